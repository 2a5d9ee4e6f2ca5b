"""tf2onnx's own conversion, for what cannot be traced without weights (variables read inside loops, as in an LSTM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ..errors import UsageError
from .handlers import HANDLERS
from .trace import concrete_function
from .translate import check_ops, quiet, restart_names

if TYPE_CHECKING:
    import tensorflow as tf


def stock_model(call: Callable[..., dict[str, tf.Tensor]], specs: Sequence[tf.TensorSpec], opset: int) -> ir.Model:
    """Convert with TensorFlow's freezing and tf2onnx's optimiser: slow and memory-hungry, but it follows everything they do.

    Args:
        call: Function of the inputs that returns a dict.
        specs: `tf.TensorSpec` per input.
        opset: At most 17.

    Returns:
        `onnx_ir.Model`, inputs and outputs in order.

    Raises:
        UsageError: It cannot convert the model either.
    """
    concrete, _ = concrete_function(call, specs, to_convert=True)
    restart_names()
    with quiet("tf2onnx"):
        try:
            proto = _converted(concrete, opset)
        except Exception as error:
            raise UsageError(f"tf2onnx cannot convert this model: {error}") from error
    check_ops(proto, {})
    model = ir.from_proto(proto)
    ShapeInferencePass()(model)  # tf2onnx's optimiser leaves values without a shape, and passes work with what is known
    _captured_constants(model.graph, concrete)
    inputs = {value.name: value for value in model.graph.inputs}
    tensors = concrete.inputs[: len(specs)]
    model.graph.inputs[:] = [inputs.get(tensor.op.name) or inputs.get(tensor.name) or _unused(tensor) for tensor in tensors]
    by_name = {value.name: value for value in model.graph.outputs}
    model.graph.outputs[:] = [by_name[tensor.name] for tensor in concrete.structured_outputs.values()]
    for value, tensor in zip(model.graph.outputs, concrete.structured_outputs.values(), strict=True):
        value.shape = ir.Shape(tensor.shape.as_list())
    return model


def _converted(concrete, opset):
    """The model in ONNX, after those passes of tf2onnx that keep what it computes.

    `optimize_transpose` is left out: of `x * x` with one transposed `x`, as in `UnitNormalization`, it moves the axes twice.
    """
    import tensorflow as tf
    from tf2onnx import optimizer, tf_loader, tfonnx

    inputs = [tensor.name for tensor in concrete.inputs if tensor.dtype != tf.resource]
    outputs = [tensor.name for tensor in concrete.structured_outputs.values()]
    passes = {name: step for name, step in optimizer._get_optimizers().items() if name != "optimize_transpose"}
    with tf.device("/cpu:0"):
        frozen = tf_loader.from_function(concrete, inputs, outputs)
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(frozen, name="")
        converted = tfonnx.process_tf_graph(
            graph,
            opset=opset,
            input_names=inputs,
            output_names=outputs,
            continue_on_error=True,
            custom_op_handlers=dict(HANDLERS),
        )
        return optimizer.optimize_graph(converted, optimizers=passes).make_model("model")


def _unused(tensor):
    """An input that no output depends on, which tf2onnx drops."""
    dtype = ir.DataType.from_numpy(np.dtype(tensor.dtype.as_numpy_dtype))
    return ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape.as_list()))


def _captured_constants(graph, concrete):
    """Give the graph the constants that Keras layers hold as tensors (`Normalization`), which tf2onnx leaves as inputs."""
    inputs = {value.name: value for value in graph.inputs}
    for outer, inner in concrete.graph.captures:
        value = inputs.get(inner.name)
        if value is not None:
            value.const_value = ir.tensor(outer.numpy(), name=value.name)
            graph.inputs.remove(value)
            graph.register_initializer(value)
