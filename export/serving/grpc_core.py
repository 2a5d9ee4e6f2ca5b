"""A gRPC server of coroutines on grpcio's core, without `grpc.aio`.

`grpc.aio` wakes a thread and the event loop for each of the four events of a call, which takes a third of the time of a small
request. Here a thread passes events to the loop as Python objects, so that events share a wake-up: those of several calls; a
call's start and its first message, which the thread asks for itself; the end of one call and the start of the next.

This is the only module that uses a private part of grpcio: `cygrpc`, on which grpcio's own server of threads (`grpc/_server.py`)
is built in the same way. Checked with grpcio 1.80 to 1.85; all tests of gRPC run over it.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import grpc
from grpc._cython import cygrpc

log = logging.getLogger("resnet_export.serving")

NO_FLAGS = 0
# How long an event that is not urgent waits for others before the event loop is woken, in seconds.
TOGETHER = 0.001

Handler: TypeAlias = "Callable[[Call], Coroutine[Any, Any, bytes | None]]"


class Refused(Exception):
    """Raised by a handler, ends its call with a status other than OK.

    Args:
        code: The status.
        details: Its message.
        metadata: Trailing metadata.
    """

    def __init__(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(details)
        self.code, self.details, self.metadata = code, details, metadata


class ClientGone(Exception):
    """The client does not read messages any more."""


class _Tag(NamedTuple):
    """What the core gives back with the event of an operation, and the loop calls with it."""

    call: "Call"
    done: Callable[[Any], None]

    def __call__(self, event: Any) -> None:
        self.call._complete(self.done, event)


class Call:
    """A call that is being answered, on the event loop's thread. It is made on the thread that polls, and reads at once.

    Attributes:
        path: The method, as `/SERVICE/METHOD`.
        metadata: Pairs of a name and a value, which the client sent.
        loop: The event loop.
    """

    def __init__(self, event: Any, loop: asyncio.AbstractEventLoop, forget: "Callable[[Call], None]") -> None:
        self.path: str = event.call_details.method.decode(errors="replace")
        self.metadata: tuple[tuple[str, str], ...] = event.invocation_metadata
        self.loop = loop
        self._core, self._pending = event.call, 0
        self._task: asyncio.Task | None = None
        self._started_answer = self._ended = self._closed = False
        self._callbacks: list[Callable[[Call], None]] = [forget]
        self._start((cygrpc.ReceiveCloseOnServerOperation(NO_FLAGS),), self._close)
        self._first: asyncio.Future | None = self._batch((cygrpc.ReceiveMessageOperation(NO_FLAGS),))

    def peer(self) -> str:
        """Return the client's address, e.g. `ipv4:127.0.0.1:40000`."""
        return self._core.peer()

    def add_done_callback(self, callback: "Callable[[Call], None]") -> None:
        """Call a function once the client has taken the answer, or will not get one."""
        self._callbacks.append(callback)

    async def read(self, timeout: float | None = None) -> bytes | None:
        """Return the client's next message, or None if there is no other.

        Args:
            timeout: Time to wait for it, in seconds.

        Raises:
            TimeoutError: It has not arrived in time.
        """
        message, self._first = self._first or self._batch((cygrpc.ReceiveMessageOperation(NO_FLAGS),)), None
        _, (received,) = await self._within(message, timeout)
        return received.message()

    async def write(self, message: bytes, timeout: float) -> None:
        """Send a message, and return when the next one may be sent.

        Args:
            message: The message.
            timeout: Time that the client has to take it, in seconds.

        Raises:
            TimeoutError: The client has not taken it in time.
            ClientGone: It cannot be sent.
        """
        sent = self._batch((*self._head(), cygrpc.SendMessageOperation(message, NO_FLAGS)))
        success, _ = await self._within(sent, timeout)
        if not success:
            raise ClientGone

    def run(self, handler: Handler) -> None:
        """Have a handler answer the call with the message that it returns, or with the `Refused` that it raises."""
        self._task = self.loop.create_task(handler(self))
        self._task.add_done_callback(self._answered)

    def refuse(self, refused: Refused) -> None:
        """End the call with a status."""
        status = (refused.metadata or None, refused.code.value[0], refused.details.encode())
        self._end(cygrpc.SendStatusFromServerOperation(*status, NO_FLAGS))

    def _answered(self, task: asyncio.Task) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Refused):
            self.refuse(error)
        elif error and not isinstance(error, ClientGone):
            log.error("gRPC %s: internal error", self.path, exc_info=error)
            self.refuse(Refused(grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__})"))
        elif error or task.cancelled():
            self.refuse(Refused(grpc.StatusCode.CANCELLED, "the call was cancelled"))
        else:
            message = task.result()
            sent = () if message is None else (cygrpc.SendMessageOperation(message, NO_FLAGS),)
            self._end(*sent, cygrpc.SendStatusFromServerOperation(None, cygrpc.StatusCode.ok, b"", NO_FLAGS))

    def _head(self) -> tuple[Any, ...]:
        """What comes before the first message or status."""
        if self._started_answer:
            return ()
        self._started_answer = True
        return (cygrpc.SendInitialMetadataOperation(None, NO_FLAGS),)

    def _end(self, *operations: Any) -> None:
        self._ended = True
        if self._closed:
            self._settle()
        else:
            self._start((*self._head(), *operations), lambda event: None)

    def _close(self, event: Any) -> None:
        """The call is over: it has been answered, or the client, its deadline or a shutdown has cancelled it."""
        self._closed = True
        if self._task and not self._ended:
            self._task.cancel()

    def _batch(self, operations: tuple[Any, ...]) -> asyncio.Future:
        """Have the core carry out operations; the future tells whether they succeeded, and gives them with their results."""
        future = self.loop.create_future()
        self._start(operations, partial(_settle_future, future))
        return future

    async def _within(self, future: asyncio.Future, timeout: float | None) -> tuple[bool, tuple[Any, ...]]:
        # `asyncio.timeout` takes several times as long.
        late = self.loop.call_later(timeout, _fail, future) if timeout and not future.done() else None
        try:
            return await future
        finally:
            if late:
                late.cancel()

    def _start(self, operations: tuple[Any, ...], done: Callable[[Any], None]) -> None:
        self._pending += 1
        self._core.start_server_batch(operations, _Tag(self, done))

    def _complete(self, done: Callable[[Any], None], event: Any) -> None:
        self._pending -= 1
        done(event)
        self._settle()

    @property
    def answered(self) -> bool:
        """Whether the answer is on its way, so that nobody waits for further events."""
        return self._ended

    def _settle(self) -> None:
        if self._closed and self._ended and not self._pending:
            callbacks, self._callbacks, self._task = self._callbacks, [], None
            for callback in callbacks:
                callback(self)


def _settle_future(future: asyncio.Future, event: Any) -> None:
    # The event itself refers to the future: such a cycle would keep the message until the garbage collector runs.
    if not future.done():
        future.set_result((event.success, event.batch_operations))


def _fail(future: asyncio.Future) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


class CoreServer:
    """Accepts calls and has them answered on the event loop that starts it.

    Args:
        find: Function that returns a method's handler, given its path.
        options: Channel options by name.
        max_calls: Largest number of calls at a time; others are refused.
    """

    def __init__(self, find: Callable[[str], Handler], options: Mapping[str, Any], max_calls: int) -> None:
        self._find, self._max_calls = find, max_calls
        self._calls: set[Call] = set()
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(options.items()), False)
        self._server.register_completion_queue(self._queue)
        self._drained = False
        self._stopped: asyncio.Future | None = None
        self._loop: Any = None
        # What the loop has to call, with an argument; whether it has been told so; and the tag of calls that begin.
        self._events: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._woken = False
        self._new_call = object()

    def listen(self, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
        """Listen on an address, `HOST:PORT`, and return the port; 0 if that is not possible."""
        arguments = (credentials._credentials,) if credentials else ()
        return self._server.add_http2_port(address.encode(), *arguments)

    def start(self) -> None:
        """Accept calls."""
        self._loop = asyncio.get_running_loop()
        self._server.start()
        self._request_call()
        threading.Thread(target=self._poll, name="grpc", daemon=True).start()

    async def stop(self, grace: float | None) -> None:
        """Accept no more calls, finish those in flight, and return.

        Args:
            grace: Time after which calls are cancelled, in seconds. None cancels them at once.
        """
        if not self._stopped:
            self._stopped = self._loop.create_future()
            self._server.shutdown(self._queue, self._shut_down)
        if grace is not None:
            await asyncio.wait({self._stopped}, timeout=grace)
        if not self._stopped.done():
            self._server.cancel_all_calls()
        await asyncio.shield(self._stopped)

    def _request_call(self) -> None:
        self._server.request_call(self._queue, self._queue, self._new_call)

    def _accept(self, call: Call) -> None:
        self._calls.add(call)
        if not self._stopped:
            self._request_call()
        if len(self._calls) <= self._max_calls:
            call.run(self._find(call.path))
        else:
            call.refuse(Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the server answers {self._max_calls:,} calls already"))

    def _shut_down(self, event: Any) -> None:
        self._drained = True
        self._end_queue()

    def _forget(self, call: Call) -> None:
        self._calls.discard(call)
        self._end_queue()

    def _end_queue(self) -> None:
        # Not while a call is open: the core ends the process if an operation starts after its queue was shut down.
        if self._drained and not self._calls:
            self._queue.shutdown()

    def _poll(self) -> None:
        """Hand events over to the event loop, on a thread of its own, until the queue is shut down and empty."""
        deadline: float | None = None  # until when what has come may wait for more
        while True:
            event = self._queue.poll(deadline)
            urgent, ended = True, event.completion_type == cygrpc.CompletionType.queue_shutdown
            if ended:
                self._events.append((self._finish, None))
            elif event.completion_type == cygrpc.CompletionType.operation_complete:
                if event.tag is self._new_call:
                    urgent = False
                    if event.success:
                        self._new(event)
                else:
                    self._events.append((event.tag, event))
                    urgent = not (isinstance(event.tag, _Tag) and event.tag.call.answered)
            # The core busy-waits as long as an event of a finished call is referenced.
            del event
            if not urgent:
                deadline = deadline or time.time() + TOGETHER
                urgent = time.time() >= deadline
            if not urgent:
                continue
            deadline = None
            if self._events and not self._woken:
                self._woken = True
                try:
                    self._loop.call_soon_threadsafe(self._handle)
                except RuntimeError:
                    # The event loop is closed: the process ends without having waited.
                    return
            if ended:
                return

    def _new(self, event: Any) -> None:
        try:
            self._events.append((self._accept, Call(event, self._loop, self._forget)))
        except Exception:  # the thread must go on, and the next call be asked for
            log.exception("gRPC: internal error")
            self._request_call()

    def _handle(self) -> None:
        """Handle what has come, on the event loop's thread."""
        self._woken = False
        while self._events:
            handle, argument = self._events.popleft()
            try:
                handle(argument)
            except Exception:
                log.exception("gRPC: internal error")

    def _finish(self, _: None) -> None:
        self._server.destroy()
        if self._stopped and not self._stopped.done():
            self._stopped.set_result(None)
