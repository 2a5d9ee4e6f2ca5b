"""Translations of TensorFlow ops that tf2onnx lacks or gets wrong, in the form that tf2onnx takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from .trace import GROWTH

if TYPE_CHECKING:
    from tf2onnx.graph import Graph, Node


def conv_transpose(ctx: Graph, node: Node, name: str, args: list) -> None:
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


def _replace(ctx: Graph, node: Node, op: str, inputs: list[str], attributes: dict | None = None) -> None:
    """Put an ONNX node in the place of a TensorFlow one."""
    shapes, dtypes, outputs = node.output_shapes, node.output_dtypes, node.output
    ctx.remove_node(node.name)
    ctx.make_node(op, inputs, attr=attributes, name=node.name, outputs=outputs, shapes=shapes, dtypes=dtypes)


class _Builder:
    """Short names for making nodes and constants."""

    def __init__(self, ctx: Graph, node: Node) -> None:
        self.ctx, self.node = ctx, node

    def __getattr__(self, op: str) -> Callable[..., str]:
        return lambda *inputs, **attributes: self.ctx.make_node(op, list(inputs), attr=attributes).output[0]

    def const(self, content: object, like: str | None = None) -> str:
        """Return a constant, in the dtype of a tensor or as numpy has it."""
        from tf2onnx import utils

        dtype = None if like is None else ctx_dtype(self.ctx, like)
        return self.ctx.make_const(utils.make_name(self.node.name), np.asarray(content, dtype)).output[0]


def select(ctx: Graph, node: Node, name: str, args: list) -> None:
    """Choose floats with Where; tf2onnx multiplies both by 0 or 1, and 0 times an infinity that was not chosen is NaN."""
    from tf2onnx.onnx_opset import controlflow

    node.set_attr("handles_nan", 1)
    is_float = ctx.get_dtype(node.output[0]) in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
    choose = controlflow.Select.version_9 if is_float else controlflow.Select.version_7
    choose(ctx, node)


def floor_div(ctx: Graph, node: Node, name: str, args: list) -> None:
    """Divide and round down; ONNX' division of integers rounds towards zero."""
    from tf2onnx.onnx_opset import math

    if not np.issubdtype(dtype := ctx_dtype(ctx, node.output[0]), np.integer):
        math.FloorDiv.version_6(ctx, node)
        return
    make, (x, y) = _Builder(ctx, node), node.input
    quotient = make.Div(x, y)
    if np.issubdtype(dtype, np.unsignedinteger):
        _replace(ctx, node, "Identity", [quotient])
        return
    zero = make.const(0, like=x)
    rounded_up = make.And(make.Not(make.Equal(make.Mul(quotient, y), x)), make.Xor(make.Less(x, zero), make.Less(y, zero)))
    _replace(ctx, node, "Sub", [quotient, make.Cast(rounded_up, to=ctx.get_dtype(x))])


def floor_mod(ctx: Graph, node: Node, name: str, args: list) -> None:
    """What a division that rounds down leaves."""
    from tf2onnx.onnx_opset import math

    if np.issubdtype(ctx_dtype(ctx, node.output[0]), np.integer):
        _replace(ctx, node, "Mod", list(node.input))
    else:
        math.FloorMod.version_7(ctx, node)


def bias_add(ctx: Graph, node: Node, name: str, args: list) -> None:
    """Add a number per channel, which is the second axis in channels-first layout; tf2onnx misses that after some operations."""
    make, (x, bias) = _Builder(ctx, node), node.input
    if node.get_attr_value("data_format", b"NHWC") in (b"NCHW", "NCHW"):
        bias = make.Unsqueeze(bias, make.const(np.arange(1, len(ctx.get_shape(x)) - 1)))
    _replace(ctx, node, "Add", [x, bias])


def expm1(ctx: Graph, node: Node, name: str, args: list) -> None:
    """`exp(x) - 1` as `tanh(x / 2) * (exp(x) + 1)`, which is exact near zero too."""
    make, x = _Builder(ctx, node), node.input[0]
    half, one = make.const(0.5, like=x), make.const(1, like=x)
    _replace(ctx, node, "Mul", [make.Tanh(make.Mul(x, half)), make.Add(make.Exp(x), one)])


def log1p(ctx: Graph, node: Node, name: str, args: list) -> None:
    """`log(1 + x)`, corrected by what the sum rounds off: `log(u) * x / (u - 1)` with `u = 1 + x`."""
    make, x = _Builder(ctx, node), node.input[0]
    one, zero = make.const(1, like=x), make.const(0, like=x)
    total = make.Add(x, one)
    kept, logarithm = make.Sub(total, one), make.Log(total)
    corrected = make.Div(make.Mul(logarithm, x), kept)
    small = make.Where(make.Equal(kept, zero), x, corrected)
    _replace(ctx, node, "Where", [make.Equal(kept, x), logarithm, small])


def invert(ctx: Graph, node: Node, name: str, args: list) -> None:
    """All bits of an integer flipped: the largest number of its type (-1 for a signed one) minus it."""
    make, x = _Builder(ctx, node), node.input[0]
    dtype = np.dtype(ctx_dtype(ctx, x))
    ones = np.iinfo(dtype).max if np.issubdtype(dtype, np.unsignedinteger) else -1
    _replace(ctx, node, "Sub", [make.const(ones, like=x), x])


def ctx_dtype(ctx: Graph, tensor: str) -> Any:
    """Return the numpy dtype of a tensor."""
    from tf2onnx import utils

    return utils.map_onnx_to_numpy_type(ctx.get_dtype(tensor))


def bitwise(ctx: Graph, node: Node, name: str, args: list) -> None:
    """And, Or and Xor of every bit, which ONNX has from opset 18 on: bits are digits that add up to the number.

    A negative number of 32 bits or less is one of the upper half of the numbers from 0 to 2^32. There is no room for those of 64.
    """
    make, dtype = _Builder(ctx, node), ctx_dtype(ctx, node.output[0])
    logical = node.type.removeprefix("Bitwise")
    if np.dtype(dtype).itemsize > 4:
        return  # refused by `check_ops`
    powers = 2 ** np.arange(32, dtype="int64")
    wide = [make.Unsqueeze(make.Cast(x, to=onnx.TensorProto.INT64), make.const(np.array([-1]))) for x in node.input]
    two = make.const(np.int64(2))
    digits = [make.Cast(make.Mod(_floor_quotient(make, x, powers), two), to=onnx.TensorProto.BOOL) for x in wide]
    bits = make.Cast(getattr(make, logical)(*digits), to=onnx.TensorProto.INT64)
    number = make.ReduceSum(make.Mul(bits, make.const(powers)), make.const(np.array([-1])), keepdims=0)
    if np.issubdtype(dtype, np.signedinteger):
        half = make.GreaterOrEqual(number, make.const(np.int64(2**31)))
        number = make.Sub(number, make.Mul(make.Cast(half, to=onnx.TensorProto.INT64), make.const(np.int64(2**32))))
    _replace(ctx, node, "Cast", [number], {"to": ctx.get_dtype(node.output[0])})


def _floor_quotient(make: _Builder, x: str, divisors: np.ndarray) -> str:
    """An int64 divided by positive numbers, rounded down: what the rest is taken from divides without one."""
    divisors = make.const(divisors)
    return make.Div(make.Sub(x, make.Mod(x, divisors)), divisors)


def image_patches(ctx: Graph, node: Node, name: str, args: list) -> None:
    """Patches of an image as the channels of one pixel each: a convolution whose kernel picks one number per channel."""
    make, channels = _Builder(ctx, node), ctx.get_shape(node.input[0])[3]
    (height, width), strides, rates = (node.get_attr_value(key)[1:3] for key in ("ksizes", "strides", "rates"))
    count = height * width * channels
    kernel = np.eye(count, dtype="float32").reshape(count, height, width, channels).transpose(0, 3, 1, 2)
    padding = node.get_attr_value("padding").decode()
    options = {
        "kernel_shape": [height, width],
        "strides": list(strides),
        "dilations": list(rates),
        "auto_pad": "SAME_UPPER" if padding == "SAME" else "VALID",
    }
    patches = make.Conv(make.Transpose(node.input[0], perm=[0, 3, 1, 2]), make.const(kernel), **options)
    _replace(ctx, node, "Transpose", [patches], {"perm": [0, 2, 3, 1]})


def bitcast(ctx: Graph, node: Node, name: str, args: list) -> None:
    """The sign bit of a float32, which is all that Keras' `signbit` and `argmax` read: set below zero and for -0."""
    make, x = _Builder(ctx, node), node.input[0]
    users = ctx.find_output_consumers(node.output[0])
    lowest = np.iinfo("int32").min
    masks = [user.inputs[1] for user in users if user.type == "BitwiseAnd"]
    if len(masks) != len(users) or not all(mask.is_const() and mask.get_tensor_value() == lowest for mask in masks):
        return  # refused by `check_ops`
    zero = make.const(0, like=x)
    negative = make.Or(make.Less(x, zero), make.Less(make.Reciprocal(x), zero))
    for user in users:
        ctx.remove_input(user, user.input[1], 1)
        user.type, user.skip_conversion = "Identity", True
    _replace(ctx, node, "Where", [negative, make.const(np.int32(lowest)), make.const(np.int32(0))])


def bucketize(ctx: Graph, node: Node, name: str, args: list) -> None:
    """The number of boundaries that a number reaches."""
    make, x = _Builder(ctx, node), node.input[0]
    boundaries = make.const(np.asarray(node.get_attr_value("boundaries"), "float32"))
    numbers = make.Unsqueeze(make.Cast(x, to=onnx.TensorProto.FLOAT), make.const(np.array([-1])))
    _count(ctx, node, make, make.GreaterOrEqual(numbers, boundaries))


def bound(ctx: Graph, node: Node, name: str, args: list) -> None:
    """The number of sorted numbers below a number (LowerBound), or not above it (UpperBound)."""
    make = _Builder(ctx, node)
    values = make.Unsqueeze(node.input[1], make.const(np.array([-1])))
    row = make.Unsqueeze(node.input[0], make.const(np.array([1])))
    _count(ctx, node, make, (make.Greater if node.type == "LowerBound" else make.GreaterOrEqual)(values, row))


def _count(ctx: Graph, node: Node, make: _Builder, condition: str) -> None:
    dtype = ctx.get_dtype(node.output[0])
    _replace(ctx, node, "ReduceSum", [make.Cast(condition, to=dtype), make.const(np.array([-1]))], {"keepdims": 0})


def broadcast_args(ctx: Graph, node: Node, name: str, args: list) -> None:
    """The shape that two shapes broadcast to."""
    make = _Builder(ctx, node)
    ranks = [ctx.get_shape(shape)[0] for shape in node.input]
    first, second = (
        shape if rank == max(ranks) else make.Concat(make.const([1] * (max(ranks) - rank), like=shape), shape, axis=0)
        for shape, rank in zip(node.input, ranks, strict=True)
    )
    _replace(ctx, node, "Where", [make.Equal(first, make.const(1, like=first)), second, first])


def cross(ctx: Graph, node: Node, name: str, args: list) -> None:
    """The vector product of the last axis, of size 3."""
    make = _Builder(ctx, node)
    turned, back = make.const(np.array([1, 2, 0])), make.const(np.array([2, 0, 1]))
    a, b = node.input
    left = make.Mul(make.Gather(a, turned, axis=-1), make.Gather(b, back, axis=-1))
    _replace(ctx, node, "Sub", [left, make.Mul(make.Gather(a, back, axis=-1), make.Gather(b, turned, axis=-1))])


def update_slice(ctx: Graph, node: Node, name: str, args: list) -> None:
    """A tensor with another written into it from a corner on."""
    make, (data, update, corner) = _Builder(ctx, node), node.input
    begins = make.Cast(corner, to=onnx.TensorProto.INT64)
    size = make.Shape(update)
    ends = make.Sub(make.Sub(make.Shape(data), size), begins)
    pads = make.Concat(begins, ends, axis=0)
    ones = make.Expand(make.const(np.float32(1)), size)
    inside = make.Cast(make.Pad(ones, pads), to=onnx.TensorProto.BOOL)
    _replace(ctx, node, "Where", [inside, make.Pad(update, pads), data])


# Above this length, the matrices of a Fourier transform would make a file of hundreds of megabytes.
LONGEST_TRANSFORM = 4096


def fourier(ctx: Graph, node: Node, name: str, args: list) -> None:
    """Convert a Fourier transform of the last axis to products with cosines and sines, because ONNX has no complex numbers.

    Keras makes complex numbers of two tensors, and takes them apart again right after the transform.
    """
    users = ctx.find_output_consumers(node.output[0])
    source, real_input = node.inputs[0], node.type == "RFFT"
    parts = [node.input[0]] if real_input else list(source.input)
    size = ctx.get_shape(parts[0])[-1] if real_input or source.type == "Complex" else -1
    known = size > 0 and (len(node.input) < 2 or node.inputs[1].is_const())
    taken_apart = node.type == "IRFFT" or all(user.type in ("Real", "Imag", "ComplexAbs") for user in users)
    if not (known and taken_apart):
        return  # refused by `check_ops`
    length = int(node.inputs[1].get_tensor_value()[0]) if len(node.input) > 1 else ctx.get_shape(node.input[0])[-1]
    if length > LONGEST_TRANSFORM:
        return  # refused by `check_ops`
    cosines, sines = (_with_rows(matrix, size) for matrix in _fourier_matrices(node.type, length))
    make = _Builder(ctx, node)
    products = [[make.MatMul(part, make.const(matrix, like=part)) for matrix in (cosines, sines)] for part in parts]
    real, imaginary = products[0]
    if len(parts) == 2:
        real, imaginary = make.Sub(real, products[1][1]), make.Add(imaginary, products[1][0])
    if node.type == "IRFFT":
        _replace(ctx, node, "Identity", [real])
        return
    for user in users:
        part = {"Real": real, "Imag": imaginary}.get(user.type)
        if part is None:
            part = make.Sqrt(make.Add(make.Mul(real, real), make.Mul(imaginary, imaginary)))
        ctx.replace_input(user, user.input[0], part, 0)
        user.type, user.skip_conversion = "Identity", True
    ctx.remove_node(node.name)


def _fourier_matrices(kind: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the real and the imaginary part of the matrix that a row of numbers is multiplied by."""
    inverse = kind in ("IFFT", "IRFFT")
    half = length // 2 + 1
    rows, columns = half if kind == "IRFFT" else length, half if kind == "RFFT" else length
    angles = (2 if inverse else -2) * np.pi / length * (np.outer(np.arange(rows), np.arange(columns)) % length)
    factor = np.full((rows, 1), 1 / length if inverse else 1.0)
    if kind == "IRFFT":  # the other half of the spectrum is this one mirrored
        factor[1 : (length + 1) // 2] *= 2
    return factor * np.cos(angles), factor * np.sin(angles)


def _with_rows(matrix: np.ndarray, rows: int) -> np.ndarray:
    """Return a matrix with as many rows as the input has numbers; those beyond the transform's length are zero."""
    return np.pad(matrix[:rows], ((0, max(rows - len(matrix), 0)), (0, 0)))


HANDLERS = {
    name: (handler, [])
    for handler, names in {
        conv_transpose: ("Conv2DBackpropInput", "Conv3DBackpropInputV2"),
        select: ("Select", "SelectV2"),
        floor_div: ("FloorDiv",),
        floor_mod: ("FloorMod",),
        bias_add: ("BiasAdd",),
        expm1: ("Expm1",),
        log1p: ("Log1p",),
        invert: ("Invert",),
        bitwise: ("BitwiseAnd", "BitwiseOr", "BitwiseXor"),
        image_patches: ("ExtractImagePatches",),
        bitcast: ("Bitcast",),
        bucketize: ("Bucketize",),
        bound: ("LowerBound", "UpperBound"),
        broadcast_args: ("BroadcastArgs",),
        cross: ("Cross",),
        update_slice: ("XlaDynamicUpdateSlice",),
        fourier: ("FFT", "IFFT", "IRFFT", "RFFT"),
    }.items()
    for name in names
}
