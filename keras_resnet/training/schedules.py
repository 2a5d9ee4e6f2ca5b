"""Learning rate schedules: Keras' own after a linear warm-up."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from .run import Run


@keras.saving.register_keras_serializable("keras_resnet")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up before any schedule, which then begins at its own step 0.

    `CosineDecay` of Keras has a warm-up of its own; the other schedules have none.

    Args:
        schedule: Schedule after the warm-up.
        steps: Steps of the warm-up; the first step after them has the full learning rate.
        start: Learning rate at step 0.
        offset: Steps of the run before step 0 of the optimiser.

    Source: arXiv 1706.02677, section 2.2.
    """

    def __init__(
        self, schedule: keras.optimizers.schedules.LearningRateSchedule, steps: int, start: float = 0.0, offset: int = 0
    ) -> None:
        self.schedule, self.steps, self.start, self.offset = schedule, int(steps), float(start), int(offset)

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32") + self.offset
        peak = self.schedule(ops.zeros_like(step))
        rising = self.start + (peak - self.start) * ops.minimum(1.0, step / max(1, self.steps))
        return ops.where(step < self.steps, rising, self.schedule(ops.maximum(step - self.steps, 0.0)))

    def get_config(self) -> dict[str, Any]:
        schedule = keras.saving.serialize_keras_object(self.schedule)
        return {"schedule": schedule, "steps": self.steps, "start": self.start, "offset": self.offset}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WarmUp:
        return cls(**{**config, "schedule": keras.saving.deserialize_keras_object(config["schedule"])})


ONE_CYCLE_RISE, ONE_CYCLE_START, ONE_CYCLE_END = 0.3, 1 / 25, 1e-4


def make_schedule(run: Run, steps_per_epoch: int) -> keras.optimizers.schedules.LearningRateSchedule | float:
    """Return the learning rate of a `Run`, scaled to the global batch: a schedule, or a number where it is constant.

    Args:
        run: `Run`.
        steps_per_epoch: Number of steps per epoch.
    """
    # An optimiser that accumulates gradients counts updates.
    steps_per_epoch = steps_per_epoch / run.accumulate
    total = run.epochs * steps_per_epoch
    peak = scaled_rate(run)
    warmup, start = round(run.warmup_epochs * steps_per_epoch), run.learning_rate if run.warmup_to_batch else 0.0
    schedules = keras.optimizers.schedules
    if run.schedule == "one-cycle":
        warmup, start = round(ONE_CYCLE_RISE * total), peak * ONE_CYCLE_START
        inner = schedules.CosineDecay(peak, max(1, total - warmup), alpha=ONE_CYCLE_END)
    elif run.schedule == "cosine":
        inner = schedules.CosineDecay(peak, max(1, total - warmup))
    elif run.schedule == "linear":
        inner = schedules.PolynomialDecay(peak, max(1, total - warmup), end_learning_rate=0.0)
    elif run.schedule == "step":
        # Boundaries of Keras are the last step with the old value, and count from the end of the warm-up.
        edges = [math.ceil(epoch * steps_per_epoch) - warmup - 1 for epoch in run.milestones]
        values = [peak * run.factor**i for i in range(len(edges) + 1)]
        inner = schedules.PiecewiseConstantDecay(edges, values)
    elif not warmup:
        # A number, which callbacks such as ReduceLROnPlateau can change.
        return float(peak)
    else:
        inner = schedules.PolynomialDecay(peak, 1, end_learning_rate=peak)
    return WarmUp(inner, warmup, min(start, peak), round(run.initial_epoch * steps_per_epoch))


def scaled_rate(run: Run) -> float:
    """Peak learning rate for the run's global batch."""
    return run.learning_rate * run.batch_size * run.accumulate / run.base_batch
