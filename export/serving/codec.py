"""Decoding and encoding without holding up the event loop.

Small messages are decoded where they are. Larger ones go to a thread. JSON holds Python's global lock for as long as it is
parsed, so that a thread would not help: above `PROCESS_BYTES` it goes to a process of its own.
"""

import asyncio
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from . import protocol
from .protocol import InferRequest, ProtocolError

# Up to here the work takes less time than handing it over is worth.
INLINE_BYTES = 64 * 1024
# JSON of this size is parsed in about 10 ms; the numbers are those of its text.
PROCESS_BYTES = 1024 * 1024
PROCESS_NUMBERS = 100_000

Result = TypeVar("Result")
Tensors = list[tuple[str, np.ndarray, bool]]


class Codec:
    """Decodes requests and encodes answers, wherever that keeps the event loop free.

    Args:
        threads: Number of threads.
        max_json: Largest JSON part of a request or an answer, in bytes.
    """

    def __init__(self, threads: int, max_json: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._max_json = max_json
        self._process: ProcessPoolExecutor | None = None

    async def decode_request(self, body: bytes | bytearray, json_length: int | None) -> InferRequest:
        """Decode an inference request, see `protocol.decode_request`.

        Raises:
            ProtocolError: The body is not an inference request (400), or its JSON is larger than allowed (413).
        """
        size = len(body) if json_length is None else json_length
        if size > self._max_json:
            raise ProtocolError(
                f"the JSON of the request has {size:,} bytes, more than {self._max_json:,}; send the tensors as binary data", 413
            )
        if size > PROCESS_BYTES:
            return await self._in_process(protocol.decode_request, body, json_length)
        # A body with little JSON may still hold many strings.
        if len(body) > INLINE_BYTES:
            return await self.in_thread(protocol.decode_request, body, json_length)
        return protocol.decode_request(body, json_length)

    async def encode_response(
        self, model_name: str, model_version: str, tensors: Tensors, request_id: str | None
    ) -> tuple[list[bytes | memoryview], int | None]:
        """Encode an inference response, see `protocol.response_parts`.

        Raises:
            ProtocolError: JSON cannot express an output (400), or needs more bytes than allowed (413).
        """
        arguments = (model_name, model_version, tensors, request_id, self._max_json)
        numbers = sum(array.size for _, array, binary in tensors if not binary)
        if 2 * numbers > self._max_json:
            raise ProtocolError(f"{numbers:,} numbers are too many for JSON; ask for binary data", 413)
        if numbers > PROCESS_NUMBERS:
            return await self._in_process(_response, *arguments)
        if numbers * 8 > INLINE_BYTES or any(array.dtype.kind == "O" and array.size > 1000 for _, array, _ in tensors):
            return await self.in_thread(protocol.response_parts, *arguments)
        return protocol.response_parts(*arguments)

    async def decompress(self, body: bytes | bytearray, encoding: str, limit: int) -> bytes | bytearray:
        """Decompress a body, see `protocol.decompress`."""
        return await self.in_thread(protocol.decompress, body, encoding, limit)

    async def compress(self, parts: list[bytes | memoryview], encoding: str) -> bytes:
        """Compress an answer, see `protocol.compress`."""
        if sum(map(len, parts)) > INLINE_BYTES:
            return await self.in_thread(protocol.compress, parts, encoding)
        return protocol.compress(parts, encoding)

    async def in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def close(self) -> None:
        """Give the threads and the process back."""
        self._threads.shutdown()
        if self._process:
            self._process.shutdown(wait=False, cancel_futures=True)

    async def _in_process(self, function: Callable[..., Result], *arguments: Any) -> Result:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._process = ProcessPoolExecutor(1, mp_context=context, initializer=_begin_worker)
        process = self._process
        try:
            return await asyncio.get_running_loop().run_in_executor(process, function, *arguments)
        except BrokenProcessPool as error:
            if self._process is process:
                self._process = None
            reason = "the process that handles large JSON has ended; try again later, or use binary data"
            raise ProtocolError(reason, 503, {"Retry-After": "1"}) from error


def _begin_worker() -> None:
    # Ctrl-C reaches every process of a terminal; the server says when this one ends.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the server has been killed; the executor's own pipes would stay open for ever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(0)


def _response(*arguments: Any) -> tuple[list[bytes | memoryview], int | None]:
    parts, length = protocol.response_parts(*arguments)
    return [bytes(part) for part in parts], length
