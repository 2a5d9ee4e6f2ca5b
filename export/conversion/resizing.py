"""Resize and crop in the graph, as `images.fit` does with Pillow: the same filters, as products with two matrices.

ONNX has a Resize that filters where it makes smaller only from opset 18 on, and TensorFlow's own has no counterpart there. A
matrix whose rows hold a filter's weights is the same arithmetic out of ops that every runtime has. Pillow rounds to whole levels
after each axis; here nothing is rounded, so that a pixel differs by less than `LEVELS`, or by more where bicubic or lanczos
overshoot at edges between black and white: that is cut off after each axis, and which Pillow takes first depends on the image.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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


def fitted(pixels: tf.Tensor, preprocessing: dict[str, Any]) -> tf.Tensor:
    """Images of any size as the size that a card names, see `images.fit`.

    Args:
        pixels: float32 tensor `[n, channels, height, width]`, 0–255.
        preprocessing: a card's entry, with `size`.

    Returns:
        float32 tensor of `size`, `[n, channels, height, width]`.

    Raises:
        UsageError: an interpolation that the graph does not have, or `resize` smaller than the crop.
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
