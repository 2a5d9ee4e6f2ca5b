"""Resizing in the graph, as products with two matrices of filter weights.

`fitted` resizes and crops as `images.fit` does with Pillow; `resized_as_tensorflow` does what `tf.image.resize` does.

ONNX has a Resize that filters where it makes smaller only from opset 18 on, and TensorFlow's own has no counterpart there. A
matrix whose rows hold a filter's weights is the same arithmetic out of ops that every runtime has. Pillow rounds to whole levels
after each axis; here nothing is rounded, so that a pixel differs by less than `LEVELS`, or by more where bicubic or lanczos
overshoot at edges between black and white: that is cut off after each axis, and which Pillow takes first depends on the image.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError

if TYPE_CHECKING:
    import tensorflow as tf

LEVELS = 1.5


def _triangle(x):
    import tensorflow as tf

    return tf.maximum(1 - tf.abs(x), 0)


def _cubic(x, a=-0.5):
    import tensorflow as tf

    x = tf.minimum(tf.abs(x), 2.0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return tf.where(x < 1, near, far)


def _lanczos(x, lobes=3):
    import tensorflow as tf

    def sinc(x: tf.Tensor) -> tf.Tensor:
        safe = tf.where(x == 0, tf.ones_like(x), x)
        return tf.where(x == 0, tf.ones_like(x), tf.sin(math.pi * safe) / (math.pi * safe))

    return tf.where(tf.abs(x) < lobes, sinc(x) * sinc(x / lobes), tf.zeros_like(x))


FILTERS = {"bilinear": _triangle, "bicubic": _cubic, "lanczos": _lanczos}


def fitted(pixels: tf.Tensor, preprocessing: dict) -> tf.Tensor:
    """Images of any size as the size that a card names, see `images.fit`.

    Args:
        pixels: Float32 tensor `[n, channels, height, width]`, 0–255.
        preprocessing: A card's entry, with `size`.

    Returns:
        Float32 tensor of `size`, `[n, channels, height, width]`.

    Raises:
        UsageError: An interpolation that the graph does not have, or `resize` smaller than the crop.
    """
    import tensorflow as tf

    height, width = preprocessing["size"]
    name, shorter = preprocessing.get("interpolation") or "bilinear", preprocessing.get("resize")
    if name not in (*FILTERS, "nearest"):
        raise UsageError(f"`interpolation` must be one of nearest, {', '.join(FILTERS)}, got {name!r}")
    have = tf.shape(pixels)[2:]
    if shorter is None:
        return _resized(pixels, have, tf.constant([height, width]), tf.constant([0, 0]), (height, width), name)
    if shorter < max(height, width):
        raise UsageError(f"the card's `resize` ({shorter}) must be at least its `size` ({height}×{width})")
    size = shorter * have // tf.reduce_min(have)
    # Half to even, as Python rounds.
    corner = tf.cast(tf.round(tf.cast(size - tf.constant([height, width]), "float32") / 2), "int32")
    return _resized(pixels, have, size, corner, (height, width), name)


def _resized(pixels, have, size, corner, kept, name):
    """The part of the resized image that is kept; the rest, which a long and narrow image has much of, is never made.

    Batch and channels are one axis, and no operand of a product is broadcast: oneDNN's batched product crashes on some of those.
    """
    import tensorflow as tf

    rows, columns = (_matrix(have[axis], size[axis], corner[axis], kept[axis], name, axis) for axis in (0, 1))
    overshoots = name in ("bicubic", "lanczos")
    across = tf.reshape(tf.matmul(tf.reshape(pixels, [-1, have[1]]), columns), [-1, have[0], kept[1]])
    across = tf.clip_by_value(across, 0, 255) if overshoots else across
    resized = tf.matmul(tf.tile(rows[None], [tf.shape(across)[0], 1, 1]), across)
    resized = tf.clip_by_value(resized, 0, 255) if overshoots else resized
    return tf.reshape(resized, [-1, pixels.shape[1], *kept])


def _matrix(have, want, first, count, name, axis):
    """Weights of the old pixels in `count` of `want` new ones: `[count, have]` for rows (axis 0), `[have, count]` for columns."""
    import tensorflow as tf

    new, old = tf.expand_dims(first + tf.range(count), 1 - axis), tf.expand_dims(tf.range(have), axis)
    if name == "nearest":
        return tf.cast((2 * new + 1) * have // (2 * want) == old, "float32")
    scale = tf.cast(have, "float32") / tf.cast(want, "float32")
    centres = (tf.cast(new, "float32") + 0.5) * scale
    weights = FILTERS[name]((tf.cast(old, "float32") + 0.5 - centres) / tf.maximum(scale, 1))
    return weights / tf.reduce_sum(weights, 1 - axis, keepdims=True)


# ---------------------------------------------------------------- as TensorFlow does it

TABLE = 1024  # TensorFlow's bicubic rounds positions to this many parts of a pixel
FILTERS_OF_TENSORFLOW: dict[str, tuple[Callable, float]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_cubic, 2),
    "lanczos3": (_lanczos, 3),
    "lanczos5": (functools.partial(_lanczos, lobes=5), 5),
}
DYNAMIC = (*FILTERS_OF_TENSORFLOW, "area")
STATIC = (*DYNAMIC, "gaussian", "mitchellcubic")


def resized_as_tensorflow(
    real: Callable[..., tf.Tensor],
    images: tf.Tensor,
    size: object,
    method: str = "bilinear",
    preserve_aspect_ratio: bool = False,
    antialias: bool = False,
    name: str | None = None,
) -> tf.Tensor:
    """Return `tf.image.resize` in operations that ONNX has: the other arguments are that function's own.

    The Resize of ONNX divides by a scale where TensorFlow multiplies by its inverse. Coordinates in a large image then differ
    by so much that bilinear results are off by 3e-5 of the largest value, and nearest pixels are others. It is used only where
    the scale is a power of two, for which both are exact.
    """
    import tensorflow as tf

    images = tf.convert_to_tensor(images)
    size = tf.convert_to_tensor(size, "int32")
    have, want = images.shape[-3:-1].as_list(), tf.get_static_value(size)
    is_static = None not in have and want is not None
    picks = method == "nearest" or method == "bilinear" and not antialias
    exact = picks and is_static and all(math.log2(new / old).is_integer() for new, old in zip(want, have, strict=True))
    known = picks or method in (STATIC if is_static else DYNAMIC)
    if exact or not known or preserve_aspect_ratio or images.shape.rank not in (3, 4) or is_static and have == list(want):
        return real(images, size, method, preserve_aspect_ratio, antialias, name)
    sizes = list(zip(have, want, strict=True)) if is_static else [(tf.shape(images)[axis - 3], size[axis]) for axis in (0, 1)]
    resized = images if method == "nearest" else tf.cast(images, "float32")
    if picks:
        for axis in (1, 0):  # as TensorFlow does: columns first
            resized = _picked(resized, axis - 3, *sizes[axis], method)
    else:
        swap = [0, 3, 1, 2] if images.shape.rank == 4 else [2, 0, 1]
        back = [0, 2, 3, 1] if images.shape.rank == 4 else [1, 2, 0]
        rows, columns = (
            _measured(real, *pair, method, antialias) if is_static else _tensorflow_matrix(*pair, method, antialias)
            for pair in sizes
        )
        resized = tf.transpose(tf.matmul(rows, tf.matmul(tf.transpose(resized, swap), columns, transpose_b=True)), back)
    if want is not None:
        resized.set_shape([*images.shape[:-3], *want, images.shape[-1]])
    return resized


def _picked(images: tf.Tensor, axis: int, have: int | tf.Tensor, want: int | tf.Tensor, method: str) -> tf.Tensor:
    """One axis of an image resized to the nearest pixels, or between the two nearest ones."""
    import tensorflow as tf

    with tf.init_scope() if isinstance(have, int) else contextlib.nullcontext():
        scale = tf.cast(have, "float32") / tf.cast(want, "float32")
        centres = (tf.cast(tf.range(want), "float32") + 0.5) * scale
        if method == "bilinear":
            centres -= 0.5
        pixels = tf.floor(centres)
        lower = tf.clip_by_value(tf.cast(pixels, "int32"), 0, have - 1)
        upper = tf.minimum(tf.cast(pixels, "int32") + 1, have - 1)
        share = tf.reshape(centres - pixels, [-1] + [1] * (-1 - axis))
        if isinstance(have, int):
            lower, upper, share = lower.numpy(), upper.numpy(), share.numpy()
    first = tf.gather(images, lower, axis=axis)
    return first if method == "nearest" else first + (tf.gather(images, upper, axis=axis) - first) * share


def _measured(real: Callable[..., tf.Tensor], have: int, want: int, method: str, antialias: bool) -> np.ndarray:
    """The weights that TensorFlow itself uses for these sizes: what it makes of each single pixel of a column."""
    import tensorflow as tf

    with tf.init_scope():
        column = np.eye(have, dtype="float32")[None, :, None]
        return real(column, (int(want), 1), method, False, antialias).numpy()[0, :, 0]


def _tensorflow_matrix(have: tf.Tensor, want: tf.Tensor, method: str, antialias: bool) -> tf.Tensor:
    """Weights of the old pixels in the new ones, `[want, have]`, for sizes that are known at run time only."""
    import tensorflow as tf

    new, old = tf.cast(tf.range(want), "float32")[:, None], tf.cast(tf.range(have), "float32")[None]
    have, want = tf.cast(have, "float32"), tf.cast(want, "float32")
    if method == "area":
        scale = have / want
        first, last = new * scale, (new + 1) * scale
        overlap = tf.maximum(tf.minimum(last, old + 1) - tf.maximum(first, old), 0.0)
        # TensorFlow takes the scale itself only where a new pixel touches neither border of the old one.
        return tf.where(tf.logical_and(first > old, last < old + 1), scale, overlap) / scale
    weigh, radius = FILTERS_OF_TENSORFLOW[method]
    if method == "bicubic" and not antialias:
        centres = (new + 0.5) * (have / want) - 0.5
        pixel = tf.floor(centres)
        distances = pixel + tf.round((centres - pixel) * TABLE) / TABLE - old
    else:
        # Rounded twice, as TensorFlow does. Of `1 / x` onnxruntime would make one division with the product that follows.
        scale = tf.math.reciprocal(want / have)
        distances = old + 0.5 - (new + 0.5) * scale
        distances = distances / tf.maximum(scale, 1.0) if antialias else distances
    weights = tf.where(tf.abs(distances) < radius, weigh(distances), 0.0)
    return weights / tf.reduce_sum(weights, 1, keepdims=True)
