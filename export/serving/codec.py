"""Decoding and encoding without holding up the event loop.

Small messages are decoded where they are. Larger ones go to a thread. JSON holds Python's global lock for as long as it is
parsed, so that a thread would not help: above `PROCESS_BYTES` it goes to a process of its own.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from . import protocol
from .protocol import InferRequest, ProtocolError
from .worker import Worker, WorkerEnded

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
        self._worker, self._waiting = Worker(), ThreadPoolExecutor(1, thread_name_prefix="large JSON")

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
            return await self._in_process(_decoded, np.frombuffer(body, "u1"), json_length)
        # A body with little JSON may still hold many strings.
        if len(body) > INLINE_BYTES:
            return await self.in_thread(protocol.decode_request, body, json_length)
        return protocol.decode_request(body, json_length)

    async def encode_response(
        self,
        model_name: str,
        model_version: str,
        tensors: Tensors,
        request_id: str | None,
        parameters: dict[str, str] | None = None,
    ) -> tuple[list[bytes | memoryview], int | None]:
        """Encode an inference response, see `protocol.response_parts`.

        Raises:
            ProtocolError: JSON cannot express an output (400), or needs more bytes than allowed (413).
        """
        arguments = (model_name, model_version, tensors, request_id, self._max_json, parameters)
        numbers = sum(array.size for _, array, binary in tensors if not binary)
        if 2 * numbers > self._max_json:
            raise ProtocolError(f"{numbers:,} numbers are too many for JSON; ask for binary data", 413)
        if numbers > PROCESS_NUMBERS:
            parts, length = await self._in_process(_encoded, *arguments)
            return [part.data for part in parts], length
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
        self._waiting.shutdown(wait=False, cancel_futures=True)
        self._worker.close()

    async def _in_process(self, function: Callable[..., Result], *arguments: Any) -> Result:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._waiting, self._worker.call, function, *arguments)
        except WorkerEnded as error:
            reason = "the process that handles large JSON has ended; try again later, or use binary data"
            raise ProtocolError(reason, 503, {"Retry-After": "1"}) from error


def _decoded(body: np.ndarray, json_length: int | None) -> InferRequest:
    return protocol.decode_request(body.data, json_length)


def _encoded(*arguments: Any) -> tuple[list[np.ndarray], int | None]:
    parts, length = protocol.response_parts(*arguments)
    return [np.frombuffer(part, "u1") for part in parts], length
