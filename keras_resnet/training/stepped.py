"""A model that Keras' `fit` can train under every strategy, in front of the model that is being trained."""

import keras
import tensorflow as tf
from keras import ops


class Stepped(keras.Model):
    """The graph of another model, sharing its layers, with training steps that hold on several machines.

    Keras 3.15's `fit` fails under `MultiWorkerMirroredStrategy`: its symbolic build reduces a tuple of values, and then it
    reduces scalar outputs of the step along an axis they do not have. Here nothing is built symbolically, and a step's
    outputs have one axis. Evaluation counts by sample weights, so that the images that fill up a last batch do not count.

    Make it under the strategy's scope, with `inputs` and `outputs` of a Functional model.
    """

    def configure(self, optimizer, loss, *, smoothing=0.0, multi_worker=False, jit=False, steps_per_execution=1):
        """Set optimiser and loss; `loss` is a Keras loss on one-hot labels and logits.

        `smoothing` is the share of a label that all classes get alike; Keras' binary cross-entropy moves every class to a half.
        """
        self.criterion, self.smoothing, self.multi_worker = loss, smoothing, multi_worker
        # In float64, since a float32 counter stands still at 2²⁴ images.
        self.loss_mean = keras.metrics.Mean(name="loss", dtype="float64")
        self.accuracy = keras.metrics.CategoricalAccuracy(name="accuracy", dtype="float64")
        # Counts the steps before the first loss that is not finite; from there on all are not.
        self.finite = keras.metrics.Sum(name="finite", dtype="float64")
        self.stop_asked = tf.Variable(0.0, trainable=False) if multi_worker else None
        self.compile(optimizer=optimizer, jit_compile=jit, steps_per_execution=steps_per_execution, auto_scale_loss=False)
        return self

    @property
    def metrics(self):
        return [self.loss_mean, self.accuracy, self.finite] if hasattr(self, "finite") else []

    def get_metrics_result(self):
        return {"loss": self.loss_mean.result(), "accuracy": self.accuracy.result()}

    @property
    def input_spec(self):
        # Training crops may be smaller than the model's input; the layers themselves check what they need.
        return None

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, data):
        images, labels = data
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        with tf.GradientTape() as tape:
            logits = _wide(self(images, training=True))
            smooth = labels * (1 - self.smoothing) + self.smoothing / labels.shape[-1]
            loss = ops.mean(self.criterion.call(ops.cast(smooth, logits.dtype), logits))
            # Losses of layers are the same on all replicas; the sum over replicas makes the mean.
            total = loss + sum(ops.cast(extra, loss.dtype) for extra in self.losses) if self.losses else loss
            scaled = self.optimizer.scale_loss(total / replicas)
        gradients = tape.gradient(scaled, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        self.loss_mean.update_state(loss)
        self.accuracy.update_state(labels, logits)
        self.finite.update_state(ops.cast(ops.isfinite(loss), "float64") / replicas)
        return self._logs()

    def test_step(self, data):
        images, labels, weights = data
        logits = _wide(self(images, training=False))
        losses = self.criterion.call(ops.cast(labels, logits.dtype), logits)
        self.loss_mean.update_state(losses, sample_weight=weights)
        self.accuracy.update_state(labels, logits, sample_weight=weights)
        return self._logs()

    def _logs(self):
        logs = self.get_metrics_result()
        if not self.multi_worker:
            return logs
        logs["stop"] = self.stop_asked.read_value()
        return {name: tf.reshape(tf.cast(value, tf.float32), [1]) for name, value in logs.items()}

    def _get_metrics_result_or_logs(self, logs):
        return self.get_metrics_result()


def _wide(logits):
    """At least float32: a scaled loss overflows in half precision."""
    return ops.cast(logits, "float32") if logits.dtype in (tf.float16, tf.bfloat16) else logits
