"""A Keras call as a TensorFlow graph without its weights: small enough that every later step is cheap.

TensorFlow's own freezing copies each weight into the graph several times and lets the graph optimiser walk over it; here a
variable becomes a placeholder that remembers which variable it stands for, and what depends on weights alone (a batch norm's
scale and shift) is computed with numpy in float64, so that only the boundary between weights and data stays in the graph.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact import first_line
from ..errors import UsageError
from .keras_internals import (
    calls_of_layers,
    center_crop_of_dynamic_size,
    clean_name,
    clean_scope_names,
    native_dilation,
    other_adaptive_pooling,
    other_resize,
    plain_grouped_convolutions,
    random_crop_of_dynamic_size,
    time_distribution_of_dynamic_length,
    unrolling_of_dynamic_length,
    upsampling_of_dynamic_size,
)
from .pooling import adaptive_average_pool, adaptive_max_pool
from .resizing import resized_as_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf


__all__ = ["NotWeightless", "Trace", "Weight", "calls_of_layers", "clean_name", "concrete_function", "trace"]

LARGEST_CONSTANT = 4096


class NotWeightless(Exception):
    """The graph reads variables in a way that this method cannot follow, e.g. inside a loop body."""


@dataclass
class Weight:
    """A value that depends on weights alone: a variable (read when asked for) or an array computed from some."""

    source: Any
    path: str | None = None
    shape: tuple = field(init=False)

    def __post_init__(self) -> None:
        self.shape = tuple(self.source.shape)

    def array(self) -> np.ndarray:
        return self.source if isinstance(self.source, np.ndarray) else self.source.numpy()

    @property
    def dtype(self) -> np.dtype:
        """numpy dtype in the graph: arithmetic is float64, the graph stays float32."""
        dtype = np.dtype(getattr(self.source.dtype, "as_numpy_dtype", self.source.dtype))
        return np.dtype("float32") if dtype == np.float64 and isinstance(self.source, np.ndarray) else dtype


@dataclass
class Trace:
    """A traced call.

    Attributes:
        graph: GraphDef in which weights are placeholders.
        inputs: Tensor names, in the order of the specs.
        outputs: `{output name: tensor name}`.
        weights: `{placeholder name: Weight}`.
        layers: `{tensor name: path of the Keras layer whose output it is}`.
    """

    graph: object
    inputs: list
    outputs: dict
    weights: dict
    layers: dict


def trace(call: Callable[..., dict[str, tf.Tensor]], specs: Sequence[tf.TensorSpec]) -> Trace:
    """Trace `call(*tensors) -> {name: tensor}` and take the weights out.

    Args:
        call: Function of the model's inputs that returns a dict.
        specs: `tf.TensorSpec` per input.

    Returns:
        Trace

    Raises:
        NotWeightless: A variable is read inside control flow or by another op than a plain read.
    """
    concrete, layers = concrete_function(call, specs, to_convert=True)
    outputs = {name: tensor.name for name, tensor in concrete.structured_outputs.items()}
    graph, weights = _without_variables(concrete, {name.split(":")[0] for name in outputs.values()})
    graph, weights = _evaluate_frontier(graph, weights, {name.split(":")[0] for name in outputs.values()})
    _note_growth(graph, growth_of_transposed_convolutions(concrete.graph))
    return Trace(graph, [tensor.name for tensor in concrete.inputs[: len(specs)]], outputs, weights, layers)


def concrete_function(
    call: Callable[..., dict[str, tf.Tensor]], specs: Sequence[tf.TensorSpec], to_convert: bool = False
) -> tuple[Any, dict[str, str]]:
    """Trace a call.

    Args:
        call: Function of the inputs that returns a dict.
        specs: `tf.TensorSpec` per input.
        to_convert: Whether the graph is for a converter only, and need not run in TensorFlow.

    Returns:
        `(concrete function, {tensor name: path of the Keras layer whose output it is})`.

    Raises:
        UsageError: A layer cannot be traced with dynamic sizes.
    """
    import tensorflow as tf

    layers = {}

    def noted(path: str, result: Any) -> None:
        if isinstance(result, tf.Tensor):
            layers.setdefault(result.name, path)

    try:
        with contextlib.ExitStack() as patches:
            for patch in (
                plain_grouped_convolutions(to_convert),
                clean_scope_names(),
                other_adaptive_pooling(adaptive_average_pool, adaptive_max_pool),
                random_crop_of_dynamic_size(),
                center_crop_of_dynamic_size(),
                upsampling_of_dynamic_size(),
                unrolling_of_dynamic_length(),
                time_distribution_of_dynamic_length(),
                calls_of_layers(noted),
                *((native_dilation(), other_resize(resized_as_tensorflow)) if to_convert else ()),
            ):
                patches.enter_context(patch)
            return tf.function(call, autograph=False).get_concrete_function(*specs), layers
    except tf.errors.OperatorNotAllowedInGraphError as error:
        kind = re.search(r"calling (\w+)\.call", str(error))
        raise UsageError(
            f"{kind[1] if kind else 'a layer'} decides on a number that is known only at run time, as bilinear UpSampling2D does"
            " where height and width are dynamic; build the model with a fixed input size"
        ) from error
    except (UsageError, NotWeightless):
        raise
    except Exception as error:  # whatever a layer raises while TensorFlow traces it is about the layer
        raise UsageError(
            f"layer {getattr(error, 'layer_path', '?')!r} cannot be traced as a TensorFlow graph of these sizes: "
            f"{first_line(error)}; replace that layer, or give the model a fixed input size"
        ) from error


TRANSPOSED = {"Conv2DBackpropInput": 2, "Conv3DBackpropInputV2": 3}


def growth_of_transposed_convolutions(graph: tf.Graph) -> dict[str, tuple[int, ...]]:
    """Return how much larger than stride times input the output of every transposed convolution is, per spatial axis.

    TensorFlow gets the output's size as a tensor. Keras computes it from the input's, so that the difference is a constant
    where height and width are dynamic too; it is found by working the size out for two sizes of the input.

    Args:
        graph: `tf.Graph`.

    Returns:
        `{operation name: tuple of int}`, without the operations whose output's size is computed in another way.
    """
    found = {}
    for operation in graph.get_operations():
        if operation.type in TRANSPOSED:
            growth = _growth(operation)
            if growth is not None:
                found[operation.name] = growth
    return found


GROWTH = "_growth"
PROBES = (50, 81)


def _note_growth(graph, growth):
    for node in graph.node:
        if node.name in growth:
            node.attr[GROWTH].list.i.extend(growth[node.name])


def _growth(operation):
    start = 1 if operation.get_attr("data_format").endswith(b"C") else 2
    axes = slice(start, start + TRANSPOSED[operation.type])
    strides = np.array(operation.get_attr("strides")[axes])
    shape = operation.inputs[2].shape.as_list()
    found = set()
    for probe in PROBES if None in shape else PROBES[:1]:
        sizes = _output_sizes(operation, probe)
        if sizes is None:
            return None
        found.add(tuple(int(size) for size in sizes[axes] - strides * [size or probe for size in shape[axes]]))
    return found.pop() if len(found) == 1 else None


def _output_sizes(operation, probe):
    """The first input of a transposed convolution where every unknown size of its last is `probe`, or None."""
    import tensorflow as tf

    static = tf.get_static_value(operation.inputs[0])
    if static is not None:
        return static
    source = operation.inputs[2]
    allowed = {source.ref()} | ({source.op.inputs[0].ref()} if source.op.type == "ExpandDims" else set())
    shapes = _sources(operation.inputs[0])
    if not all(shape.type == "Shape" and shape.inputs[0].ref() in allowed for shape in shapes):
        return None
    feeds = {shape.outputs[0].name: [size or probe for size in shape.inputs[0].shape.as_list()] for shape in shapes}
    with tf.compat.v1.Session(graph=operation.graph) as session:
        return session.run(operation.inputs[0], feeds)


def _sources(tensor):
    """The operations that read data, or the shape of data, for a tensor."""
    found, stack, seen = [], [tensor.op], set()
    while stack:
        operation = stack.pop()
        if operation.name not in seen:
            seen.add(operation.name)
            is_source = operation.type == "Shape" or not operation.inputs and operation.type != "Const"
            (found if is_source else stack).extend([operation] if is_source else [value.op for value in operation.inputs])
    return found


def _without_variables(concrete, outputs):
    """Replace reads of captured variables, captured constants and large constants by placeholders of the same name.

    What no output depends on is left out first: augmentation layers advance their random seeds in inference too.
    """
    import tensorflow as tf

    handles = {id(variable.handle): variable for variable in concrete.graph.variables}
    variables, weights = {}, {}
    for outer, inner in concrete.graph.captures:
        if inner.dtype == tf.resource:
            variables[inner.op.name] = handles.get(id(outer))
        else:
            weights[inner.op.name] = Weight(outer.numpy())
    graph = concrete.graph.as_graph_def()
    live = _live(graph, outputs)
    assigned = {node.input[0] for node in graph.node if node.op.startswith("Assign")}
    first_read, kept = {}, []
    for node in graph.node:
        if node.name in variables or node.name not in live and node.op != "Placeholder":
            continue
        sources = [name.split(":")[0] for name in node.input]
        if node.op == "ReadVariableOp":
            variable = variables.get(sources[0])
            if variable is None or node.input[0] in assigned:
                raise NotWeightless(f"{node.name} reads a variable that is not the model's, or that changes on the way")
            if variable.handle.ref() in first_read:
                _become_identity(node, first_read[variable.handle.ref()])
            else:
                first_read[variable.handle.ref()] = node.name
                weights[node.name] = Weight(variable, variable.name.split(":")[0])
                _become_placeholder(node, variable.dtype, variable.shape)
        elif any(name in variables for name in sources):
            raise NotWeightless(f"{node.op} {node.name} uses a variable other than by reading it")
        elif node.op == "Const" and len(node.attr["value"].tensor.tensor_content) > LARGEST_CONSTANT:
            weights[node.name] = Weight(tf.make_ndarray(node.attr["value"].tensor))
            _become_placeholder(node, weights[node.name].dtype, weights[node.name].shape)
        kept.append(node)
    return _graph_of(graph, kept), weights


def _live(graph, outputs):
    """Names of the nodes that outputs are computed from; the order of side effects does not count."""
    nodes = {node.name: node for node in graph.node}
    live, stack = set(outputs), list(outputs)
    while stack:
        for source in nodes[stack.pop()].input:
            name = source.split(":")[0]
            if not source.startswith("^") and name not in live:
                live.add(name)
                stack.append(name)
    return live


def _become_placeholder(node, dtype, shape):
    import tensorflow as tf

    node.op = "Placeholder"
    node.ClearField("input")
    node.attr.clear()
    node.attr["dtype"].type = tf.as_dtype(dtype).as_datatype_enum
    node.attr["shape"].shape.CopyFrom(tf.TensorShape(shape).as_proto())


def _become_identity(node, source):
    dtype = node.attr["dtype"].type
    node.op = "Identity"
    del node.input[:]
    node.input.append(source)
    node.attr.clear()
    node.attr["T"].type = dtype


def _graph_of(graph, nodes):
    result = type(graph)()
    result.versions.CopyFrom(graph.versions)
    result.library.CopyFrom(graph.library)
    result.node.extend(nodes)
    return result


ARITHMETIC = {
    "Add": np.add,
    "AddV2": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "RealDiv": np.divide,
    "Sqrt": np.sqrt,
    "Rsqrt": lambda x: 1 / np.sqrt(x),
    "Neg": np.negative,
    "Maximum": np.maximum,
    "Square": np.square,
}
MOVEMENT = {"Identity": lambda x: x, "Reshape": lambda x, shape: np.reshape(x, shape)}


def _evaluate_frontier(graph, weights, outputs):
    """Compute every node that depends on weights and constants alone; only those that data meets stay, as placeholders."""
    import tensorflow as tf

    known = dict(weights)
    constants = {node.name: node for node in graph.node if node.op == "Const"}

    def value(name: str) -> np.ndarray:
        return known[name].array() if name in known else tf.make_ndarray(constants[name].attr["value"].tensor)

    for node in graph.node:  # inference only: control edges merely order reads, and node order is topological
        data = [name for name in node.input if not name.startswith("^")]
        del node.input[:]
        node.input.extend(data)
        sources = [name.split(":")[0] for name in data]
        if node.name in known or node.name in outputs or not any(name in known for name in sources):
            continue
        if not all(name in known or name in constants for name in sources):
            continue
        if node.op in MOVEMENT:
            moved = MOVEMENT[node.op](*map(value, sources))
            known[node.name] = known[sources[0]] if node.op == "Identity" else Weight(moved, known[sources[0]].path)
        elif node.op in ARITHMETIC:
            operands = [value(name) for name in sources]
            if all(np.issubdtype(operand.dtype, np.floating) for operand in operands):
                known[node.name] = Weight(np.asarray(ARITHMETIC[node.op](*(x.astype("float64") for x in operands))))
    return _pruned(graph, known, outputs)


def _pruned(graph, known, outputs):
    nodes = {node.name: node for node in graph.node}
    live, stack = set(outputs), list(outputs)
    while stack:
        name = stack.pop()
        for source in () if name in known else (entry.split(":")[0] for entry in nodes[name].input):
            if source not in live:
                live.add(source)
                stack.append(source)
    kept = []
    for node in graph.node:
        if node.name in live and node.name in known:
            _become_placeholder(node, known[node.name].dtype, known[node.name].shape)
        if node.name in live or (node.op == "Placeholder" and node.name not in known):
            kept.append(node)
    return _graph_of(graph, kept), {node.name: known[node.name] for node in kept if node.name in known}
