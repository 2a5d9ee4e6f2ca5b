"""int8 files: static quantisation within a budget of accuracy; layers go back to float32 until it holds."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from .. import artifact
from ..errors import MismatchError, UsageError
from ..results import ExportResult, VerificationReport
from ..verification.agreement import Budget, QuantisedOutput
from .accuracy import LayerError, layer_errors, open_converted, outputs_to_compare, require, worst_layers
from .samples import Feeds, Outputs, read_samples
from .source import Source, is_large, open_source, quiet, save
from .strides import subsample_once

TARGETS = ("cpu", "gpu")
ROUNDS = 6  # 2, 4, 8, 16 and 32 layers go back to float32, one round after the other
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def to_int8(
    source: str | os.PathLike[str] | Source,
    path: str | os.PathLike[str],
    *,
    calibration: Any,
    samples: Any = None,
    target: str = "cpu",
    max_drop: float = 1.0,
    max_error: float = 0.1,
    scores: str | None = None,
    output_kind: str | None = None,
    overwrite: bool = True,
    keep_failed: bool = False,
) -> ExportResult:
    """Write a statically quantised file (QDQ, int8 weights per channel); layers stay in float32 until the budget holds.

    onnxruntime's own defaults leave a third of a ResNet's convolutions in float32 and are half as fast on a CPU.

    Args:
        source: Float32 ONNX file, of any exporter; opsets below 13 are raised.
        path: File to write.
        calibration: Images that set the ranges of activations: a folder, an `.npz` or `.npy` file, an array, or
            `{input name: array}`.
        samples: Images to measure the difference on, in the same forms; by default the calibration images.
        target: `"cpu"`: unsigned activations, 7-bit weights where the CPU has no VNNI; `"gpu"`: symmetric and signed.
        max_drop: Allowed loss of agreement with the float32 file, in percent of the images: the same best class, or the same
            side of 0.5 where classes are independent.
        max_error: Allowed error of outputs that score no classes: max |Δ| as a share of the largest value, and 1 − cosine.
        scores: Name of the output to compare; by default all that the model returns, without its features.
        output_kind: Kind of that output, one of `artifact.KINDS`, for files that do not state it.
        overwrite: Whether `path` may exist.
        keep_failed: Keep a file that failed as `path + ".failed"`.

    Returns:
        The result; notes name the layers with the largest errors and those left in float32.

    Raises:
        UsageError: A file cannot be read or written, or the images do not fit.
        MismatchError: The budget does not hold; says what is reachable.
    """
    check_target(target)
    budget = Budget(max_drop, max_error)
    artifact.check_target(path, overwrite)
    opened = open_source(source)
    outputs = outputs_to_compare(opened.session, scores, output_kind, budget)
    ranges = read_samples(calibration, opened.session)
    tests = ranges if samples is None else read_samples(samples, opened.session)
    names = [output.output for output in outputs]
    reference = [opened.session.run(feeds, names) for feeds in tests]
    with artifact.publishing(path, overwrite, keep_failed) as work:
        report = _within_budget(opened, work, _Trial(outputs, ranges, tests, reference, target), samples is None)
        report = dataclasses.replace(report, path=str(path))
        require(report)
        return ExportResult(str(path), report, artifact.digest(work), "int8", artifact.disk_size(work), report.notes)


def check_target(target: str) -> None:
    """Check the option of `to_int8`.

    Raises:
        UsageError: There is no such target.
    """
    if target not in TARGETS:
        raise UsageError(f"`target` must be one of {', '.join(TARGETS)}, got {target!r}")


@dataclass(frozen=True)
class _Trial:
    """What every attempt at a quantised file is made and compared with."""

    outputs: list[QuantisedOutput]
    ranges: list[Feeds]
    tests: list[Feeds]
    reference: list[Outputs]
    target: str


def _within_budget(source: Source, work: Path, trial: _Trial, calibrated_on_tests: bool) -> VerificationReport:
    """Quantise with fewer and fewer int8 layers until the budget holds.

    Returns:
        The report of the file that is at `work` now: the first that holds, or the last one, with the best that was reached.
    """
    before, layers = _before_first_layer(source)
    excluded: list[str] = []
    best: VerificationReport | None = None
    for attempt in range(ROUNDS):
        report = _attempt(source, work, trial, [*before, *excluded])
        remaining = [layer for layer in layers if layer not in excluded]
        errors = layer_errors(source.model, artifact.read_proto(work), _first_rows(source.model, trial.tests[0]))
        errors = {layer: error for layer, error in errors.items() if layer not in before}
        if not _has_int8(work):
            break
        report = _with_notes(report, source, errors, excluded, len(layers), calibrated_on_tests)
        if report.passed:
            return report
        best = report if best is None else min(best, report, key=lambda found: _shortfall(trial.outputs, found))
        if len(remaining) < 2:
            break
        excluded += _next_in_float32(errors, excluded, remaining, 2 ** (attempt + 1))
    if best is None:
        raise MismatchError(f"onnxruntime's quantiser leaves every layer of {source.name} in float32; keep the float32 file")
    return _with_what_is_reachable(best, trial.outputs)


def _next_in_float32(errors: Mapping[str, LayerError], excluded: list[str], remaining: list[str], count: int) -> list[str]:
    """The next nodes that go back to float32, at most `count`; one layer with weights stays in int8, to see what it costs."""
    chosen = [name for name in candidates(errors) if name not in excluded][:count]
    if set(remaining) <= set(chosen):
        chosen.remove(next(name for name in reversed(chosen) if name in remaining))
    return chosen


def _attempt(source: Source, work: Path, trial: _Trial, excluded: Collection[str]) -> VerificationReport:
    quantise(source, work, trial.ranges, excluded, trial.target)
    quantised = open_converted(work, source)
    names = [output.output for output in trial.outputs]
    got = [quantised.run(feeds, names) for feeds in trial.tests]
    inputs = [next(iter(feeds.values())) for feeds in trial.tests]
    shape = [sum(map(len, inputs)), *inputs[0].shape[1:]]
    pairs = [([batch[name] for batch in trial.reference], [batch[name] for batch in got]) for name in names]
    comparisons = tuple(output.compare(shape, *pair) for output, pair in zip(trial.outputs, pairs, strict=True))
    problems = tuple(
        output.described(comparison)
        for output, comparison in zip(trial.outputs, comparisons, strict=True)
        if not comparison.passed
    )
    tolerance = trial.outputs[0].tolerance
    return VerificationReport(str(work), not problems, "int8", tolerance, comparisons, problems=problems)


def _shortfall(outputs: list[QuantisedOutput], report: VerificationReport) -> float:
    return max(output.needed(comparison) for output, comparison in zip(outputs, report.comparisons, strict=True))


def _with_what_is_reachable(report: VerificationReport, outputs: list[QuantisedOutput]) -> VerificationReport:
    """The report with, instead of what is wrong with the last attempt, what is the best that was reached and what would pass."""
    problems = tuple(
        f"{output.described(comparison)} at best; {output.option(comparison)} would pass"
        for output, comparison in zip(outputs, report.comparisons, strict=True)
        if not comparison.passed
    )
    return dataclasses.replace(report, problems=problems)


def _first_rows(model: ir.Model, feeds: Feeds, rows: int = 8) -> Feeds:
    """A few rows of a batch; all where the model has a fixed number of them."""
    fixed = any(value.shape and isinstance(value.shape[0], int) for value in model.graph.inputs)
    return feeds if fixed else {name: value[:rows] for name, value in feeds.items()}


def _has_int8(path: Path) -> bool:
    """Whether a layer with weights reads them in 8 bits."""
    graph = artifact.read_proto(path, external_data=False).graph
    dequantised = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return any(node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in dequantised for node in graph.node)


def _before_first_layer(source: Source) -> tuple[list[str], list[str]]:
    """The nodes before the first layer with weights, pixels to normalised input, where 8 bits are all there is; and the layers.

    Raises:
        UsageError: There is no layer with weights.
    """
    names = [node.name for node in source.model.graph]
    layers = [
        node.name
        for node in source.model.graph
        if node.op_type in WEIGHTED and node.inputs[1] is not None and node.inputs[1].const_value is not None
    ]
    if not layers:
        raise UsageError(f"{source.name} has no convolution or dense layer with constant weights, which is what int8 speeds up")
    return names[: names.index(layers[0])], layers


def quantise(source: Source, path: Path, ranges: list[Feeds], excluded: Collection[str], target: str) -> None:
    """Write a quantised file with onnxruntime's quantiser.

    Args:
        source: The float32 file.
        path: File to write.
        ranges: Batches that set the ranges of activations.
        excluded: Names of the nodes that stay in float32.
        target: One of `TARGETS`.

    Raises:
        UsageError: The quantiser of onnxruntime fails on the graph.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(ranges)

        def get_next(self) -> Feeds | None:
            return next(self.rows, None)

    symmetric = target == "gpu" or platform.machine().lower() in ("aarch64", "arm64")
    proto = ir.to_proto(
        subsample_once(source.model)
    )  # of a path the quantiser writes a copy next to it, over whatever has that name
    try:
        with quiet():
            quantize_static(
                proto,
                str(path),
                Reader(),
                quant_format=QuantFormat.QDQ,
                use_external_data_format=is_large(proto),
                per_channel=True,
                reduce_range=target == "cpu" and not symmetric and not has_vnni(),
                activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(excluded),
                # A mean over batches, since a range set by one outlier wastes its levels: ResNet-20 agrees with its float32
                # file on 99.87 % of CIFAR-10's training images, 99.77 % with the extremes themselves or the entropy.
                extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True, "CalibMovingAverage": True},
            )
    except OSError:  # a full disk is not the graph's fault
        raise
    except Exception as error:  # the quantiser raises whatever its many parts raise
        raise UsageError(
            f"onnxruntime's quantiser cannot handle {source.name}: {artifact.first_line(error)}".replace(str(path), "its output")
        ) from error
    quantised = ir.from_proto(artifact.read_proto(path))
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # the quantiser's; int8 is small enough for one file again
    save(quantised, path, source, "int8", None)


def has_vnni(path: str = "/proc/cpuinfo") -> bool:
    """Return whether the CPU multiplies 8-bit numbers without overflow in between; without, weights get 7 bits."""
    with contextlib.suppress(OSError):
        return "vnni" in Path(path).read_text()
    return False


def candidates(errors: Mapping[str, LayerError]) -> list[str]:
    """Node names in the order in which they go back to float32: first and last, which are sensitive, then by added error."""
    names = list(errors)
    return list(dict.fromkeys([*names[:1], *names[-1:], *worst_layers(errors)]))


def _with_notes(
    report: VerificationReport,
    source: Source,
    errors: Mapping[str, LayerError],
    excluded: Collection[str],
    layers: int,
    calibrated_on_tests: bool,
) -> VerificationReport:
    worst = ", ".join(f"{name} {errors[name].total:.1%}" for name in worst_layers(errors)[:5])
    notes = [*source.notes, f"layers that add most error (‖Δ‖/‖float32‖ of their output): {worst}"]
    if excluded:
        notes.append(f"left in float32: {', '.join(excluded)}")
    if calibrated_on_tests:
        notes.append("the difference was measured on the calibration images; give --samples for others")
    figures = {name: {"error": error.total, "added": error.added} for name, error in errors.items()}
    return dataclasses.replace(report, notes=tuple(notes), layers=figures)
