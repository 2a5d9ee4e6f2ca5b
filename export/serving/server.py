"""The application on one machine: uvicorn, with bounds on slow and oversized requests and a shutdown that loses nothing."""

import asyncio
import contextlib
import functools
import json
import logging
import signal
import socket
from dataclasses import dataclass

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ..errors import UsageError

HEAD_BYTES = 64 * 1024
KEEP_ALIVE = 75
OPEN_FILES = 65_536


@dataclass(frozen=True)
class ServerOptions:
    """Where and how the server listens.

    Args:
        host, port: address; port 0 takes a free one.
        grace: seconds for which a shutdown waits for what is in flight.
        head_timeout: seconds in which the head of a request must come.
        access_log: one line per request on standard error.
        tls: uvicorn's `ssl_…` options.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grace: float = 60.0
    head_timeout: float = 30.0
    access_log: bool = False
    tls: tuple = ()


def bind(options):
    """A socket bound to the address, not yet listening.

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
        raise UsageError(f"cannot listen on {options.host}:{options.port}: {reason}; choose another --host or --port") from error
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
    config = uvicorn.Config(
        app,
        http=functools.partial(_Connection, head_timeout=options.head_timeout),
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


def run(config, bound):
    """Serve until SIGTERM or SIGINT: stop accepting, finish what is in flight, return.

    Args:
        config: what `configure` returned.
        bound: what `bind` returned.

    Returns:
        the signal that ended it.
    """
    _allow_connections()
    server = _Server(config)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[bound]))
    return server.ended_by


def _allow_connections():
    """Every connection is an open file, and shells often allow no more than 256 or 1024: take what the system would give."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Some systems have a further limit that they do not tell.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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


class _Connection(AutoHTTPProtocol):
    """A connection that must send the head of its request in time and in bounds; refusals are JSON like all others."""

    def __init__(self, *args, head_timeout, **kwargs):
        super().__init__(*args, **kwargs)
        self._head_timeout, self._deadline, self._head = head_timeout, None, 0

    def connection_made(self, transport):
        super().connection_made(transport)
        # Clients may open connections ahead; a head that has begun is another matter.
        self._watch(KEEP_ALIVE)

    def connection_lost(self, exc):
        super().connection_lost(exc)
        self._unwatch()

    def data_received(self, data):
        super().data_received(data)
        if not self._in_head():
            self._unwatch()
            self._head = 0
            return
        if not self._head:
            self._watch(self._head_timeout)
        self._head += len(data)
        if self._head > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the head of the request has more than {HEAD_BYTES:,} bytes")

    def send_400_response(self, msg):
        body = json.dumps({"error": msg}).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _in_head(self):
        # After an early refusal the rest of the body still comes, and is passed over.
        return self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body)

    def _watch(self, seconds):
        self._unwatch()
        self._deadline = self.loop.call_later(seconds, self._expire)

    def _unwatch(self):
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self):
        self._deadline = None
        if self._in_head() and not self.transport.is_closing():
            self.transport.close()
