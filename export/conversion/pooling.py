"""Adaptive pooling in operations that ONNX has.

Keras pools with windows of two sizes and picks from both. TensorFlow refuses to trace that where one window is larger than the
map, as in pooling to a single pixel, and it needs a height and a width that are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorflow as tf


def adaptive_average_pool(inputs: tf.Tensor, output_size: int | tuple[int, ...], data_format: str | None = None) -> tf.Tensor:
    """`keras.ops.adaptive_average_pool`."""
    import tensorflow as tf

    return _adaptive_pool(inputs, output_size, data_format, tf.reduce_mean, "AVG")


def adaptive_max_pool(inputs: tf.Tensor, output_size: int | tuple[int, ...], data_format: str | None = None) -> tf.Tensor:
    """`keras.ops.adaptive_max_pool`."""
    import tensorflow as tf

    return _adaptive_pool(inputs, output_size, data_format, tf.reduce_max, "MAX")


def _adaptive_pool(
    inputs: tf.Tensor, output_size: int | tuple[int, ...], data_format: str | None, reduce: Callable[..., tf.Tensor], kind: str
) -> tf.Tensor:
    """One window of the same size everywhere where that is what it comes to, else one slice per output along each axis."""
    import keras
    import tensorflow as tf

    rank = inputs.shape.rank - 2
    wanted = [output_size] * rank if isinstance(output_size, int) else list(output_size)
    is_first = (data_format or keras.config.image_data_format()) == "channels_first"
    inputs = tf.transpose(inputs, [0, *range(2, rank + 2), 1]) if is_first else inputs
    have = inputs.shape[1:-1].as_list()
    if all(count == 1 for count in wanted):
        pooled = reduce(inputs, list(range(1, rank + 1)), keepdims=True)
    elif None not in have and not any(size % count for size, count in zip(have, wanted, strict=True)):
        window = [size // count for size, count in zip(have, wanted, strict=True)]
        pooled = tf.nn.pool(inputs, window, kind, window, "VALID")
    else:
        pooled = inputs
        for axis, count in enumerate(wanted, 1):
            size = pooled.shape[axis] or tf.shape(pooled)[axis]
            edges = [(index * size // count, ((index + 1) * size + count - 1) // count) for index in range(count)]
            parts = [pooled[(slice(None),) * axis + (slice(*edge),)] for edge in edges]
            pooled = tf.concat([reduce(part, axis, keepdims=True) for part in parts], axis)
    return tf.transpose(pooled, [0, rank + 1, *range(1, rank + 1)]) if is_first else pooled
