"""The application on one machine: uvicorn, with bounds on slow and oversized requests and a shutdown that loses nothing."""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
from dataclasses import dataclass

import uvicorn

from ..errors import UsageError
from .connection import KEEP_ALIVE, Connection, ConnectionLimits

OPEN_FILES = 65_536


@dataclass(frozen=True)
class ServerOptions:
    """Where and how the server listens.

    Args:
        host, port: address; port 0 takes a free one.
        grace: seconds for which a shutdown waits for what is in flight.
        head_timeout: Time in which the head of a request must arrive, and in which a client must take a piece of its answer, in
            seconds.
        max_connections_per_address: Largest number of connections from one client address. By default half the number of files
            that the server may open, so that no single address can take all of them.
        access_log: one line per request on standard error.
        tls: uvicorn's `ssl_…` options.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grace: float = 60.0
    head_timeout: float = 30.0
    max_connections_per_address: int | None = None
    access_log: bool = False
    tls: tuple = ()


def bind(options, flag="--port"):
    """A socket bound to the address, not yet listening.

    Args:
        options: `ServerOptions`.
        flag: The option that chose the port, for the error message.

    Raises:
        UsageError: the address is taken, not ours, or unknown.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"cannot listen on {options.host}:{options.port}: {reason}; choose another --host or {flag}") from error
    return bound


def url_of(bound, tls=False):
    """The address of a bound socket, as a URL."""
    host, port = bound.getsockname()[:2]
    host = f"[{host}]" if bound.family == socket.AF_INET6 else host
    return f"{'https' if tls else 'http'}://{host}:{port}"


def configure(app, options):
    """uvicorn's configuration, checked before anything listens.

    Args:
        app: ASGI application.
        options: `ServerOptions`.

    Raises:
        UsageError: the TLS files cannot be used.
    """
    files = allow_connections()
    per_address = options.max_connections_per_address or (files // 2 if files else None)
    limits = ConnectionLimits(options.head_timeout, options.head_timeout, per_address)
    config = uvicorn.Config(
        app,
        http=functools.partial(Connection, limits=limits),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=options.access_log,
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


def run(config, bound, companions=()):
    """Serve until SIGTERM or SIGINT: stop accepting, finish what is in flight, return.

    Args:
        config: what `configure` returned.
        bound: what `bind` returned.
        companions: Other servers on the event loop, started and stopped by the application. Their `begin_stop` is called when
            this one stops accepting, and their `cut` when it is told not to wait any longer.

    Returns:
        the signal that ended it.
    """
    server = _Server(config)
    server.companions = companions
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[bound]))
    return server.ended_by


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


def log_to_stderr(access_log=False):
    """Send the server's log to standard error; a full disk behind it is no reason to stop serving."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    names = ["resnet_export.serving", "uvicorn.error"] + (["uvicorn.access"] if access_log else [])
    for name in names:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO if name != "uvicorn.error" else logging.WARNING)


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal ends it with a return instead of being raised again: a clean stop exits with 0."""

    ended_by = None
    companions = ()

    async def shutdown(self, sockets=None):
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
    def capture_signals(self):
        old = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _stop(self, number, frame):
        self.ended_by = self.ended_by or number
        self.handle_exit(number, frame)
