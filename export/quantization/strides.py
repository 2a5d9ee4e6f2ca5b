"""Strided 1×1 convolutions in the form that stays in int8 in every runtime."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from ..conversion.passes.common import attribute, insert, set_attribute


def subsample_once(model: ir.Model) -> ir.Model:
    """Move the stride of 1×1 convolutions that read the same tensor into one max pooling of window 1 before them.

    A window of 1 only picks pixels, so that the results are equal bit for bit. OpenVINO makes the same change to the blocks
    of a ResNet v1 by itself, but between `DequantizeLinear` and `Conv`, and then computes these convolutions in float32. When
    the change comes before quantisation, an int8 ResNet-50 takes 0.75 of the time there at batch 8, and 1.00 to 1.01 of it in
    onnxruntime (`scripts/benchmark.py export --parts nncf`).

    Args:
        model: A float32 graph.

    Returns:
        A changed copy.
    """
    model = model.clone()
    graph = model.graph
    position = {node: index for index, node in enumerate(graph)}
    for value in [*graph.inputs, *(output for node in position for output in node.outputs)]:
        users = sorted({node for node, _ in value.uses()}, key=lambda node: position.get(node, -1))
        strides = {_stride_of_window_one(node) if node in position else None for node in users}
        if len(users) < 2 or len(strides) != 1 or None in strides:
            continue
        (stride,) = strides
        attributes = {"kernel_shape": [1] * len(stride), "strides": list(stride)}
        kept = insert(graph, users[0], "MaxPool", [value], attributes, like=value)
        for node in users:
            node.replace_input_with(0, kept)
            set_attribute(node, "strides", [1] * len(stride))
    common.NameFixPass()(model)
    return model


def _stride_of_window_one(node: ir.Node) -> tuple[int, ...] | None:
    """The stride of a 1×1 convolution that skips pixels, None for any other node."""
    if node.op_type != "Conv" or node.inputs[1] is None or node.inputs[1].shape is None:
        return None
    window, strides = node.inputs[1].shape.numpy()[2:], attribute(node, "strides")
    if any(size != 1 for size in window) or any(attribute(node, "pads") or ()):
        return None
    return None if strides is None or set(strides) == {1} else tuple(strides)
