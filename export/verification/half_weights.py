"""Comparing the weights of a float16 file with float32 ones: each must be what float16 makes of it, or float32 still."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .. import artifact

COPY = "__float16"  # ends the name of a weight's float16 copy, where some nodes read the weight in float32
WEIGHT_TOLERANCE = 1e-6


def compare_half_weights(path: str | os.PathLike[str], expected: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Compare a float16 file's weights with float32 ones of the same names, element by element.

    A number in float16 may be one step away from the rounded expected one: a step of float16 at that number, not a share of the
    tensor's largest, since a tensor can be tiny throughout. What stayed float32 may differ by 1e-6 of its largest number.

    Args:
        path: Float16 ONNX file.
        expected: `{name: array or tensor}` in float32.

    Returns:
        `(figures, problems)`.
    """
    base, compared, elements, problems = str(Path(path).parent), 0, 0, []
    for tensor in artifact.read_proto(path).graph.initializer:
        name = tensor.name.removesuffix(COPY)
        if name not in expected or (want := np.asarray(expected[name])).dtype != np.float32:
            continue
        have = onnx.numpy_helper.to_array(tensor, base_dir=base)
        compared, elements = compared + 1, elements + want.size
        if problem := _difference(have, want):
            problems.append(f"weight {name!r} {problem}")
    return {"compared": compared, "elements": elements}, problems


def _difference(have: np.ndarray, want: np.ndarray) -> str | None:
    """What is wrong with a weight, or None."""
    if have.shape != want.shape:
        return f"has the shape {list(have.shape)} instead of {list(want.shape)}"
    if have.dtype == np.float16:
        with np.errstate(over="ignore"):
            rounded = want.astype("float16")
        step = np.spacing(np.abs(np.where(np.isfinite(rounded), rounded, 0)).astype("float16")).astype("float64")
    elif have.dtype == np.float32:
        rounded, step = want, WEIGHT_TOLERANCE * float(np.abs(want[np.isfinite(want)]).max(initial=0))
    else:
        return f"has the dtype {have.dtype}"
    same = (have == rounded) | (np.isnan(have) & np.isnan(rounded))
    with np.errstate(invalid="ignore"):
        off = np.abs(have.astype("float64") - rounded.astype("float64"))
    wrong = ~(same | (off <= step))
    if not wrong.any():
        return None
    worst = float(np.where(np.isfinite(off), off, np.inf)[wrong].max())
    return f"differs in {int(wrong.sum()):,} of {want.size:,} numbers by up to {worst:.3g}"
