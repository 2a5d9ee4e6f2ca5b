"""Reading a model's graph and what its outputs mean. Nothing here changes a model.

A *graph* is a Functional model, or the Functional model inside a Sequential one. Graphs nest; a *path* such as
`"backbone/block5_pool"` names an operation in a nested graph.

Both packages use private attributes of Keras in this module only, except for those of optimizers and trainers in `training` and
what `resnet_export.conversion.keras_internals` replaces while it traces. They were checked against Keras 3.15, and
tests/test_graphs.py fails if one of them changes:

| private | used for |
|---|---|
| `Functional` (class), `Sequential._functional` | recognising graphs |
| `_nodes_by_depth`, `_inputs_struct`, `_outputs_struct`, `_standardize_inputs` of a graph | running it call by call |
| `_keras_history` of a tensor, `_inbound_nodes` of an operation | what made a tensor |
| `_keras_mask`, `_keras_logits` of a tensor | its mask, the logits before a softmax |
| `_flatten_layers` of a layer | the layers inside it, wrapped ones included |
| `_output_shape` of a `Lambda` | making it again |
| `global_state`, its entry `uninitialized_variables` | building a model without numbers in its weights |
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import tree
from keras.src.backend.common import global_state
from keras.src.models.functional import Functional


def graph_of(operation: Any) -> Any:
    """Return the Functional graph that a model or layer runs when it is called, or None if there is none that can be read.

    Subclasses of Functional count as long as they do not override `call`.
    """
    if isinstance(operation, keras.Sequential):
        return operation._functional if type(operation).call is keras.Sequential.call else None
    if isinstance(operation, Functional) and type(operation).call is Functional.call:
        return operation
    return None


def symbolic_graph(model: keras.Model) -> Any:
    """Return the Functional graph that a Functional or built Sequential model was made as, even if its `call` differs."""
    return getattr(model, "_functional", None) or model


def require_graph(model: keras.Model) -> Any:
    """Return a model's graph as `graph_of` does.

    Raises:
        TypeError: It is not a Keras model.
        ValueError: The model has no graph that can be read; the message says what to do.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model, got {type(model).__name__}")
    if (graph := graph_of(model)) is None:
        fix = (
            "call `model.build(input_shape)` first"
            if isinstance(model, keras.Sequential)
            else "rebuild it with the functional API"
        )
        raise ValueError(f"model {model.name!r} ({type(model).__name__}) has no graph that can be read; {fix}")
    return graph


def nodes(graph: Any) -> list[Any]:
    """Return the graph's calls in order of execution, inputs left out."""
    by_depth = graph._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if node.operation and not node.is_input]


def replay(graph: Any, inputs: Sequence[Any], call: Callable[..., Any]) -> Any:
    """Run a graph on tensors, symbolic or real.

    Args:
        graph: Functional.
        inputs: Flat list of tensors, in the order of `graph.inputs`.
        call: `call(node, args, kwargs) -> outputs`, in order of execution.

    Returns:
        Outputs in the graph's output structure.
    """
    values = dict(zip(map(id, graph.inputs), inputs, strict=True))
    for node in nodes(graph):
        args, kwargs = node.arguments.fill_in(values)
        outputs = call(node, args, kwargs)
        values.update(zip(map(id, node.outputs), tree.flatten(outputs), strict=True))
    return pack_outputs(graph, [values[id(output)] for output in graph.outputs])


def flat_inputs(graph: Any, x: Any) -> list[Any]:
    """Return inputs as a caller gives them (tensor, list, dict by name), as the flat list that `replay` takes."""
    with warnings.catch_warnings():
        # Keras warns where a lone tensor stands for a list of one; both are fine here.
        warnings.simplefilter("ignore")
        return tree.flatten(graph._standardize_inputs(x))


def pack_inputs(graph: Functional, tensors: list) -> object:
    """Return a flat list of tensors in the structure (tensor, list, dict) in which a graph takes its inputs."""
    return tree.pack_sequence_as(graph._inputs_struct, tensors)


def pack_outputs(graph: Functional, tensors: list) -> Any:
    """Return a flat list of tensors in the structure (tensor, list, dict) in which a graph gives its outputs."""
    return tree.pack_sequence_as(graph._outputs_struct, tensors)


def walk(model: keras.Model, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield `(path, graph, node)` of every call in the model's tree, in order of execution.

    A nested model comes before its parts, and its parts come once, however often it is called.
    """
    yield from _walk(require_graph(model), path, set())


def _walk(graph, path, seen):
    for node in nodes(graph):
        name = path + node.operation.name
        yield name, graph, node
        inner = graph_of(node.operation) if isinstance(node.operation, keras.Model) else None
        if inner is not None and id(inner) not in seen:
            seen.add(id(inner))
            yield from _walk(inner, name + "/", seen)


def call_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a layer was called on, whether given by position or as `inputs=`."""
    return args[0] if args else next(iter(kwargs.values()))


def producer(tensor: keras.KerasTensor) -> Any:
    """Return the node that made a symbolic tensor, or None."""
    history = getattr(tensor, "_keras_history", None)
    return None if history is None or history.operation is None else history.operation._inbound_nodes[history.node_index]


def producer_name(tensor: keras.KerasTensor) -> str:
    """Name of the operation that made a symbolic tensor, "" if there is none."""
    node = producer(tensor)
    return "" if node is None else node.operation.name


def ancestors(tensor: keras.KerasTensor) -> dict[int, keras.KerasTensor]:
    """Return the tensor and all that it is made from, by id."""
    found, queue = {id(tensor): tensor}, [tensor]
    while queue:
        node = producer(queue.pop())
        for parent in node.arguments.keras_tensors if node is not None else ():
            if id(parent) not in found:
                found[id(parent)] = parent
                queue.append(parent)
    return found


def mask_of(tensor: Any) -> Any:
    """Return the Keras mask of a tensor, symbolic or real, or None."""
    return getattr(tensor, "_keras_mask", None)


def logits_of(output: object) -> object:
    """Return the logits that a softmax or sigmoid took, or the tensor itself where Keras keeps none."""
    return getattr(output, "_keras_logits", output)


def layers_in(layer: keras.layers.Layer, include_self: bool = True) -> list[keras.layers.Layer]:
    """Return a layer or model and all layers in it: those of nested models, and those that wrappers hold."""
    return list(layer._flatten_layers(include_self=include_self))


def lambda_output_shape(layer: keras.layers.Lambda) -> object:
    """Return the argument `output_shape` that a `Lambda` was made with."""
    return layer._output_shape


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Let models that are built in the context have weights without numbers, which take no memory at any size.

    Keras has no public way to drop variables that wait for their first value; it would fill them when the next model is built.
    """
    waiting = "uninitialized_variables"
    before = list(global_state.get_global_attribute(waiting, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        global_state.set_global_attribute(waiting, before)


def is_convolution(operation: Any) -> bool:
    """Return whether an operation is a layer with a kernel over space: `Conv*`, `DepthwiseConv*`, `SeparableConv*`."""
    named = "Conv" in type(operation).__name__ and "LSTM" not in type(operation).__name__
    return isinstance(operation, keras.layers.Layer) and named and hasattr(operation, "kernel_size")


def is_of_keras(operation: Any) -> bool:
    """Return whether Keras or this package defines what an operation computes, not the user (own layers, `Lambda`)."""
    known = type(operation).__module__.split(".")[0] in ("keras", "keras_resnet")
    return known and not isinstance(operation, keras.layers.Lambda)


def is_weighted(operation: Any) -> bool:
    """Return whether an operation counts as a weighted layer, as papers count depth: it holds a kernel (not just vectors)."""
    if isinstance(operation, keras.Model) or not isinstance(operation, keras.layers.Layer):
        return False
    return any(len(weight.shape) >= 2 for weight in operation.weights)


def data_format_at(tensor: keras.KerasTensor, graph: Any = None) -> str:
    """Return the data format of a symbolic tensor: that of the nearest layer before it that has one, or else after it.

    Args:
        tensor: Symbolic tensor.
        graph: Functional graph that it is part of, or None.

    Returns:
        `"channels_last"` or `"channels_first"`. If no layer of the graph has a data format, Keras' setting.
    """
    if (found := _layout(tensor, {})) is not None:
        return found
    for node in nodes(graph) if graph is not None else ():
        if (found := getattr(node.operation, "data_format", None)) is not None:
            return found
    return keras.config.image_data_format()


def _layout(tensor, known):
    if id(tensor) not in known:
        known[id(tensor)] = None
        node = producer(tensor)
        if node is not None and not node.is_input:
            known[id(tensor)] = _layout_after(node, known)
    return known[id(tensor)]


def _layout_after(node, known):
    if (own := getattr(node.operation, "data_format", None)) is not None:
        return own
    before = next((found for parent in node.arguments.keras_tensors if (found := _layout(parent, known))), None)
    order = getattr(node.operation, "dims", None) or getattr(node.operation, "axes", None)
    if before is None or type(node.operation).__name__ not in ("Permute", "Transpose") or order is None:
        return before
    # Where has the channel axis gone? `Permute` leaves the batch out of its list.
    order = (0, *order) if type(node.operation).__name__ == "Permute" else tuple(order)
    place = order.index(1 if before == "channels_first" else len(order) - 1)
    return {1: "channels_first", len(order) - 1: "channels_last"}.get(place)


def state_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Return the state variables of a stateful recurrent layer, which its `variables` lack."""
    states = tree.flatten(getattr(layer, "states", None) or [])
    return [state for state in states if isinstance(state, keras.Variable)]


@contextlib.contextmanager
def state_kept(*models: keras.Model, but: Iterable[keras.Variable] = ()) -> Iterator[None]:
    """Put statistics, seeds and recurrent states back to what they were, whatever is called in the context.

    Args:
        models: Models that are called.
        but: Variables that may change.
    """
    free = {id(variable) for variable in but}
    layers = [layer for model in models for layer in layers_in(model)]
    variables = [v for model in models for v in model.variables if not v.trainable]
    variables += [v for layer in layers for v in state_variables(layer)]
    variables = [v for v in variables if id(v) not in free]
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            if not np.array_equal(keras.ops.convert_to_numpy(variable), value, equal_nan=value.dtype.kind == "f"):
                variable.assign(value)


@dataclass(frozen=True)
class OutputHead:
    """What one output of a model means, read from the operations that make it.

    Attributes:
        kind: `"probabilities"` (a softmax over the last axis, or a mean of such), `"binary"` (a sigmoid with one unit),
            `"multilabel"` (a sigmoid with several units), or `"other"` (a linear output, or one that the graph does not explain).
        activation: `"softmax"` or `"sigmoid"` where it is the last operation that changes values, else None.
    """

    kind: str
    activation: str | None = None


OTHER = OutputHead("other")


def output_heads(model: keras.Model) -> list[OutputHead]:
    """Find the final activation of every output of a model.

    Only operations whose effect is known count: a layer of Keras' own (or a subclass that inherits `call`), a function of
    `keras.ops`, and what passes values through unchanged (`Dropout` in inference, `Reshape`, `Flatten`, a linear activation).
    An attribute named `activation` on a layer of the user's own says nothing about what its `call` does last.

    Args:
        model: A built model. A subclassed model without a graph has the kind `"other"` throughout.

    Returns:
        One `OutputHead` per output, in the order of `model.outputs`.
    """
    graph = graph_of(model)
    if graph is None:
        return [OTHER for _ in getattr(model, "outputs", None) or [None]]
    return [_sized(_head(tensor, graph), tuple(tensor.shape)) for tensor in graph.outputs]


def _sized(head: OutputHead, shape: tuple) -> OutputHead:
    """The head with `"multilabel"` told from `"binary"` by the number of units."""
    if head.kind not in ("binary", "multilabel"):
        return head
    return OutputHead("binary" if len(shape) > 1 and shape[-1] == 1 else "multilabel", head.activation)


def _head(tensor: keras.KerasTensor, graph: Any) -> OutputHead:
    """The head of a symbolic tensor that belongs to a graph."""
    node = producer(tensor)
    if node is None or node.is_input:
        return OTHER
    operation = node.operation
    if isinstance(operation, keras.Model) and (inner := graph_of(operation)) is not None:
        return _head(inner.outputs[[id(output) for output in node.outputs].index(id(tensor))], inner)
    if activation := final_activation(operation):
        return OutputHead("probabilities" if activation == "softmax" else "multilabel", activation)
    sources = node.input_tensors
    if _keeps_values(operation, sources, tensor):
        return _head(sources[0], graph)
    if _has_own_call(operation, keras.layers.Average):
        heads = {_head(source, graph).kind for source in sources}
        return OutputHead(heads.pop()) if len(heads) == 1 else OTHER
    return OTHER


def final_activation(operation: Any) -> str | None:
    """Name the activation that an operation applies last, over the last axis: `"softmax"`, `"sigmoid"` or None."""
    layers = keras.layers
    if isinstance(operation, keras.Layer) and "call" in vars(operation):  # somebody replaced it on this one object
        return None
    if _has_own_call(operation, layers.TimeDistributed):
        return final_activation(operation.layer)
    if _has_own_call(operation, layers.Softmax):
        return "softmax" if operation.axis == -1 else None
    if any(_has_own_call(operation, getattr(layers, name)) for name in _WITH_ACTIVATION):
        return _named(operation.activation)
    if not isinstance(operation, keras.Layer) and type(operation).__module__.startswith("keras."):
        kind = type(operation).__name__
        if kind == "Softmax":
            return "softmax" if operation.axis == -1 else None
        return "sigmoid" if kind == "Sigmoid" else None
    return None


# Keras layers whose last operation is the function in their attribute `activation`.
_WITH_ACTIVATION = (
    "Activation Dense EinsumDense Conv1D Conv2D Conv3D DepthwiseConv1D DepthwiseConv2D SeparableConv1D SeparableConv2D"
    " Conv1DTranspose Conv2DTranspose Conv3DTranspose"
).split()


def _has_own_call(operation: Any, kind: Any) -> bool:
    """Whether an operation is a layer of that Keras class, or of a subclass that does not override `call`."""
    return isinstance(operation, kind) and type(operation).call is kind.call


def _named(function: Callable) -> str | None:
    """The name of an activation function, whichever library it comes from."""
    known = {"softmax": [keras.activations.softmax, keras.ops.softmax], "sigmoid": [keras.activations.sigmoid, keras.ops.sigmoid]}
    for name, functions in known.items():
        for library in ("tensorflow", "jax"):
            if nn := getattr(sys.modules.get(library), "nn", None):
                functions.append(getattr(nn, name))
        if any(function is candidate for candidate in functions):
            return name
    return None


def _keeps_values(operation: Any, sources: list, result: Any) -> bool:
    """Whether an operation, in inference, gives its one input back, at most in another shape with the same last axis."""
    if len(sources) != 1:
        return False
    layers = keras.layers
    if any(_has_own_call(operation, kind) for kind in (layers.Flatten, layers.Reshape)) or _is_reshape(operation):
        return sources[0].shape[-1] == result.shape[-1]
    if _has_own_call(operation, layers.Activation):
        return operation.activation is keras.activations.linear
    kinds = (layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.GaussianDropout, layers.GaussianNoise)
    return any(_has_own_call(operation, kind) for kind in (*kinds, layers.Identity, layers.ActivityRegularization))


def _is_reshape(operation: Any) -> bool:
    return type(operation).__module__.startswith("keras.src.ops") and type(operation).__name__ == "Reshape"
