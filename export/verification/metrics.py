"""Error figures of two arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

# Half the distance between neighbouring numbers of a format, relative to them.
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-9}


def off_by_rounding(rng: np.random.Generator, array: np.ndarray, dtype: str = "float32", times: float = 1) -> np.ndarray:
    """Return an array whose numbers are off by up to two unit roundoffs of a format, `times` so many, at random.

    Whole numbers stay.
    """
    if array.dtype.kind != "f":
        return array
    return (array * (1 + times * UNIT_ROUNDOFF[dtype] * rng.uniform(-2, 2, array.shape))).astype(array.dtype)


def input_off_by_rounding(rng: np.random.Generator, array: np.ndarray, dtype: str = "float32", times: float = 1) -> np.ndarray:
    """Return an input whose numbers are off by rounding, except for whole ones.

    Pixels and indices are exact, and a cast or comparison would make others of them.
    """
    return np.where(array == np.rint(array), array, off_by_rounding(rng, array, dtype, times)).astype(array.dtype)


def measure(reference: np.ndarray, got: np.ndarray, scale: float | None = None) -> dict[str, Any]:
    """Error figures of two arrays; infinite where shapes differ or a number of only one of them is not finite.

    Args:
        reference: Array of numbers or booleans.
        got: The array to measure.
        scale: What `relative` is relative to; by default the largest |reference|.

    Returns:
        The figures of `results.Comparison`: `max_abs`, `mean_abs`, `relative`, `cosine`, `top1`, `top5`.
    """
    nothing = {"max_abs": np.inf, "mean_abs": np.inf, "relative": np.inf, "cosine": 0.0, "top1": None, "top5": None}
    reference, got = np.asarray(reference, "float64"), np.asarray(got, "float64")
    if reference.shape != got.shape or not np.isfinite(reference).all() or not np.isfinite(got).all():
        return nothing
    difference = np.abs(reference - got)
    scale = np.abs(reference).max(initial=0) if scale is None else scale
    worst = float(difference.max(initial=0))
    norms = np.linalg.norm(reference) * np.linalg.norm(got)
    return {
        "max_abs": worst,
        "mean_abs": float(difference.mean()) if difference.size else 0.0,
        "relative": worst / float(scale) if scale > 0 else (0.0 if worst == 0 else np.inf),
        "cosine": float((reference * got).sum() / norms) if norms > 0 else float(worst == 0),
        "top1": agreement(reference, got, 1),
        "top5": agreement(reference, got, 5),
    }


def agreement(reference: np.ndarray, got: np.ndarray, k: int) -> float | None:
    """Share of rows whose `k` best classes are the same set; None where there are no rows of more than `k` scores."""
    if reference.ndim != 2 or reference.shape[1] <= k:
        return None
    best = [np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1) for scores in (reference, got)]
    return float((best[0] == best[1]).all(axis=1).mean())


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    """max |Δ|; infinite where shapes differ or a number is not finite."""
    return measure(first, second)["max_abs"]
