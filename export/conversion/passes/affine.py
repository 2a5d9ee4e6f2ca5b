"""Fold per-channel arithmetic into the weights in front of it, and write what is left over as one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .common import array, attribute, constant, insert, is_constant, only_user, remove_unused, replace, shape

if TYPE_CHECKING:
    import onnx_ir as ir


# Axis of the output channels in the weight, for each op that can absorb a scale and a shift.
OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}


@dataclass
class _Affine:
    """`y = scale * x + shift`, per channel, in float64."""

    scale: np.ndarray
    shift: np.ndarray

    def then(self, scale: np.ndarray, shift: np.ndarray) -> _Affine:
        return _Affine(self.scale * scale, self.shift * scale + shift)


def fold_affine(graph: ir.Graph) -> None:
    """Multiply constant Mul, Add, Sub, Div and BatchNormalization after a Conv, ConvTranspose, MatMul or Gemm into its weights.

    A MatMul that gains a bias becomes a Gemm. The weight is always a new constant: another layer may share the old one.
    Rounds once, from float64; the runtime would round at each step.
    """
    for node in list(graph):
        if node.graph is graph and _can_absorb(node):
            _absorb(graph, node)
    remove_unused(graph)


def _can_absorb(node):
    if node.op_type not in OUTPUT_AXIS or not all(is_constant(value) for value in node.inputs[1:] if value is not None):
        return False
    rank = len(node.inputs[1].shape)
    if node.op_type == "MatMul":
        return rank == 2 and len(shape(node.outputs[0]) or []) == 2
    if node.op_type == "Gemm":
        plain = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
        return all(attribute(node, name, value) == value for name, value in plain.items())
    return node.op_type == "Conv" or attribute(node, "group", 1) == 1


def _absorb(graph, node):
    weight, axis = node.inputs[1], OUTPUT_AXIS[node.op_type]
    channels, rank = weight.const_value.shape[axis], max(len(weight.shape), 2)
    bias = array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(channels)
    if bias.size not in (1, channels):
        return
    affine = _Affine(np.ones(channels), np.broadcast_to(bias.reshape(-1).astype("float64"), channels))
    absorbed, output = [], node.outputs[0]
    while (user := only_user(graph, output)) is not None:
        step = _as_affine(user, output, channels, rank)
        if step is None:
            break
        affine = affine.then(*step)
        absorbed.append(user)
        output = user.outputs[0]
    if not absorbed:
        return
    path = weight.meta.get("path")
    if not (affine.scale == 1).all():
        along = [1] * len(weight.shape)
        along[axis] = channels
        scaled = array(weight).astype("float64") * affine.scale.reshape(along)
        node.replace_input_with(1, constant(graph, weight.name, scaled.astype(array(weight).dtype), like=weight))
    shift = constant(graph, f"{weight.name}/bias", affine.shift, like=None)
    shift.dtype = weight.dtype
    if path:
        shift.meta["path"] = path.rsplit("/", 1)[0] + "/bias"
    inputs, attributes = [*node.inputs[:2], shift], dict(node.attributes)
    result = insert(graph, node, "Gemm" if node.op_type == "MatMul" else node.op_type, inputs, attributes)
    result.type, result.shape = output.type, output.shape
    replace(graph, output, result)
    for step in reversed([node, *absorbed[:-1]]):
        graph.remove(step, safe=True)


def _as_affine(node, x, channels, rank):
    """`(scale, shift)` that a node applies to `x` per channel, or None if it does anything else."""
    if node.op_type == "BatchNormalization":
        return _batch_norm(node) if node.inputs[0] is x and len(node.outputs) == 1 else None
    if node.op_type not in ("Mul", "Add", "Sub", "Div") or len(node.inputs) != 2:
        return None
    place = 0 if node.inputs[0] is x else 1
    other = per_channel(array(node.inputs[1 - place]), channels, rank)
    if other is None:
        return None
    if node.op_type == "Mul":
        return other, 0.0
    if node.op_type == "Add":
        return 1.0, other
    if node.op_type == "Sub":
        return (1.0, -other) if place == 0 else (-1.0, other)
    return (1 / other, 0.0) if place == 0 else None


def _batch_norm(node):
    if not all(is_constant(value) for value in node.inputs[1:]) or attribute(node, "training_mode", 0):
        return None
    gamma, beta, mean, variance = (array(value).astype("float64") for value in node.inputs[1:])
    scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return scale, beta - mean * scale


def per_channel(content: np.ndarray, channels: int, rank: int) -> np.ndarray | None:
    """Return a constant of a channels-first tensor as one float64 number per channel, or None if it varies otherwise."""
    if content is None or not np.issubdtype(content.dtype, np.floating):
        return None
    if content.size == 1:
        return np.full(channels, content.reshape(()), "float64") if content.ndim <= rank else None
    sizes = [1] * (rank - content.ndim) + list(content.shape)
    return content.reshape(channels).astype("float64") if len(sizes) == rank and sizes[1] == channels == content.size else None


def write_batch_norm(graph: ir.Graph) -> None:
    """Constant Mul then Add on channels-first data that no weight could absorb (pre-activation) becomes one BatchNormalization.

    One pass over memory instead of two; onnxruntime fuses neither form any further.
    """
    for node in list(graph):
        follower = only_user(graph, node.outputs[0]) if node.op_type == "Mul" and node.graph is graph else None
        if follower is None or follower.op_type != "Add":
            continue
        x = next((value for value in node.inputs if not is_constant(value)), None)
        sizes = shape(x)
        if sizes is None or not 3 <= len(sizes) <= 5 or sizes[1] <= 0:
            continue
        scale, shift = (_as_affine(step, value, sizes[1], len(sizes)) for step, value in ((node, x), (follower, node.outputs[0])))
        operands = [value for value in (*node.inputs, *follower.inputs) if is_constant(value)]
        if scale is None or shift is None or len(operands) != 2 or min(v.const_value.size for v in operands) == 1:
            continue
        name = follower.outputs[0].name
        parts = {"scale": scale[0], "bias": shift[1], "mean": np.zeros(sizes[1]), "variance": np.ones(sizes[1])}
        inputs = [x, *(constant(graph, f"{name}/{part}", content) for part, content in parts.items())]
        for value in inputs[1:]:
            value.dtype = x.dtype
        # Below opset 14 onnx's reference evaluator mixes in the batch's own statistics, by one minus the momentum.
        attributes = {"epsilon": 0.0, "momentum": 1.0}
        result = insert(graph, follower, "BatchNormalization", inputs, attributes, like=x, sizes=sizes)
        replace(graph, follower.outputs[0], result)
    remove_unused(graph)


def permute_flattened(graph: ir.Graph) -> None:
    """Drop the Transpose of `Transpose -> Reshape to [batch, n] -> Gemm` (or MatMul), by permuting the rows of the weight."""
    for node in list(graph):
        if node.op_type not in ("Gemm", "MatMul") or not _can_absorb(node):
            continue
        flatten = node.inputs[0].producer()
        if flatten is None or flatten.op_type not in ("Reshape", "Flatten") or only_user(graph, node.inputs[0]) is not node:
            continue
        transpose = flatten.inputs[0].producer()
        if transpose is None or transpose.op_type != "Transpose" or only_user(graph, flatten.inputs[0]) is not flatten:
            continue
        perm, sizes = attribute(transpose, "perm"), shape(transpose.inputs[0])
        weight = node.inputs[1]
        rows = weight.const_value.shape[0]
        if sizes is None or perm[0] != 0 or min(sizes[1:]) <= 0 or int(np.prod(sizes[1:])) != rows:
            continue
        if shape(node.inputs[0]) is None or len(shape(node.inputs[0])) != 2:
            continue
        order = np.transpose(np.arange(rows).reshape(sizes[1:]), [axis - 1 for axis in perm[1:]]).reshape(-1)
        content = array(weight)
        permuted = np.empty_like(content)
        permuted[order] = content
        node.replace_input_with(1, constant(graph, weight.name, permuted, like=weight))
        flat = insert(graph, flatten, "Flatten", [transpose.inputs[0]], {"axis": 1}, like=weight, sizes=[sizes[0], rows])
        node.replace_input_with(0, flat)
    remove_unused(graph)
