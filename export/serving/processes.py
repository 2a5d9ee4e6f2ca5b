"""Several server processes on one port: the kernel spreads connections over them, and a parent starts, watches and stops them.

Each process is a complete server with models, queues and limits of its own. They share nothing but the
port, so that the interpreter lock of one does not hold up the others.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from ..errors import ExportError, UsageError

log = logging.getLogger("resnet_export.serving")

Announce = Callable[..., None]  # (event, message, **details)

RESTART_PAUSE = 1.0  # seconds between the end of a process and the start of the next in its place


def check_platform() -> None:
    """Check that the kernel can distribute connections over several processes.

    Raises:
        UsageError: This system cannot.
    """
    if not sys.platform.startswith("linux"):
        raise UsageError("--processes needs Linux, whose kernel spreads connections over processes; leave it out")


@contextlib.contextmanager
def reserved_port(host: str, port: int, flag: str = "--port") -> Iterator[int]:
    """Hold a port for processes that bind it with `SO_REUSEPORT`.

    Args:
        host: Address to listen on.
        port: Port, 0 for a free one.
        flag: The option that chose the port, for the error message.

    Yields:
        The port.

    Raises:
        UsageError: The port is in use, also by a server that shares its port.
    """
    from .server import ServerOptions, bind

    # A port that another server shares can be bound with SO_REUSEPORT, but not without.
    with bind(ServerOptions(host, port), flag):
        pass
    with bind(ServerOptions(host, port, reuse_port=True), flag) as held:
        yield held.getsockname()[1]


@dataclass
class _Child:
    index: int
    process: Any
    events: Connection
    is_ready: bool = False


class Supervisor:
    """Starts server processes, replaces those that end unasked, and passes signals on to them.

    Args:
        serve: A function that can be pickled and that serves until a signal comes: `(index, announce) -> None`.
        count: Number of processes.
        announce: Called with the events of the first process until all are ready, then with `ready`, and at the end with
            `stopped`.
    """

    def __init__(self, serve: Callable[[int, Announce], Any], count: int, announce: Announce) -> None:
        self.serve, self.count, self.announce = serve, count, announce
        self._children: list[_Child] = []
        self._ended_by: int | None = None
        self._was_ready = False

    def run(self) -> int | None:
        """Serve until a signal comes, and wait for all processes to end.

        Returns:
            The signal.

        Raises:
            ExportError: A process could not start, or ended before it was ready.
        """
        old = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            for index in range(self.count):
                self._start(index)
            while self._children:
                by_pipe = {child.events: child for child in self._children}
                for pipe in wait(list(by_pipe)):
                    self._hear(by_pipe[pipe])  # type: ignore[index]
        finally:
            self._send(signal.SIGTERM)
            for child in self._children:
                child.process.join()
            for number, handler in old.items():
                signal.signal(number, handler)
        self.announce("stopped", "stopped")
        return self._ended_by

    def _start(self, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_in_child, args=(self.serve, index, theirs), name=f"server {index}")
        process.start()
        theirs.close()
        self._children.append(_Child(index, process, ours))
        # A signal that came while the process was not in the list has not reached it.
        if self._ended_by is not None:
            self._send(self._ended_by)

    def _hear(self, child: _Child) -> None:
        try:
            event = child.events.recv()
        except (EOFError, OSError):
            return self._replace(child)
        if isinstance(event, ExportError):
            if not self._was_ready:
                raise event
            log.error("process %d cannot start: %s", child.index, event)
            return None
        name, text, details = event
        if name == "ready":
            child.is_ready = True
            if not self._was_ready and all(other.is_ready for other in self._children):
                self._was_ready = True
                self.announce(name, text, **details)
        elif child.index == 0 and not self._was_ready:
            self.announce(name, text, **details)

    def _replace(self, child: _Child) -> None:
        child.process.join()
        self._children.remove(child)
        if self._ended_by is None and not self._was_ready:
            raise ExportError(f"process {child.index} ended with exit code {child.process.exitcode} before it was ready")
        if self._ended_by is None:
            log.error("process %d ended with exit code %s and is replaced", child.index, child.process.exitcode)
            time.sleep(RESTART_PAUSE)
        if self._ended_by is None:
            self._start(child.index)

    def _pass_on(self, number: int, frame: Any) -> None:
        if number != signal.SIGHUP:
            self._ended_by = self._ended_by or number
        self._send(number)

    def _send(self, number: int) -> None:
        for child in self._children:
            if child.process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.process.pid, number)


def _in_child(serve: Callable[[int, Announce], Any], index: int, events: Connection) -> None:
    """Serve in a child process, which reports its events to the parent and ends when the parent does."""
    os.setsid()  # Ctrl-C in a terminal is for the parent, which passes it on
    threading.Thread(target=_stop_with_parent, args=(events,), daemon=True).start()

    def announce(event: str, text: str, **details: Any) -> None:
        if event != "stopped":
            with contextlib.suppress(OSError):
                events.send((event, text, details))

    try:
        serve(index, announce)
    except ExportError as error:
        with contextlib.suppress(OSError):
            events.send(error)
        sys.exit(error.exit_code)


def _stop_with_parent(events: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        events.recv()
    os.kill(os.getpid(), signal.SIGTERM)
