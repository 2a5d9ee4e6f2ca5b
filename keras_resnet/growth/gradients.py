"""Gradients by GradientTape: the only module outside training and data that imports TensorFlow."""

import keras


def parameters_without_gradient(model, inputs, vectors):
    """Trainable variables whose gradient of `Σ ⟨output, vector⟩` is zero or missing; no state of the model moves.

    Of an output that ends in a softmax the logits are taken, since a saturated softmax passes no gradient on. Keras keeps them on
    the tensor, for its cross-entropy losses (`_keras_logits`).

    Args:
        model: a built Keras model.
        inputs: its inputs, as tensors.
        vectors: one array per output, of the output's shape.

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
            tf.reduce_sum(tf.cast(getattr(output, "_keras_logits", output), "float32") * tf.cast(vector, "float32"))
            for output, vector in zip(keras.tree.flatten(outputs), vectors, strict=True)
        )
    gradients = tape.gradient(total, values)
    return [
        variable.path
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True)
        if gradient is None or not bool(tf.reduce_any(tf.not_equal(gradient, 0)))
    ]
