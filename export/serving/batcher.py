"""Micro-batching by rows: requests of the same shape that wait at the same time run as one batch.

`Batcher.submit` queues a request, `_pump` decides when a batch starts, `_take` picks its requests, and `_execute` runs it in a
thread. Everything else happens on the event loop's thread, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np


class QueueFull(Exception):
    """More rows wait than the queue may hold."""


class DeadlineExceeded(Exception):
    """The request was not answered in the time it had."""


@dataclass(frozen=True)
class BatchOptions:
    """How requests are put together.

    Args:
        max_rows: Rows per run; a larger request is split.
        max_delay: Seconds that a request waits for others which are on their way or likely to come; without such it never waits.
        queue_rows: Rows that may wait; more are refused.
        instances: Runs at a time.
    """

    max_rows: int = 16
    max_delay: float = 0.005
    queue_rows: int = 1024
    instances: int = 1

    def __post_init__(self) -> None:
        for name in ("max_rows", "queue_rows", "instances"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.max_delay <= 60:
            raise ValueError(f"`max_delay` must be between 0 and 60 seconds, got {self.max_delay}")


@dataclass(frozen=True, eq=False)
class Timing:
    """Nanoseconds that one run took: gathering its rows, the model itself, handing out the results."""

    rows: int
    gather: int
    infer: int
    scatter: int


@dataclass(frozen=True)
class Answer:
    """The outputs of a request, the nanoseconds that it waited in the queue, and the `Timing` of every run it was part of."""

    outputs: dict[str, np.ndarray]
    queued: int
    runs: tuple[Timing, ...]


@dataclass(eq=False)
class _Item:
    inputs: dict[str, np.ndarray]
    rows: int
    future: asyncio.Future
    arrived: int = field(default_factory=time.monotonic_ns)
    state: str = "queued"
    is_last: bool = False


class Batcher:
    """Collects requests of one model and runs them in batches.

    Differs from batchers that count requests: it counts rows, and it never mixes inputs of different shapes. An idle batcher
    runs a batch at once, with two exceptions: it was told (`announced`) that more is about to arrive, or it has just answered
    several rows, whose senders get `max_delay` to ask again. While all instances run, the next full batch of each is prepared, so
    that its thread need not wait for the event loop. Its rows count as waiting until it begins.

    Args:
        run: Function `{name: array} -> {name: array}`, called in a thread.
        options: `BatchOptions`.
        observe: Called with the `Timing` of every run that succeeded.
        batched: Whether the first axis of every array counts rows; otherwise every request runs alone, and counts as one row.
        threads: Threads to run in, shared with other batchers, which closes them; by default the batcher has `instances` of its
            own. A batch that waits for a shared thread counts as waiting.
    """

    def __init__(
        self,
        run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
        options: BatchOptions,
        observe: Callable[[Timing], object] = lambda timing: None,
        batched: bool = True,
        threads: ThreadPoolExecutor | None = None,
    ) -> None:
        self.options, self.batched = options, batched
        self._run, self._observe = run, observe
        self._groups = {}
        self._waiting = self._running = self._coming = self._pending = 0
        self._freed = self._expected = 0
        self._timer: asyncio.TimerHandle | None = None
        self._drained: asyncio.Future[None] | None = None
        self._started_rows = 0
        self._is_sharing = threads is not None
        self._threads = threads or ThreadPoolExecutor(options.instances, thread_name_prefix="infer")

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return self._waiting

    @property
    def unfinished(self) -> int:
        """Rows in the queue, and rows of the batches that run."""
        return self._waiting + self._started_rows

    @property
    def pending(self) -> int:
        """Requests in the queue; a large one counts once however many parts it has."""
        return self._pending

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Around the reading of a request that will be submitted next: until then others may wait `max_delay` for it."""
        self._coming += 1
        try:
            yield
        except BaseException:
            self._coming -= 1
            # It will not come, so whoever waited for it need wait no longer.
            self._pump()
            raise
        self._coming -= 1

    async def submit(self, inputs: dict[str, np.ndarray], timeout: float | None = None) -> Answer:
        """Run one request, together with others where that serves.

        Args:
            inputs: `{name: array}`; of a batched model all with the same number of rows, at least one.
            timeout: Seconds until the answer is of no use.

        Returns:
            Answer

        Raises:
            QueueFull: More rows wait than may; the request was not taken.
            DeadlineExceeded: The time is over; what had not begun does not run.
            Exception: Whatever `run` raised.
        """
        if self._drained:
            raise RuntimeError("this batcher is closed")
        rows = self._rows(inputs)
        if self._waiting and self._waiting + rows > self.options.queue_rows:
            raise QueueFull(f"{self._waiting} rows wait already; at most {self.options.queue_rows} may")
        items = [self._enqueue(part) for part in _split(inputs, rows, self.options.max_rows)]
        # The last part begins last; until then the request is in the queue.
        items[-1].is_last, self._pending = True, self._pending + 1
        answers = [item.future for item in items]
        try:
            async with asyncio.timeout(timeout) as limit:
                self._pump()
                done = await asyncio.gather(*answers)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceeded(f"no answer within {timeout:g} s") from error
        finally:
            while items:
                self._drop(items.pop())
            # An error's traceback refers to this frame; together they would be a cycle, and the inputs would stay in memory.
            del answers
        return Answer(
            _joined([outputs for outputs, _, _ in done]),
            queued=max(queued for _, queued, _ in done),
            runs=tuple(timing for _, _, timing in done),
        )

    async def close(self) -> None:
        """Finish what was submitted, take no more, and give the threads back."""
        self._drained = self._drained or asyncio.get_running_loop().create_future()
        self._check_drained()
        await self._drained
        if not self._is_sharing:
            self._threads.shutdown()

    def _rows(self, inputs):
        return len(next(iter(inputs.values()))) if self.batched else 1

    def _enqueue(self, inputs):
        key = object()
        if self.batched:
            key = tuple((name, array.shape[1:], array.dtype.str) for name, array in sorted(inputs.items()))
        item = _Item(inputs, self._rows(inputs), asyncio.get_running_loop().create_future())
        self._groups.setdefault(key, deque()).append(item)
        self._waiting += item.rows
        return item

    def _drop(self, item):
        """Take back what nobody waits for any longer; `_live_groups` sweeps it out of the queue."""
        item.future.cancel()
        if item.state == "queued":
            item.state, item.inputs = "dropped", None
            self._waiting -= item.rows
            self._pending -= item.is_last
            self._check_drained()

    def _check_drained(self):
        if self._drained and not self._drained.done() and not self._waiting and not self._running:
            self._drained.set_result(None)

    def _pump(self):
        """Start as many runs as may start now, and look again when the oldest request has waited long enough."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        while self._running < 2 * self.options.instances and (groups := self._live_groups()):
            if self._running >= self.options.instances and not self._is_full(groups[0]):
                return
            holds = [self._hold(group) for group in groups]
            if min(holds) > 0:
                self._timer = asyncio.get_running_loop().call_later(min(holds), self._pump)
                return
            self._start(self._take(next(group for group, hold in zip(groups, holds, strict=True) if hold <= 0)))

    def _is_full(self, group):
        """Whether nothing that may still come could be added to the next batch of a group."""
        return not self.batched or self._holds(group, self.options.max_rows)

    @staticmethod
    def _holds(group: Iterable[_Item], enough: int) -> bool:
        """Whether a group has at least `enough` rows."""
        rows = 0
        for item in group:
            rows += item.rows if item.state == "queued" else 0
            if rows >= enough:
                return True
        return False

    def _live_groups(self):
        """Groups with something to run, the one whose first request is oldest first."""
        for key, group in list(self._groups.items()):
            while group and group[0].state != "queued":
                group.popleft()
            if not group:
                del self._groups[key]
        return sorted(self._groups.values(), key=lambda group: group[0].arrived)

    def _hold(self, group):
        """Seconds for which a batch of this group should still be held back."""
        since = []
        if self._coming:
            since.append(group[0].arrived)
        if self._expected > 1:
            since.append(self._freed)
        if not since or not self.batched:
            return 0
        enough = self.options.max_rows if self._coming else min(self._expected, self.options.max_rows)
        if self._holds(group, enough):
            return 0
        return self.options.max_delay - (time.monotonic_ns() - max(since)) / 1e9

    def _take(self, group):
        """The first requests of a group, in order, as many as fit."""
        batch, rows = [], 0
        while group and (group[0].state != "queued" or rows + group[0].rows <= self.options.max_rows):
            item = group.popleft()
            if item.state == "queued":
                rows += item.rows
                batch.append(item)
        return batch

    def _start(self, batch):
        loop = asyncio.get_running_loop()
        begun = functools.partial(loop.call_soon_threadsafe, self._begin, batch)
        if self._running < self.options.instances and not self._is_sharing:
            self._begin(batch)
            begun = None
        self._running += 1
        job = loop.run_in_executor(self._threads, _execute, self._run, batch, self.batched, begun)
        job.add_done_callback(lambda job: self._finish(batch, job))

    def _begin(self, batch):
        for item in batch:
            if item.state == "queued":
                item.state = "running"
                self._waiting -= item.rows
                self._started_rows += item.rows
                self._pending -= item.is_last

    def _finish(self, batch, job):
        self._running -= 1
        # Clients that ask one question after the other will be back at once; without them a batch would split in two for good.
        self._freed, self._expected = time.monotonic_ns(), self._waiting + sum(item.rows for item in batch)
        error = None if job.cancelled() else job.exception()
        done = {} if job.cancelled() or error else job.result()
        for item in batch:
            self._started_rows -= item.rows if item.state == "running" else 0
            item.state, item.inputs = "done", None
            if item.future.done():
                continue
            if job.cancelled():
                item.future.cancel()
            elif error or isinstance(done[item].outcome, Exception):
                item.future.set_exception(error or done[item].outcome)
            else:
                found = done[item]
                item.future.set_result((found.outcome, found.began - item.arrived, found.timing))
        for timing in dict.fromkeys(found.timing for found in done.values() if found.timing):
            self._observe(timing)
        self._pump()
        self._check_drained()


def _split(inputs, rows, size):
    for start in range(0, rows, size):
        yield inputs if rows <= size else {name: array[start : start + size] for name, array in inputs.items()}


def _joined(parts):
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class _Done:
    """What became of one request of a batch: its outputs or the error, when its run began, and the `Timing` of that run."""

    outcome: dict[str, np.ndarray] | Exception
    began: int
    timing: Timing | None


def _execute(run, batch, batched, begun):
    """Run a batch (in a thread): `{item: _Done}`, without those whose client has gone.

    `begun` is called first, if the batch had to wait for its turn: who has gone meanwhile has taken the inputs along.
    """
    if begun:
        begun()
    live = [(item, inputs) for item in batch if (inputs := item.inputs) is not None]
    if not live:
        return {}
    try:
        return _run_together(run, live, batched)
    except Exception as error:
        if len(live) == 1:
            return {live[0][0]: _failed(error)}
    # One request of several cannot be run, or all together are too much: each gets its own answer, or its own error.
    done = {}
    for pair in live:
        try:
            done |= _run_together(run, [pair], batched)
        except Exception as error:
            done[pair[0]] = _failed(error)
    return done


def _failed(error):
    """A run that failed, without the traceback, whose frames would keep the inputs in memory in a cycle."""
    return _Done(error.with_traceback(None), 0, None)


def _run_together(run, live, batched):
    began = time.monotonic_ns()
    items = [item for item, _ in live]
    inputs = _joined([inputs for _, inputs in live])
    gathered = time.monotonic_ns()
    outputs = run(inputs)
    inferred = time.monotonic_ns()
    counts = [item.rows for item in items]
    results = _shares(outputs, counts) if batched else [outputs]
    timing = Timing(sum(counts), gathered - began, inferred - gathered, time.monotonic_ns() - inferred)
    return {item: _Done(result, began, timing) for item, result in zip(items, results, strict=True)}


def _shares(outputs, counts):
    for name, array in outputs.items():
        if array.ndim == 0 or len(array) != sum(counts):
            raise ValueError(f"output {name!r} has shape {list(array.shape)} for {sum(counts)} rows")
    if len(counts) == 1:
        return [outputs]
    ends = np.cumsum(counts).tolist()
    # Copies, because one client that does not read its answer would keep the outputs of the whole batch in memory.
    return [
        {name: array[end - rows : end].copy() for name, array in outputs.items()} for rows, end in zip(counts, ends, strict=True)
    ]
