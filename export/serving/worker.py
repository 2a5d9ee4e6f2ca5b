"""A process for work that would hold the interpreter's lock, and with it the event loop, for too long.

Arrays travel between the processes in pieces. In one piece, each copy of 100 MB would hold the lock for some 50 ms.
"""

import contextlib
import multiprocessing
import pickle
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from . import protocol

PIECE_BYTES = 128 * 1024


class WorkerEnded(Exception):
    """The worker process ended before it had answered; the next call starts another one."""


class Worker:
    """Calls functions in another process, one at a time. The process starts with the first call."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in the process and wait for its result.

        Args:
            function: A function of a module.
            *arguments: What it is called with. Large data should be arrays: bytes are copied as a whole.

        Returns:
            The function's result.

        Raises:
            WorkerEnded: The process ended meanwhile.
            Exception: Whatever the function raised.
        """
        if self._process is None:
            self._start()
        try:
            _send(self._connection, (function, arguments))
            succeeded, value = _receive(self._connection)
        except (EOFError, OSError) as error:
            self.close()
            raise WorkerEnded from error
        except BaseException:
            # Half a message may be on its way.
            self.close()
            raise
        if not succeeded:
            raise value
        return value

    def close(self) -> None:
        """End the process, whatever it does; a call that waits for it raises `WorkerEnded`."""
        process, self._process = self._process, None
        if process:
            process.kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), name="large JSON", daemon=True)
        self._process.start()
        theirs.close()


def _work(connection: Connection) -> None:
    """Do what is asked for until the other end of the connection is gone."""
    # Ctrl-C reaches every process of a terminal; the server says when this one ends.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, arguments = _receive(connection)
            try:
                answer = True, function(*arguments)
            except Exception as error:
                answer = False, error
            _send(connection, answer)
            # What was large is not kept until the next call.
            del function, arguments, answer


class _Pickler(pickle.Pickler):
    """Sends arrays of strings as bytes: a million strings in a pickle would be built under the interpreter's lock."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind == "O":
            return _strings, (np.frombuffer(protocol.to_bytes(value), "u1"), value.shape)
        return NotImplemented


def _strings(raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return protocol.from_bytes(raw.data, "BYTES", shape, "strings")


def _send(connection: Connection, value: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    head = _Bytes()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(value)
    views = [buffer.raw() for buffer in buffers]
    connection.send_bytes(pickle.dumps((bytes(head), [len(view) for view in views])))
    for view in views:
        for start in range(0, len(view), PIECE_BYTES):
            connection.send_bytes(view[start : start + PIECE_BYTES])


def _receive(connection: Connection) -> Any:
    head, sizes = pickle.loads(connection.recv_bytes())
    buffers = [np.empty(size, "u1") for size in sizes]
    for buffer in buffers:
        for start in range(0, len(buffer), PIECE_BYTES):
            connection.recv_bytes_into(buffer[start : start + PIECE_BYTES])
    return pickle.loads(head, buffers=buffers)


class _Bytes(bytearray):
    """A file for a pickle."""

    def write(self, data: bytes) -> None:
        self.extend(data)
