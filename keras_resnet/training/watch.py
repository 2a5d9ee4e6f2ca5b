"""Looks after a run from inside of `fit`."""

import math
import time

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from . import checkpoint
from .faults import Interrupted
from .logs import write_csv
from .run import TrainingError


class Watch(keras.callbacks.Callback):
    """Looks after a run from inside of `fit`: progress, checkpoints, faults, the wish to stop."""

    def __init__(self, training, number):
        super().__init__()
        self.training, self.number = training, number
        self.interrupted = None
        # Reading the loss waits for the device; on a CPU nothing is gained by not waiting.
        self.check_every = 1 if not tf.config.list_physical_devices("GPU") else 20
        self.validating = False

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
            speed = (training.step - self.first) * training.run.batch_size / max(elapsed, 1e-9)
            rate = float(training.schedule(training.step - 1))
            training.progress.step(training.step, loss, float(np.mean(logs["accuracy"])), rate, speed)
        if training.placement.multi_worker:
            if training.stop_asked:
                training.stepped.stop_asked.assign(1.0)
            asked = float(np.mean(logs["stop"])) > 0
        else:
            asked = training.stop_asked
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
        values = {key: round(float(np.mean(value)), 6) for key, value in logs.items() if key != "stop"}
        row = {
            "epoch": epoch + 1, "step": training.step, **values,
            "learning_rate": float(f"{float(training.schedule(training.step - 1)):.6g}"),
            "images_per_second": round((training.step - self.first) * training.run.batch_size / elapsed, 1),
            "seconds": round(elapsed, 2),
        }  # fmt: skip
        training.rows.append(row)
        training.save(self.number)
        self.since_save = training.step
        if training.placement.chief and training.out is not None:
            write_csv(training.rows, training.out / "log.csv")
            if training.board:
                training.board.add(row)
        training.progress.epoch(row, training.run.epochs)
        if self._stop_agreed() and training.step < training.total:
            stop(training)

    def _stop_agreed(self):
        """Whether any process was asked to stop; the same answer in all of them."""
        training = self.training
        if not training.placement.multi_worker:
            return training.stop_asked
        return float(training.sum_over_workers(tf.constant(float(training.stop_asked)))) > 0


def stop(training):
    where = f" in {training.out}; the same command goes on from there" if training.out is not None else ""
    raise Interrupted(f"stopped as asked, saved at step {training.step} of {training.total}{where}")
