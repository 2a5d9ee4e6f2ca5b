"""The segments of a run: epochs in which model, optimiser and image size stay as they are."""

import itertools
from dataclasses import dataclass

from .run import Run


@dataclass(frozen=True)
class Segment:
    """Epochs of a run in which model, optimiser and image size stay as they are.

    Args:
        start: First epoch, from 0.
        end: Epoch after the last.
        growth: Growth events `(epoch, after, blocks)` that come before the first epoch.
        frozen: Whether the backbone is frozen.
        small: Whether training crops are smaller than the model's input.
    """

    start: int
    end: int
    growth: tuple
    frozen: bool
    small: bool


def segments(run: Run) -> list[Segment]:
    """Return the segments of a run, in order, from its initial epoch on."""
    small_end = round(run.epochs * run.small_epochs) if run.small_crops < 1 else 0
    first = run.initial_epoch
    edges = {first, run.epochs, run.frozen_epochs, small_end, *(event[0] for event in run.growth)}
    edges = sorted(edge for edge in edges if first <= edge <= run.epochs)
    return [
        Segment(start, end, tuple(e for e in run.growth if e[0] == start), start < run.frozen_epochs, start < small_end)
        for start, end in itertools.pairwise(edges)
    ]
