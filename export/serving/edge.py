"""What happens to every HTTP request before and after its handler, whichever engine carries the application: plain ASGI.

The `Host` header is checked, the path prefix of a proxy is removed, keys are asked for, and answers are counted and logged.
"""

import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from .protocol import REASONS, ProtocolError
from .service import Service

PUBLIC = ("/", "/page.css", "/page.js", "/v2/health/live", "/v2/health/ready")
HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(:[0-9]{0,5})?")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("resnet_export.serving")
access_log = logging.getLogger("resnet_export.access")


@dataclass
class Record:
    """What is known about a request for the counts and the access log; handlers find it in the scope, under `"record"`.

    Args:
        route: Name of the handler, "none" if there was none.
        model: Name of the model, or None.
        status: HTTP status of the answer; 499 if the client went away first.
        reason: One word that says why it was not answered as asked, "ok" if it was.
        sent: Bytes of the answer's body.
    """

    route: str = "none"
    model: str | None = None
    status: int = 499
    reason: str | None = None
    sent: int = 0


class Edge:
    """The outermost ASGI layer.

    Args:
        app: The application.
        service: Whose keys are asked for and whose counts are kept.
        root_path: Path under which a proxy publishes the server, e.g. `/models`; requests may arrive with or without it.
    """

    def __init__(self, app: Application, service: Service, root_path: str = "") -> None:
        self.app, self.service, self.root_path = app, service, root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        record = scope["record"] = Record()
        call = _Call(record, receive, send, _header(scope, b"expect").lower() == b"100-continue")
        if self.root_path:
            _set_root(scope, self.root_path)
        try:
            error = self._refusal(scope)
            if error:
                record.reason = error.reason
                await send_error(error, call.send)
            else:
                await self.app(scope, call.receive, call.send)
        finally:
            record.reason = record.reason or ("ok" if record.status < 400 else REASONS.get(record.status, "other"))
            seconds = time.perf_counter() - started
            self.service.requests.count(record.route, scope["method"], record.status, record.reason, seconds)
            if access_log.isEnabledFor(logging.INFO):
                access_log.info("%s", _line(scope, record, seconds), extra={"fields": _fields(scope, record, seconds)})

    def _refusal(self, scope: Scope) -> ProtocolError | None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) > 1:
            return ProtocolError("a request must have one `Host` header, got several")
        if not hosts and scope.get("http_version") == "1.1":
            return ProtocolError("an HTTP/1.1 request must have a `Host` header")
        if hosts and not HOST.fullmatch(hosts[0]):
            return ProtocolError(f"`Host` must be a name or address and perhaps a port, got {hosts[0][:80]!r}")
        is_public = scope["path"].removeprefix(scope.get("root_path", "")) in PUBLIC
        if is_public or self.service.keys.accept(_header(scope, b"authorization")):
            return None
        return ProtocolError("an API key is needed: Authorization: Bearer KEY", 401, {"WWW-Authenticate": "Bearer"})


class _Call:
    """The two ends of a request, watched."""

    def __init__(self, record: Record, receive: Receive, send: Send, expects_continue: bool) -> None:
        self._record, self._receive, self._send, self._expects_continue = record, receive, send, expects_continue

    async def receive(self) -> MutableMapping[str, Any]:
        # The engine tells the client to go on when the body is asked for.
        self._expects_continue = False
        return await self._receive()

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            if self._expects_continue:
                # The client may or may not send its body now, so that nobody knows where the next request would begin.
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        else:
            self._record.sent += len(message.get("body", b""))
        await self._send(message)


async def send_error(error: ProtocolError, send: Send) -> None:
    """Answer with an error."""
    body = json.dumps({"error": str(error)}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")


def _set_root(scope: Scope, root_path: str) -> None:
    """Tell the router which part of the path is the proxy's; some proxies remove it, others do not."""
    scope["root_path"] = root_path
    if scope["path"] != root_path and not scope["path"].startswith(root_path + "/"):
        scope["path"] = root_path + scope["path"]
        if scope.get("raw_path"):
            scope["raw_path"] = root_path.encode() + scope["raw_path"]


def _fields(scope: Scope, record: Record, seconds: float) -> dict[str, Any]:
    return {
        "client": _client(scope),
        "method": scope["method"],
        "path": scope["path"],
        "status": record.status,
        "reason": record.reason,
        "model": record.model,
        "bytes_received": int(length) if (length := _header(scope, b"content-length")).isdigit() else None,
        "bytes_sent": record.sent,
        "milliseconds": round(1000 * seconds, 3),
    }


def _line(scope: Scope, record: Record, seconds: float) -> str:
    # A path may hold anything once it has been decoded; a log line is one line.
    target = scope["path"].encode("unicode_escape").decode()
    request = f'{_client(scope) or "-"} "{scope["method"]} {target}"'
    return f"{request} {record.status} {record.reason} {record.sent} B {1000 * seconds:.1f} ms"


def _client(scope: Scope) -> str | None:
    return f"{scope['client'][0]}:{scope['client'][1]}" if scope.get("client") else None
