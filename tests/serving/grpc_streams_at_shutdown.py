"""Shuts servers down while streams are read and written. A fault ends the process with a signal, hence one of its own."""

import asyncio
import random
import threading

import grpc

from resnet_export.serving.grpc_core import CoreServer

SERVERS, STREAMS = 12, 6


async def read(call, messages):
    try:
        while (message := await call.read()) is not None:
            messages.put_nowait(message)
    finally:
        messages.put_nowait(None)


async def echo(call):
    messages = asyncio.Queue()
    reader = asyncio.create_task(read(call, messages))
    try:
        while message := await messages.get():
            await call.write(message, 30)
    finally:
        reader.cancel()


def use(port):
    """Send and read without end."""

    def endless():
        while True:
            yield bytes(100)

    def stream():
        options = [("grpc.use_local_subchannel_pool", 1)]
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
                for _ in channel.stream_stream("/a/b")(endless()):
                    pass
        except grpc.RpcError:
            pass

    for _ in range(STREAMS):
        threading.Thread(target=stream, daemon=True).start()


async def main():
    for _ in range(SERVERS):
        server = CoreServer(lambda path: echo, {}, 100)
        use(server.listen("127.0.0.1:0"))
        server.start()
        while len(server._calls) < STREAMS:
            await asyncio.sleep(0.01)
        await asyncio.sleep(random.random() / 10)
        await server.stop(None)


asyncio.run(main())
print("done", flush=True)
