"""Means and maxima over all of space under their own names, and padding inside the op that needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .common import array, attribute, constant, insert, is_constant, remove_unused, replace, set_attribute, shape
from .transposes import constant_axes

if TYPE_CHECKING:
    import onnx_ir as ir


GLOBAL = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}


def write_global_pools(graph: ir.Graph) -> None:
    """A reduction over all spatial axes becomes GlobalAveragePool or GlobalMaxPool (and Flatten), which have fast kernels."""
    for node in list(graph):
        sizes = shape(node.inputs[0]) if node.op_type in GLOBAL else None
        axes = constant_axes(node) if sizes is not None and len(sizes) >= 3 else None
        if axes is None or sorted(axis % len(sizes) for axis in axes) != list(range(2, len(sizes))):
            continue
        output = node.outputs[0]
        pooled = insert(
            graph, node, GLOBAL[node.op_type], [node.inputs[0]], like=node.inputs[0], sizes=sizes[:2] + [1] * (len(sizes) - 2)
        )
        if not attribute(node, "keepdims", 1):
            pooled = insert(graph, node, "Flatten", [pooled], {"axis": 1}, like=pooled, sizes=sizes[:2])
        replace(graph, output, pooled)
    remove_unused(graph)


def split_means(graph: ir.Graph) -> None:
    """A mean over several axes that are not the last ones, as group norms take it, becomes means over one axis after the other.

    onnxruntime adds the numbers of such a mean one by one: in a map of 107×131, the variance of a group is off by 2e-4.
    """
    for node in list(graph):
        sizes = shape(node.inputs[0]) if node.op_type == "ReduceMean" else None
        axes = sorted(axis % len(sizes) for axis in constant_axes(node) or ()) if sizes is not None else []
        if len(axes) < 2 or axes == list(range(len(sizes) - len(axes), len(sizes))):
            continue
        value, keepdims = node.inputs[0], attribute(node, "keepdims", 1)
        for axis in reversed(axes):
            sizes = [*sizes[:axis], *([1] if keepdims else []), *sizes[axis + 1 :]]
            options = {"axes": [axis], "keepdims": keepdims}
            value = insert(graph, node, "ReduceMean", [value], options, like=node.inputs[0], sizes=sizes)
        replace(graph, node.outputs[0], value)
    remove_unused(graph)


def settle_same_padding(graph: ir.Graph) -> None:
    """Write SAME padding as numbers where it does not depend on the size: at stride 1, and for windows of 1 and 2.

    A window of 2 needs a zero at the end at most, which does no harm where it is not needed. onnxruntime computes a negative
    padding where the stride is larger than the window and stops, and not every runtime has SAME padding with dilation.
    """
    for node in graph:
        kernel = attribute(node, "kernel_shape")
        if not attribute(node, "auto_pad", "NOTSET").startswith("SAME") or kernel is None or node.op_type == "ConvTranspose":
            continue
        strides, dilations = (attribute(node, name) or [1] * len(kernel) for name in ("strides", "dilations"))
        totals = [(size - 1) * dilation for size, dilation in zip(kernel, dilations, strict=True)]
        upper = attribute(node, "auto_pad") == "SAME_UPPER"
        if all(total <= upper or stride == 1 for total, stride in zip(totals, strides, strict=True)):
            begins = [total // 2 if upper else total - total // 2 for total in totals]
            del node.attributes["auto_pad"]
            set_attribute(node, "pads", [*begins, *(total - begin for total, begin in zip(totals, begins, strict=True))])


NOT_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softplus", "Softmax"}


def _not_negative(value):
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Clip":
        low = array(node.inputs[1]) if len(node.inputs) > 1 else None
        return low is not None and low.item() >= 0
    return node.op_type in NOT_NEGATIVE


def merge_pads(graph: ir.Graph) -> None:
    """Zero padding in front of a Conv goes into its `pads`; in front of a MaxPool (which pads with -inf) only where nothing is
    negative, so that every window keeps its maximum."""
    for node in list(graph):
        pads = zero_pads(node)
        if pads is None or node.outputs[0].is_graph_output():
            continue
        half = len(pads) // 2
        spatial = [*pads[2:half], *pads[half + 2 :]]
        users = list(node.outputs[0].uses())
        if not all(user.graph is graph and index == 0 and _accepts(user, spatial, node.inputs[0]) for user, index in users):
            continue
        for user, _ in users:
            own = attribute(user, "pads") or [0] * len(spatial)
            user.attributes.pop("auto_pad", None)
            set_attribute(user, "pads", [int(a + b) for a, b in zip(own, spatial, strict=True)])
            user.replace_input_with(0, node.inputs[0])
    remove_unused(graph)


def zero_pads(node: ir.Node) -> list[int] | None:
    """Return the pads of a Pad node that puts zeros around space only, else None."""
    if node.op_type != "Pad" or attribute(node, "mode", "constant") != "constant" or not is_constant(node.inputs[1]):
        return None
    if len(node.inputs) > 3 or (len(node.inputs) > 2 and node.inputs[2] is not None and _nonzero(node.inputs[2])):
        return None
    pads = [int(size) for size in array(node.inputs[1])]
    half = len(pads) // 2
    return None if min(pads) < 0 or any(pads[:2]) or any(pads[half : half + 2]) else pads


def _nonzero(value):
    content = array(value)
    return content is None or content.item() != 0


def _accepts(node, spatial, source):
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    if node.op_type == "Conv":
        return True
    if node.op_type != "MaxPool" or attribute(node, "ceil_mode", 0) or not _not_negative(source):
        return False
    kernel = list(attribute(node, "kernel_shape")) * 2
    return all(size < side for size, side in zip(spatial, kernel, strict=True))


def guard_pads(graph: ir.Graph) -> None:
    """Keep onnxruntime from moving a zero Pad into a MaxPool, which pads with -inf: wrong wherever all inputs are negative.

    Its Pad_Fusion looks for 0.0 and takes -0.0 for another number (1.24 to 1.32, opset 13 to 23). A Pad with `axes`, which it
    leaves alone too, is one that OpenVINO cannot read.
    """
    for node in list(graph):
        if zero_pads(node) is not None and np.issubdtype(np.dtype(node.inputs[0].dtype.numpy()), np.floating):
            zero = constant(graph, "minus_zero", np.array(-0.0, node.inputs[0].dtype.numpy()))
            if len(node.inputs) > 2:
                node.replace_input_with(2, zero)
            else:
                node.resize_inputs(3)
                node.replace_input_with(2, zero)
    remove_unused(graph)
