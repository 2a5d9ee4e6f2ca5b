"""Interleaved measurement with an A/A control: what a machine's own noise looks like in the same run."""

import statistics
import time
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """Median ratio of two alternatives and the control's spread.

    Args:
        name: what was compared.
        ratio: median over the pairs of candidate / reference.
        spread: how far the median of reference / reference lies from 1: the farther end of its 95 % bootstrap interval.
        reference: median seconds.
        candidate: median seconds.
        pairs: how many.
    """

    name: str
    ratio: float
    spread: float
    reference: float
    candidate: float
    pairs: int

    def meets(self, bar):
        """A bar is missed only beyond what the control shows too."""
        return self.ratio <= bar + self.spread

    def line(self, bar=None):
        """One line of a table."""
        verdict = "" if bar is None else f"  bar {bar:.2f} {'met' if self.meets(bar) else 'MISSED'}"
        times = f"{1000 * self.reference:9.1f} ms {1000 * self.candidate:9.1f} ms"
        return f"{self.name:44} {times}  ratio {self.ratio:.3f}  A/A ±{self.spread:.3f}{verdict}"


def compare(name, reference, candidate, pairs, warm_up=2):
    """Time both in turns, the reference twice per turn and in changing order.

    Args:
        name: for the table.
        reference: function without arguments.
        candidate: likewise.
        pairs: turns.
        warm_up: calls of each that are not counted.
    """
    for _ in range(warm_up):
        reference(), candidate()
    times = {"reference": [], "control": [], "candidate": []}
    jobs = [("reference", reference), ("candidate", candidate), ("control", reference)]
    for turn in range(pairs):
        for key, job in jobs[turn % 3 :] + jobs[: turn % 3]:
            started = time.perf_counter()
            job()
            times[key].append(time.perf_counter() - started)
    base = np.array(times["reference"])
    control = np.array(times["control"]) / base
    # The candidate is set against both measurements of the reference, so that their noise cancels.
    ratios = np.array(times["candidate"]) / ((base + np.array(times["control"])) / 2)
    return Comparison(
        name,
        float(np.median(ratios)),
        _spread(control),
        statistics.median(times["reference"]),
        statistics.median(times["candidate"]),
        pairs,
    )


def _spread(control):
    random = np.random.default_rng(0)
    medians = np.median(random.choice(control, (2000, len(control))), axis=1)
    return float(np.abs(np.percentile(medians, [2.5, 97.5]) - 1).max())
