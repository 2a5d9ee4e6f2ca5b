"""The gRPC front end: Triton's inference service and gRPC's health service over a `Service`, next to the HTTP server.

It runs on the event loop that the HTTP server runs on. A pool of threads was measured as well: the two do not differ in
throughput, and here a slow client costs no thread.

Neither grpcio nor the generated messages have types: calls ("contexts") and messages are `Any`.
"""

import asyncio
import contextlib
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

# The C++ library has its own log, in its own format, on standard error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Histogram

from ..errors import UsageError
from . import grpc_codec as codec
from .batcher import DeadlineExceeded
from .codec import INLINE_BYTES
from .grpc_messages import METHODS, STREAM_METHOD, TRITON_SERVICE
from .protocol import InferRequest, ProtocolError
from .service import EXTENSIONS, NAME, Admission, Service
from .statistics import BUCKETS
from .triton import served_config

log = logging.getLogger("resnet_export.serving")
access_log = logging.getLogger("resnet_export.access")

# Requests of one stream that are being answered at a time; further ones wait in the connection.
STREAM_WINDOW = 256
STREAMS_PER_CONNECTION = 1024
MAX_CALLS = 16_384
# Largest message of calls that carry no tensors.
MAX_CONTROL_BYTES = 64 * 1024
# An error travels in a header, whose size clients bound.
MAX_DETAILS = 1000
PUBLIC = {"ServerLive", "ServerReady", "Check"}
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
CHANNEL_OPTIONS = {
    "grpc.max_send_message_length": -1,
    "grpc.max_concurrent_streams": STREAMS_PER_CONNECTION,
    # Otherwise a second server can listen on the same port, and each gets some of the connections.
    "grpc.so_reuseport": 0,
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
    """

    host: str = "127.0.0.1"
    port: int = 8001
    grace: float = 60.0
    max_connections: int | None = None
    certificate: str | None = None
    key: str | None = None


@dataclass(frozen=True)
class _Outcome:
    """How a call ended, for the counts and the log."""

    code: grpc.StatusCode
    reason: str
    sent: int = 0


@dataclass(eq=False)
class _Held:
    """One request.

    Args:
        admission: The memory that it and its answer are accounted with.
        request_id: The request's id, as soon as it is known.
        task: What answers it, if it is one of a stream.
    """

    admission: Admission
    request_id: str = ""
    task: asyncio.Task | None = None

    def release(self) -> None:
        """Account for nothing any longer: the client has taken the answer, or will not get one."""
        self.admission.settle(0)


class GrpcServer:
    """Answers gRPC calls.

    Args:
        service: The request path, shared with the HTTP front end.
        options: `GrpcOptions`.

    Raises:
        UsageError: The TLS files cannot be read.
    """

    def __init__(self, service: Service, options: GrpcOptions):
        self.service, self.options = service, options
        self.port = options.port
        self.failure: UsageError | None = None
        self._server: Any = None
        self._readers: set[asyncio.Task] = set()
        self._stopping: asyncio.Future | None = None
        self._cutting: asyncio.Future | None = None
        # The names that other gRPC servers use, so that their dashboards work.
        registry = service.requests.registry
        labels = ("grpc_method", "grpc_code", "reason")
        self._calls = Counter("grpc_server_handled", "gRPC calls by status", labels, registry=registry)
        self._counters: dict[tuple[str, str, str], tuple[Any, Any]] = {}
        self._seconds = Histogram(
            "grpc_server_handling_seconds", "From a call to its answer", ("grpc_method",), buckets=BUCKETS, registry=registry
        )
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
            "grpc.server_handshake_timeout_ms": round(1000 * self.service.options.body_timeout),
        }
        if self.options.max_connections:
            options["grpc.max_allowed_incoming_connections"] = self.options.max_connections
        self._server = grpc.aio.server(
            handlers=[_Router(self)], options=tuple(options.items()), maximum_concurrent_rpcs=MAX_CALLS
        )
        try:
            if self._certificates:
                credentials = grpc.dynamic_ssl_server_credentials(self._certificates, lambda: self._certificates)
                self.port = self._server.add_secure_port(self.target, credentials)
            else:
                self.port = self._server.add_insecure_port(self.target)
        except RuntimeError as error:
            raise UsageError(f"cannot listen on {self.target} for gRPC; choose another --host or --grpc-port") from error
        await self._server.start()

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
        # A stream may stay open for ever. It ends when its requests so far have been answered.
        for reader in list(self._readers):
            reader.cancel()
        await self._server.stop(self.options.grace)

    def reload_certificate(self) -> None:
        """Read the TLS files again; connections made from now on use them.

        Raises:
            UsageError: They cannot be read.
        """
        self._certificates = _certificates(self.options)

    # How calls are received and answered.

    async def answer(self, name: str, context: Any, respond: Callable[[Any], Awaitable[bytes | None]]) -> bytes | None:
        """Answer one call: check its key, turn errors into a status, count and log it.

        Args:
            name: The method's name, for the log.
            context: The call.
            respond: Coroutine function that reads the request from the context and returns the encoded answer.
        """
        started = time.perf_counter()
        outcome = _Outcome(grpc.StatusCode.CANCELLED, "client_gone")
        try:
            if name not in PUBLIC and not self.service.keys.accept(_metadata(context, "authorization").encode()):
                raise ProtocolError("an API key is needed: metadata `authorization` with `Bearer KEY`", 401)
            encoded = await respond(context)
            outcome = _Outcome(grpc.StatusCode.OK, "ok", len(encoded or b""))
            return encoded
        except ProtocolError as error:
            outcome = _Outcome(_code(error), error.reason)
            if error.status == 500:
                log.error("gRPC %s: %s", name, error)
            await context.abort(outcome.code, str(error)[:MAX_DETAILS], _retry(error))
        except grpc.aio.BaseError:
            # The call has been ended already.
            raise
        except Exception as error:
            outcome = _Outcome(grpc.StatusCode.INTERNAL, "internal_error")
            log.exception("gRPC %s: internal error", name)
            await context.abort(outcome.code, f"internal error ({type(error).__name__})")
        finally:
            self._record(name, context, outcome, time.perf_counter() - started)

    def _record(self, name: str, context: Any, outcome: _Outcome, seconds: float) -> None:
        counted = (name, outcome.code.name, outcome.reason)
        if counted not in self._counters:
            self._counters[counted] = (self._calls.labels(*counted), self._seconds.labels(name))
        calls, durations = self._counters[counted]
        calls.inc()
        durations.observe(seconds)
        if access_log.isEnabledFor(logging.INFO):
            fields = {"client": unquote(context.peer()), "method": "gRPC", "path": name, "status": outcome.code.name}
            fields |= {"reason": outcome.reason, "bytes_sent": outcome.sent, "milliseconds": round(1000 * seconds, 3)}
            text = '{client} "{method} {path}" {status} {reason} {bytes_sent} B {milliseconds} ms'.format(**fields)
            access_log.info("%s", text, extra={"fields": fields})

    async def _read(self, context: Any, held: _Held) -> bytes:
        """The call's only request message, which must arrive in time."""
        try:
            async with asyncio.timeout(self.service.options.body_timeout):
                message = await context.read()
        except TimeoutError as error:
            raise ProtocolError(f"the request did not arrive within {self.service.options.body_timeout:g} s", 408) from error
        if message is grpc.aio.EOF:
            raise ProtocolError("the call has no request message")
        held.admission.take(len(message))
        return message

    def _watch(self, context: Any, held: _Held) -> None:
        """Once the answer is being sent: give the client so much time to take it, then account for it no longer."""
        late = asyncio.get_running_loop().call_later(self.service.options.body_timeout, self._hang_up, context)

        def done(_: Any) -> None:
            late.cancel()
            held.release()

        context.add_done_callback(done)

    def _hang_up(self, context: Any) -> None:
        peer = context.peer()
        log.warning("gRPC: %s does not take its answer; its connection is closed", peer)
        asyncio.get_running_loop().run_in_executor(None, close_connection, peer, self.port)

    # Calls.

    async def infer(self, context: Any) -> bytes:
        """ModelInfer."""
        held = _Held(Admission(self.service))
        try:
            return await self._inferred(await self._read(context, held), held)
        finally:
            self._watch(context, held)

    async def _inferred(self, message: bytes, held: _Held, streamed: bool = False) -> bytes:
        """The encoded answer to an encoded request. No caller keeps the request, which may be large."""
        rest, raw = codec.split(message)
        del message
        name, version, asked = await self._decoded(rest, raw, held)
        with self.service.hold(name, version) as model:
            tensors = await self.service.infer(model, asked, held.admission)
        source, identifier = model.source, asked.id
        # From here on only the answer is in memory.
        del rest, raw, asked, model
        arguments = (source.name, source.version, tensors, identifier, streamed)
        if any(array.dtype.kind == "O" or array.nbytes > INLINE_BYTES for _, array, _ in tensors):
            encoded = await self.service.codec.in_thread(codec.encode_response, *arguments)
        else:
            encoded = codec.encode_response(*arguments)
        held.admission.settle(len(encoded))
        return encoded

    async def _decoded(self, rest: bytes, raw: list[memoryview], held: _Held) -> tuple[str, str | None, InferRequest]:
        admission, in_thread = held.admission, self.service.codec.in_thread
        taken = codec.parsed_size(rest)
        admission.take(taken)
        parsed = await in_thread(codec.parse, rest) if taken else codec.parse(rest)
        held.request_id = parsed.id
        strings = codec.strings_size(parsed, raw)
        admission.take(strings)
        decoded = codec.decode_request(parsed, raw) if not taken + strings else await in_thread(codec.decode_request, parsed, raw)
        admission.take(-taken)
        if not raw:
            admission.take(sum(array.nbytes for array in decoded[2].inputs.values()))
        return decoded

    async def stream(self, context: Any) -> None:
        """ModelStreamInfer: requests are answered in their order, but run together."""
        answers: asyncio.Queue[_Held | None] = asyncio.Queue()
        window = asyncio.Semaphore(STREAM_WINDOW)
        reader = asyncio.create_task(self._read_stream(context, answers, window))
        self._readers.add(reader)
        ends_with_status = _metadata(context, "triton_grpc_error").lower() == "true"
        held = None
        try:
            while held := await answers.get():
                await self._write(context, await self._streamed_answer(held, ends_with_status))
                held.release()
                window.release()
            await asyncio.wait({reader})
        finally:
            self._readers.discard(reader)
            reader.cancel()
            for left in [held, *(answers.get_nowait() for _ in range(answers.qsize()))]:
                if left:
                    left.task.cancel()
                    left.release()
        if reader.cancelled():
            raise ProtocolError("the server is shutting down", 503)
        reader.result()

    async def _read_stream(self, context: Any, answers: asyncio.Queue, window: asyncio.Semaphore) -> None:
        try:
            while True:
                await window.acquire()
                message = await context.read()
                if message is grpc.aio.EOF:
                    return
                held = _Held(Admission(self.service))
                held.task = asyncio.create_task(self._streamed(message, held))
                answers.put_nowait(held)
                del message, held
        finally:
            answers.put_nowait(None)

    async def _streamed(self, message: bytes, held: _Held) -> tuple[bytes, ProtocolError | None]:
        """The answer to one request of a stream, and the error if it is one."""
        try:
            held.admission.take(len(message))
            work = self._inferred(message, held, streamed=True)
            del message
            return await work, None
        except ProtocolError as error:
            failure = error
        except Exception as error:
            log.exception("gRPC ModelStreamInfer: internal error")
            failure = ProtocolError(f"internal error ({type(error).__name__})", 500)
        return codec.encode_stream_error(str(failure)[:MAX_DETAILS], held.request_id), failure

    async def _streamed_answer(self, held: _Held, ends_with_status: bool) -> bytes:
        encoded, error = await held.task
        if error and ends_with_status:
            raise error
        return encoded

    async def _write(self, context: Any, message: bytes) -> None:
        try:
            async with asyncio.timeout(self.service.options.body_timeout):
                await context.write(message)
        except TimeoutError as error:
            self._hang_up(context)
            raise ProtocolError("the client does not take its answers", 408) from error

    async def server_live(self, asked: Any) -> dict[str, Any]:
        """Whether the server is there: it is."""
        return {"live": True}

    async def server_ready(self, asked: Any) -> dict[str, Any]:
        """Whether all models are ready."""
        return {"ready": self.service.ready}

    async def check(self, asked: Any) -> dict[str, Any]:
        """The standard health check, as Kubernetes' gRPC probes use it."""
        if asked.service not in ("", TRITON_SERVICE):
            raise ProtocolError(f"there is no service {asked.service[:80]!r}; there is {TRITON_SERVICE}", 404)
        return {"status": "SERVING" if self.service.ready else "NOT_SERVING"}

    async def server_metadata(self, asked: Any) -> dict[str, Any]:
        """Name, version and extensions."""
        return {"name": NAME, "version": self.service.version, "extensions": list(EXTENSIONS)}

    async def model_ready(self, asked: Any) -> dict[str, Any]:
        """Whether a model is ready; one that does not exist is not, as in Triton."""
        try:
            self.service.find(asked.name, asked.version or None)
        except ProtocolError:
            return {"ready": False}
        return {"ready": True}

    async def model_metadata(self, asked: Any) -> dict[str, Any]:
        """A model's inputs, outputs and versions."""
        model = self.service.find(asked.name, asked.version or None)
        return model.metadata(self.service.repository.versions(model.source.name))

    async def model_config(self, asked: Any) -> dict[str, Any]:
        """A model's configuration, in Triton's terms."""
        return {"config": served_config(self.service.find(asked.name, asked.version or None))}

    async def model_statistics(self, asked: Any) -> dict[str, Any]:
        """What one model or all have done."""
        return {"model_stats": self.service.statistics(asked.name or None, asked.version or None)}

    async def repository_index(self, asked: Any) -> dict[str, Any]:
        """Names, versions and states of all models, or of those that are ready."""
        index = self.service.repository.index()
        return {"models": [entry for entry in index if entry["state"] == "READY" or not asked.ready]}

    async def repository_model_load(self, asked: Any) -> dict[str, Any]:
        """Load a model that is in the repository."""
        await self.service.load(asked.model_name, dict(asked.parameters))
        return {}

    async def repository_model_unload(self, asked: Any) -> dict[str, Any]:
        """Unload a model."""
        await self.service.unload(asked.model_name)
        return {}

    async def control(self, context: Any, method: Any, respond: Callable[[Any], Awaitable[dict[str, Any]]]) -> bytes:
        """Answer a call that carries no tensors, whose answer is the HTTP front end's JSON as a message."""
        held = _Held(Admission(self.service))
        try:
            message = await self._read(context, held)
            if len(message) > MAX_CONTROL_BYTES:
                raise ProtocolError(
                    f"the message has {len(message):,} bytes; {method.name} takes at most {MAX_CONTROL_BYTES:,}", 413
                )
            try:
                asked = method.request.FromString(message)
            except DecodeError as error:
                raise ProtocolError(f"the message is not a valid {method.request.DESCRIPTOR.name}") from error
            return json_format.ParseDict(await respond(asked), method.response()).SerializeToString()
        finally:
            self._watch(context, held)


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


class _Router(grpc.GenericRpcHandler):
    """Finds the handler of a method.

    Every handler takes a stream of encoded messages, although most methods have only one: so the handler, not the library,
    decides how long to wait for it.
    """

    def __init__(self, server: GrpcServer):
        self._handlers = {path: _unary(server, method) for path, method in METHODS.items()}
        self._handlers[STREAM_METHOD] = _handler(server, "ModelStreamInfer", server.stream, grpc.stream_stream_rpc_method_handler)
        self._unknown = grpc.stream_unary_rpc_method_handler(_refuse_method)

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler:
        """Return the handler of the call's method."""
        return self._handlers.get(handler_call_details.method, self._unknown)


def _unary(server: GrpcServer, method: Any) -> grpc.RpcMethodHandler:
    if method.name == "ModelInfer":
        return _handler(server, method.name, server.infer)
    respond = getattr(server, _snake(method.name))

    async def control(context: Any) -> bytes:
        return await server.control(context, method, respond)

    return _handler(server, method.name, control)


def _handler(
    server: GrpcServer,
    name: str,
    respond: Callable[[Any], Awaitable[Any]],
    kind: Callable[..., grpc.RpcMethodHandler] = grpc.stream_unary_rpc_method_handler,
) -> grpc.RpcMethodHandler:
    async def call(messages: Any, context: Any) -> bytes | None:
        return await server.answer(name, context, respond)

    return kind(call)


async def _refuse_method(messages: Any, context: Any) -> None:
    reason = "this server has no such method; shared memory, tracing and log settings of Triton are not supported"
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, reason)


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).removeprefix("_")


def _metadata(context: Any, name: str) -> str:
    return next((value for key, value in context.invocation_metadata() or () if key == name), "")


def _code(error: ProtocolError) -> grpc.StatusCode:
    """The status of an error. HTTP has one status for a server that is busy and a time that is over, gRPC has two."""
    if isinstance(error.__cause__, DeadlineExceeded):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return CODES.get(error.status, grpc.StatusCode.INTERNAL if error.status >= 500 else grpc.StatusCode.INVALID_ARGUMENT)


def _retry(error: ProtocolError) -> tuple[tuple[str, str], ...]:
    """What `Retry-After` is in gRPC: clients with a retry policy wait so long."""
    seconds = error.headers.get("Retry-After")
    return (("grpc-retry-pushback-ms", str(1000 * int(seconds))),) if seconds else ()


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

    The library's server has no way to end a call whose client does not take the answer, and keeps the answer as long.

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
