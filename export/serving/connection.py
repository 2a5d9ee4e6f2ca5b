"""One client connection: uvicorn's HTTP/1.1 protocol with a deadline on everything that a client does or fails to do.

This is the only module that touches uvicorn's internals (`HttpToolsProtocol`).
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 64 * 1024
KEEP_ALIVE = 75
# How long the rest of a body is read and dropped after an early answer, in seconds.
LINGER = 5.0


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on the connections of clients. All connections share one object.

    Args:
        head_timeout: Time in which the head of a request must arrive, in seconds.
        write_timeout: Time in which the client must read an answer that does not fit into the socket's buffers, in
            seconds.
        per_address: Maximum number of connections from one address; None for no limit.
        counts: Number of open connections by address.
    """

    head_timeout: float = 30.0
    write_timeout: float = 30.0
    per_address: int | None = None
    counts: Counter[str] = field(default_factory=Counter)


class Connection(HttpToolsProtocol):
    """A connection that its client can neither hold open for ever nor desynchronise.

    Differs from uvicorn's own protocol:

    - `Upgrade` is ignored on every request, as RFC 9110 allows: the body is read as usual and the answer is HTTP/1.1.
    - The head of a request, the rest of a body after an early answer, and an idle connection each have a deadline.
    - After an answer that precedes the end of the body, what still arrives is dropped for a moment before the connection closes.
      Closing at once would reset it, and the client would lose the answer.
    - A client that closes its half of the connection after its request gets its answer.
    - A client that does not read its answer is cut off.
    - The number of connections from one address is bounded.
    - Refusals are JSON, and never end up in the middle of an answer.

    Args:
        limits: `ConnectionLimits`.
    """

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._address: str | None = None
        # The part of a request that is arriving: "head", "body" or None, and its bytes since the last piece of a body.
        self._receiving: str | None = None
        self._unread, self._progress = 0, False
        self._upgrading = self._deaf = False
        self._deadlines: dict[str, asyncio.TimerHandle] = {}

    # Called by the transport.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_GentleTransport(transport, self._close_gently))  # type: ignore[arg-type]
        self._address = self.client[0] if self.client else None
        if self._address:
            counts, most = self._limits.counts, self._limits.per_address
            counts[self._address] += 1
            if most and counts[self._address] > most:
                self._refuse("503 Service Unavailable", f"{self._address} has {most} connections already; close some")
                return
        self._set_deadline("idle", KEEP_ALIVE)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._deadlines):
            self._clear_deadline(name)
        if self._address:
            counts = self._limits.counts
            counts[self._address] -= 1
            if not counts[self._address]:
                del counts[self._address]
            self._address = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._unread, self._progress = self._unread + len(data), False
        try:
            while data:
                data = self._feed(data)
        except httptools.HttpParserError:
            self._refuse("400 Bad Request", "the request is not valid HTTP/1.1")
            return
        if self._progress:
            self._unread = 0
        if self._unread > HEAD_BYTES:
            self._refuse("400 Bad Request", f"the head of the request has more than {HEAD_BYTES:,} bytes")
            return
        self._update_deadlines()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio closes the connection unless it is true
        # TLS has no half-closed connections.
        if self._receiving or not self._is_answering() or self.scheme == "https":
            return False
        self.cycle.keep_alive = False
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        # One deadline for all of an answer, however many times the client takes a little of it.
        self._keep_deadline("write", self._limits.write_timeout, wanted=True)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._is_answering():
            self._clear_deadline("write")

    # Called by the parser.

    def on_message_begin(self) -> None:
        self._receiving = "head"
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._upgrading = self.parser.should_upgrade()
        if not self._upgrading:
            self._receiving = "body"
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._upgrading:
            self._receiving, self._progress = None, True
            super().on_message_complete()

    # Called by the request's cycle, and by the server.

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._keep_deadline("write", self._limits.write_timeout, wanted=self.flow.write_paused)
            self._update_deadlines()

    def send_400_response(self, msg: str) -> None:
        self._refuse("400 Bad Request", msg)

    def _feed(self, data: bytes) -> bytes:
        """Parse `data`; returns what is to be parsed next.

        The parser stops after the head of a request with `Upgrade`, whose body it takes for another protocol. A new parser then
        reads the head again without `Upgrade`.
        """
        try:
            self.parser.feed_data(data)
            return b""
        except httptools.HttpParserUpgrade as stopped:
            method = self.parser.get_method()
            if method == b"CONNECT":
                raise httptools.HttpParserError("this server is not a proxy") from stopped
            line = b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())
            fields = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            # As the base class does: what follows a request with `Connection: close` is ignored.
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            return b"\r\n".join([line, *fields, b"", b""]) + data[stopped.args[0] :]

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: str, reason: str) -> None:
        """Answer with an error and close, or just close once an answer to an earlier request has been sent."""
        self._deaf = True
        if self._is_answering() and (self._receiving != "body" or self.cycle.response_started):
            self.cycle.keep_alive = False
            return
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps({"error": reason}).encode()
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _close_gently(self, transport: asyncio.Transport) -> None:
        """Close the real transport, at once or after the rest of a request has been dropped for a moment."""
        for name in ("idle", "head", "rest"):
            self._clear_deadline(name)
        self._set_deadline("write", self._limits.write_timeout)
        if not self._receiving:
            transport.close()
            return
        if transport.can_write_eof():
            transport.write_eof()
        self._set_deadline("linger", LINGER)
        self.flow.resume_reading()

    def _update_deadlines(self) -> None:
        waiting = not self._is_answering()
        self._keep_deadline("head", self._limits.head_timeout, self._receiving == "head" and waiting)
        self._keep_deadline("rest", min(LINGER, self._limits.head_timeout), self._receiving == "body" and waiting)
        self._keep_deadline("idle", KEEP_ALIVE, self._receiving is None and waiting)

    def _keep_deadline(self, name: str, seconds: float, wanted: bool) -> None:
        if not wanted:
            self._clear_deadline(name)
        elif name not in self._deadlines:
            self._set_deadline(name, seconds)

    def _set_deadline(self, name: str, seconds: float) -> None:
        self._clear_deadline(name)
        self._deadlines[name] = self.loop.call_later(seconds, self._expire, name)

    def _clear_deadline(self, name: str) -> None:
        if name in self._deadlines:
            self._deadlines.pop(name).cancel()

    def _expire(self, name: str) -> None:
        del self._deadlines[name]
        self.transport.abort()


class _GentleTransport:
    """A transport whose `close` is left to its connection; everything else is the transport's own.

    Args:
        transport: The real transport.
        close: Function that closes it.
    """

    def __init__(self, transport: asyncio.Transport, close: Callable[[asyncio.Transport], None]) -> None:
        self._transport, self._close, self._is_closing = transport, close, False
        self.write = transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._is_closing or self._transport.is_closing()

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._close(self._transport)
