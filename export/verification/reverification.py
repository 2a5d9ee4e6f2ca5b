"""Verifying the same graph once more, with other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact import temporary_folder
from .divergence import first_layer_that_differs
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
        path: The ONNX file that the runners open, or None.
    """

    runners: dict[str, Runner]
    same_graph: bool = True
    problems: tuple[str, ...] = ()
    path: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What a second verification found: messages on what is wrong, notes, and the first layer that differs."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    diverges: str | None = None


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

    def run(self, first: OutputComparison) -> Outcome:
        """Verify again where the first verification leaves something open.

        Args:
            first: The outcome of the first verification.
        """
        model, found = self.reference.signature.model, []
        if first.ill_conditioned and (variables := statistics(model)):
            found.append(self._with_other_weights(variables, "with batch-norm statistics that fit the data"))
        if constant := constant_variables(model):
            found.append(
                self._with_other_weights(constant, f"with random values for {len(constant)} variables that were constant")
            )
        return Outcome(
            [problem for outcome in found for problem in outcome.problems],
            [note for outcome in found for note in outcome.notes],
            next((outcome.diverges for outcome in found if outcome.diverges), None),
        )

    def _with_other_weights(self, variables: list[keras.Variable], what: str) -> Outcome:
        feeds = self.cases[0].feeds
        with (
            randomised(variables, lambda: self.reference.values(feeds, but=variables)),
            temporary_folder("resnet-export-") as folder,
        ):
            reference = Reference(self.reference.signature)  # the rounding of other weights is another one
            cases = [Case(case.data, case.feeds, reference.values(case.feeds)) for case in self.cases]
            cases = [case for case in cases if case.values.finite]
            if not cases:
                return Outcome(notes=[f"{what} Keras computes no finite numbers, so there was nothing to compare"])
            loaded = self.load(folder)
            if loaded is None:
                return Outcome()
            comparison = OutputComparison(reference)
            for case in cases:
                for runtime, run in loaded.runners.items():
                    comparison.compare(case, runtime, run)
            problems, diverges = [*comparison.all_problems(), *loaded.problems], None
            if comparison.failed and loaded.path is not None:
                diverges = first_layer_that_differs(loaded.path, reference.signature, cases)
        note = f"verified again {what}, max relative error {comparison.worst():.1e}"
        if not loaded.same_graph:
            note += " (on a fresh conversion, since the file's graph has another form)"
        return Outcome([f"{what}: {problem}" for problem in problems], [note], diverges)
