"""Local rewrites that make nodes constant, neutral or known to ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .common import array, attribute, constant, insert, is_constant, remove_unused, replace, set_attribute, shape

if TYPE_CHECKING:
    import onnx_ir as ir


def spell_out_erfc(graph: ir.Graph) -> None:
    """`Erfc(x)`, which exact GELU uses and ONNX lacks, becomes `1 - Erf(x)`."""
    for node in list(graph):
        if node.op_type == "Erfc":
            x, output = node.inputs[0], node.outputs[0]
            erf = insert(graph, node, "Erf", [x], like=x, sizes=shape(x))
            one = constant(graph, "one", np.float32(1))
            replace(graph, output, insert(graph, node, "Sub", [one, erf], like=x, sizes=shape(x)))


NEUTRAL = {"Mul": 1.0, "Add": 0.0}


def drop_neutral(graph: ir.Graph) -> None:
    """Remove `x * 1` and `x + 0` with a scalar constant: TensorFlow's SiLU is `x * sigmoid(1.0 * x)`."""
    for node in list(graph):
        if node.op_type not in NEUTRAL or len(node.inputs) != 2 or node.outputs[0].is_graph_output():
            continue
        for scalar, other in (node.inputs, node.inputs[::-1]):
            if scalar.shape is None or scalar.shape.rank() > 0 and list(scalar.shape) != [1] or not is_constant(scalar):
                continue
            if (
                other.shape is not None
                and other.shape.rank() >= scalar.shape.rank()
                and array(scalar).item() == NEUTRAL[node.op_type]
            ):
                replace(graph, node.outputs[0], other)
                break
    remove_unused(graph)


def fix_reshapes(graph: ir.Graph) -> None:
    """Give a Reshape to a computed shape its constant shape, where at most one size is unknown."""
    for node in graph:
        if node.op_type != "Reshape" or is_constant(node.inputs[1]):
            continue
        sizes = shape(node.outputs[0])
        if sizes is not None and sum(size < 0 for size in sizes) <= 1 and 0 not in sizes:
            node.replace_input_with(1, constant(graph, "shape", np.array(sizes, "int64")))
    remove_unused(graph)


def write_split_sizes(graph: ir.Graph) -> None:
    """Give a Split into equal parts its sizes.

    onnxruntime takes two such nodes with the same input for one, whatever their number
    of outputs (1.24 to 1.31).
    """
    for node in graph:
        sizes = shape(node.inputs[0]) if node.op_type == "Split" and len(node.inputs) == 1 else None
        size = sizes[attribute(node, "axis", 0)] if sizes is not None else -1
        if size > 0 and size % len(node.outputs) == 0:
            count = len(node.outputs)
            node.resize_inputs(2)
            node.replace_input_with(1, constant(graph, "split", np.full(count, size // count, "int64")))


def settle_groups(graph: ir.Graph) -> None:
    """Give every convolution the number of groups that its input and weight state; tf2onnx leaves 1 for three dimensions."""
    for node in graph:
        if node.op_type != "Conv":
            continue
        channels, weight = (shape(value) for value in node.inputs[:2])
        if channels and weight and channels[1] > 0 and weight[1] > 0 and channels[1] != weight[1] * attribute(node, "group", 1):
            set_attribute(node, "group", channels[1] // weight[1])
