"""Verifying an ONNX file: its structure, its outputs, its metadata and its weights against the untouched Keras model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import artifact
from ..conversion.convert import convert, weights_of
from ..conversion.prepare import Prepared
from ..conversion.resizing import LEVELS, fitted
from ..conversion.signature import Signature
from ..metadata import TOLERANCES
from ..results import VerificationReport
from ..runtime import images
from .cards import check_metadata
from .copies import compare_copy
from .divergence import first_layer_that_differs
from .half_weights import compare_half_weights
from .inputs import Case, find_cases
from .outputs import OutputComparison, Runner
from .reference import Reference
from .refolding import compare_refolded
from .reverification import Loaded, Reverification
from .weights import compare_weights, file_weights

# onnxruntime with its default optimisations, which is what users will meet, and without any.
RUNTIMES = {"onnxruntime, default": True, "onnxruntime, no optimisation": False}


def verify_onnx(
    path: str | os.PathLike[str],
    prepared: Prepared,
    *,
    opset: int,
    precision: str = "float32",
    weights: Mapping[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    samples: object = None,
    seed: int = 0,
) -> VerificationReport:
    """Compare an ONNX file with a model; the file is opened as it is on disk.

    In this order: the file is valid and has the signature's inputs and outputs; a rebuilt copy of the model computes what the
    original computes; every output agrees with Keras on every batch (see `inputs.find_cases`), in onnxruntime with and without
    optimisations; metadata and weights agree; the same graph agrees once more with other weights (see `reverification`).

    Args:
        path: ONNX file.
        prepared: The model and the file's inputs and outputs.
        opset: Opset of the file, for conversions with other weights.
        precision: `"float32"` or `"float16"`.
        weights: `{initialiser name: array}` that the file must hold, in float32; by default those of a fresh conversion.
        metadata: The metadata that an export would write, or None to compare none.
        samples: Folder of images, or an array in the file's layout, or None.
        seed: Seed of the random batches.

    Raises:
        UsageError: Keras itself fails on every random batch, or the samples do not fit.
    """
    signature, float32 = prepared.signature, precision == "float32"
    problems = check_structure(path, signature)
    wrong, notes = check_metadata(path, metadata)
    structure, problems = bool(problems), problems + wrong
    reference = Reference(signature)
    comparison, cases, figures, diverges = OutputComparison(reference, TOLERANCES[precision]), [], None, None
    if not structure:
        cases = find_cases(reference, samples, seed)
        problems += compare_copy(prepared, cases)
        runners = onnx_runners(path)
        for case in cases:
            for runtime, run in runners.items():
                comparison.compare(case, runtime, run)
        if float32:
            comparison.compare_unsaturated(cases[-1 if samples is None else 1], runners)
        if signature.fit:
            wrong, said = check_resizing(signature, cases[0])
            problems, notes = problems + wrong, notes + said
        problems += comparison.all_problems()
        notes += comparison.conditioning_notes()
        weights = weights_of(convert(signature, opset)[0]) if weights is None else weights
        if float32:
            figures, wrong, said = compare_weights(path, weights, signature.model)
            notes += said
        else:
            figures, wrong = compare_half_weights(path, weights)
        problems += wrong
    if not problems and float32:
        again = Reverification(reference, cases, lambda folder: with_present_weights(path, signature, opset, folder))
        outcome = again.run(comparison)
        problems, notes, diverges = problems + outcome.problems, notes + outcome.notes, outcome.diverges
    elif problems and cases:
        diverges = first_layer_that_differs(path, signature, cases, precision)
    return VerificationReport(
        str(path),
        not problems,
        precision,
        TOLERANCES[precision],
        tuple(comparison.comparisons),
        figures,
        diverges,
        tuple(problems),
        tuple(notes),
    )


def check_structure(path: str | os.PathLike[str], signature: Signature) -> list[str]:
    """Return messages on what is wrong with the file as a file: invalid, or with other inputs and outputs than the signature."""
    if invalid := check_valid(path):
        return invalid
    graph = artifact.read_proto(path, external_data=False).graph
    initializers = {tensor.name for tensor in graph.initializer}
    problems = []
    for kind, have, want in (
        ("inputs", [value.name for value in graph.input if value.name not in initializers], [s.name for s in signature.inputs]),
        ("outputs", [value.name for value in graph.output], signature.names),
    ):
        if have != want:
            problems.append(f"its {kind} are {', '.join(have)}, the model's {', '.join(want)}")
    return problems


def check_valid(path: str | os.PathLike[str]) -> list[str]:
    """Return what onnx.checker, in full, says against a file: a list of one message, or an empty one."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return [f"onnx.checker refuses it: {artifact.first_line(error)}"]
    return []


def onnx_runners(path: str | os.PathLike[str]) -> dict[str, Runner]:
    """Return `{runtime: Runner}` of an ONNX file: onnxruntime's default, and onnxruntime without optimisations."""
    return {runtime: _runner(path, optimise) for runtime, optimise in RUNTIMES.items()}


def _runner(path: str | os.PathLike[str], optimise: bool) -> Runner:
    """Open the file for each batch, so that no session holds the weights in memory while Keras runs."""

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray] | str:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            names = [value.name for value in session.get_outputs()]
            return dict(zip(names, session.run(names, feeds), strict=True))
        except Exception as error:  # onnxruntime's errors have no common class
            return f"onnxruntime does not run it: {artifact.first_line(error)}"

    return run


def with_present_weights(path: str | os.PathLike[str], signature: Signature, opset: int, folder: Path) -> Loaded:
    """Return the graph of a file with the weights that the model has now; see `reverification.Loaded`."""
    converted, _ = convert(signature, opset)
    weights, other = weights_of(converted), folder / "other.onnx"
    same_graph = {tensor.name for tensor in artifact.read_proto(path, external_data=False).graph.initializer} == set(weights)
    if same_graph:
        artifact.write_with_weights(path, other, weights)
    else:
        artifact.write_onnx(converted, other)
    _, _, problems = compare_refolded(file_weights(other), signature.model)
    return Loaded(onnx_runners(other), same_graph, tuple(problems), other)


def check_resizing(signature: Signature, case: Case) -> tuple[list[str], list[str]]:
    """Compare the graph's resizing with Pillow's, which is what `predict` and the card mean.

    Returns:
        `(problems, notes)`.
    """
    import tensorflow as tf

    (pixels,) = case.feeds.values()
    pixels = pixels // 2 + 64  # noise between black and white would make every filter overshoot
    channels_first = pixels if signature.layout == "nchw" else pixels.transpose(0, 3, 1, 2)
    got = fitted(tf.constant(channels_first, "float32"), signature.fit).numpy().transpose(0, 2, 3, 1)
    want = np.stack([images.fit(image, signature.fit) for image in channels_first.transpose(0, 2, 3, 1)])
    worst = float(np.abs(got - want).max())
    said = f"the graph's resizing is within {worst:.2f} of 255 levels of Pillow's"
    return ([], [said]) if worst <= LEVELS else ([f"{said}, at most {LEVELS} are allowed"], [])
