"""Resize nodes whose output has the size that the model gives it, with coordinates that every runtime knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .common import array, attribute, constant, is_constant, remove_unused, set_attribute, set_shape, shape

if TYPE_CHECKING:
    import onnx_ir as ir


def settle_resizes(graph: ir.Graph) -> None:
    """Correct scales that round the output's size down, and write TensorFlow's nearest pixel in terms of the standard.

    14 / 11 as a float32 times 11 is less than 14, of which a runtime takes the integer part. `tf_half_pixel_for_nn` left the
    standard with opset 13; rounding half pixels up is the same.
    """
    for node in graph:
        if node.op_type != "Resize":
            continue
        if attribute(node, "coordinate_transformation_mode") == "tf_half_pixel_for_nn":
            set_attribute(node, "coordinate_transformation_mode", "half_pixel")
            set_attribute(node, "nearest_mode", "round_prefer_ceil")
        scales, sizes = node.inputs[2] if len(node.inputs) > 2 else None, shape(node.inputs[0])
        if is_constant(scales) and sizes is not None and len(sizes) == array(scales).size:
            settled = np.array([_settled(*pair) for pair in zip(array(scales), sizes, strict=True)], "float32")
            if (settled != array(scales)).any():
                node.replace_input_with(2, constant(graph, "scales", settled, like=scales))
                set_shape(
                    node.outputs[0], [int(size * scale) if size > 0 else size for size, scale in zip(sizes, settled, strict=True)]
                )
    remove_unused(graph)


def _settled(scale, size):
    """The smallest scale that is not below the given one and gives the whole number of pixels nearest to it."""
    scale, wanted = np.float32(scale), np.round(np.float64(size) * scale)
    while size > 0 and np.floor(np.float64(size) * scale) < wanted:
        scale = np.nextafter(scale, np.float32(np.inf))
    return scale
