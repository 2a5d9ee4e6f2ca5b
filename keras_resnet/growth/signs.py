"""Which tensors cannot be negative, proved from the graph: what a post-activation block needs to be the identity."""

import keras

from .graph import graph_of, is_convolution, producer, walk

_NON_NEGATIVE_FUNCTIONS = {
    "relu", "relu6", "sigmoid", "hard_sigmoid", "softmax", "softplus", "exponential", "exp", "square", "absolute", "abs"
}  # fmt: skip
# Operations that map non-negative inputs to non-negative outputs.
_SIGN_KEEPING = {
    "MaxPooling", "AveragePooling", "GlobalMaxPooling", "GlobalAveragePooling", "AdaptiveAveragePooling", "AdaptiveMaxPooling",
    "ZeroPadding", "Cropping", "UpSampling", "Reshape", "Flatten", "Permute", "Dropout", "SpatialDropout", "RepeatVector",
    "Add", "Multiply", "Average", "Maximum", "Minimum", "Concatenate", "ResidualAdd", "Transpose", "Squeeze", "ExpandDims",
    "Mean", "Max", "Min", "Sum", "Sqrt",
}  # fmt: skip
# Of those, operations whose second operand may be a constant, which nothing is known about.
_BINARY = {"Add", "Multiply", "Minimum"}


def is_non_negative(tensor, outer=None):
    """Whether a symbolic tensor is ≥ 0 by the operations that made it, whatever the input.

    Args:
        tensor: KerasTensor.
        outer: maps the id of a nested graph's input to the tensors it is called on.

    Returns:
        True only where the graph proves it; a probe batch would prove nothing.
    """
    node = producer(tensor)
    if node is None or node.is_input:
        sources = (outer or {}).get(id(tensor), [])
        return bool(sources) and all(is_non_negative(source, outer) for source in sources)
    operation, parents = node.operation, node.arguments.keras_tensors
    if (graph := graph_of(operation)) is not None and isinstance(operation, keras.Model):
        inner = graph.outputs[node.outputs.index(tensor)] if len(node.outputs) > 1 else graph.outputs[0]
        bound = {**(outer or {}), **{id(x): [y] for x, y in zip(graph.inputs, parents, strict=False)}}
        return is_non_negative(inner, bound)
    if (known := getattr(operation, "non_negative_output", None)) is not None:
        return known
    if isinstance(operation, keras.layers.ReLU):
        return not operation.negative_slope and (operation.threshold or 0) >= 0
    if isinstance(operation, keras.layers.Activation) or _ends_in_activation(operation):
        return getattr(operation.activation, "__name__", "") in _NON_NEGATIVE_FUNCTIONS
    if not _is_of_keras(operation):
        return False
    if type(operation).__name__.lower() in _NON_NEGATIVE_FUNCTIONS:
        return True
    return _keeps_sign(operation, parents) and all(is_non_negative(parent, outer) for parent in parents)


def _is_of_keras(operation):
    return type(operation).__module__.split(".")[0] in ("keras", "keras_resnet")


def _ends_in_activation(operation):
    """Layers of Keras whose last step is their `activation`; of recurrent layers that is not so."""
    return _is_of_keras(operation) and (
        is_convolution(operation) or isinstance(operation, (keras.layers.Dense, keras.layers.EinsumDense))
    )


def _keeps_sign(operation, parents):
    name = type(operation).__name__.rstrip("D").rstrip("123")
    if name == "UpSampling":
        return getattr(operation, "interpolation", "nearest") in ("nearest", "bilinear")
    if name in _BINARY and len(parents) < 2:
        return False
    return name in _SIGN_KEEPING and bool(parents)


def callers(model):
    """For `is_non_negative`: the tensors that each nested graph's inputs are called on, over all its calls."""
    found = {}
    for _, _, node in walk(model):
        if isinstance(node.operation, keras.Model) and (graph := graph_of(node.operation)) is not None:
            for inner, outer in zip(graph.inputs, node.arguments.keras_tensors, strict=False):
                found.setdefault(id(inner), []).append(outer)
    return found
