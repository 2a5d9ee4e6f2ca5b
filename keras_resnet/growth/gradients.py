"""Gradients by GradientTape: the only module outside training and data that imports TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from ..blocks.finding import Block
from ..blocks.gates import gate_parameters
from ..graphs import logits_of
from .probing import run_with_fresh_branches


def parameters_without_gradient(model: keras.Model, inputs: Sequence[Any], vectors: Sequence[np.ndarray]) -> list[str] | None:
    """Trainable variables whose gradient of `Σ ⟨output, vector⟩` is zero or missing; no state of the model moves.

    Of an output that ends in a softmax the logits are taken, since a saturated softmax passes no gradient on. Keras keeps them on
    the tensor, for its cross-entropy losses.

    Args:
        model: A built Keras model.
        inputs: Its inputs, as tensors.
        vectors: One array per output, of the output's shape.

    Returns:
        List of variable paths, or None where the backend is not TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    values = [tf.convert_to_tensor(variable.value) for variable in model.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(values)
        outputs, _ = model.stateless_call(values, [v.value for v in model.non_trainable_variables], inputs, training=True)
        total = sum(
            tf.reduce_sum(tf.cast(logits_of(output), "float32") * tf.cast(vector, "float32"))
            for output, vector in zip(keras.tree.flatten(outputs), vectors, strict=True)
        )
    gradients = tape.gradient(total, values)
    return [
        variable.path
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True)
        if gradient is None or not bool(tf.reduce_any(tf.not_equal(gradient, 0)))
    ]


def gate_gradients(model: keras.Model, blocks: Sequence[Block], loss: Callable) -> Callable[[object, object], list]:
    """Make a function that computes the gradient of a loss with respect to the gates of fresh blocks.

    Args:
        model: Functional or Sequential model with the blocks. Grown branches run in training mode, everything else in
            inference mode, and only the gates are differentiated.
        blocks: Blocks whose gate is their last layer.
        loss: `loss(labels, outputs)`, a tensor per sample or their mean.

    Returns:
        `function(inputs, labels)`, which returns one flat float32 array per block.

    Raises:
        RuntimeError: Keras' backend is not TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(f"gradients are computed with TensorFlow, but Keras' backend is {keras.backend.backend()}")
    import tensorflow as tf

    gates = [[variable.value for variable in gate_parameters(block.gate, block.branch)] for block in blocks]

    @tf.function(autograph=False, reduce_retracing=True)
    def compute(inputs: Any, labels: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(gates)
            outputs = run_with_fresh_branches(model, inputs, lambda layer, inputs, output: None)
            value = tf.reduce_mean(tf.cast(loss(labels, outputs), "float32"))
        return tape.gradient(value, gates, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    def function(inputs: Any, labels: Any) -> Any:
        gradients = compute(inputs, labels)
        return [np.concatenate([np.asarray(part, "float32").ravel() for part in parts]) for parts in gradients]

    return function
