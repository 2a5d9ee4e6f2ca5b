"""The gRPC server: where it listens, and how it starts and stops together with the HTTP server.

It runs on the event loop that the HTTP server runs on, so that a slow client costs no thread.
"""

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc

from ..errors import UsageError
from .grpc_calls import Calls
from .grpc_core import CoreServer
from .service import Service

STREAMS_PER_CONNECTION = 1024
MAX_CALLS = 16_384
CHANNEL_OPTIONS = {
    "grpc.max_send_message_length": -1,
    "grpc.max_concurrent_streams": STREAMS_PER_CONNECTION,
    # A client that has gone without a word is noticed.
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    # Clients may look whether the server is there, too.
    "grpc.http2.min_ping_interval_without_data_ms": 5_000,
    # As long as the HTTP server keeps an idle connection; clients open another when they need one.
    "grpc.max_connection_idle_ms": 75_000,
}


@dataclass(frozen=True)
class GrpcOptions:
    """Where the gRPC server listens.

    Args:
        host: Address or host name.
        port: Port, or 0 for a free one.
        grace: Time for which a shutdown waits for calls in flight, in seconds.
        max_connections: Largest number of connections, so that those to other ports find open files left. None for no bound.
        certificate: Path of the TLS certificate, or None to serve without TLS.
        key: Path of the certificate's private key; None if the certificate's file holds it.
        reuse_port: Share the port with other processes that do so too.
    """

    host: str = "127.0.0.1"
    port: int = 8001
    grace: float = 60.0
    max_connections: int | None = None
    certificate: str | None = None
    key: str | None = None
    reuse_port: bool = False


class GrpcServer:
    """Answers gRPC calls.

    Args:
        service: The request path, shared with the HTTP front end.
        options: `GrpcOptions`.

    Raises:
        UsageError: The TLS files cannot be read.
    """

    def __init__(self, service: Service, options: GrpcOptions) -> None:
        self.service, self.options = service, options
        self.port = options.port
        self.failure: UsageError | None = None
        self._calls = Calls(service, self._hang_up)
        self._server: Any = None
        self._stopping: asyncio.Future | None = None
        self._cutting: asyncio.Future | None = None
        self._certificates = _certificates(options)

    @property
    def target(self) -> str:
        """The address as clients write it: `HOST:PORT`."""
        host = self.options.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    async def start(self) -> None:
        """Listen and answer, on the event loop that runs now.

        Raises:
            UsageError: The address cannot be listened on.
        """
        options = CHANNEL_OPTIONS | {
            "grpc.max_receive_message_length": self.service.options.max_body,
            # By default any second server could listen on the same port, and each would get some of the connections.
            "grpc.so_reuseport": int(self.options.reuse_port),
            "grpc.server_handshake_timeout_ms": round(1000 * self.service.options.body_timeout),
        }
        if self.options.max_connections:
            options["grpc.max_allowed_incoming_connections"] = self.options.max_connections
        certificates, credentials = self._certificates, None
        if certificates:
            credentials = grpc.dynamic_ssl_server_credentials(certificates, lambda: self._certificates)
        self._server = CoreServer(self._calls.find, options, MAX_CALLS)
        port = self._server.listen(self.target, credentials)
        if not port:
            raise UsageError(f"cannot listen on {self.target} for gRPC; choose another --host or --grpc-port")
        self.port = port
        self._server.start()

    def begin_stop(self) -> None:
        """Take no more calls from now on, and end streams; `stop` waits for what is in flight."""
        self._stopping = self._stopping or asyncio.ensure_future(self._stop())

    def cut(self) -> None:
        """End all calls now instead of waiting for them."""
        self._cutting = asyncio.ensure_future(self._server.stop(None))

    async def stop(self) -> None:
        """Take no more calls, finish those in flight for at most `grace` seconds, and return."""
        self.begin_stop()
        await self._stopping

    async def _stop(self) -> None:
        # A stream may stay open for ever.
        self._calls.end_streams()
        await self._server.stop(self.options.grace)

    def reload_certificate(self) -> None:
        """Read the TLS files again; connections made from now on use them.

        Raises:
            UsageError: They cannot be read.
        """
        self._certificates = _certificates(self.options)

    def _hang_up(self, peer: str) -> None:
        close_connection(peer, self.port)


def attach(app: Any, server: GrpcServer) -> None:
    """Have an application start a gRPC server with itself, and stop it before it lets go of its models.

    Args:
        app: What `create_app` returned.
        server: The server. If it does not start, its `failure` says why.
    """
    lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def both(app: Any) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            try:
                await server.start()
            except UsageError as error:
                server.failure = error
                raise
            try:
                yield state
            finally:
                await server.stop()

    app.router.lifespan_context = both


def _certificates(options: GrpcOptions) -> Any:
    if not options.certificate:
        return None
    try:
        with open(options.certificate, "rb") as certificate, open(options.key or options.certificate, "rb") as key:
            return grpc.ssl_server_certificate_configuration([(key.read(), certificate.read())])
    except OSError as error:
        raise UsageError(f"the TLS certificate or key cannot be used: {error}") from error


def close_connection(peer: str, port: int) -> None:
    """Close the connection of a client to one of this process's ports.

    The library's server has no way to end a call whose client does not read the answer, and keeps the answer as long.

    Args:
        peer: The client's address as gRPC names it, e.g. `ipv4:127.0.0.1:40000`.
        port: The local port.
    """
    host, _, number = unquote(peer).partition(":")[2].rpartition(":")
    wanted = (host.strip("[]"), int(number))
    # Windows has no such folder: there, the client is gone when it likes.
    names = os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else []
    for name in names:
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.getsockname()[1] != port:
                    continue
                host, number = connection.getpeername()[:2]
                if (host.removeprefix("::ffff:"), number) == wanted:
                    connection.shutdown(socket.SHUT_RDWR)
