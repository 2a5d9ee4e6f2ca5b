"""Comparing the weights in a file with the model's, element by element: one wrong weight often does not show in the output."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import artifact
from . import refolding

if TYPE_CHECKING:
    import keras

WEIGHT_TOLERANCE = 1e-6


def compare_weights(
    path: str | os.PathLike[str], expected: Mapping[str, Any], model: keras.Model
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Compare a file's initialisers with those of a fresh conversion, and with the Keras weights folded a second way.

    Args:
        path: ONNX file.
        expected: `{name: array}`: what the same conversion gives now.
        model: Keras model; see `refolding`.

    Returns:
        `(figures, problems, notes)`.
    """
    have = file_weights(path)
    if set(have) != set(expected) and _written_by_another_version(path):
        note = "weights compared through outputs only: another version wrote the file, whose graph has another form"
        return {"compared": 0, "elements": 0, "refolded": 0, "max_relative": 0.0, "worst": None}, [], [note]
    problems, worst, worst_name, elements = [], 0.0, None, 0
    for name in sorted(set(have) ^ set(expected)):
        problems.append(f"weight {name!r} is {'missing' if name in expected else 'not the model’s'}")
    for name in sorted(set(have) & set(expected)):
        error = weight_error(have[name], np.asarray(expected[name]))
        elements += have[name].size
        if error > worst:
            worst, worst_name = error, name
        if error > WEIGHT_TOLERANCE:
            problems.append(f"weight {name!r} differs: max error {error:.3g} of its largest value")
    refolded, through_outputs, wrong = refolding.compare_refolded(have, model)
    notes = []
    if through_outputs:
        notes.append(
            f"{through_outputs} weights compared through the outputs only, because the graph does not determine their values"
        )
    figures = {"compared": len(set(have) & set(expected)), "elements": elements, "refolded": refolded}
    return figures | {"max_relative": worst, "worst": worst_name}, problems or wrong, notes


def _written_by_another_version(path: str | os.PathLike[str]) -> bool:
    from keras_resnet._version import __version__

    return (artifact.read_metadata(path).get("versions") or {}).get("keras_resnet_export") != __version__


def file_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return `{initialiser name: array}` of an ONNX file."""
    import onnx

    base = str(Path(path).parent)
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor, base_dir=base) for tensor in artifact.read_proto(path).graph.initializer
    }


def weight_error(have: np.ndarray, expected: np.ndarray) -> float:
    """max |Δ| / max |expected|; infinite where shapes or kinds differ, or infinities and NaNs are not at the same positions."""
    expected = np.asarray(expected)
    if have.shape != expected.shape or have.dtype.kind != expected.dtype.kind:
        return np.inf
    if have.dtype.kind != "f":
        return 0.0 if np.array_equal(have, expected) else np.inf
    have, expected = have.astype("float64"), expected.astype("float64")
    if not np.isfinite(have).all():
        return 0.0 if np.array_equal(have, expected, equal_nan=True) else np.inf
    difference, largest = np.abs(have - expected).max(initial=0), np.abs(expected).max(initial=0)
    return float(difference / largest) if largest > 0 else (0.0 if difference == 0 else np.inf)
