"""From a trace without weights to an onnx-ir model: tf2onnx's op handlers translate, and the weights are put in afterwards.

tf2onnx's own optimiser is not used. It copies the whole model in every pass, does not fold a batch norm into a convolution that
has a bias, and hides its errors. `passes` does this work instead.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from ..errors import UsageError
from . import handlers
from .keras_internals import needed_rewriters

if TYPE_CHECKING:
    from .trace import Trace


def to_ir(trace: Trace, opset: int) -> ir.Model:
    """Translate a `tracing.Trace`.

    Args:
        trace: The traced call.
        opset: At most 17; later ones are reached by `passes.opset`.

    Returns:
        `onnx_ir.Model` whose graph has the trace's inputs and outputs in their order, values that carry the Keras layer they
        come from in `meta["layer"]`, and weights that are read only when needed.

    Raises:
        UsageError: An op has no counterpart in ONNX.
    """
    proto, types = _handlers_only(trace, opset)
    model = ir.from_proto(proto)
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs} | {value.name: value for value in graph.inputs}
    for name, (dtype, shape) in types.items():
        if name in values and dtype is not None:
            values[name].dtype = ir.DataType(dtype)
        if name in values and shape is not None:
            values[name].shape = ir.Shape([size if size is not None and size >= 0 else None for size in shape])
    for name, layer in trace.layers.items():
        if name in values:
            values[name].meta["layer"] = layer
    _put_weights(graph, trace.weights)
    by_name = {value.name: value for value in graph.inputs}
    graph.inputs[:] = [by_name[name] for name in trace.inputs]
    graph.outputs[:] = [values[name] for name in trace.outputs.values()]
    return model


def _handlers_only(trace, opset):
    import tensorflow as tf
    from tf2onnx import tfonnx

    restart_names()
    weight_inputs = [f"{name}:0" for name in trace.weights]
    outputs = list(dict.fromkeys(trace.outputs.values()))
    ops = {node.op for nodes in (trace.graph.node, *(f.node_def for f in trace.graph.library.function)) for node in nodes}
    with tf.Graph().as_default() as tf_graph, quiet("tf2onnx"), needed_rewriters(ops):
        tf.import_graph_def(trace.graph, name="")
        try:
            graph = tfonnx.process_tf_graph(
                tf_graph,
                opset=opset,
                input_names=trace.inputs + weight_inputs,
                output_names=outputs,
                continue_on_error=False,
                custom_op_handlers=dict(handlers.HANDLERS),
            )
        except Exception as error:
            raise UsageError(f"tf2onnx cannot convert this model: {error}") from error
    types = {name: (graph.get_dtype(name), graph.get_shape(name)) for node in graph.get_nodes() for name in node.output}
    proto = graph.make_model("model")
    check_ops(proto, trace.layers)
    return proto, types


def restart_names() -> None:
    """Let tf2onnx number its names from the start, as in a new process; it sorts nodes by them."""
    from tf2onnx import utils

    utils.INTERNAL_NAME = 1


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Suppress a library's log lines; what they would say is raised as an error here."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


KNOWN_GAPS = {"Erfc"}  # `passes.simplify` rewrites these


def check_ops(proto: onnx.ModelProto, layers: dict[str, str]) -> None:
    """Refuse ops that ONNX does not have; tf2onnx passes them through, and no runtime loads such a file.

    Raises:
        UsageError: An op has no counterpart in ONNX; the message names it and its layer.
    """
    for node in _all_nodes(proto.graph):
        if node.domain == "com.microsoft" and node.op_type == "Range":  # tf2onnx writes it so for int64; the standard has it too
            node.domain = ""
        opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
        if node.domain in ("", "ai.onnx") and (onnx.defs.has(node.op_type, opset) or node.op_type in KNOWN_GAPS):
            continue
        since = f"opset {opset} of " if onnx.defs.has(node.op_type) else ""
        raise UsageError(f"op {node.op_type!r} of {_origin(node, layers)} has no counterpart in {since}ONNX; replace that layer")


def _all_nodes(graph):
    """The nodes of a GraphProto and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)


def _origin(node, layers):
    for output in node.output:
        if output in layers:
            return f"layer {layers[output]!r}"
    scope = node.name.rsplit("/", 1)[0]
    inside = sorted({layer for tensor, layer in layers.items() if tensor.rsplit("/", 1)[0] == scope})
    return f"layer {inside[0]!r}" if inside else f"node {node.name!r}"


def _put_weights(graph, weights):
    inputs = {value.name: value for value in graph.inputs}
    for name, weight in weights.items():
        value = inputs[f"{name}:0"]
        graph.inputs.remove(value)
        dtype = ir.DataType.from_numpy(weight.dtype)
        value.shape, value.dtype = ir.Shape(weight.shape), dtype
        value.const_value = _tensor(weight, value.name, dtype)
        if weight.path:
            value.meta["path"] = weight.path
        graph.initializers[value.name] = value


def _tensor(weight, name, dtype):
    """Computed arrays as they are, in float64; variables are read when a pass or the writer asks for them."""
    if isinstance(weight.source, np.ndarray):
        return ir.tensor(weight.source, name=name)
    return ir.LazyTensor(lambda: ir.tensor(np.asarray(weight.array()), name=name), dtype, ir.Shape(weight.shape), name=name)
