"""Verifying the same graph once more, with other weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .inputs import Case
from .outputs import OutputComparison, Runner
from .randomization import constant_variables, randomised, statistics
from .reference import Reference

if TYPE_CHECKING:
    import keras


@dataclass(frozen=True)
class Loaded:
    """The graph under test with the model's present weights.

    Attributes:
        runners: `{runtime: Runner}`.
        same_graph: Whether it is the graph of the file itself; False where the conversion of the model with these weights has
            another form, as where a scale of 1 had been left out.
        problems: Messages on weights that are not the model's.
    """

    runners: dict[str, Runner]
    same_graph: bool = True
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reverification:
    """A second verification of a graph with other weights, where its own hide errors or amplify rounding.

    Attributes:
        reference: The model.
        cases: The batches of the first verification.
        load: Function of an empty folder that loads the graph with the weights that the model has at that time.
    """

    reference: Reference
    cases: list[Case]
    load: Callable[[Path], Loaded | None]

    def run(self, first: OutputComparison) -> tuple[list[str], list[str]]:
        """Verify again where the first verification leaves something open.

        Args:
            first: The outcome of the first verification.

        Returns:
            `(problems, notes)`.
        """
        problems, notes = [], []
        model = self.reference.signature.model
        if first.ill_conditioned and (variables := statistics(model)):
            wrong, note = self._with_other_weights(variables, "with batch-norm statistics that fit the data")
            problems, notes = problems + wrong, notes + note
        if constant := constant_variables(model):
            what = f"{len(constant)} constant weights (untrained) replaced by random ones"
            wrong, note = self._with_other_weights(constant, what)
            problems, notes = problems + wrong, notes + note
        return problems, notes

    def _with_other_weights(self, variables: list[keras.Variable], what: str) -> tuple[list[str], list[str]]:
        feeds = self.cases[0].feeds
        with (
            randomised(variables, lambda: self.reference.values(feeds)),
            tempfile.TemporaryDirectory(prefix="resnet-export-") as folder,
        ):
            reference = Reference(self.reference.signature)  # the rounding of other weights is another one
            cases = [Case(case.data, case.feeds, reference.values(case.feeds)) for case in self.cases]
            cases = [case for case in cases if case.values.finite]
            if not cases:
                return [], [f"{what}: Keras computes no finite numbers with them, so there was nothing to compare"]
            loaded = self.load(Path(folder))
            if loaded is None:
                return [], []
            comparison = OutputComparison(reference)
            for case in cases:
                for runtime, run in loaded.runners.items():
                    comparison.compare(case, runtime, run)
        note = f"{what}: verified again, max relative error {comparison.worst():.1e}"
        if not loaded.same_graph:
            note += " (on a fresh conversion, since the file's graph has another form)"
        problems = [*comparison.all_problems(), *loaded.problems]
        return [f"{what}: {problem}" for problem in problems], [note]
