"""Comparing what a file computes with what Keras computes, output by output and batch by batch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..conversion.signature import OutputSpec
from ..metadata import TOLERANCES
from ..results import Comparison
from .inputs import Case, scaled_cases
from .metrics import largest_difference, measure
from .reference import Reference, Rounding, expected, saturated, seen

# Two roundings of one computation differ by chance; a file may be this much farther from the exact result than Keras is.
ROUNDINGS = 8
# How many perturbed runs are made to see whether a whole number of an output depends on rounding.
ATTEMPTS = 32
BOUND = TOLERANCES["float32"]

# A way to run a file: `{input name: array}` to `{output name: array}`, or a message that says why it does not run.
Runner = Callable[[dict[str, np.ndarray]], "dict[str, np.ndarray] | str"]


@dataclass
class OutputComparison:
    """The outputs of a file against a reference; collects the figures of every batch, output and runtime.

    Attributes:
        reference: The Keras model.
        tolerance: Bound of max |Δ| relative to the largest value of the output.
        comparisons: The figures so far.
        problems: Messages on what is wrong, apart from comparisons that did not pass.
        ill_conditioned: `(error of the file, rounding of Keras)`, relative, of comparisons that pass only because float32 itself
            is no more precise there.
        ties: How many whole numbers of the outputs differ only because float32 decides them by its rounding.
    """

    reference: Reference
    tolerance: float = BOUND
    comparisons: list[Comparison] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    ill_conditioned: list[tuple[float, float]] = field(default_factory=list)
    ties: int = 0

    def compare(self, case: Case, runtime: str, run: Runner) -> None:
        """Run one batch and compare every output."""
        got = run(case.feeds)
        if isinstance(got, str):
            self.problems.append(got)
            return
        rounding: list[Rounding] = []
        for output in self.reference.signature.outputs:
            self.comparisons.append(self._compared(output, case, runtime, got[output.name], rounding))

    def _compared(self, output: OutputSpec, case: Case, runtime: str, got: np.ndarray, rounding: list[Rounding]) -> Comparison:
        top = self.reference.signature.top
        want, have = expected(output, case.values, top), seen(output, case.values, got)
        scale = float(np.abs(want.astype("float64")).max(initial=0)) if want.dtype.kind in "fiub" else None
        if output.source == "logits":
            scale = max(scale, 1.0)
        figures = measure(want, have, scale)
        first = next(iter(case.feeds.values()))
        passed, shape = figures["relative"] <= self.tolerance, list(first.shape)
        comparison = Comparison(output.name, shape[0], shape, case.data, runtime, passed=passed, **figures)
        if passed or not np.isfinite(figures["max_abs"]) or self.tolerance != BOUND:
            return comparison
        if want.dtype.kind != "f":
            return self._judged_by_reach(comparison, output, case, got)
        if not rounding:
            rounding.append(self.reference.rounding(case.feeds, case.values))
        return self._judged_by_rounding(comparison, output, got, rounding[0], scale)

    def _judged_by_rounding(
        self, comparison: Comparison, output: OutputSpec, got: np.ndarray, rounding: Rounding, scale: float
    ) -> Comparison:
        """A comparison that missed the bound passes if the file is no farther from the exact result than float32 rounds."""
        top = self.reference.signature.top
        error = largest_difference(expected(output, rounding.exact, top), seen(output, rounding.exact, got))
        noise = rounding.largest(output, top)
        if not np.isfinite(noise) or not error <= ROUNDINGS * noise:
            return comparison
        scale = scale or 1.0
        self.ill_conditioned.append((error / scale, noise / scale))
        return dataclasses.replace(comparison, passed=True)

    def _judged_by_reach(self, comparison: Comparison, output: OutputSpec, case: Case, got: np.ndarray) -> Comparison:
        """A whole number or a boolean passes if rounding alone gives it, as it decides which of two equal scores comes first."""
        top = self.reference.signature.top
        unexplained = expected(output, case.values, top) != seen(output, case.values, got)
        near = int(unexplained.sum())
        with contextlib.closing(self.reference.reachable(case.feeds, ROUNDINGS)) as results:
            for values in itertools.islice(results, ATTEMPTS):
                unexplained &= expected(output, values, top) != seen(output, values, got)
                if not unexplained.any():
                    self.ties += near
                    return dataclasses.replace(comparison, passed=True)
        return comparison

    def compare_unsaturated(self, case: Case, runners: dict[str, Runner]) -> None:
        """Compare the input of a final activation on smaller inputs, until no class is saturated on all of them."""
        for output in self.reference.signature.outputs:
            if output.source != "logits":
                continue
            hidden = saturated(output, case.values)
            for smaller in scaled_cases(self.reference, case) if hidden.any() else ():
                still = hidden & saturated(output, smaller.values)
                if still.sum() == hidden.sum():
                    continue
                hidden = still
                for runtime, run in runners.items():
                    self.compare(smaller, runtime, run)
                if not hidden.any():
                    break

    @property
    def failed(self) -> list[Comparison]:
        """The comparisons that did not pass."""
        return [comparison for comparison in self.comparisons if not comparison.passed]

    def all_problems(self) -> list[str]:
        """Return messages on everything that is wrong."""
        return self.problems + [described(comparison) for comparison in self.failed]

    def worst(self) -> float:
        """Return the largest relative error."""
        return max((comparison.relative for comparison in self.comparisons), default=0.0)

    def conditioning_notes(self) -> list[str]:
        """Return notes on differences that were accepted because float32 itself is no more precise; empty without any."""
        notes = []
        if self.ill_conditioned:
            error, noise = (max(figures) for figures in zip(*self.ill_conditioned, strict=True))
            there = f"the file is {error:.1e} from Keras in float64, and float32 rounds this computation by {noise:.1e}"
            notes.append(f"ill-conditioned: {there}")
        if self.ties:
            numbers = "1 whole number differs" if self.ties == 1 else f"{self.ties} whole numbers differ"
            notes.append(f"ties: {numbers} from Keras where the rounding of float32 decides the result")
        return notes


def described(comparison: Comparison) -> str:
    """Return a failed comparison as a message."""
    where = f"output `{comparison.output}`, batch {comparison.batch} ({comparison.data}), {comparison.runtime}"
    return f"{where}: max error {comparison.max_abs:.3g}, {comparison.relative:.3g} of the largest value"
