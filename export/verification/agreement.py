"""Comparing an int8 file: its numbers are others by design, so its decisions are compared, or its errors with a wide bound."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artifact import Scores
from ..conversion.prepare import Prepared
from ..conversion.signature import FEATURES, TOP_PROBABILITIES, OutputSpec, Signature
from ..errors import UsageError
from ..results import Comparison, VerificationReport
from .cards import check_metadata
from .inputs import read_samples
from .metrics import measure
from .onnx_file import RUNTIMES, check_structure, onnx_runners
from .reference import Reference, Values, expected, softmax

MOST_SAMPLES, ROWS = 512, 16
RUNTIME = next(iter(RUNTIMES))


@dataclass(frozen=True)
class Budget:
    """How much a quantised file may differ from its float32 file, or from the model.

    Attributes:
        max_drop: Allowed loss of agreement of outputs that score classes, in percent of the images (of the decisions, for
            `"multilabel"`).
        max_error: Allowed error of other outputs: max |Δ| as a share of the largest value, and 1 − cosine.
    """

    max_drop: float = 1.0
    max_error: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop <= 100:
            raise UsageError(f"`max_drop` must be from 0 to 100 percent, got {self.max_drop}")
        if not 0 < self.max_error:
            raise UsageError(f"`max_error` must be positive, got {self.max_error}")


@dataclass(frozen=True)
class QuantisedOutput:
    """An output of a quantised file, and how far it may be from what it is compared with.

    Attributes:
        output: Name of the output.
        scores: What its numbers mean, or None for an output that scores no classes.
        tolerance: Allowed loss of agreement as a share; for outputs that score no classes, the allowed relative error.
        reference: What it is compared with, as messages name it.
    """

    output: str
    scores: Scores | None
    tolerance: float
    reference: str = "float32"

    def compare(self, shape: list[int], reference: list[np.ndarray], got: list[np.ndarray]) -> Comparison:
        """Compare all batches at once.

        Args:
            shape: Shape of the first input, all rows together.
            reference: What the output must be close to, batch by batch.
            got: What the quantised file computed.
        """
        if self.scores is None:
            figures = measure(*(np.concatenate([value.ravel() for value in side]) for side in (reference, got)))  # type: ignore[arg-type]
            figures |= {"top1": None, "top5": None}
        else:
            want, have = np.concatenate(reference), np.concatenate(got)
            figures = measure(want, have) | {"top1": self.scores.agreement(want, have)}
        comparison = Comparison(self.output, shape[0], shape, "samples", RUNTIME, passed=False, **figures)
        # 1 - 0.99 is more than 0.01 in floats.
        return dataclasses.replace(comparison, passed=self.needed(comparison) <= self.tolerance + 1e-9)

    def needed(self, comparison: Comparison) -> float:
        """Return the tolerance that a comparison needs in order to pass."""
        if self.scores is not None:
            return math.inf if comparison.top1 is None else 1 - comparison.top1
        return max(comparison.relative, 1 - comparison.cosine)

    def described(self, comparison: Comparison) -> str:
        """Return a comparison as a message."""
        if self.scores is None:
            return (
                f"output `{self.output}` is off by {comparison.relative:.2%} of its largest value, with a cosine of "
                f"{comparison.cosine:.5f}, on {comparison.batch} images"
            )
        kind = "top-1 agreement" if self.scores.kind in ("logits", "probabilities") else "agreement on the side of 0.5"
        share = "not measurable" if comparison.top1 is None else f"{comparison.top1:.2%}"
        return f"{kind} of `{self.output}` with {self.reference} is {share} on {comparison.batch} images"

    def option(self, comparison: Comparison) -> str:
        """Return the option with which a comparison would pass."""
        needed = self.needed(comparison)
        if not math.isfinite(needed):
            return "no option"
        if self.scores is None:
            return f"`--max-error {_rounded_up(needed)}`"
        return f"`--max-drop {_rounded_up(100 * needed)}`"


def _rounded_up(number: float) -> str:
    """The next number with at most two digits: 1.95 → 2, 0.0312 → 0.032."""
    if number <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(number)) - (1 if number < 1 or number >= 10 else 0))
    return f"{math.ceil(number / step - 1e-9) * step:.6g}"


def quantised_outputs(
    shapes: Mapping[str, list], kinds: Mapping[str, str], budget: Budget, only: str | None = None, reference: str = "float32"
) -> list[QuantisedOutput]:
    """Return the outputs to compare: those that score classes by their decisions, others by their errors.

    Features and the best classes of a row come on top of what the model returns, and count only where `only` names them or there
    is nothing else.

    Args:
        shapes: `{output name: shape}` of the outputs of floats.
        kinds: `{output name: kind}`; an output that it does not name scores no classes.
        budget: How much they may differ.
        only: Name of the only output to compare, or None.
        reference: What they are compared with, as messages name it.

    Raises:
        UsageError: There is none.
    """
    if not shapes:
        raise UsageError("the file has no output of floats, so an int8 file cannot be compared with it; keep the float32 file")
    returned = [name for name in shapes if name not in (FEATURES, TOP_PROBABILITIES) and not name.startswith(f"{FEATURES}_")]
    return [
        QuantisedOutput(name, Scores(name, kinds[name]), budget.max_drop / 100, reference)
        if kinds.get(name, "other") != "other" and len(shapes[name]) == 2
        else QuantisedOutput(name, None, budget.max_error, reference)
        for name in ([only] if only else returned or list(shapes))
    ]


def verify_int8(
    path: str | os.PathLike[str],
    prepared: Prepared,
    samples: object,
    metadata: dict[str, Any] | None = None,
    budget: Budget | None = None,
) -> VerificationReport:
    """Compare an int8 file with the model on images, as `to_int8` compares it with the float32 file.

    Args:
        path: ONNX file.
        prepared: The model and the file's inputs and outputs.
        samples: Folder of images (up to 512 are read), or an array in the file's layout.
        metadata: The metadata that an export would write, or None to compare none.
        budget: How much the file may differ.

    Raises:
        UsageError: The samples do not fit.
    """
    signature, budget = prepared.signature, budget or Budget()
    problems = check_structure(path, signature)
    wrong, notes = check_metadata(path, metadata)
    problems, comparisons, tolerance = problems + wrong, [], budget.max_drop / 100
    if not problems:
        feeds = read_samples(samples, signature, MOST_SAMPLES)
        want, got, problems = _on_both_sides(path, signature, feeds)
    if not problems:
        shapes = {name: list(arrays[0].shape) for name, arrays in want.items()}
        chosen = quantised_outputs(shapes, signature.kinds(), budget, reference="the model")
        shape, tolerance = list(next(iter(feeds.values())).shape), chosen[0].tolerance
        for output in chosen:
            comparison = output.compare(shape, want[output.output], got[output.output])
            comparisons.append(comparison)
            if not comparison.passed:
                problems.append(f"{output.described(comparison)}; {output.option(comparison)} would pass")
    return VerificationReport(
        str(path), not problems, "int8", tolerance, tuple(comparisons), problems=tuple(problems), notes=tuple(notes)
    )


def _on_both_sides(
    path: str | os.PathLike[str], signature: Signature, feeds: dict[str, np.ndarray]
) -> tuple[dict, dict, list[str]]:
    """`({output name: batches of Keras}, {output name: batches of the file}, problems)`, of the outputs of floats.

    The best classes and their probabilities follow from the other outputs and are left out.
    """
    reference, run = Reference(signature), onnx_runners(path)[RUNTIME]
    want: dict[str, list[np.ndarray]] = {}
    got: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(next(iter(feeds.values()))), ROWS):
        rows = {name: array[start : start + ROWS] for name, array in feeds.items()}
        found = run(rows)
        if isinstance(found, str):
            return {}, {}, [found]
        values = reference.values(rows)
        for output in signature.outputs:
            if found[output.name].dtype.kind == "f" and output.source != "top_probabilities":
                want.setdefault(output.name, []).append(_of_model(output, values, signature.top))
                got.setdefault(output.name, []).append(_of_file(output, found[output.name]))
    return want, got, []


def _of_model(output: OutputSpec, values: Values, top: int | None) -> np.ndarray:
    return values.own[output.index] if output.source == "logits" else expected(output, values, top)


def _of_file(output: OutputSpec, got: np.ndarray) -> np.ndarray:
    """An output; what goes into a final activation is compared after it, since Keras does not return it."""
    if output.source != "logits":
        return got
    return softmax(got) if output.activation == "softmax" else 1 / (1 + np.exp(-got.astype("float64")))
