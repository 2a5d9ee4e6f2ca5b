"""Carry transposes forward until they meet their inverse: Keras is channels-last, ONNX convolutions are channels-first.

onnxslim and onnxscript's rewriter leave about 100 of them in a ResNet-50; onnxruntime's transpose optimiser comes with its
faulty Pad fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .common import array, attribute, constant, insert, is_constant, remove_unused, set_attribute, set_shape, shape

ELEMENTWISE = set(
    "Relu Sigmoid Tanh Clip LeakyRelu Elu Selu Celu HardSwish HardSigmoid Softplus Softsign Erf Exp Log Sqrt Neg Abs Reciprocal"
    " Cast Identity Gelu Mish ThresholdedRelu Floor Ceil Round Sign Not Sin Cos".split()
)
BROADCAST = set("Add Sub Mul Div Max Min Pow Sum Where PRelu Equal Greater Less GreaterOrEqual LessOrEqual And Or".split())
REDUCE = set("ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL2 ReduceSumSquare".split())


def inverse(perm: Sequence[int]) -> list[int]:
    return [int(axis) for axis in np.argsort(perm)]


def is_identity(perm: Sequence[int]) -> bool:
    return list(perm) == list(range(len(perm)))


def sink_transposes(graph: ir.Graph) -> None:
    """One forward sweep: a Transpose is noted, not kept; ops that can work on the untransposed tensor do, all others get it
    transposed again (once per tensor), as a Reshape where only axes of size 1 move."""
    sweep, shapes = _Sweep(graph), [output.shape for output in graph.outputs]
    for node in list(graph):
        sweep.visit(node)
    for index, output in enumerate(graph.outputs):
        if output in sweep.lazy:
            graph.outputs[index] = sweep.materialised(output, None)
            graph.outputs[index].shape = shapes[index]
    remove_unused(graph)


@dataclass
class _Sweep:
    """`lazy[v] = (p, perm)`: what users of `v` expect is `Transpose(p, perm)`; `p` holds real data, often `v`'s own."""

    graph: ir.Graph
    lazy: dict = field(default_factory=dict)
    made: dict = field(default_factory=dict)

    def visit(self, node: ir.Node) -> None:
        first = node.inputs[0] if len(node.inputs) else None
        if node.op_type == "Transpose" and self._free(node):
            perm = attribute(node, "perm") or list(range(len(first.shape)))[::-1]
            source, before = self.lazy.get(first, (first, list(range(len(perm)))))
            self.lazy[node.outputs[0]] = (source, [before[axis] for axis in perm])
            return
        if not any(value in self.lazy for value in node.inputs if value is not None):
            return
        rule = _RULES.get(node.op_type)
        if rule is None or not self._free(node) or not rule(self, node):
            for index, value in enumerate(node.inputs):
                if value in self.lazy:
                    node.replace_input_with(index, self.materialised(value, node))

    def _free(self, node):
        """Whether no subgraph uses an output: such users cannot be rewired one by one."""
        return all(user.graph is self.graph for output in node.outputs for user, _ in output.uses())

    def materialised(self, value: ir.Value, before: ir.Node | None) -> ir.Value:
        if value not in self.lazy:
            return value
        source, perm = self.lazy[value]
        return self.transposed(source, perm, before, value.meta.get("layer"))

    def transposed(self, source: ir.Value, perm: Sequence[int], before: ir.Node | None, layer: str | None = None) -> ir.Value:
        if is_identity(perm):
            return source
        key = (source, tuple(perm))
        if key not in self.made:
            self.made[key] = self._insert_transpose(source, perm, before)
            if layer:
                self.made[key].meta.setdefault("layer", layer)
        return self.made[key]

    def _insert_transpose(self, source, perm, before):
        sizes = shape(source)
        moved = None if sizes is None else [sizes[axis] for axis in perm]
        op, inputs, attributes = "Transpose", [source], {"perm": list(perm)}
        if sizes is not None and sum(size < 0 for size in moved) <= 1:
            order = [axis for axis in perm if sizes[axis] != 1]
            if order == sorted(order):
                op, inputs, attributes = "Reshape", [source, constant(self.graph, "shape", np.array(moved, "int64"))], {}
        if before is not None:
            return insert(self.graph, before, op, inputs, attributes, like=source, sizes=moved)
        node = ir.node(op, inputs, attributes)
        node.outputs[0].type = source.type
        if moved is not None:
            set_shape(node.outputs[0], moved)
        self.graph.append(node)
        return node.outputs[0]

    def moved(self, node: ir.Node, perm: Sequence[int], output: ir.Value | None = None) -> None:
        """Note that a node now works on untransposed data: its output is `Transpose(itself, perm)`."""
        output = output or node.outputs[0]
        sizes = shape(output)
        if sizes is not None:
            set_shape(output, [sizes[axis] for axis in inverse(perm)])
        self.lazy[output] = (output, list(perm))


def _elementwise(sweep, node):
    if node.inputs[0] not in sweep.lazy:
        return False
    source, perm = sweep.lazy[node.inputs[0]]
    node.replace_input_with(0, source)
    sweep.moved(node, perm)
    return True


def _broadcast(sweep, node):
    perm = max((sweep.lazy[value][1] for value in node.inputs if value in sweep.lazy), key=len)
    rank, back = len(perm), inverse(perm)
    plan = [_operand(sweep, value, perm, rank) for value in node.inputs]
    if None in plan:
        return False
    for index, (kind, value) in enumerate(plan):
        if kind == "constant":
            content = array(value)
            if content.size > 1:
                padded = content.reshape([1] * (rank - content.ndim) + list(content.shape))
                node.replace_input_with(index, constant(sweep.graph, value.name, np.transpose(padded, back), like=value))
        elif kind == "transpose":
            node.replace_input_with(index, sweep.transposed(sweep.materialised(value, node), back, node))
        else:
            node.replace_input_with(index, value)
    sweep.moved(node, perm)
    return True


def _operand(sweep, value, perm, rank):
    """How one operand meets the others in untransposed layout; None if it cannot."""
    if value in sweep.lazy and sweep.lazy[value][1] == perm:
        return "as is", sweep.lazy[value][0]
    if is_constant(value):
        return ("constant", value) if value.const_value.shape.rank() <= rank else None
    sizes = shape(value)
    if sizes == []:
        return "as is", value
    return ("transpose", value) if sizes is not None and len(sizes) == rank else None


def _concat(sweep, node):
    perms = [sweep.lazy[value][1] if value in sweep.lazy else None for value in node.inputs]
    if None in perms or any(perm != perms[0] for perm in perms):
        return False
    set_attribute(node, "axis", perms[0][attribute(node, "axis") % len(perms[0])])
    for index, value in enumerate(node.inputs):
        node.replace_input_with(index, sweep.lazy[value][0])
    sweep.moved(node, perms[0])
    return True


def _pad(sweep, node):
    if node.inputs[0] not in sweep.lazy or not is_constant(node.inputs[1]) or len(node.inputs) > 3:
        return False
    source, perm = sweep.lazy[node.inputs[0]]
    before, after = np.split(array(node.inputs[1]), 2)
    back = inverse(perm)
    node.replace_input_with(0, source)
    node.replace_input_with(1, constant(sweep.graph, "pads", np.concatenate([before[back], after[back]])))
    sweep.moved(node, perm)
    return True


def _reduce(sweep, node):
    axes = constant_axes(node)
    if node.inputs[0] not in sweep.lazy or axes is None:
        return False
    source, perm = sweep.lazy[node.inputs[0]]
    axes = [axis % len(perm) for axis in axes]
    rest = [perm[axis] for axis in range(len(perm)) if axis not in axes]
    node.replace_input_with(0, source)
    _set_axes(sweep.graph, node, sorted(perm[axis] for axis in axes))
    if attribute(node, "keepdims", 1):
        sweep.moved(node, perm)
    elif rest != sorted(rest):
        order = sorted(rest)
        sweep.moved(node, [order.index(axis) for axis in rest])
    return True


def constant_axes(node: ir.Node) -> list[int] | None:
    if "axes" in node.attributes:
        return list(attribute(node, "axes"))
    if len(node.inputs) > 1 and is_constant(node.inputs[1]):
        return [int(axis) for axis in array(node.inputs[1])]
    return None


def _set_axes(graph, node, axes):
    if "axes" in node.attributes:
        set_attribute(node, "axes", axes)
    else:
        node.replace_input_with(1, constant(graph, "axes", np.array(axes, "int64")))


def _slice(sweep, node):
    if node.inputs[0] not in sweep.lazy or len(node.inputs) < 4 or not is_constant(node.inputs[3]):
        return False
    source, perm = sweep.lazy[node.inputs[0]]
    axes = array(node.inputs[3])
    axes = np.array([perm[int(axis) % len(perm)] for axis in axes], axes.dtype)
    node.replace_input_with(0, source)
    node.replace_input_with(3, constant(sweep.graph, "axes", axes))
    sweep.moved(node, perm)
    return True


def _along_axis(default):
    def rule(sweep: _Sweep, node: ir.Node) -> bool:
        if node.inputs[0] not in sweep.lazy:
            return False
        source, perm = sweep.lazy[node.inputs[0]]
        node.replace_input_with(0, source)
        set_attribute(node, "axis", perm[attribute(node, "axis", default) % len(perm)])
        for output in node.outputs:
            sweep.moved(node, perm, output)
        return True

    return rule


def _squeeze(sweep, node):
    axes = constant_axes(node)
    if node.inputs[0] not in sweep.lazy or axes is None:
        return False
    source, perm = sweep.lazy[node.inputs[0]]
    axes = [axis % len(perm) for axis in axes]
    rest = [perm[axis] for axis in range(len(perm)) if axis not in axes]
    if rest != sorted(rest):
        return False
    node.replace_input_with(0, source)
    _set_axes(sweep.graph, node, sorted(perm[axis] for axis in axes))
    return True


_RULES = (
    dict.fromkeys(ELEMENTWISE, _elementwise)
    | dict.fromkeys(BROADCAST, _broadcast)
    | dict.fromkeys(REDUCE, _reduce)
    | {
        "Concat": _concat,
        "Pad": _pad,
        "Slice": _slice,
        "Squeeze": _squeeze,
        "Softmax": _along_axis(-1),
        "LogSoftmax": _along_axis(-1),
        "Split": _along_axis(0),
    }
)
