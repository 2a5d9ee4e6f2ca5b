"""Translations of TensorFlow ops that tf2onnx lacks or gets wrong, in the form that tf2onnx takes them."""

from __future__ import annotations

from .trace import GROWTH


def conv_transpose(ctx, node, name: str, args: list) -> None:
    """Write a ConvTranspose with explicit pads, whatever of height and width is dynamic.

    tf2onnx cuts the pads off with nodes of shape arithmetic where sizes are dynamic, records a wrong shape there (it takes -1
    for a size), and moves the result by some pixels where the stride is larger than the kernel.
    """
    from tf2onnx.onnx_opset import nn

    growth = node.get_attr_value(GROWTH)
    if growth is None:
        nn.ConvTranspose.version_11(ctx, node)
        users = [user for user in ctx.find_output_consumers(node.output[0]) if user.type == "Transpose"]
        for output in (node.output[0], *(user.output[0] for user in users)):
            ctx.set_shape(output, [-1] * len(ctx.get_shape(output)))
        return
    spatial = len(growth)
    padding = node.get_attr("padding").s.decode()
    node.type = "ConvTranspose"
    kernel = nn.conv_kernel_shape(ctx, node, 1, spatial=spatial)
    strides = nn.conv_dims_attr(node, "strides", spatial=spatial)
    dilations = nn.conv_dims_attr(node, "dilations", spatial=spatial) or [1] * spatial
    begins, ends, missing = [], [], []
    for size, stride, dilation, more in zip(kernel, strides, dilations, growth, strict=True):
        surplus = (size - 1) * dilation + 1 - stride - more
        begins.append(0 if padding == "VALID" else max(surplus, 0) // 2)
        ends.append(max(surplus, 0) - begins[-1])
        missing.append(max(-surplus, 0))
    node.set_attr("pads", [*begins, *ends])
    node.set_attr("output_padding", missing)
    ctx.remove_input(node, node.input[0], 0)
    kernel, data = node.input[:2]
    ctx.replace_input(node, kernel, data, 0)
    ctx.replace_input(node, data, kernel, 1)
    nn.conv_convert_inputs(ctx, node, with_kernel=True, spatial=spatial, quantization_axis=1)


HANDLERS = {"Conv2DBackpropInput": (conv_transpose, []), "Conv3DBackpropInputV2": (conv_transpose, [])}
