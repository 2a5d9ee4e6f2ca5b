"""The server's HTTP face: an ASGI application over a `Repository`. Engines (uvicorn, Ray Serve) only carry it."""

import asyncio
import contextlib
import hmac
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import protocol
from .models import RETRY
from .openapi import describe
from .protocol import HEADER_LENGTH, ProtocolError
from .statistics import render_metrics
from .triton import model_config

NAME = "resnet-export"
EXTENSIONS = ("binary_tensor_data", "classification", "statistics", "model_repository", "model_configuration", "metrics")
PAGE = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'"
PUBLIC = ("/", "/page.css", "/page.js", "/v2/health/live", "/v2/health/ready")
# Up to here decoding takes less time than handing it to a thread is worth.
INLINE_BYTES = 64 * 1024

log = logging.getLogger("resnet_export.serving")


@dataclass(frozen=True)
class AppOptions:
    """What the HTTP face allows.

    Args:
        max_body: bytes of one request, also when unpacked.
        max_buffered: bytes of all requests together.
        body_timeout: seconds in which a request's body must have come.
        allow_control: whether clients may load and unload models.
        api_keys: keys of which every request must name one (`Authorization: Bearer KEY`), but for the page and the health checks.
        decoders: threads that decode images.
    """

    max_body: int = 64 * 2**20
    max_buffered: int = 2**30
    body_timeout: float = 30.0
    allow_control: bool = False
    api_keys: tuple = ()
    decoders: int = 2


def create_app(repository, options=AppOptions(), version="0", on_ready=lambda: None):
    """An ASGI application that serves a repository.

    Args:
        repository: `Repository`, opened; it is warmed up when the application starts and closed when it ends.
        options: `AppOptions`.
        version: the server's version, as its metadata give it.
        on_ready: called when all models have been warmed up.

    Returns:
        Starlette
    """
    handlers = _Handlers(repository, options, version, on_ready)
    app = Starlette(
        routes=[Route(path, _guarded(getattr(handlers, name)), methods=[method]) for method, path, name in _routes()],
        exception_handlers={HTTPException: _http_error, Exception: _bug},
        lifespan=handlers.lifespan,
    )
    app.router.redirect_slashes = False
    if options.api_keys:
        app.add_middleware(_KeyCheck, keys=options.api_keys)
    return app


def _routes():
    """`(method, path, handler)`; every path of a model exists for its newest and for a named version."""
    table = [
        ("GET", "/", "page"),
        ("GET", "/page.css", "page"),
        ("GET", "/page.js", "page"),
        ("GET", "/openapi.json", "openapi"),
        ("GET", "/metrics", "metrics"),
        ("GET", "/v2", "server_metadata"),
        ("GET", "/v2/", "server_metadata"),
        ("GET", "/v2/health/live", "live"),
        ("GET", "/v2/health/ready", "ready"),
        ("GET", "/v2/models/stats", "all_statistics"),
        ("POST", "/v2/repository/index", "index"),
        ("POST", "/v2/repository/models/{name}/load", "load"),
        ("POST", "/v2/repository/models/{name}/unload", "unload"),
    ]
    of_model = [
        ("GET", "", "model_metadata"),
        ("GET", "/ready", "model_ready"),
        ("GET", "/config", "config"),
        ("GET", "/stats", "statistics"),
        ("GET", "/card", "card"),
        ("POST", "/infer", "infer"),
        ("POST", "/classify", "classify"),
    ]
    for base in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        table += [(method, base + path, name) for method, path, name in of_model]
    return table


class _Handlers:
    def __init__(self, repository, options, version, on_ready):
        self.repository, self.options, self.version, self.on_ready = repository, options, version, on_ready
        self.buffered = 0
        self._decoders = ThreadPoolExecutor(options.decoders, thread_name_prefix="decode")
        folder = files(__package__) / "page"
        self._page = {name: (folder / name).read_bytes() for name in PAGE}

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        """Be alive at once, and ready when all models have been warmed up."""
        warming = asyncio.create_task(self._warm_up())
        yield
        warming.cancel()
        await self.repository.close()
        self._decoders.shutdown()

    async def _warm_up(self):
        for reason in await self.repository.warm_up():
            log.error(reason)
        if self.repository.ready:
            self.on_ready()

    async def page(self, request):
        name = request.url.path.rsplit("/", 1)[1] or "index.html"
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return Response(self._page[name], media_type=PAGE[name], headers=headers | {"Cache-Control": "no-cache"})

    async def openapi(self, request):
        return JSONResponse(describe(self.version))

    async def metrics(self, request):
        models = ((m.source.name, m.source.version, m.statistics, m.batcher.waiting) for m in self.repository.models())
        text, media_type = render_metrics(models)
        return Response(text, headers={"Content-Type": media_type})

    async def server_metadata(self, request):
        return JSONResponse({"name": NAME, "version": self.version, "extensions": list(EXTENSIONS)})

    async def live(self, request):
        return JSONResponse({"live": True})

    async def ready(self, request):
        if not self.repository.ready:
            raise ProtocolError("not all models are ready", 503, RETRY)
        return JSONResponse({"ready": True})

    async def model_metadata(self, request):
        model = self._model(request)
        return JSONResponse(model.metadata(self.repository.versions(model.source.name)))

    async def model_ready(self, request):
        return JSONResponse({"name": self._model(request).source.name, "ready": True})

    async def config(self, request):
        model = self._model(request)
        batch = model.options.batch
        return JSONResponse(
            model_config(
                model.source.name,
                model.inputs,
                model.outputs,
                max_batch_size=batch.max_rows if model.batched else 0,
                max_delay=batch.max_delay,
                instances=batch.instances,
                gpu=model.session.device != "cpu",
            )
        )

    async def statistics(self, request):
        name, version = request.path_params["name"], request.path_params.get("version")
        wanted = [self._model(request)]
        if version is None:
            wanted = [model for model in self.repository.models() if model.source.name == name]
        return _statistics(wanted)

    async def all_statistics(self, request):
        return _statistics(self.repository.models())

    async def card(self, request):
        model = self._model(request)
        return JSONResponse({"device": model.session.device, "rows": model.options.batch.max_rows, **model.session.metadata})

    async def index(self, request):
        """The repository index; `{"ready": true}` in the body asks for models that are ready only."""
        message = await self._message(request)
        only_ready = message.get("ready") is True
        return JSONResponse([entry for entry in self.repository.index() if entry["state"] == "READY" or not only_ready])

    async def load(self, request):
        self._check_control()
        if (await self._message(request)).get("parameters"):
            raise ProtocolError("a model's files and configuration cannot be sent; load it as it is in the repository")
        await self.repository.load(request.path_params["name"])
        return JSONResponse({})

    async def unload(self, request):
        self._check_control()
        await self.repository.unload(request.path_params["name"])
        return JSONResponse({})

    async def infer(self, request):
        async with self._budget(request) as budget:
            with self._model(request).batcher.announced():
                asked = await self._decode(request, await budget.read())
            # What was announced may have been exchanged for another while the body came.
            model = self._model(request)
            wanted = _wanted(asked, model)
            answer = await _unless_hung_up(request, model.infer(model.prepare(asked.inputs), asked.timeout))
        outputs = [_output(output, answer.outputs[output.name], model) for output in wanted]
        encoded, length = protocol.encode_response(model.source.name, model.source.version, outputs, asked.id)
        return _encoded(request, encoded, length)

    async def classify(self, request):
        """The best classes of one encoded image, for people with curl."""
        top = _top(request.query_params.get("top", "5"))
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise ProtocolError("send the image itself as the body (curl --data-binary @FILE), not a form", 415)
        started = time.perf_counter()
        async with self._budget(request) as budget:
            with self._model(request).batcher.announced():
                body = await budget.read()
                if not body:
                    raise ProtocolError("the body must be an image, it is empty")
                inputs = await self.in_thread(self._model(request).read_image, body)
                # A small file may be a large picture.
                budget.take(sum(array.nbytes for array in inputs.values()))
            model = self._model(request)
            answer = await _unless_hung_up(request, model.infer(model.prepare(inputs)))
        return JSONResponse(
            {
                "model_name": model.source.name,
                "model_version": model.source.version,
                "predictions": model.ranking(answer.outputs, top),
                "milliseconds": round((time.perf_counter() - started) * 1000, 3),
            }
        )

    def _model(self, request):
        return self.repository.get(request.path_params["name"], request.path_params.get("version"))

    def _check_control(self):
        if not self.options.allow_control:
            raise ProtocolError("loading and unloading is off; start the server with --allow-control", 403)

    async def _decode(self, request, body):
        length = protocol.header_length(request.headers.get(HEADER_LENGTH), len(body))
        if length == 0:
            return protocol.decode_raw_request(body, _only_input(self._model(request)))
        if (len(body) if length is None else length) > INLINE_BYTES:
            return await self.in_thread(protocol.decode_request, body, length)
        return protocol.decode_request(body, length)

    def in_thread(self, function, *arguments):
        return asyncio.get_running_loop().run_in_executor(self._decoders, function, *arguments)

    async def _message(self, request):
        """The JSON object in the body; `{}` for none."""
        async with self._budget(request) as budget:
            body = await budget.read()
        return protocol.parse_json(body) if body else {}

    @contextlib.asynccontextmanager
    async def _budget(self, request):
        """Reads the request's body, and until the block ends counts what it takes against what all requests may take."""
        budget = _Budget(self, request)
        try:
            yield budget
        finally:
            budget.take(-budget.taken)


class _Budget:
    """The memory that one request holds; see `_Handlers._budget`."""

    def __init__(self, handlers, request):
        self._handlers, self._options, self._request = handlers, handlers.options, request
        self.taken = 0

    def take(self, size):
        """Count `size` bytes more, or less; `ProtocolError` (503) if all requests together then hold too much."""
        self.taken += size
        self._handlers.buffered += size
        if size > 0 and self._handlers.buffered > self._options.max_buffered:
            raise ProtocolError("too many requests at once; try again later", 503, RETRY)

    async def read(self):
        """The request's body, unpacked."""
        try:
            async with asyncio.timeout(self._options.body_timeout):
                body = await self._received()
        except TimeoutError as error:
            reason = f"the body did not come within {self._options.body_timeout:g} s"
            raise ProtocolError(reason, 408, {"Connection": "close"}) from error
        encoding = self._request.headers.get("content-encoding")
        if encoding:
            packed, body = body, await self._handlers.in_thread(protocol.decompress, body, encoding, self._options.max_body)
            self.take(len(body) - len(packed))
        return body

    async def _received(self):
        announced = self._request.headers.get("content-length", "")
        size, chunks = int(announced) if announced.isdigit() else 0, []
        async for chunk in self._request.stream():
            if max(size, self.taken + len(chunk)) > self._options.max_body:
                raise ProtocolError(f"the body has more than {self._options.max_body:,} bytes", 413)
            self.take(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)


class _KeyCheck:
    """ASGI middleware: everything but the page and the health checks needs a key."""

    def __init__(self, app, keys):
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or self._public(scope) or self._known(dict(scope["headers"]).get(b"authorization", b"")):
            await self.app(scope, receive, send)
        else:
            error = ProtocolError("an API key is needed: Authorization: Bearer KEY", 401, {"WWW-Authenticate": "Bearer"})
            await _error(error)(scope, receive, send)

    def _public(self, scope):
        return scope["path"].removeprefix(scope.get("root_path", "")) in PUBLIC

    def _known(self, header):
        scheme, _, key = header.partition(b" ")
        # All are compared, each in constant time, so that the answer's time tells nothing.
        return scheme.lower() == b"bearer" and any([hmac.compare_digest(key.strip(), known) for known in self.keys])


def _guarded(handler):
    async def endpoint(request):
        try:
            return await handler(request)
        except ProtocolError as error:
            if error.status == 500:
                log.error("%s %s: %s", request.method, request.url.path, error)
            return _error(error)
        except ClientDisconnect:
            # Nobody will read this answer; the status is for the access log.
            return Response(status_code=499)

    return endpoint


def _error(error):
    return JSONResponse({"error": str(error)}, error.status, headers=error.headers)


async def _http_error(request, error):
    reason = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not allowed here"}
    return JSONResponse({"error": reason.get(error.status_code, error.detail)}, error.status_code, headers=error.headers)


async def _bug(request, error):
    return JSONResponse({"error": f"internal error ({type(error).__name__})"}, 500)


async def _unless_hung_up(request, coroutine):
    """The coroutine's result; it is cancelled, and `ClientDisconnect` raised, when the client goes away first."""
    work = asyncio.ensure_future(coroutine)
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


def _statistics(models):
    return JSONResponse({"model_stats": [m.statistics.to_json(m.source.name, m.source.version) for m in models]})


def _only_input(model):
    if len(model.inputs) != 1:
        raise ProtocolError(f"a raw binary request needs a model with one input, {model.source.name!r} has {len(model.inputs)}")
    return model.inputs[0]


def _wanted(asked, model):
    """The `RequestedOutput`s to be sent: those named, or all."""
    known = [spec.name for spec in model.outputs]
    if asked.outputs is None:
        return [protocol.RequestedOutput(name, asked.binary) for name in known]
    if unknown := [output.name for output in asked.outputs if output.name not in known]:
        raise ProtocolError(f"model {model.source.name!r} has no output {unknown[0][:80]!r}; it has {', '.join(known)}")
    return asked.outputs


def _output(output, array, model):
    """`(name, array, binary)` for the encoder."""
    if output.classes:
        if not np.issubdtype(array.dtype, np.number) or not array.size:
            raise ProtocolError(f"output {output.name!r} holds no scores to be classified")
        labels = model.labels if model.labels and array.shape[-1] == len(model.labels) else None
        array = protocol.classify(array, output.classes, labels, model.batched)
    return output.name, array, output.binary


def _encoded(request, body, length):
    """The response, packed if the client takes gzip or deflate."""
    headers = {"Content-Type": "application/json" if length is None else "application/octet-stream"}
    if length is not None:
        headers[HEADER_LENGTH] = str(length)
    accepted = [part.partition(";")[0].strip().lower() for part in request.headers.get("accept-encoding", "").split(",")]
    encoding = next((name for name in ("gzip", "deflate") if name in accepted), None)
    if encoding:
        body = protocol.compress(body, encoding)
        headers |= {"Content-Encoding": encoding, "Vary": "Accept-Encoding"}
    return Response(body, headers=headers)


def _top(text):
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 1000):
        raise ProtocolError(f"`top` must be a number from 1 to 1000, got {text[:40]!r}")
    return int(text)
