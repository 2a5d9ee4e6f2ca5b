"""The gRPC server beneath the calls: calls begin, end and vanish, whatever clients and handlers do."""

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

grpc = pytest.importorskip("grpc", reason="needs the extra `grpc`")
from grpc._cython import cygrpc
from grpc_running import Client, connected, opening

from resnet_export.serving.grpc_core import Call, ClientGone, CoreServer, Refused

CODE = grpc.StatusCode


class Handlers:
    """Handlers by path, and what they have seen."""

    def __init__(self):
        self.seen, self.go_on = [], None

    def find(self, path):
        return getattr(self, path.rsplit("/", 1)[1])

    async def echo(self, call):
        return await call.read(5)

    async def refuses(self, call):
        raise Refused(CODE.NOT_FOUND, "nothing hére", (("hint", "elsewhere"),))

    async def fails(self, call):
        raise ZeroDivisionError

    async def waits(self, call):
        self.seen.append("begun")
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.seen.append("cancelled")
            raise
        self.seen.append("ended")
        return b"late"

    async def impatient(self, call):
        try:
            await call.read(0.1)
        except TimeoutError:
            raise Refused(CODE.DEADLINE_EXCEEDED, "too late") from None

    async def doubles(self, call):
        while (message := await call.read()) is not None:
            await call.write(2 * message, 5)

    async def writes(self, call):
        try:
            while True:
                await call.write(bytes(100_000), 5)
        except (ClientGone, asyncio.CancelledError):
            self.seen.append("gone")
            raise

    async def slow_client(self, call):
        try:
            while True:
                await call.write(bytes(100_000), 0.2)
        except TimeoutError:
            self.seen.append("late")
            raise Refused(CODE.ABORTED, "the client does not read") from None


class Running:
    """A server on an event loop of its own."""

    def __init__(self, max_calls=100):
        self.handlers, self.loop = Handlers(), asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.on_loop(self._start(max_calls))

    async def _start(self, max_calls):
        self.handlers.go_on = asyncio.Event()
        self.server = CoreServer(self.handlers.find, {}, max_calls)
        self.address = f"127.0.0.1:{self.server.listen('127.0.0.1:0')}"
        self.server.start()

    def on_loop(self, coroutine, timeout=20):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def is_soon(self, condition):
        end = time.monotonic() + 10
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        return condition()

    def close(self, grace=None):
        self.on_loop(self.server.stop(grace))

    def end(self):
        self.close()
        assert not self.server._calls and self.is_soon(lambda: "grpc" not in [t.name for t in threading.enumerate()])
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def running(request):
    server = Running(**getattr(request, "param", {}))
    yield server
    server.end()


def test_a_call_is_answered_or_refused(running):
    with Client(running.address) as client:
        assert client.start("/x/echo", b"hello").result() == b"hello"
        assert client.start("/x/echo").result() == b""
        with pytest.raises(grpc.RpcError) as refused:
            client.start("/x/refuses").result()
        assert (refused.value.code(), refused.value.details()) == (CODE.NOT_FOUND, "nothing hére")
        assert dict(refused.value.trailing_metadata())["hint"] == "elsewhere"
        with pytest.raises(grpc.RpcError) as failed:
            client.start("/x/fails").result()
        assert (failed.value.code(), failed.value.details()) == (CODE.INTERNAL, "internal error (ZeroDivisionError)")
        with pytest.raises(grpc.RpcError) as late:
            client.channel.stream_unary("/x/impatient")(_endless(), timeout=5)
        assert (late.value.code(), late.value.details()) == (CODE.DEADLINE_EXCEEDED, "too late")
        assert list(client.channel.stream_stream("/x/doubles")(iter([b"a", b"bc"]))) == [b"aa", b"bcbc"]


def _endless():
    """Requests of which the first never comes."""
    threading.Event().wait(5)
    yield b""


@pytest.mark.parametrize("running", [{"max_calls": 3}], indirect=True)
def test_calls_are_bounded(running):
    with Client(running.address) as client:
        waiting = [client.start("/x/waits") for _ in range(3)]
        assert running.is_soon(lambda: len(running.handlers.seen) == 3)
        with pytest.raises(grpc.RpcError) as refused:
            client.start("/x/echo").result()
        assert refused.value.code() is CODE.RESOURCE_EXHAUSTED
        running.loop.call_soon_threadsafe(running.handlers.go_on.set)
        assert [call.result() for call in waiting] == [b"late"] * 3
        assert client.start("/x/echo", b"1").result() == b"1"


def test_calls_of_clients_that_go_leave_nothing_behind(running):
    with Client(running.address) as client:
        # Some are cancelled before they have begun.
        for call in [client.start("/x/waits") for _ in range(50)]:
            call.cancel()
        calls = [client.start("/x/waits", timeout=0.3) for _ in range(20)]
        with connected(running.address) as connection:
            connection.sendall(opening("waits"))
            assert running.is_soon(lambda: running.handlers.seen.count("begun") > 20)
        assert {call.exception().code() for call in calls} == {CODE.DEADLINE_EXCEEDED}
        assert running.is_soon(lambda: not running.server._calls)
        assert running.handlers.seen.count("begun") == running.handlers.seen.count("cancelled")
        stream = client.channel.unary_stream("/x/writes")(b"")
        assert len(next(stream)) == 100_000
        stream.cancel()
        assert running.is_soon(lambda: not running.server._calls) and "gone" in running.handlers.seen
        unread = client.channel.unary_stream("/x/slow_client")(b"")
        assert running.is_soon(lambda: "late" in running.handlers.seen)
        unread.cancel()


def test_stopping_waits_for_calls_and_then_cancels_them(running):
    with Client(running.address) as client:
        call, late = client.start("/x/waits"), client.start("/x/waits")
        assert running.is_soon(lambda: len(running.handlers.seen) == 2)
        stopping = asyncio.run_coroutine_threadsafe(running.server.stop(10), running.loop)
        time.sleep(0.2)
        assert not stopping.done()
        running.loop.call_soon_threadsafe(running.handlers.go_on.set)
        assert call.result() == late.result() == b"late"
        stopping.result(10)
        with pytest.raises(grpc.RpcError):
            client.start("/x/echo", timeout=2).result()


def test_a_grace_that_is_over_cancels_calls(running):
    with Client(running.address) as client:
        call = client.start("/x/waits")
        assert running.is_soon(lambda: running.handlers.seen)
        started = time.monotonic()
        running.close(grace=0.3)
        assert 0.3 <= time.monotonic() - started < 5 and call.exception() and "cancelled" in running.handlers.seen


def test_callbacks_come_once_and_after_the_answer(running):
    counts = []

    async def counted(call: Call):
        call.add_done_callback(lambda ended: counts.append(ended is call))
        return await call.read()

    running.handlers.counted = counted
    with Client(running.address) as client:
        assert [client.start("/x/counted", b"1").result() for _ in range(20)] == [b"1"] * 20
        assert running.is_soon(lambda: len(counts) == 20) and all(counts)
    with contextlib.suppress(OSError), connected(running.address) as connection:
        connection.sendall(opening("counted"))
        time.sleep(0.1)
    assert running.is_soon(lambda: len(counts) == 21)


def test_a_port_that_is_taken(running):
    async def listen():
        server = CoreServer(running.handlers.find, {"grpc.so_reuseport": 0}, 1)
        return server.listen(running.address)

    assert running.on_loop(listen()) == 0


def test_messages_are_freed_without_the_garbage_collector(running):
    """A reference cycle would keep every request until the collector runs, whatever the limit on buffered bytes."""

    def events():
        return sum(isinstance(thing, cygrpc.BatchOperationEvent) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = events()
        with Client(running.address) as client:
            for _ in range(20):
                assert client.start("/x/echo", bytes(1000)).result() == bytes(1000)
            list(client.channel.stream_stream("/x/doubles")(iter([b"a"] * 20)))
        assert running.is_soon(lambda: events() <= before + 2)
    finally:
        gc.enable()


def test_streams_that_are_cut_at_shutdown():
    """The core ends the process if a batch starts after its queue was shut down; readers of streams tried to."""
    script = Path(__file__).with_name("grpc_streams_at_shutdown.py")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
