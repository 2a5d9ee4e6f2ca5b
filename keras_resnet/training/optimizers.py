"""Optimisers of Keras with parameter groups.

`keras.optimizers.MultiOptimizer` has groups too, but then a global norm is one per group, there is no learning rate to log
and no loss scaling; and all Keras optimisers clip before the sum over replicas, so that the result depends on their number.
"""

import keras
import tensorflow as tf
from keras import ops


class _Grouped:
    """In front of a Keras optimiser: groups, weight decay by group, clipping behind the sum over replicas.

    Args:
        groups: list of `Group`; a variable in none has multiplier 1 and no decay.
        decay: factor of the weight decay.
        coupled: add `decay · w` to the gradient (L2, as the papers on SGD mean it); else take `rate · decay · w` off `w`.
        **kwargs: of the optimiser.
    """

    def __init__(self, *args, groups=(), decay=0.0, coupled=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.groups, self.decay, self.coupled = list(groups), decay, coupled
        self.slots = {}
        self._group_of = {}

    def build(self, variables):
        if not self.built:
            self._group_of = {self._var_key(v): group for group in self.groups for v in group.variables}
        super().build(variables)

    def add_variable_from_reference(self, reference_variable, name=None, initializer="zeros"):
        slot = super().add_variable_from_reference(reference_variable, name=name, initializer=initializer)
        self.slots.setdefault(self._var_key(reference_variable), {})[name] = slot
        return slot

    def slots_of(self, variable):
        """`{name: slot}` of a variable: momentum, moments, average."""
        return self.slots.get(self._var_key(variable), {})

    def average_of(self, variable):
        """The moving average of a variable, or None."""
        return self.slots_of(variable).get("average")

    def update_step(self, gradient, variable, learning_rate):
        group = self._group_of.get(self._var_key(variable))
        if group is not None:
            learning_rate = ops.cast(learning_rate, variable.dtype) * group.lr_multiplier
            if group.decay and self.decay:
                if self.coupled:
                    gradient = ops.cast(gradient, variable.dtype) + self.decay * variable
                else:
                    self.assign_sub(variable, self.decay * learning_rate * variable)
        super().update_step(gradient, variable, learning_rate)

    def _clip_gradients(self, grads):
        if not self.global_clipnorm:
            return grads
        if context := tf.distribute.get_replica_context():
            grads = context.all_reduce(tf.distribute.ReduceOp.SUM, grads)
        # In float64: the functions of Keras and TensorFlow refuse gradients of several dtypes.
        norm = tf.sqrt(tf.add_n([tf.cast(tf.reduce_sum(tf.square(g)), tf.float64) for g in grads if g is not None]))
        factor = self.global_clipnorm / tf.maximum(norm, self.global_clipnorm)
        return [g if g is None else g * tf.cast(factor, g.dtype) for g in grads]

    def _all_reduce_sum_gradients(self, grads_and_vars):
        return list(grads_and_vars) if self.global_clipnorm else super()._all_reduce_sum_gradients(grads_and_vars)

    def finalize_variable_values(self, var_list):
        # Keras would write the average over the weights at the end of every `fit`; a run has several.
        pass


class SGD(_Grouped, keras.optimizers.SGD):
    """`keras.optimizers.SGD` with parameter groups."""


class AdamW(_Grouped, keras.optimizers.Adam):
    """`keras.optimizers.AdamW` with parameter groups."""


class Lamb(_Grouped, keras.optimizers.Lamb):
    """`keras.optimizers.Lamb` with parameter groups; as in Keras, the decay stands outside of the trust ratio."""


def make_optimizer(run, schedule, groups):
    """The optimiser of a `Run`.

    Args:
        run: `Run`.
        schedule: learning rate schedule.
        groups: list of `Group`.
    """
    common = {"groups": groups, "decay": run.weight_decay, "global_clipnorm": run.clip_norm or None}
    if run.ema:
        common |= {"use_ema": True, "ema_momentum": run.ema}
    if run.optimizer == "sgd":
        return SGD(schedule, momentum=run.momentum, nesterov=run.nesterov, coupled=True, **common)
    return (AdamW if run.optimizer == "adamw" else Lamb)(schedule, **common)


def carry_slots(old, new, pairs):
    """Take momentum, moments and averages along to the optimiser of a model that was rewritten, by variable.

    Args:
        old: optimiser before.
        new: optimiser after, built.
        pairs: `(variable of the old model, variable of the new one)`.
    """
    new.iterations.assign(ops.convert_to_numpy(old.iterations))
    averaged = set()
    for before, after in pairs:
        source = old.slots_of(before)
        for name, slot in new.slots_of(after).items():
            if name in source:
                slot.assign(ops.convert_to_numpy(source[name]))
                averaged.add(id(slot))
    # An average that starts now starts at the value, not at zero.
    for variable in new._trainable_variables:
        average = new.average_of(variable)
        if average is not None and id(average) not in averaged:
            average.assign(ops.convert_to_numpy(variable))
