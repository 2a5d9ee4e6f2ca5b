"""Compiled training and evaluation steps: Keras' own `train_step` and `test_step`, run under any strategy.

Checked against Keras 3.15. Keras' `fit` is not used itself, because a run has several segments but one `on_train_begin`, and
because under `MultiWorkerMirroredStrategy` it reduces scalar outputs along an axis that they do not have.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from .strategies import Placement


class Steps:
    """Runs steps of a compiled model on distributed batches.

    Args:
        model: Compiled model whose variables were created under the placement's strategy.
        placement: Where the replicas are.
        per_call: Training steps per call of `train`.
        jit: Whether to compile training steps with XLA.
    """

    def __init__(self, model: keras.Model, placement: Placement, per_call: int = 1, jit: bool = False) -> None:
        self.model, self.placement, self.per_call = model, placement, per_call
        strategy = placement.strategy
        with strategy.scope():
            # The number of steps before the first loss that is not finite. The running mean stays non-finite from there on.
            self._finite = keras.metrics.Sum(name="finite", dtype="float64")
            self._stop = tf.Variable(0.0, trainable=False) if placement.multi_worker else None
        # Each replica is traced in a thread of its own, and they take turns.
        self._replica = threading.local()

        def train_step(data: Any, share: Any) -> dict:
            self._replica.share = share
            logs = model.train_step(data)
            self._finite.update_state(ops.cast(ops.isfinite(logs["loss"]), "float64") / placement.replicas)
            return logs

        compiled = tf.function(train_step, jit_compile=True) if jit else train_step

        def one_step(data: Any) -> dict:
            data = without_optionals(data)
            return compiled(data, self._share(data))

        @tf.function(reduce_retracing=True)
        def train(iterator: Iterator) -> dict:
            for _ in tf.range(per_call - 1):
                strategy.run(one_step, args=(next(iterator),))
            return strategy.run(lambda data: self._shared(one_step(data)), args=(next(iterator),))

        def test_step(data: Any) -> dict:
            data = without_padding(data)
            self._replica.share = self._share(data)
            return self._shared(model.test_step(data))

        @tf.function(reduce_retracing=True)
        def evaluate(iterator: Iterator) -> dict:
            return strategy.run(test_step, args=(next(iterator),))

        self._train, self._evaluate = train, evaluate

    def build(self, batch: Any) -> None:
        """Create the state of metrics and losses: Keras cannot create it inside a replica, and a checkpoint may hold it.

        Args:
            batch: One batch as the data gives it, or its `element_spec`.
        """
        with self.placement.strategy.scope():
            self.model._symbolic_build(data_batch=batch)
        if self.placement.replicas > 1:
            for metric in self.model._compile_loss.metrics:
                metric.update_state = self._weighing(metric.update_state)

    def _share(self, data: Any) -> Any:
        """In a replica: how large its part of the batch is, where 1 is what all would have in equal parts.

        It is needed for the losses of several outputs: Keras weighs them alike for every part, also for an empty one.
        """
        if self.placement.replicas == 1 or not self.model._compile_loss.metrics:
            return 1.0
        count = tf.cast(tf.shape(tf.nest.flatten(data)[0])[0], tf.float32)
        return count * self.placement.replicas / tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, count)

    def _weighing(self, update: Callable) -> Callable:
        """An `update_state` that weighs a replica's part of a batch by its size."""
        return lambda value, sample_weight=None: update(value, sample_weight=self._replica.share)

    def train(self, iterator: Iterator) -> dict:
        """Run `per_call` training steps.

        Returns:
            The running means of loss and metrics, over the local replicas, or over all replicas of several processes.
        """
        return self._local(self._train(iterator))

    def evaluate(self, iterator: Iterator) -> dict:
        """Run one evaluation step; see `train`."""
        return self._local(self._evaluate(iterator))

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of all replicas since the last reset, numbers or arrays; every process must call it."""
        found = {name: ops.convert_to_numpy(value) for name, value in self.model.get_metrics_result().items()}
        return {name: value.item() if np.size(value) == 1 else value for name, value in found.items()}

    def reset(self) -> None:
        """Begin an epoch or an evaluation."""
        self.model.reset_metrics()
        self._finite.reset_state()

    @property
    def metric_variables(self) -> list[keras.Variable]:
        """What an epoch accumulates: the variables of all metrics."""
        return [variable for metric in [*self.model.metrics, self._finite] for variable in metric.variables]

    def finite_steps(self) -> int:
        """Return steps of this epoch before the first whose loss was not finite."""
        return round(float(np.sum(ops.convert_to_numpy(self._finite.result()))))

    def ask_to_stop(self) -> None:
        """Tell the other processes, with the next step, that this one was asked to stop."""
        if self._stop is not None:
            self._stop.assign(1.0)

    def _shared(self, logs: dict) -> dict:
        """In a replica: the mean over the replicas of all processes, plus how many were asked to stop."""
        if self._stop is None:
            return logs
        values = logs | {"stop": self._stop.read_value()}
        flat = tf.concat([tf.reshape(tf.cast(value, tf.float32), [-1]) for value in values.values()], 0)
        means = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, flat)
        parts = tf.split(means, [tf.size(value) for value in values.values()])
        return {name: tf.reshape(part, tf.shape(values[name])) for name, part in zip(values, parts, strict=True)}

    def _local(self, logs: dict) -> dict:
        if self.placement.replicas == 1:
            return logs
        local = self.placement.strategy.experimental_local_results
        return {name: tf.reduce_mean(tf.stack([tf.cast(v, tf.float32) for v in local(value)]), 0) for name, value in logs.items()}


PADDED = "padding"


def without_padding(data: Any) -> Any:
    """Remove the padding of the last batch of an evaluation, which gives every replica a part of it.

    Args:
        data: A batch as Keras takes it, or `{"padding": weights, "data": batch}` where the images to leave out come last and
            have weight 0.
    """
    if not (isinstance(data, dict) and PADDED in data):
        return without_optionals(data)
    count = tf.cast(tf.reduce_sum(data[PADDED]), tf.int32)
    return tf.nest.map_structure(lambda part: part[:count], data["data"])


def without_optionals(data: Any) -> Any:
    """Return a batch with None where Keras' adapters put an empty optional for a missing part."""
    return tf.nest.map_structure(lambda part: None if isinstance(part, tf.experimental.Optional) else part, data)
