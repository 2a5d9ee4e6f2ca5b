"""Looks after a run from inside of `fit`."""

import math
import time

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from . import checkpoint
from .faults import Interrupted
from .run import TrainingError


class UnlessAsked(keras.callbacks.Callback):
    """Breaks an evaluation off when the run is asked to stop."""

    def __init__(self, training):
        super().__init__()
        self.training, self.broken = training, False

    def on_test_batch_end(self, batch, logs=None):
        if self.training.asked_to_stop(logs):
            self.broken = self.model.stop_evaluating = True


class Watch(UnlessAsked):
    """Looks after a run from inside of `fit`: progress, checkpoints, faults, the wish to stop."""

    def __init__(self, training, number):
        super().__init__(training)
        self.number = number
        self.interrupted, self.stopping = None, False
        # Reading the loss waits for the device; on a CPU nothing is gained by not waiting.
        self.check_every = 1 if not tf.config.list_physical_devices("GPU") else 20

    def on_epoch_begin(self, epoch, logs=None):
        training = self.training
        if self.interrupted is not None:
            checkpoint.restore_metrics(training.stepped, self.interrupted)
            self.interrupted = None
        self.began, self.first = time.perf_counter(), training.step
        self.since_save = training.step
        training.spent_before = training.spent

    def on_train_batch_end(self, batch, logs=None):
        training = self.training
        training.step += training.per_call
        elapsed = time.perf_counter() - self.began
        training.spent = training.spent_before + elapsed
        if training.step // training.per_call % self.check_every == 0:
            loss = float(np.mean(logs["loss"]))
            if not math.isfinite(loss):
                finite = float(np.sum(ops.convert_to_numpy(training.stepped.finite.result())))
                training.diverged(finite, (training.step - 1) // training.steps * training.steps)
            if training.progress.due():
                speed = (training.step - self.first) * training.run.batch_size / max(elapsed, 1e-9)
                rate = float(training.schedule(training.step - 1))
                training.progress.step(training.step, loss, float(np.mean(logs["accuracy"])), rate, speed)
        asked = training.asked_to_stop(logs)
        at_end = training.step % training.steps == 0
        if (asked or training.step - self.since_save >= training.run.save_every) and not at_end:
            training.save(self.number)
            self.since_save = training.step
        if asked and not at_end:
            stop(training)

    def on_test_begin(self, logs=None):
        self.training.swap_averages()

    def on_test_end(self, logs=None):
        self.training.swap_averages()

    def on_epoch_end(self, epoch, logs=None):
        training = self.training
        if training.step % training.steps or training.step == self.first:
            if training.stepped.stop_training:
                return
            raise TrainingError(f"the data ended at step {training.step} of {training.total}; are images or records missing?")
        elapsed = time.perf_counter() - self.began
        training.spent = training.spent_before + elapsed
        # What was measured on a part of the images is no measurement.
        kept = ("loss", "accuracy") if self.broken else ("loss", "accuracy", "val_loss", "val_accuracy")
        values = {key: round(float(np.mean(logs[key])), 6) for key in kept if key in logs}
        row = {
            "epoch": epoch + 1, "step": training.step, **values,
            "learning_rate": float(f"{float(training.schedule(training.step - 1)):.6g}"),
            "images_per_second": round((training.step - self.first) * training.run.batch_size / elapsed, 1),
            "seconds": round(elapsed, 2),
        }  # fmt: skip
        if self.broken:
            training.pending = row
            training.save(self.number)
            stop(training)
        training.record(row, self.number)
        self.since_save = training.step
        self.stopping = self._stop_agreed() and training.step < training.total

    def _stop_agreed(self):
        """Whether any process was asked to stop; the same answer in all of them."""
        training = self.training
        if not training.placement.multi_worker:
            return training.stop_asked
        return float(training.sum_over_workers(tf.constant(float(training.stop_asked)))) > 0


class Stop(keras.callbacks.Callback):
    """Ends a run behind an epoch, as `watch` found out; the last of all callbacks, so that the others hear of the epoch."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def on_epoch_end(self, epoch, logs=None):
        # A run that a callback ends is over, not interrupted.
        if self.watch.stopping and not self.model.stop_training:
            stop(self.watch.training)


def stop(training):
    where = f" in {training.out}; the same command goes on from there" if training.out is not None else ""
    raise Interrupted(f"stopped as asked, saved at step {training.step} of {training.total}{where}")
