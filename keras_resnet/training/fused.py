"""Batch norm by TensorFlow's fused operation in training steps. Checked against Keras 3.15, TensorFlow 2.21.

Keras computes the moments and the normalisation one after the other, in float32 copies of half-precision inputs. The fused
operation does all of it at once in the dtype of the inputs, and in oneDNN on CPUs. The numbers are the same but for rounding.
"""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import tensorflow as tf


def fuse(layers: Iterable[keras.layers.BatchNormalization]) -> int:
    """Let batch norms on images, channels last, use the fused operation when they train; all else is computed as before.

    Only these objects change, and not what is saved of them.

    Returns:
        The number of layers that use it.
    """
    suitable = [layer for layer in layers if _is_suitable(layer)]
    for layer in suitable:
        layer.call = _fused_call(layer, layer.call)
    return len(suitable)


def _is_suitable(layer: keras.layers.BatchNormalization) -> bool:
    is_fused = "call" in vars(layer)
    if type(layer) is not keras.layers.BatchNormalization or layer.renorm or layer.synchronized or is_fused:
        return False
    return layer.built and layer.input_spec.ndim == 4 and layer.axis in (-1, 3) and layer.compute_dtype != "float64"


def _fused_call(layer: keras.layers.BatchNormalization, call: Callable) -> Callable:
    channels = layer.moving_mean.shape

    def fused(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        if training is not True or not layer.trainable or mask is not None or isinstance(inputs, keras.KerasTensor):
            return call(inputs, training=training, mask=mask)
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=tf.convert_to_tensor(layer.gamma) if layer.scale else tf.ones(channels),
            offset=tf.convert_to_tensor(layer.beta) if layer.center else tf.zeros(channels),
            mean=tf.zeros([0]),
            variance=tf.zeros([0]),
            epsilon=layer.epsilon,
            is_training=True,
        )
        # The operation's variance is the unbiased one; Keras averages that of the batch.
        count = tf.cast(tf.size(inputs, tf.int64), tf.float32) / float(channels[0])
        _average(layer.moving_mean, mean, layer.momentum)
        _average(layer.moving_variance, variance * (count - 1) / count, layer.momentum)
        return y

    return fused


def _average(variable: keras.Variable, value: tf.Tensor, momentum: float) -> None:
    variable.assign(variable * momentum + value * (1.0 - momentum))
