"""Evaluate what depends on constants alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from .common import attribute, constant, is_constant, remove_unused, replace

KEEP = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "ConstantOfShape"}
LARGEST_GROWTH = 1 << 20


def _reshape(node, x, shape):
    keep_zero = attribute(node, "allowzero", 0)
    return x.reshape([x.shape[axis] if size == 0 and not keep_zero else size for axis, size in enumerate(shape)])


def _axes(node, axes):
    found = axes[0] if axes else attribute(node, "axes")
    return None if found is None else tuple(int(axis) for axis in found)


# The ops that stand between a Keras weight and its use, without the evaluator's overhead per node.
MOVEMENT = {
    "Identity": lambda node, x: x,
    "Transpose": lambda node, x: np.transpose(x, attribute(node, "perm")),
    "Reshape": _reshape,
    "Squeeze": lambda node, x, *axes: np.squeeze(x, _axes(node, axes)),
    "Unsqueeze": lambda node, x, *axes: np.expand_dims(x, _axes(node, axes)),
}
ARITHMETIC = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
}


def fold_constants(graph: ir.Graph) -> None:
    """Replace each node whose inputs are all constant by its value; float32 arithmetic is done in float64.

    Hot ops are numpy calls, all others go through onnx's reference evaluator; onnxscript's folder would round each step to
    float32 and skips weights of ordinary size.
    """
    for node in list(graph):
        if not _foldable(node):
            continue
        results = _evaluate(node, [None if value is None else value.const_value.numpy() for value in node.inputs], graph)
        if results is None:
            continue
        for output, result in zip(node.outputs, results, strict=True):
            like = node.inputs[0] if node.op_type in MOVEMENT else output
            ir.convenience.replace_all_uses_with(output, constant(graph, output.name, result, like=like))
        graph.remove(node, safe=True)
    remove_unused(graph)


def _foldable(node):
    if node.op_type in KEEP or node.domain not in ("", "ai.onnx") or not any(value is not None for value in node.inputs):
        return False
    if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
        return False
    return all(value is None or is_constant(value) for value in node.inputs) and not any(
        output.is_graph_output() for output in node.outputs
    )


def _evaluate(node, inputs, graph):
    if node.op_type in MOVEMENT:
        return [MOVEMENT[node.op_type](node, *inputs)]
    if node.op_type in ARITHMETIC and all(np.issubdtype(x.dtype, np.floating) for x in inputs):
        return [np.asarray(ARITHMETIC[node.op_type](*(x.astype("float64") for x in inputs)))]
    try:
        results = _reference(node, inputs, graph.opset_imports[""])
    except Exception:
        return None  # the evaluator lacks the op; the runtime will compute it
    size = sum(np.size(x) for x in inputs if x is not None)
    return results if sum(np.size(result) for result in results) <= size + LARGEST_GROWTH else None


def _reference(node, inputs, opset):
    proto = ir.serde.serialize_node(node)
    feeds = {name: x for name, x in zip(proto.input, inputs, strict=True) if name}
    graph = onnx.helper.make_graph(
        [proto],
        "fold",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in feeds.items()
        ],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in proto.output],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    return [np.asarray(result) for result in ReferenceEvaluator(model).run(None, feeds)]


def drop_identities(graph: ir.Graph) -> None:
    """Let users of an Identity use its input; one that only renames an output gives the name to its producer.

    onnx-ir's `IdentityEliminationPass` would lose the layer that a value belongs to. Verification needs it to name the first
    layer that differs.
    """
    for node in list(graph):
        if node.op_type != "Identity":
            continue
        source, output = node.inputs[0], node.outputs[0]
        if output.is_graph_output() and (source.producer() is None or source.is_graph_output()):
            continue
        replace(graph, output, source)
