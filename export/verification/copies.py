"""Whether a copy that is converted instead of the model computes what the model computes."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..conversion.prepare import PRUNED_WITH_TOLERANCE, Prepared
from ..conversion.signature import call_in_inference
from .inputs import Case
from .metrics import input_off_by_rounding, largest_difference, measure, off_by_rounding
from .outputs import BOUND, ROUNDINGS
from .reference import PERTURBATIONS, Values, weights_kept

if TYPE_CHECKING:
    import keras


# bfloat16 keeps 8 bits of a number; a few layers in, this much of the largest value is rounding.
HALF_BOUND = 0.05


def compare_copy(prepared: Prepared, cases: list[Case]) -> list[str]:
    """Compare the copy with the original on batches that the original accepts; a list of problems.

    A copy with dynamic size, or without blocks that compute the identity, agrees as a file would. A float32 copy of a model in
    mixed precision agrees up to what half precision rounds. A copy without blocks that had learned a little is what was asked
    for, and is not compared.
    """
    import keras

    from keras_resnet.graphs import layers_in

    original, copy = prepared.original, prepared.signature.model
    if not prepared.copied or PRUNED_WITH_TOLERANCE in prepared.copied:
        return []
    bound = HALF_BOUND if any("float16" in layer.compute_dtype for layer in layers_in(original)) else BOUND
    shapes = [tuple(tensor.shape) for tensor in original.inputs]
    for case in cases:
        feeds = _model_inputs(prepared, case, shapes)
        if feeds is None:
            continue
        want, got = (_call(keras, model, feeds) for model in (original, copy))
        for index, (a, b) in enumerate(zip(want.own, got.own, strict=True)):
            figures = measure(a, b)
            if figures["relative"] <= bound or a.dtype.kind not in "fV":
                continue
            noise = _noise(keras, copy, feeds, got, index, bound)
            if np.isfinite(noise) and figures["max_abs"] <= ROUNDINGS * noise:
                continue
            half = any(layer.compute_dtype == "float16" for layer in layers_in(original))
            return [
                f"the copy made for the export ({', '.join(prepared.copied)}) differs from the model: max error "
                f"{figures['max_abs']:.3g}, {figures['relative']:.3g} of the largest value of output {index}"
                + (
                    "; float16 cannot represent values above 65,504, which intermediate values of the model may exceed"
                    if half
                    else ""
                )
            ]
    return []


def _model_inputs(prepared: Prepared, case: Case, shapes: list[tuple]) -> list[np.ndarray] | None:
    """The batch as the original takes it; a fixed size gets random pixels of that size. None where it cannot be made to fit."""
    rng, feeds = np.random.default_rng(0), []
    for spec, shape in zip(prepared.signature.inputs, shapes, strict=True):
        array = case.feeds[spec.name]
        if prepared.signature.fit:
            array = array.transpose(0, 2, 3, 1) if prepared.signature.layout == "nchw" else array
        elif prepared.signature.layout == "nchw" and array.ndim == 4:
            array = array.transpose(0, 2, 3, 1)
        if any(want not in (None, have) for want, have in zip(shape, array.shape, strict=True)):
            wanted = [have if want is None else want for want, have in zip(shape, array.shape, strict=True)]
            array = rng.choice(array.reshape(-1), wanted)
        feeds.append(array)
    return feeds


def _call(keras: ModuleType, model: keras.Model, feeds: list[np.ndarray]) -> Values:
    from keras_resnet.graphs import state_kept

    tensors = [keras.ops.convert_to_tensor(array) for array in feeds]
    tensors = [
        keras.ops.cast(tensor, keras.backend.standardize_dtype(wanted.dtype))
        for tensor, wanted in zip(tensors, model.inputs, strict=True)
    ]
    with state_kept(model):
        results = call_in_inference(model, tensors)
    own = [
        np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(x, "float32") if _is_half(x) else x))
        for x in keras.tree.flatten(results)
    ]
    return Values(own, [])


def _is_half(tensor: Any) -> bool:
    return "float16" in str(tensor.dtype)


def _noise(keras: ModuleType, copy: keras.Model, feeds: list[np.ndarray], got: Values, index: int, bound: float) -> float:
    """How far the copy is from itself when its weights and inputs are off by as much as the original's precision rounds."""
    rng, dtype = np.random.default_rng(0), "bfloat16" if bound == HALF_BOUND else "float32"
    worst = 0.0
    with weights_kept(copy) as weights:
        for _ in range(PERTURBATIONS):
            for variable, value in weights:
                variable.assign(off_by_rounding(rng, value, dtype))
            off = [input_off_by_rounding(rng, array, dtype) for array in feeds]
            worst = max(worst, largest_difference(got.own[index], _call(keras, copy, off).own[index]))
    return worst
