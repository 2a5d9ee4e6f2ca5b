"""Latency and throughput of ONNX files, alternatives interleaved so that a noisy machine treats them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from .sessions import session

if TYPE_CHECKING:
    from .sessions import Session


WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """One file on one device, for one batch size and number of threads.

    Attributes:
        file, device, batch, threads: What ran; `threads` 0 is onnxruntime's choice.
        runs: Number of timed runs.
        p50, p90, p99: Milliseconds per batch.
        throughput: Rows per second at the median.
    """

    file: str
    device: str
    batch: int
    threads: int
    runs: int
    p50: float
    p90: float
    p99: float
    throughput: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def bench(
    files: Sequence[str | os.PathLike[str]],
    *,
    devices: Sequence[str] = ("auto",),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (0,),
    runs: int = 31,
    seed: int = 0,
) -> list[Timing]:
    """Time files against each other: in every round each one runs once.

    Args:
        files: ONNX files.
        devices: Devices, see `runtime.session`.
        batches: Batch sizes.
        threads: Threads within an operator; 0 is onnxruntime's choice.
        runs: Timed rounds per combination, after three to warm up.
        seed: Seed of the random input.

    Returns:
        List of `Timing`, for each batch size and thread count the files in their order.

    Raises:
        UsageError: A number below 1 (threads: below 0), or an unreadable file.
        DeviceError: A device does not start.
    """
    for name, numbers, low in (("batches", batches, 1), ("threads", threads, 0), ("runs", (runs,), 1)):
        if any(number < low for number in numbers):
            raise UsageError(f"`{name}` must be at least {low}, got {min(numbers)}")
    found = []
    for count in threads:
        sessions = [(str(file), session(file, device, threads=count or None)) for file in files for device in devices]
        for batch in batches:
            feeds = [random_feeds(model, batch, seed) for _, model in sessions]
            times = _interleaved(
                [lambda m=model, f=feed: m.run(f) for (_, model), feed in zip(sessions, feeds, strict=True)], runs
            )
            found += [
                _timing(file, model.device, batch, count, taken) for (file, model), taken in zip(sessions, times, strict=True)
            ]
    return found


def _interleaved(calls, runs):
    """Seconds of each call per round, as one list per call."""
    times = [[] for _ in calls]
    for turn in range(WARM_UP + runs):
        for call, taken in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            if turn >= WARM_UP:
                taken.append(time.perf_counter() - started)
    return times


def _timing(file, device, batch, threads, taken):
    p50, p90, p99 = (1000 * float(value) for value in np.quantile(taken, (0.5, 0.9, 0.99)))
    return Timing(file, device, batch, threads, len(taken), p50, p90, p99, batch / statistics.median(taken))


def random_feeds(model: Session, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random input for a session: pixels for integer inputs and images; dynamic sizes become 224.

    Raises:
        UsageError: The batch size is fixed to another number.
    """
    rng, feeds = np.random.default_rng(seed), {}
    for value in model.inputs:
        shape = [size if isinstance(size, int) else 224 for size in value.shape]
        if isinstance(value.shape[0], int) and value.shape[0] != batch:
            raise UsageError(f"{model.path.name} takes batches of {value.shape[0]}, not {batch}")
        shape[0] = batch
        feeds[value.name] = rng.integers(0, 256, shape).astype(value.dtype)
    return feeds
