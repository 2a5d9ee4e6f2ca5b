"""A family that is served under one name: each request goes to one of its members, which the answer names."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..family import Family, Member, check_files, is_family, read_family
from .batcher import QueueFull
from .models import ServedModel, Source, buckets
from .protocol import ProtocolError
from .statistics import Statistics, total

if TYPE_CHECKING:
    from .models import ModelOptions

RUNS = 5
# Latencies are estimated from medians; a deadline leaves room for what they do not show.
MARGIN = 1.25


def open_model(source: Source, options: ModelOptions) -> ServedModel:
    """Open a version of a model: a single file, or a family.

    Raises:
        UsageError: A file is missing or damaged, or the members of a family do not fit together.
        MismatchError: A member of a family is not the file that `family.json` names.
        DeviceError: The device does not start.
    """
    return ServedFamily(source, options) if is_family(source.path) else ServedModel(source, options)


def member_sources(source: Source) -> list[Source]:
    """Return the members of a family as models of their own, for servers that know no families; any other source as it is.

    Raises:
        UsageError, MismatchError: As `open_model`.
    """
    if not is_family(source.path):
        return [source]
    family = read_family(source.path)
    check_files(source.path, family.members)
    return [
        dataclasses.replace(source, name=f"{source.name}-{member.name}", path=source.path.parent / member.file)
        for member in family.members
    ]


class ServedFamily(ServedModel):
    """A family, opened. It is the model of its deepest member, and sends requests to others where that is asked for or needed.

    Members share their threads, so that no more batches run at a time than with a single model.

    Args:
        source: Where `family.json` is.
        options: `ModelOptions`.

    Raises:
        UsageError, MismatchError, DeviceError: As `open_model`.
    """

    def __init__(self, source: Source, options: ModelOptions) -> None:
        self.family = read_family(source.path)
        check_files(source.path, self.family.members)
        self._threads = ThreadPoolExecutor(options.batch.instances, thread_name_prefix="infer")
        first, *others = self.family.members
        super().__init__(_source_of(source, first), options, first.name, self._threads)
        self.members: list[ServedModel] = [self]
        for member in others:
            opened = ServedModel(_source_of(source, member), options, member.name, self._threads)
            _check_alike(source, self, opened, member)
            self.members.append(opened)
        self.seconds = [_as_measured(self.family, member, options.batch.max_rows) for member in self.family.members]
        self._ladder = _faster_and_faster(self.seconds)

    def parts(self) -> list[ServedModel]:
        return self.members

    def total_statistics(self) -> Statistics:
        return total([member.statistics for member in self.members])

    def warm_up(self) -> None:
        """Run every batch size of every member, and measure how long each takes."""
        for member in self.members:
            ServedModel.warm_up(member)
        if self.options.warm_up and (measured := _measured(self.members)):
            self.seconds = measured
            self._ladder = _faster_and_faster(measured)

    async def close(self) -> None:
        await super().close()
        for member in self.members[1:]:
            await member.close()
        self._threads.shutdown()

    def announced(self) -> contextlib.AbstractContextManager[None]:
        # Which member a request asks for is not known yet.
        return self.members[self._candidates()[0]].batcher.announced()

    def choose(self, parameters: dict[str, Any], rows: int = 1, timeout: float | None = None) -> ServedModel:
        """Choose the member that answers a request.

        A request that names one (`parameters.depth`) gets it. Otherwise it is the deepest one, or with `ModelOptions.adaptive`
        one member shallower for each full batch that waits. A request with a timeout gets the deepest member from there on that
        is likely to answer in time, or the fastest one.

        Args:
            parameters: Parameters of the request.
            rows: Its rows.
            timeout: Seconds after which the client no longer wants an answer.

        Raises:
            ProtocolError: There is no such member (400), or too many rows wait (503).
        """
        waiting = self._waiting()
        if waiting and waiting + rows > self.options.batch.queue_rows:
            self.statistics.failed(0)
            raise self.busy(QueueFull(f"{waiting} rows wait already; at most {self.options.batch.queue_rows} may"))
        if (depth := parameters.get("depth")) is not None:
            return self.members[self._named(depth)]
        candidates = self._candidates()
        if timeout is None:
            return self.members[candidates[0]]
        queued = sum(self._takes(number, member.batcher.unfinished) for number, member in enumerate(self.members))
        queued /= self.options.batch.instances
        in_time = (number for number in candidates if MARGIN * (queued + self._takes(number, rows)) <= timeout)
        return self.members[next(in_time, candidates[-1])]

    def _waiting(self) -> int:
        return sum(member.batcher.waiting for member in self.members)

    def _candidates(self) -> list[int]:
        """Positions of the members from the one on that the queue allows, the deepest first."""
        full_batch = self.options.batch.max_rows if self.batched else 1
        level = self._waiting() // full_batch if self.options.adaptive else 0
        return self._ladder[min(level, len(self._ladder) - 1) :]

    def _named(self, depth: object) -> int:
        names = [member.name for member in self.family.members]
        found = self.family.member(depth) if isinstance(depth, str | float | int) and not isinstance(depth, bool) else None
        if found is None:
            raise ProtocolError(f"model {self.source.name!r} has no depth {str(depth)[:40]!r}; it has {', '.join(names)}")
        return names.index(found.name)

    def _takes(self, number: int, rows: int) -> float:
        """Seconds that a member needs for this number of rows, in batches."""
        seconds = self.seconds[number]
        most = max(seconds)
        full, rest = divmod(rows, most)
        return full * seconds[most] + (seconds[min(size for size in seconds if size >= rest)] if rest else 0.0)


def _source_of(source: Source, member: Member) -> Source:
    return dataclasses.replace(source, path=source.path.parent / member.file)


def _check_alike(source: Source, first: ServedModel, other: ServedModel, member: Member) -> None:
    """Refuse a member that is another model: other labels, inputs or outputs."""
    for what, of in (
        ("labels", lambda model: model.labels),
        ("inputs", lambda model: model.inputs),
        ("outputs", lambda model: model.outputs),
    ):
        if of(first) != of(other):
            raise UsageError(f"{source.path}: the member {member.file} has other {what} than {first.source.path.name}")


def _as_measured(family: Family, member: Member, max_rows: int) -> dict[int, float]:
    """Seconds by the number of rows as `family.json` has them, in proportion to the rows, until they are measured here."""
    per_row = member.latency_ms / 1000 / family.measured.get("batch", 1)
    return {rows: rows * per_row for rows in buckets(max_rows)}


def _measured(members: Sequence[ServedModel]) -> list[dict[int, float]]:
    """Median seconds of each member by the number of rows, in turns; empty where the input's size is not known."""
    found: list[dict[int, float]] = [{} for _ in members]
    for rows, inputs in members[0].warm_inputs():
        times = [[_timed(member, inputs) for member in members] for _ in range(RUNS)]
        for seconds, taken in zip(found, zip(*times, strict=True), strict=True):
            seconds[rows] = statistics.median(taken)
    return found if found[0] else []


def _timed(member, inputs):
    started = time.perf_counter()
    member.run_once(inputs)
    return time.perf_counter() - started


def _faster_and_faster(seconds: Sequence[dict[int, float]]) -> list[int]:
    """Positions of the members that are worth a choice, deepest first: each is faster per row than all before it."""
    found, best = [], math.inf
    for number, measured in enumerate(seconds):
        rows = max(measured)
        if measured[rows] / rows < best:
            best = measured[rows] / rows
            found.append(number)
    return found
