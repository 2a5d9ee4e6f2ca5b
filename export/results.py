"""What the exporters and the verifier return: plain dataclasses with `to_json()`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """One output of the artefact against the model, for one batch.

    Attributes:
        output: Output name.
        batch: Number of rows.
        shape: Shape of the first input, e.g. `[3, 224, 224, 3]`.
        data: What was fed: `"pixels"`, `"noise"`, `"samples"`.
        runtime: How it was run, e.g. `"onnxruntime, default"` or `"onnxruntime, no optimisation"`.
        max_abs, mean_abs: Absolute error.
        relative: Max |Δ| / max |reference|, what the tolerance bounds.
        cosine: Cosine similarity of all numbers.
        top1, top5: Share of rows whose best class (set of best five) agrees; None where the output is not a row of scores.
        passed: Whether `relative` is within the tolerance.
    """

    output: str
    batch: int
    shape: list[int]
    data: str
    runtime: str
    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    top1: float | None
    top5: float | None
    passed: bool


@dataclass(frozen=True)
class VerificationReport:
    """The verdict on an artefact.

    Attributes:
        path: The file or folder.
        passed: Whether everything agreed.
        precision: `"float32"`, `"float16"` or `"int8"`.
        tolerance: Bound of `Comparison.relative`.
        comparisons: Tuple of `Comparison`.
        weights: `{"compared", "elements", "max_relative", "worst"}` of the initialisers, or None where they were not compared.
        diverges: Name of the first layer whose output differs, or None.
        problems: Sentences, one per thing that is wrong.
        notes: Messages on what was done in addition to the plain comparison, or could not be.
        layers: Of int8: `{node: {"error", "added"}}`, the error of its output and what of it the node itself added, as shares
            ‖Δ‖ / ‖float32‖.
    """

    path: str
    passed: bool
    precision: str
    tolerance: float
    comparisons: tuple[Comparison, ...]
    weights: dict[str, Any] | None = None
    diverges: str | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    layers: dict[str, dict[str, float]] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def worst(self) -> float:
        """Return the largest `relative` error of all comparisons, 0.0 if there are none."""
        return max((comparison.relative for comparison in self.comparisons), default=0.0)

    def summary(self) -> str:
        """Return the verdict in one sentence."""
        if not self.passed:
            layer = f"; first layer that differs: {self.diverges}" if self.diverges else ""
            return f"{self.path} does not match the model: {self.problems[0]}{layer}"
        if self.precision == "int8":
            shares = [comparison.top1 for comparison in self.comparisons if comparison.top1 is not None]
            if not shares:
                return f"{self.path} is within {self.worst():.2%} of the largest value of float32 (at most {self.tolerance:.2%})"
            return f"{self.path} agrees with float32 on {min(shares):.2%} of the images (at least {1 - self.tolerance:.2%})"
        beyond = "; the rest is ill-conditioned, see the note" if self.worst() > self.tolerance else ""
        return f"{self.path} matches the model: max relative error {self.worst():.1e} (bound {self.tolerance:.0e}){beyond}"


@dataclass(frozen=True)
class ExportResult:
    """A written and verified artefact.

    Attributes:
        path: The file or folder.
        report: `VerificationReport`.
        sha256: Digest of the file (of all files of a folder, in order of their paths).
        method: `"weightless"`, or `"stock"` where tf2onnx's own conversion had to help; `"savedmodel"`.
        size: Bytes on disk.
        notes: Sentences that the user should read.
        table: Of lower precision: `{"precision", "size", "milliseconds", "top1"}` of the float32 file and of this one: bytes,
            median latency of one batch on the CPU, share of rows with the same best class as in float32.
    """

    path: str
    report: VerificationReport
    sha256: str
    method: str
    size: int
    notes: tuple[str, ...] = ()
    table: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
