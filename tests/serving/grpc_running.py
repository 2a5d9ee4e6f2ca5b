"""A gRPC server in this process, on an event loop of its own, and raw HTTP/2 for what a client library would not do."""

import asyncio
import contextlib
import socket
import threading
import time

import grpc

from resnet_export.serving import grpc_messages as messages
from resnet_export.serving.batcher import BatchOptions
from resnet_export.serving.grpc_server import GrpcOptions, GrpcServer
from resnet_export.serving.models import ModelOptions, Source
from resnet_export.serving.repository import Repository
from resnet_export.serving.service import Service, ServiceOptions

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
END_STREAM, END_HEADERS, ACK = 1, 4, 1


class GrpcRunner:
    """A server over some models: `{name: path}`, or a repository folder."""

    def __init__(self, paths=None, folder=None, options=None, grace=10.0, listen=None, **model):
        batch = BatchOptions(max_rows=4, **model.pop("batch", {}))
        sources = [Source(name, "1", path) for name, path in (paths or {}).items()]
        repository = Repository(sources, folder, ModelOptions(device="cpu", threads=1, batch=batch, **model))
        repository.open(warm_up=True)
        self.service = Service(repository, ServiceOptions(**(options or {})), "9.9")
        self.server = GrpcServer(self.service, GrpcOptions("127.0.0.1", 0, grace, **(listen or {})))
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.on_loop(self.server.start())
        self.address = self.server.target

    def on_loop(self, coroutine, timeout=30):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    async def _stop(self):
        await self.server.stop()
        await self.service.close()

    def close(self):
        self.on_loop(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    def eventually(self, condition, seconds=10):
        """Wait until something is the case."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came to be"
            time.sleep(0.01)


@contextlib.contextmanager
def grpc_running(*arguments, **options):
    runner = GrpcRunner(*arguments, **options)
    try:
        yield runner
    finally:
        runner.close()


class Client:
    """Calls by method name; messages are those of `grpc_messages`, or bytes."""

    def __init__(self, address, credentials=None, **channel_options):
        options = [("grpc.max_receive_message_length", -1), *((f"grpc.{name}", value) for name, value in channel_options.items())]
        self.channel = (
            grpc.secure_channel(address, credentials, options) if credentials else grpc.insecure_channel(address, options)
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.channel.close()

    def start(self, method, message=b"", timeout=20, **more):
        path = method if method.startswith("/") else f"/{messages.TRITON_SERVICE}/{method}"
        data = message if isinstance(message, bytes) else message.SerializeToString()
        return self.channel.unary_unary(path).future(data, timeout=timeout, **more)

    def __call__(self, method, message=b"", **more):
        path = method if method.startswith("/") else f"/{messages.TRITON_SERVICE}/{method}"
        return messages.METHODS[path].response.FromString(self.start(method, message, **more).result())

    def stream(self, requests, **more):
        """The answers to `ModelInferRequest`s that an iterator gives."""
        encoded = (request.SerializeToString() for request in requests)
        for answer in self.channel.stream_stream(messages.STREAM_METHOD)(encoded, timeout=20, **more):
            yield messages.ModelStreamInferResponse.FromString(answer)


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(name, value):
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def opening(method, stream=1):
    """The frames that open a connection, whose client grants no more than the initial window, and a call."""
    path = f"/{messages.TRITON_SERVICE}/{method}".encode()
    head = b"\x83\x86" + _literal(b":path", path) + _literal(b":authority", b"x") + _literal(b"te", b"trailers")
    return (
        PREFACE
        + frame(SETTINGS, 0, 0)
        + frame(HEADERS, END_HEADERS, stream, head + _literal(b"content-type", b"application/grpc"))
    )


def data_frames(message, stream=1):
    """A whole message, in frames as large as every peer must take."""
    data = b"\0" + len(message).to_bytes(4, "big") + message
    parts = [data[start : start + 16384] for start in range(0, len(data), 16384)]
    return b"".join(frame(DATA, END_STREAM if part is parts[-1] else 0, stream, part) for part in parts)


def connected(address):
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=10)


def answer_pings(connection, seconds):
    """Read what comes and answer pings and settings, but never grant more window; whether the server hung up in time."""
    end, data = time.monotonic() + seconds, b""
    connection.settimeout(0.1)
    while time.monotonic() < end:
        try:
            chunk = connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            return True
        if not chunk:
            return True
        data += chunk
        while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
            length = int.from_bytes(data[:3], "big")
            kind, flags, payload = data[3], data[4], data[9 : 9 + length]
            data = data[9 + length :]
            if kind in (PING, SETTINGS) and not flags & ACK:
                connection.sendall(frame(kind, ACK, 0, payload if kind == PING else b""))
    return False
