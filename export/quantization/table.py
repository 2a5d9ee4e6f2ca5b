"""A file in lower precision next to the float32 file that it was made from: size, latency and agreement."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

from .. import artifact
from ..errors import UsageError
from ..results import ExportResult
from ..runtime.sessions import session
from .samples import Feeds, find_cases
from .source import Source

WARM_UP = 3


def side_by_side(source: Source, result: ExportResult, runs: int = 11) -> ExportResult:
    """Add the `table` to the result of `to_float16` or `to_int8`.

    Args:
        source: The float32 file.
        result: The result.
        runs: Timed runs of each file, on the CPU, in turns.

    Returns:
        The result with its table; without one, and with a note that says why, where no random input runs.
    """
    try:
        feeds = find_cases(source)[0].feeds
    except UsageError as error:
        return dataclasses.replace(result, notes=(*result.notes, f"not timed: {error}"))
    before, after = _milliseconds([source.path, Path(result.path)], feeds, runs)
    shares = [comparison.top1 for comparison in result.report.comparisons if comparison.top1 is not None]
    table = (
        {
            "precision": "float32",
            "size": artifact.disk_size(source.path),
            "milliseconds": before,
            "top1": 1.0 if shares else None,
        },
        {"precision": result.method, "size": result.size, "milliseconds": after, "top1": min(shares, default=None)},
    )
    return dataclasses.replace(result, table=table)


def _milliseconds(files: list[Path], feeds: Feeds, runs: int) -> list[float]:
    """Median latency of each file on one batch, the files in turns."""
    sessions = [session(file, "cpu") for file in files]
    seconds: list[list[float]] = [[] for _ in files]
    for turn in range(WARM_UP + runs):
        for opened, taken in zip(sessions, seconds, strict=True):
            started = time.perf_counter()
            opened.run(feeds)
            if turn >= WARM_UP:
                taken.append(time.perf_counter() - started)
    return [1000 * statistics.median(taken) for taken in seconds]
