"""The server's HTTP face: an ASGI application over a `Repository`. Engines (uvicorn, Ray Serve) only carry it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from . import protocol
from .edge import Edge, Receive, Scope, Send
from .models import RETRY
from .openapi import describe
from .protocol import HEADER_LENGTH, ProtocolError
from .repository import Repository
from .service import DEFAULTS, EXTENSIONS, MAX_TOP, NAME, Admission, Service, ServiceOptions, decode_raw
from .triton import served_config

PAGE = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'"
# An answer is written in pieces of this size, each once the client has taken most of the one before.
PIECE_BYTES = 256 * 1024
WHOLE_BYTES = 64 * 1024

log = logging.getLogger("resnet_export.serving")

AppOptions = ServiceOptions


def create_app(
    repository: Repository,
    options: ServiceOptions = DEFAULTS,
    version: str = "0",
    on_ready: Callable[[], None] = lambda: None,
    root_path: str = "",
    with_metrics: bool = True,
) -> Starlette:
    """Make an ASGI application that serves a repository.

    Args:
        repository: The models, opened. They are warmed up when the application starts and closed when it ends.
        options: `ServiceOptions`.
        version: The server's version, as its metadata reports it.
        on_ready: Called when all models have been warmed up.
        root_path: Path under which a proxy publishes the server.
        with_metrics: Whether the metrics are served here; `metrics_app` serves them elsewhere.

    Returns:
        The application; its `state.service` is the `Service`.
    """
    service = Service(repository, options, version)
    handlers = _Handlers(service, on_ready)
    table = [entry for entry in _routes() if with_metrics or entry[2] != "metrics"]
    endpoints = {name: _Endpoint(service, name, getattr(handlers, name)) for _, _, name in table}
    app = _Application(
        routes=[Route(path, endpoints[name], methods=[method]) for method, path, name in table],
        exception_handlers={HTTPException: _http_error, Exception: _bug},
        lifespan=handlers.lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.edge = Edge(app.inner, service, root_path)
    return app


def metrics_app(service: Service) -> Starlette:
    """Make an ASGI application that serves nothing but the metrics and the health checks, without keys.

    Args:
        service: The service of the main application.
    """
    handlers = _Handlers(service, lambda: None)
    paths = {"/metrics": "metrics", "/v2/health/live": "live", "/v2/health/ready": "ready"}
    routes = [Route(path, getattr(handlers, name), methods=["GET"]) for path, name in paths.items()]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, ProtocolError: _protocol_error})  # type: ignore[dict-item]


class _Application(Starlette):
    """Starlette with an `Edge` around everything, its own handling of internal errors included."""

    edge: Edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.edge(scope, receive, send)

    async def inner(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)


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
    def __init__(self, service: Service, on_ready: Callable[[], None]) -> None:
        self.service, self.on_ready = service, on_ready
        folder = files(__package__) / "page"
        self._page = {name: (folder / name).read_bytes() for name in PAGE}

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Be alive at once, and ready when all models have been warmed up."""
        warming = asyncio.create_task(self._warm_up())
        yield
        warming.cancel()
        await self.service.close()

    async def _warm_up(self):
        for reason in await self.service.warm_up():
            log.error(reason)
        if self.service.ready:
            self.on_ready()

    async def page(self, request: Request) -> Response:
        name = request.url.path.rsplit("/", 1)[1] or "index.html"
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return Response(self._page[name], media_type=PAGE[name], headers=headers | {"Cache-Control": "no-cache"})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(describe(self.service.version))

    async def metrics(self, request: Request) -> Response:
        text, media_type = self.service.metrics()
        return Response(text, headers={"Content-Type": media_type})

    async def server_metadata(self, request: Request) -> Response:
        return JSONResponse({"name": NAME, "version": self.service.version, "extensions": list(EXTENSIONS)})

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        if not self.service.ready:
            raise ProtocolError("not all models are ready", 503, RETRY)
        return JSONResponse({"ready": True})

    async def model_metadata(self, request: Request) -> Response:
        model = self._model(request)
        return JSONResponse(model.metadata(self.service.repository.versions(model.source.name)))

    async def model_ready(self, request: Request) -> Response:
        return JSONResponse({"name": self._model(request).source.name, "ready": True})

    async def config(self, request: Request) -> Response:
        return JSONResponse(served_config(self._model(request)))

    async def statistics(self, request: Request) -> Response:
        return JSONResponse({"model_stats": self.service.statistics(*_named(request))})

    async def all_statistics(self, request: Request) -> Response:
        return JSONResponse({"model_stats": self.service.statistics()})

    async def card(self, request: Request) -> Response:
        model = self._model(request)
        about = {"device": model.session.device, "rows": model.options.batch.max_rows}
        return JSONResponse({**about, "classifies_images": model.classifies_images, **model.card()})

    async def index(self, request: Request) -> Response:
        """Return the repository index; `{"ready": true}` in the body asks for models that are ready only."""
        message = await self._message(request)
        only_ready = message.get("ready") is True
        return JSONResponse([entry for entry in self.service.repository.index() if entry["state"] == "READY" or not only_ready])

    async def load(self, request: Request) -> Response:
        await self.service.load(request.path_params["name"], (await self._message(request)).get("parameters"))
        return JSONResponse({})

    async def unload(self, request: Request) -> Response:
        await self.service.unload(request.path_params["name"])
        return JSONResponse({})

    async def infer(self, request: Request) -> _Parts:
        admission = request.state.admission
        with self.service.announced(*_named(request)):
            body = await self._body(request)
            length = protocol.header_length(request.headers.get(HEADER_LENGTH), len(body))
            asked = None if length == 0 else await self.service.codec.decode_request(body, length)
        with self.service.hold(*_named(request)) as model:
            asked = asked or decode_raw(body, model)
            model = self.service.choose(model, asked)
            tensors = await _unless_hung_up(request, self.service.infer(model, asked, admission))
        names, identifier, parameters = (model.source.name, model.source.version), asked.id, model.parameters
        # From here on only the answer is in memory.
        del body, asked, model
        parts, length = await self.service.codec.encode_response(*names, tensors, identifier, parameters)
        del tensors
        admission.settle(sum(map(len, parts)))
        headers = {"Content-Type": "application/json" if length is None else "application/octet-stream"}
        if length is not None:
            headers[HEADER_LENGTH] = str(length)
        encoding = protocol.accepted_encoding(request.headers.get("accept-encoding", ""))
        if encoding:
            parts = [await self.service.codec.compress(parts, encoding)]
            headers |= {"Content-Encoding": encoding, "Vary": "Accept-Encoding"}
        return _Parts(parts, headers)

    async def classify(self, request: Request) -> Response:
        """Return the best classes of an encoded image, e.g. for requests with curl."""
        top = _top(request.query_params.get("top", "5"))
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise ProtocolError("send the image itself as the body (curl --data-binary @FILE), not a form", 415)
        started = time.perf_counter()
        with self.service.announced(*_named(request)):
            body = await self._body(request)
        wanted = {"depth": request.query_params["depth"]} if "depth" in request.query_params else {}
        with self.service.hold(*_named(request)) as model:
            model = model.choose(wanted)
            found = await _unless_hung_up(request, self.service.classify(model, body, top, request.state.admission))
        return JSONResponse(
            {
                "model_name": model.source.name,
                "model_version": model.source.version,
                **model.parameters,
                "output_kind": model.scores.kind,
                "predictions": found,
                "milliseconds": round((time.perf_counter() - started) * 1000, 3),
            }
        )

    def _model(self, request):
        return self.service.find(*_named(request))

    async def _message(self, request):
        """The JSON object in the body; `{}` for none."""
        body = await self._body(request)
        return protocol.parse_json(body) if body else {}

    async def _body(self, request):
        """The request's body, decompressed and accounted for."""
        options, admission = self.service.options, request.state.admission
        try:
            async with asyncio.timeout(options.body_timeout):
                body = await _received(request, admission, options.max_body)
        except TimeoutError as error:
            reason = f"the body did not come within {options.body_timeout:g} s"
            raise ProtocolError(reason, 408, {"Connection": "close"}) from error
        encoding = request.headers.get("content-encoding")
        if encoding:
            packed, body = body, await self.service.codec.decompress(body, encoding, options.max_body)
            admission.take(len(body) - len(packed))
        return body


async def _received(request: Request, admission: Admission, limit: int) -> bytearray:
    announced = request.headers.get("content-length", "")
    # Refused before the body is asked for: a client that sends `Expect: 100-continue` then keeps it.
    _check_size(int(announced) if announced.isdigit() else 0, limit)
    body = bytearray()
    async for chunk in request.stream():
        _check_size(len(body) + len(chunk), limit)
        admission.take(len(chunk))
        body += chunk
    return body


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ProtocolError(f"the body has more than {limit:,} bytes", 413)


class _Endpoint:
    """One route as an ASGI application: errors become answers, and what the request holds is given back once it is sent.

    Args:
        service: The `Service`.
        name: Name of the route, for the counts.
        handler: Coroutine function from a request to a response.
    """

    def __init__(self, service: Service, name: str, handler: Callable[[Request], Awaitable[Response]]) -> None:
        self.service, self.name, self.handler = service, name, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, record = Request(scope, receive, send), scope["record"]
        record.route = self.name
        with self.service.admit() as admission:
            request.state.admission = admission
            try:
                response = await self.handler(request)
                record.model = scope["path_params"].get("name")
            except ProtocolError as error:
                record.reason = error.reason
                if error.status == 500:
                    log.error("%s %s: %s", request.method, scope["path"], error)
                response = _error(error)
            except ClientDisconnect:
                # Nobody would read an answer.
                return
            await response(scope, receive, send)


class _Parts:
    """A response made of buffers that are written one after the other, in pieces, without copying them.

    Args:
        parts: The buffers.
        headers: Header names and values.
    """

    def __init__(self, parts: Sequence[bytes | memoryview], headers: dict[str, str]) -> None:
        self.parts = parts
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self.size = sum(map(len, parts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.headers, (b"content-length", str(self.size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if self.size <= WHOLE_BYTES:
            await send({"type": "http.response.body", "body": b"".join(self.parts)})
            return
        for part in (memoryview(part) for part in self.parts):
            for start in range(0, len(part), PIECE_BYTES):
                body = bytes(part[start : start + PIECE_BYTES])
                await send({"type": "http.response.body", "body": body, "more_body": True})
        # The engine takes this once the client has room for it: until then the answer counts as memory in use.
        await send({"type": "http.response.body", "body": b""})


def _error(error):
    return JSONResponse({"error": str(error)}, error.status, headers=error.headers)


async def _protocol_error(request: Request, error: ProtocolError) -> Response:
    return _error(error)


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
        # An error's traceback refers to this frame; together they would be a cycle, and the request would stay in memory.
        del work, gone


def _named(request):
    return request.path_params["name"], request.path_params.get("version")


def _top(text):
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_TOP):
        raise ProtocolError(f"`top` must be a number from 1 to {MAX_TOP}, got {text[:40]!r}")
    return int(text)
