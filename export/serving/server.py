"""The application on one machine: uvicorn, with bounds on slow and oversized requests and a shutdown that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import json
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn

from ..errors import UsageError
from .connection import KEEP_ALIVE, Connection, ConnectionLimits

if TYPE_CHECKING:
    from .edge import Application


OPEN_FILES = 65_536

log = logging.getLogger("resnet_export.serving")


@dataclass(frozen=True)
class ServerOptions:
    """Where and how the server listens.

    Args:
        host, port: Address; port 0 takes a free one.
        grace: Seconds for which a shutdown waits for what is in flight.
        head_timeout: Time in which the head of a request must arrive, and in which a client must take a piece of its answer, in
            seconds.
        max_connections_per_address: Largest number of connections from one client address. By default half the number of files
            that the server may open, so that no single address can take all of them.
        shutdown_delay: Time for which the server still accepts requests after a signal to stop, while it reports that it is not
            ready, in seconds.
        uds: Path of a Unix socket to listen on instead of an address.
        reuse_port: Share the port with other processes that do so too.
        access_log: One line per request on standard error.
        tls: The `ssl_…` options of uvicorn.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grace: float = 60.0
    head_timeout: float = 30.0
    max_connections_per_address: int | None = None
    shutdown_delay: float = 0.0
    uds: str | None = None
    reuse_port: bool = False
    access_log: bool = False
    tls: tuple = ()


@contextlib.contextmanager
def bind(options: ServerOptions, flag: str = "--port") -> Iterator[socket.socket]:
    """Bind a socket to the address, without listening yet, and close it at the end.

    Args:
        options: `ServerOptions`.
        flag: The option that chose the port, for the error message.

    Yields:
        The socket.

    Raises:
        UsageError: The address is taken, not ours, or unknown.
    """
    if options.uds:
        with _bind_unix(options.uds) as bound:
            try:
                yield bound
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(options.uds)
        return
    with contextlib.ExitStack() as stack:
        try:
            family, kind, proto, _, address = socket.getaddrinfo(
                options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            bound = stack.enter_context(socket.socket(family, kind, proto))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if options.reuse_port:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(address)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(
                f"cannot listen on {options.host}:{options.port}: {reason}; choose another --host or {flag}"
            ) from error
        yield bound


def _bind_unix(path: str) -> socket.socket:
    """Bind a Unix socket; one that an earlier server left behind is replaced."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(path) != 0:
                    os.unlink(path)
    except FileNotFoundError:
        pass
    bound = socket.socket(socket.AF_UNIX)
    try:
        bound.bind(path)
    except OSError as error:
        bound.close()
        raise UsageError(f"cannot listen on {path}: {error.strerror or error}; choose another --uds") from error
    return bound


def url_of(bound: socket.socket, tls: bool = False) -> str:
    """Return the address of a bound socket, as a URL."""
    if bound.family == getattr(socket, "AF_UNIX", None):
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    host = f"[{host}]" if bound.family == socket.AF_INET6 else host
    return f"{'https' if tls else 'http'}://{host}:{port}"


def configure(app: Application, options: ServerOptions) -> uvicorn.Config:
    """uvicorn's configuration, checked before anything listens.

    Args:
        app: ASGI application.
        options: `ServerOptions`.

    Raises:
        UsageError: The TLS files cannot be used.
    """
    files = allow_connections()
    per_address = options.max_connections_per_address or (files // 2 if files else None)
    limits = ConnectionLimits(options.head_timeout, options.head_timeout, per_address)
    config = uvicorn.Config(
        app,
        http=functools.partial(Connection, limits=limits),  # type: ignore[arg-type]  # uvicorn calls it like a class
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        backlog=4096,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=max(1, round(options.grace)),
        server_header=False,
        **dict(options.tls),
    )
    try:
        config.load()
    except OSError as error:
        raise UsageError(f"the TLS certificate or key cannot be used: {error}") from error
    return config


@dataclass(frozen=True)
class Hooks:
    """What the server calls when it gets signals.

    Args:
        drain: Called when it has been asked to stop, before it closes its listener.
        reload: Called on SIGHUP, after the certificates have been read again.
        delay: Seconds between `drain` and the end of the listener.
    """

    drain: Callable[[], None] = lambda: None
    reload: Callable[[], None] = lambda: None
    delay: float = 0.0


def run(
    config: uvicorn.Config,
    bound: socket.socket,
    hooks: Hooks | None = None,
    metrics: tuple[Application, socket.socket] | None = None,
    companions: Sequence[Any] = (),
) -> int | None:
    """Serve until SIGTERM or SIGINT: report not ready, stop accepting, finish what is in flight, return.

    Args:
        config: What `configure` returned.
        bound: What `bind` yielded.
        hooks: `Hooks`.
        metrics: `(application, bound socket)` of a second listener, for metrics.
        companions: Other servers on the event loop, started and stopped by the application. Their `begin_stop` is called when
            this one stops accepting, and their `cut` when it is told not to wait any longer.

    Returns:
        The signal that ended it.
    """
    server = _Server(config, hooks or Hooks())
    server.companions = companions

    async def serve() -> None:
        side = asyncio.create_task(_serve_beside(*metrics)) if metrics else None
        try:
            await server.serve(sockets=[bound])
        finally:
            if side:
                side.cancel()
                await asyncio.wait([side])

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(serve())
    return server.ended_by


async def _serve_beside(app: Application, bound: socket.socket) -> None:
    """Serve an application on a second socket, without signal handlers or a lifespan of its own."""
    side = _SideServer(uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False))
    await side.serve(sockets=[bound])


def allow_connections() -> int | None:
    """Allow as many open files as the system permits: every connection is one, and shells often allow no more than 256 or 1024.

    Returns:
        The number of files that may be open, or None where there is no limit.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Some systems have a further limit that they do not tell.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def log_to_stderr(access_log: bool = False, as_json: bool = False) -> None:
    """Send the server's log to standard error; a full disk does not stop the server.

    Args:
        access_log: Whether to write a line per request.
        as_json: Write JSON lines.
    """
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    levels = {"resnet_export.serving": logging.INFO, "uvicorn.error": logging.WARNING}
    levels["resnet_export.access"] = logging.INFO if access_log else logging.CRITICAL
    for name, level in levels.items():
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(level)


class _JsonLines(logging.Formatter):
    """Log records as JSON objects; the fields of an access record follow the usual ones."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name}
        fields = getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line | fields)


class _SideServer(uvicorn.Server):
    """uvicorn's server, which leaves signals to the main one."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal ends it with a return instead of being raised again: a clean stop exits with 0.

    Args:
        config: The configuration of uvicorn.
        hooks: `Hooks`.
    """

    ended_by: int | None = None
    companions: Sequence[Any] = ()

    def __init__(self, config: uvicorn.Config, hooks: Hooks) -> None:
        super().__init__(config)
        self._hooks = hooks

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for companion in self.companions:
            companion.begin_stop()
        impatient = asyncio.create_task(self._cut_when_forced())
        try:
            await super().shutdown(sockets)
        finally:
            impatient.cancel()

    async def _cut_when_forced(self):
        while not self.force_exit:
            await asyncio.sleep(0.1)
        for companion in self.companions:
            companion.cut()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        wanted = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop}
        if hasattr(signal, "SIGHUP"):
            wanted[signal.SIGHUP] = self._reload
        self._loop = asyncio.get_running_loop()
        old = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _stop(self, number, frame):
        first, self.ended_by = self.ended_by is None, self.ended_by or number
        self._hooks.drain()
        if first and self._hooks.delay:
            self._loop.call_soon_threadsafe(self._loop.call_later, self._hooks.delay, self.handle_exit, number, frame)
        else:
            # A second signal ends the delay.
            self.handle_exit(number, frame)

    def _reload(self, number, frame):
        self._loop.call_soon_threadsafe(self._read_again)

    def _read_again(self):
        try:
            if self.config.ssl:
                self.config.ssl.load_cert_chain(self.config.ssl_certfile, self.config.ssl_keyfile)
            self._hooks.reload()
            log.info("API keys and certificates were reloaded")
        except (OSError, UsageError) as error:
            log.error("API keys and certificates were not reloaded: %s", error)
