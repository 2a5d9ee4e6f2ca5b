"""Proves from the graph that a tensor cannot be negative, without which a post-activation block is not the identity."""

from __future__ import annotations

from typing import Any

import keras
from keras import tree

from ..graphs import graph_of, is_convolution, is_of_keras, producer, walk

# Functions are compared by identity, because a user's own function may have the same name.
_NON_NEGATIVE_ACTIVATIONS = tuple(
    getattr(keras.activations, name)
    for name in ("relu", "relu6", "sigmoid", "hard_sigmoid", "softmax", "softplus", "exponential")
)
# Names of Keras' classes, without their rank: layers and operations whose output is never negative, …
_NON_NEGATIVE_OPERATIONS = {
    "Relu", "Relu6", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Square", "Absolute", "Abs"
}  # fmt: skip
# … and those whose output is not negative if their inputs are not.
_SIGN_KEEPING_LAYERS = {
    "MaxPooling", "AveragePooling", "GlobalMaxPooling", "GlobalAveragePooling", "AdaptiveAveragePooling", "AdaptiveMaxPooling",
    "ZeroPadding", "Cropping", "UpSampling", "Reshape", "Flatten", "Permute", "Dropout", "SpatialDropout", "RepeatVector",
    "Add", "Multiply", "Average", "Maximum", "Minimum", "Concatenate", "ResidualAdd",
}  # fmt: skip
_SIGN_KEEPING_OPERATIONS = {
    "Add", "Multiply", "Maximum", "Concatenate", "Reshape", "Transpose", "Squeeze", "ExpandDims", "Mean", "Max", "Sum", "Sqrt"
}  # fmt: skip


def is_non_negative(tensor: keras.KerasTensor, outer: Any = None, known: dict[int, bool] | None = None) -> bool:
    """Return whether a symbolic tensor is ≥ 0 for every input of the model, because of the operations that compute it.

    Args:
        tensor: Symbolic tensor.
        outer: The tensors that each input of a nested graph is called on, by the id of the input; see `callers`.
        known: Results for other tensors, by their ids. Used by the recursion.

    Returns:
        True if the graph proves it. Values of a batch are not looked at, since they would prove nothing.
    """
    known = {} if known is None else known
    if id(tensor) not in known:
        known[id(tensor)] = _is_non_negative(tensor, outer or {}, known)
    return known[id(tensor)]


def _is_non_negative(tensor, outer, known):
    node = producer(tensor)
    if node is None or node.is_input:
        sources = outer.get(id(tensor), [])
        return bool(sources) and all(is_non_negative(source, outer, known) for source in sources)
    operation, parents = node.operation, node.arguments.keras_tensors
    if isinstance(operation, keras.Model) and (graph := graph_of(operation)) is not None:
        inner = graph.outputs[node.outputs.index(tensor)] if len(node.outputs) > 1 else graph.outputs[0]
        bound = {**outer, **{id(x): [y] for x, y in zip(graph.inputs, parents, strict=False)}}
        return is_non_negative(inner, bound)
    if (own := getattr(operation, "non_negative_output", None)) is not None:
        return own
    if not is_of_keras(operation):
        return False
    if isinstance(operation, keras.layers.ReLU):
        return not operation.negative_slope
    if _ends_in_activation(operation):
        return any(operation.activation is function for function in _NON_NEGATIVE_ACTIVATIONS)
    name = type(operation).__name__.rstrip("D").rstrip("123")
    if name in _NON_NEGATIVE_OPERATIONS:
        return True
    return _keeps_sign(name, node) and all(is_non_negative(parent, outer, known) for parent in parents)


def is_relu(operation: Any) -> bool:
    """Return whether an operation is a ReLU without bounds or slopes, which gives back whatever is not negative."""
    if isinstance(operation, keras.layers.ReLU):
        return operation.max_value is None and not operation.negative_slope and not operation.threshold
    return isinstance(operation, keras.layers.Activation) and operation.activation is keras.activations.relu


def _ends_in_activation(operation):
    """Whether an operation is a layer that applies its `activation` last, which recurrent layers do not."""
    kinds = (keras.layers.Activation, keras.layers.Dense, keras.layers.EinsumDense)
    return isinstance(operation, kinds) or is_convolution(operation)


def _keeps_sign(name, node):
    operation, parents = node.operation, node.arguments.keras_tensors
    if name == "UpSampling":
        return getattr(operation, "interpolation", "nearest") in ("nearest", "bilinear")
    if isinstance(operation, keras.layers.Layer):
        return name in _SIGN_KEEPING_LAYERS and bool(parents)
    # Nothing is known about constants among the operands.
    operands = 2 if name in ("Add", "Multiply") else 1
    constants = [x for x in tree.flatten((node.arguments.args, node.arguments.kwargs)) if hasattr(x, "shape")]
    return name in _SIGN_KEEPING_OPERATIONS and len(parents) >= operands and len(constants) == len(parents)


def callers(model: keras.Model) -> dict[int, Any]:
    """Return the tensors that the inputs of nested graphs are called on, over all calls, as `is_non_negative` takes them."""
    found = {}
    for _, _, node in walk(model):
        if isinstance(node.operation, keras.Model) and (graph := graph_of(node.operation)) is not None:
            for inner, outer in zip(graph.inputs, node.arguments.keras_tensors, strict=False):
                found.setdefault(id(inner), []).append(outer)
    return found
