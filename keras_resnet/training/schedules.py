"""Learning rate schedules: Keras' own, behind a linear warm-up."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_resnet")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up in front of any schedule, which then begins at its own step 0.

    `CosineDecay` of Keras has a warm-up of its own; the other schedules have none.

    Args:
        schedule: schedule behind the warm-up.
        steps: of the warm-up; the first behind them has the full rate.
        start: rate at step 0.

    Source: arXiv 1706.02677, section 2.2.
    """

    def __init__(self, schedule, steps, start=0.0):
        self.schedule, self.steps, self.start = schedule, int(steps), float(start)

    def __call__(self, step):
        step = ops.cast(step, "float32")
        peak = self.schedule(ops.zeros_like(step))
        rising = self.start + (peak - self.start) * ops.minimum(1.0, step / max(1, self.steps))
        return ops.where(step < self.steps, rising, self.schedule(ops.maximum(step - self.steps, 0.0)))

    def get_config(self):
        schedule = keras.saving.serialize_keras_object(self.schedule)
        return {"schedule": schedule, "steps": self.steps, "start": self.start}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "schedule": keras.saving.deserialize_keras_object(config["schedule"])})


ONE_CYCLE_RISE, ONE_CYCLE_START, ONE_CYCLE_END = 0.3, 1 / 25, 1e-4


def make_schedule(run, steps_per_epoch):
    """The schedule of a `Run`: peak rate scaled to the global batch.

    Args:
        run: `Run`.
        steps_per_epoch: steps.
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
    return WarmUp(inner, warmup, min(start, peak))


def scaled_rate(run):
    """Peak learning rate for the run's global batch."""
    return run.learning_rate * run.batch_size * run.accumulate / run.base_batch
