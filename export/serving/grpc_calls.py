"""Answering gRPC calls: Triton's inference service and gRPC's health service over a `Service`.

Calls arrive as streams of encoded messages, although most methods have only one message: so this module, not the library, decides
how long to wait for it. Generated messages have no types: they are `Any`.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

# The C++ library has its own log, in its own format, on standard error.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Histogram

from . import grpc_codec
from .batcher import DeadlineExceeded
from .codec import INLINE_BYTES
from .grpc_core import Call, ClientGone, Handler, Refused
from .grpc_messages import HEALTH_METHOD, METHODS, STREAM_METHOD, TRITON_SERVICE, Method
from .protocol import InferRequest, ProtocolError
from .service import EXTENSIONS, NAME, Admission, Service
from .statistics import BUCKETS
from .triton import served_config

log = logging.getLogger("resnet_export.serving")
access_log = logging.getLogger("resnet_export.access")

# Requests of one stream that are being answered at a time; further ones wait in the connection.
STREAM_WINDOW = 256
# Largest message of calls that carry no tensors.
MAX_CONTROL_BYTES = 64 * 1024
# An error travels in a header, whose size clients bound.
MAX_DETAILS = 1000
PUBLIC = {f"/{TRITON_SERVICE}/ServerLive", f"/{TRITON_SERVICE}/ServerReady", HEALTH_METHOD}
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
        """Release the memory that this call accounts for: the client has the answer, or will not get one."""
        self.admission.settle(0)


class Calls:
    """Answers calls.

    Args:
        service: The request path, shared with the HTTP front end.
        hang_up: Function that closes the connection of a client, given its address as gRPC names it.
    """

    def __init__(self, service: Service, hang_up: Callable[[str], None]) -> None:
        self._service, self._close = service, hang_up
        self._readers: set[asyncio.Task] = set()
        # Name and version.
        self._last_asked: tuple[str, str | None] = "", None
        self._counts = _Counts(service)
        questions = _Questions(service)
        self._methods: dict[str, Handler] = {
            path: self._infer if method.name == "ModelInfer" else self._asking(method, getattr(questions, _snake(method.name)))
            for path, method in METHODS.items()
        }
        self._methods[STREAM_METHOD] = self._stream

    def find(self, path: str) -> Handler:
        """Return the handler of a method."""
        return self._answer if path in self._methods else _refuse_method

    def end_streams(self) -> None:
        """Have all streams end once the requests that they have sent so far have been answered."""
        for reader in list(self._readers):
            reader.cancel()

    def _asking(self, method: Method, respond: Callable[[Any], Awaitable[dict[str, Any]]]) -> Handler:
        async def ask(call: Call) -> bytes:
            return await self._question(call, method, respond)

        return ask

    async def _answer(self, call: Call) -> bytes | None:
        """Check the call's key, read the request and encode the answer, and turn errors into a status."""
        started = time.perf_counter()
        outcome = _Outcome(grpc.StatusCode.CANCELLED, "client_gone")
        try:
            if call.path not in PUBLIC and not self._service.keys.accept(_metadata(call, "authorization").encode()):
                raise ProtocolError("an API key is needed: metadata `authorization` with `Bearer KEY`", 401)
            encoded = await self._methods[call.path](call)
            outcome = _Outcome(grpc.StatusCode.OK, "ok", len(encoded or b""))
            return encoded
        except ProtocolError as error:
            outcome = _Outcome(_code(error), error.reason)
            if error.status == 500:
                log.error("gRPC %s: %s", call.path, error)
            raise Refused(outcome.code, str(error)[:MAX_DETAILS], _retry(error)) from None
        except ClientGone:
            raise
        except Exception as error:
            outcome = _Outcome(grpc.StatusCode.INTERNAL, "internal_error")
            log.exception("gRPC %s: internal error", call.path)
            raise Refused(outcome.code, f"internal error ({type(error).__name__})") from None
        finally:
            self._counts.add(call, outcome, time.perf_counter() - started)

    async def _read(self, call: Call, held: _Held) -> bytes:
        """The call's only request message, which must arrive in time."""
        try:
            message = await call.read(self._service.options.body_timeout)
        except TimeoutError as error:
            raise ProtocolError(f"the request did not arrive within {self._service.options.body_timeout:g} s", 408) from error
        if message is None:
            raise ProtocolError("the call has no request message")
        held.admission.take(len(message))
        return message

    def _watch(self, call: Call, held: _Held) -> None:
        """Once the answer is being sent: give the client so much time to take it, then account for it no longer."""
        late = call.loop.call_later(self._service.options.body_timeout, self._hang_up, call)

        def done(_: Any) -> None:
            late.cancel()
            held.release()

        call.add_done_callback(done)

    def _hang_up(self, call: Call) -> None:
        peer = call.peer()
        log.warning("gRPC: %s does not read its answer; the connection is closed", peer)
        call.loop.run_in_executor(None, self._close, peer)

    async def _infer(self, call: Call) -> bytes:
        """ModelInfer."""
        held = _Held(Admission(self._service))
        try:
            return await self._inferred(await self._read_request(call, held), held)
        finally:
            self._watch(call, held)

    async def _read_request(self, call: Call, held: _Held) -> bytes:
        """The request, for which others of the same model may wait, as over HTTP.

        Its model is not known before it has been read: it is most likely the one that was asked for last.
        """
        with contextlib.ExitStack() as announced:
            with contextlib.suppress(ProtocolError):
                announced.enter_context(self._service.announced(*self._last_asked))
            return await self._read(call, held)

    async def _inferred(self, message: bytes, held: _Held, streamed: bool = False) -> bytes:
        """The encoded answer to an encoded request. No caller keeps the request, which may be large."""
        rest, raw = grpc_codec.split(message)
        del message
        name, version, asked = await self._decoded(rest, raw, held)
        self._last_asked = name, version
        with self._service.hold(name, version) as model:
            model = self._service.choose(model, asked)
            tensors = await self._service.infer(model, asked, held.admission)
        source, identifier, parameters = model.source, asked.id, model.parameters
        # From here on only the answer is in memory.
        del rest, raw, asked, model
        arguments = (source.name, source.version, tensors, identifier, streamed, parameters)
        if any(array.dtype.kind == "O" or array.nbytes > INLINE_BYTES for _, array, _ in tensors):
            encoded = await self._service.codec.in_thread(grpc_codec.encode_response, *arguments)
        else:
            encoded = grpc_codec.encode_response(*arguments)
        held.admission.settle(len(encoded))
        return encoded

    async def _decoded(self, rest: bytes, raw: list[memoryview], held: _Held) -> tuple[str, str | None, InferRequest]:
        admission, in_thread = held.admission, self._service.codec.in_thread
        taken = grpc_codec.parsed_size(rest)
        admission.take(taken)
        parsed = await in_thread(grpc_codec.parse, rest) if taken else grpc_codec.parse(rest)
        held.request_id = parsed.id
        strings = grpc_codec.strings_size(parsed, raw)
        admission.take(strings)
        decoded = (
            grpc_codec.decode_request(parsed, raw)
            if not taken + strings
            else await in_thread(grpc_codec.decode_request, parsed, raw)
        )
        admission.take(-taken)
        if not raw:
            admission.take(sum(array.nbytes for array in decoded[2].inputs.values()))
        return decoded

    async def _stream(self, call: Call) -> None:
        """ModelStreamInfer: requests are answered in their order, but run together."""
        answers: asyncio.Queue[_Held | None] = asyncio.Queue()
        window = asyncio.Semaphore(STREAM_WINDOW)
        reader = asyncio.create_task(self._read_stream(call, answers, window))
        self._readers.add(reader)
        ends_with_status = _metadata(call, "triton_grpc_error").lower() == "true"
        held = None
        try:
            while held := await answers.get():
                await self._write(call, await self._streamed_answer(held, ends_with_status))
                held.release()
                window.release()
                # Not kept until the next answer, which may be hours away.
                held = None
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

    async def _read_stream(self, call: Call, answers: asyncio.Queue, window: asyncio.Semaphore) -> None:
        try:
            while True:
                await window.acquire()
                message = await call.read()
                if message is None:
                    return
                held = _Held(Admission(self._service))
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
            failure = _without_frames(error)
        except Exception as error:
            log.exception("gRPC ModelStreamInfer: internal error")
            failure = ProtocolError(f"internal error ({type(error).__name__})", 500)
        return grpc_codec.encode_stream_error(str(failure)[:MAX_DETAILS], held.request_id), failure

    async def _streamed_answer(self, held: _Held, ends_with_status: bool) -> bytes:
        encoded, error = await held.task
        if error and ends_with_status:
            raise error
        return encoded

    async def _write(self, call: Call, message: bytes) -> None:
        try:
            await call.write(message, self._service.options.body_timeout)
        except TimeoutError as error:
            self._hang_up(call)
            raise ProtocolError("the client does not read its answers", 408) from error

    async def _question(self, call: Call, method: Method, respond: Callable[[Any], Awaitable[dict[str, Any]]]) -> bytes:
        """Answer a call that carries no tensors, whose answer is the HTTP front end's JSON as a message."""
        held = _Held(Admission(self._service))
        try:
            message = await self._read(call, held)
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
            self._watch(call, held)


class _Questions:
    """Answers, from request messages, what carries no tensors: the HTTP front end's JSON, which then becomes a message."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def server_live(self, asked: Any) -> dict[str, Any]:
        """Answer that the server is live."""
        return {"live": True}

    async def server_ready(self, asked: Any) -> dict[str, Any]:
        """Return whether all models are ready."""
        return {"ready": self.service.ready}

    async def check(self, asked: Any) -> dict[str, Any]:
        """Answer the standard health check, which Kubernetes' gRPC probes use."""
        if asked.service not in ("", TRITON_SERVICE):
            raise ProtocolError(f"there is no service {asked.service[:80]!r}; there is {TRITON_SERVICE}", 404)
        return {"status": "SERVING" if self.service.ready else "NOT_SERVING"}

    async def server_metadata(self, asked: Any) -> dict[str, Any]:
        """Name, version and extensions."""
        return {"name": NAME, "version": self.service.version, "extensions": list(EXTENSIONS)}

    async def model_ready(self, asked: Any) -> dict[str, Any]:
        """Return whether a model is ready; one that does not exist is not, as in Triton."""
        try:
            self.service.find(asked.name, asked.version or None)
        except ProtocolError:
            return {"ready": False}
        return {"ready": True}

    async def model_metadata(self, asked: Any) -> dict[str, Any]:
        """Return a model's inputs, outputs and versions."""
        model = self.service.find(asked.name, asked.version or None)
        return model.metadata(self.service.repository.versions(model.source.name))

    async def model_config(self, asked: Any) -> dict[str, Any]:
        """Return a model's configuration, in Triton's terms."""
        return {"config": served_config(self.service.find(asked.name, asked.version or None))}

    async def model_statistics(self, asked: Any) -> dict[str, Any]:
        """Return the statistics of one model, or of all."""
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


class _Counts:
    """Counts calls and writes the access log, under the names that other gRPC servers use for their metrics."""

    def __init__(self, service: Service) -> None:
        registry, names = service.requests.registry, ("grpc_type", "grpc_service", "grpc_method")
        self._calls = Counter("grpc_server_handled", "gRPC calls by status", (*names, "grpc_code", "reason"), registry=registry)
        self._seconds = Histogram(
            "grpc_server_handling_seconds", "From a call to its answer", names, buckets=BUCKETS, registry=registry
        )
        self._found: dict[tuple[str, grpc.StatusCode, str], tuple[Any, Any]] = {}

    def add(self, call: Call, outcome: _Outcome, seconds: float) -> None:
        """Count one call."""
        path = call.path
        key = (path, outcome.code, outcome.reason)
        if key not in self._found:
            names = ("bidi_stream" if path == STREAM_METHOD else "unary", *path[1:].split("/"))
            self._found[key] = (self._calls.labels(*names, outcome.code.name, outcome.reason), self._seconds.labels(*names))
        calls, durations = self._found[key]
        calls.inc()
        durations.observe(seconds)
        if access_log.isEnabledFor(logging.INFO):
            fields = {"client": unquote(call.peer()), "method": "gRPC", "path": path, "status": outcome.code.name}
            fields |= {"reason": outcome.reason, "bytes_sent": outcome.sent, "milliseconds": round(1000 * seconds, 3)}
            text = '{client} "{method} {path}" {status} {reason} {bytes_sent} B {milliseconds} ms'.format(**fields)
            access_log.info("%s", text, extra={"fields": fields})


async def _refuse_method(call: Call) -> None:
    reason = "this server has no such method; shared memory, tracing and log settings of Triton are not supported"
    raise Refused(grpc.StatusCode.UNIMPLEMENTED, reason)


def _without_frames(error: ProtocolError) -> ProtocolError:
    """An error that is kept: its traceback would keep the request alive, in a cycle that only the garbage collector breaks."""
    link: BaseException | None = error
    while link:
        link.__traceback__, link = None, link.__cause__ or link.__context__
    return error


def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).removeprefix("_")


def _metadata(call: Call, name: str) -> str:
    return next((value for key, value in call.metadata if key == name), "")


def _code(error: ProtocolError) -> grpc.StatusCode:
    """The status of an error. HTTP has one status for a server that is busy and a time that is over, gRPC has two."""
    if isinstance(error.__cause__, DeadlineExceeded):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return CODES.get(error.status, grpc.StatusCode.INTERNAL if error.status >= 500 else grpc.StatusCode.INVALID_ARGUMENT)


def _retry(error: ProtocolError) -> tuple[tuple[str, str], ...]:
    """What `Retry-After` is in gRPC: clients with a retry policy wait so long."""
    seconds = error.headers.get("Retry-After")
    return (("grpc-retry-pushback-ms", str(1000 * int(seconds))),) if seconds else ()
