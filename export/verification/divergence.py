"""Which layer goes wrong first: every inner tensor of a file that has a layer's name, against what that layer returns."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from ..artifact import read_proto
from ..conversion.trace import calls_of_layers, concrete_function
from .metrics import input_off_by_rounding

if TYPE_CHECKING:
    from ..conversion.signature import Signature
    from .inputs import Case

# Error of a layer's output, as a share of its largest value, that rounding alone does not explain.
CLEARLY_OFF = {"float32": 1e-4, "float16": 2e-2}
# In a network that amplifies rounding, a layer counts as wrong if it is off by this many times what nearby inputs make of it.
AMPLIFIED = 30


def first_layer_that_differs(
    path: str | os.PathLike[str], signature: Signature, cases: list[Case], precision: str = "float32"
) -> str | None:
    """Return the first layer, in the file's order, whose output differs, on whichever batch shows one.

    Noise comes first: among small numbers a small fault shows, and pixels reach what saturates.
    """
    for case in reversed(cases):
        try:
            layer = first_divergence(path, signature, case.feeds, CLEARLY_OFF[precision])
        except Exception:  # a file that does not run for this batch, which is among the problems already
            continue
        if layer is not None:
            return layer
    return None


def first_divergence(
    path: str | os.PathLike[str], signature: Signature, feeds: dict[str, np.ndarray], bound: float = CLEARLY_OFF["float32"]
) -> str | None:
    """Return the first layer, in the file's order, whose output differs for one batch.

    All inner tensors are read in one run without optimisation; a convolution with a folded batch norm has the norm's name.

    Args:
        path: ONNX file that onnxruntime loads.
        signature: The file's inputs and outputs.
        feeds: `{input name: array}`.
        bound: Error, as a share of the largest value of the tensor, above which a layer counts as wrong, unless inputs that are
            off by rounding change it as much.

    Returns:
        The layer's path, or None where no named tensor and no output differs.
    """
    expected, nearby = _expected(signature, feeds)
    layers = {name: name for name in expected} | layers_of_outputs(signature)
    for name, value in inner_tensors(path, feeds, {name for name, layer in layers.items() if layer in expected}).items():
        if _is_off(value, layers[name], expected, nearby, bound):
            return layers[name]
    return None


def _expected(signature: Signature, feeds: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What every layer computes for a batch, and for inputs that are off by rounding."""
    rng = np.random.default_rng(0)
    off = {name: input_off_by_rounding(rng, array) for name, array in feeds.items()}
    return layer_outputs(signature, feeds), layer_outputs(signature, off)


def _is_off(value: np.ndarray, layer: str, expected: dict[str, np.ndarray], nearby: dict[str, np.ndarray], bound: float) -> bool:
    """Whether the value of a layer is off by more than a bound, and than rounding explains."""
    rounding = _difference(nearby[layer], expected[layer]) if layer in nearby else 0.0
    return _difference(value, expected[layer]) > max(bound, AMPLIFIED * rounding)


def first_divergence_in_graph(signature: Signature, cases: list[Case]) -> str | None:
    """Return the first layer, in the order of calls, that computes something else in a TensorFlow graph than eagerly.

    Variables and names of a SavedModel are compared before, so that this is what remains where an output of one differs.

    Args:
        signature: The folder's inputs and outputs.
        cases: Batches; the last one that shows a difference decides.
    """
    for case in reversed(cases):
        expected, nearby = _expected(signature, case.feeds)
        try:
            found = layer_outputs(signature, case.feeds, in_graph=True)
        except Exception:  # whatever a layer raises in a graph is among the problems already
            return None
        for layer in expected:
            if layer in found and _is_off(found[layer], layer, expected, nearby, CLEARLY_OFF["float32"]):
                return layer
    return None


def layers_of_outputs(signature: Signature) -> dict[str, str]:
    """Return `{output name: layer that computes it}`, because outputs have their own names in the file, not the layer's."""
    from keras_resnet.graphs import graph_of, producer_name

    graph = graph_of(signature.model)
    if graph is None:
        return {}
    return {output.name: producer_name(graph.outputs[output.index]) for output in signature.outputs if output.source == "model"}


def layer_outputs(signature: Signature, feeds: dict[str, np.ndarray], in_graph: bool = False) -> dict[str, np.ndarray]:
    """Return `{layer path: array}` of every layer that Keras calls once, for one batch, in the order of the calls.

    Args:
        signature: The model and its inputs.
        feeds: `{input name: array}`.
        in_graph: Whether to call the model in a TensorFlow graph, as it is traced for a SavedModel, instead of eagerly.
    """
    import tensorflow as tf

    from keras_resnet.graphs import state_kept

    def call(*tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        found, repeated = {}, set()

        def noted(path: str, result: Any) -> None:
            if tf.is_tensor(result):
                repeated.update({path} & set(found))
                found[path] = result

        with calls_of_layers(noted):
            signature.run(*tensors)
        return {path: result for path, result in found.items() if path not in repeated}

    tensors = [tf.convert_to_tensor(feeds[spec.name]) for spec in signature.inputs]
    with state_kept(signature.model):
        results = (concrete_function(call, signature.specs())[0] if in_graph else call)(*tensors)
    return {path: result.numpy() for path, result in results.items()}


def inner_tensors(path: str | os.PathLike[str], feeds: dict[str, np.ndarray], wanted: set[str]) -> dict[str, np.ndarray]:
    """Return `{tensor name: array}` of those tensors of a file, in its order, from onnxruntime without optimisation."""
    import onnxruntime as ort

    proto = read_proto(path)
    outputs = {value.name for value in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name in wanted]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, feeds), strict=True)) if names else {}


def _difference(got: np.ndarray, reference: np.ndarray) -> float:
    """Relative error in whichever layout fits best; 0 if none does, since nothing can be said then."""
    if not np.issubdtype(got.dtype, np.floating):
        return 0.0
    largest = max(float(np.abs(reference).max(initial=0)), 1e-30)
    layouts = [got] if got.ndim < 3 else [got, np.moveaxis(got, 1, -1)]
    found = [float(np.abs(layout - reference).max(initial=0)) / largest for layout in layouts if layout.shape == reference.shape]
    return min(found) if found else 0.0
