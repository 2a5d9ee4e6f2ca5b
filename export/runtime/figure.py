"""A figure of benchmark timings: latency and throughput over the batch size, one line per file, device and thread count."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact import written
from ..errors import DeviceError, UsageError

if TYPE_CHECKING:
    from .benchmark import Timing

FORMATS = (".png", ".svg", ".pdf")


def check(path: str | os.PathLike[str]) -> None:
    """Raise before anything is measured if no figure could be drawn.

    Raises:
        DeviceError: Matplotlib is not installed.
        UsageError: The name does not end in one of `FORMATS`.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"the name of a figure must end in {', '.join(FORMATS)}, got {str(path)!r}")
    try:
        found = importlib.util.find_spec("matplotlib") is not None
    except ValueError:  # set to None in sys.modules
        found = False
    if not found:
        raise DeviceError("a figure needs matplotlib: pip install 'keras-resnet-export[demo]'")


def draw(timings: Sequence[Timing], path: str | os.PathLike[str]) -> None:
    """Draw `benchmark.Timing`s into a file.

    Args:
        timings: List of `benchmark.Timing`.
        path: `.png`, `.svg` or `.pdf` file.

    Raises:
        UsageError: The file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for (name, rows), marker in zip(_lines(timings).items(), "osv^D<>Pp*hX" * (1 + len(timings) // 12), strict=False):
        batches, p50 = [row.batch for row in rows], [row.p50 for row in rows]
        tail = [[0] * len(rows), [row.p99 - row.p50 for row in rows]]
        latency.errorbar(batches, p50, tail, marker=marker, markersize=4, capsize=3, label=name)
        throughput.plot(batches, [row.throughput for row in rows], marker=marker, markersize=4, label=name)
    for axis, title, unit in (
        (latency, "latency: p50, whisker to p99", "ms per batch"),
        (throughput, "throughput", "rows per second"),
    ):
        batches = sorted({row.batch for row in timings})
        axis.set(title=title, xlabel="batch size", ylabel=unit, xscale="log", xticks=batches, xticklabels=batches, ylim=(0, None))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    throughput.legend(fontsize="small")
    with rc_context({"svg.fonttype": "none"}), written(path) as target:
        figure.savefig(target, dpi=120)


def _lines(timings):
    """`{name: [Timing per batch]}`; a name says only what differs between the lines."""
    devices, threads = ({getattr(row, key) for row in timings} for key in ("device", "threads"))
    found = {}
    for row in timings:
        parts = [Path(row.file).name]
        if len(devices) > 1:
            parts.append(row.device)
        if len(threads) > 1:
            parts.append({0: "default threads", 1: "1 thread"}.get(row.threads, f"{row.threads} threads"))
        name, copy = ", ".join(parts), 1
        while any(entry.batch == row.batch for entry in found.get(name, ())):  # the same file twice
            copy += 1
            name = f"{', '.join(parts)} ({copy})"
        found.setdefault(name, []).append(row)
    return found
