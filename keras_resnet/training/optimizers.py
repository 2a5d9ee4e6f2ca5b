"""Keras' optimisers with parameter groups, and the state that optimisers keep per variable. Checked against Keras 3.15.

`keras.optimizers.MultiOptimizer` has groups too, but then a global norm is one per group, there is no learning rate to log
and no loss scaling; and all Keras optimisers clip before the sum over replicas, so that the result depends on their number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf
from keras import ops

from .groups import Group
from .run import Run
from .schedules import scaled_rate

if TYPE_CHECKING:  # The mixin below uses the attributes of the optimisers that it is added to.
    from keras.optimizers import Optimizer as _Mixin
else:
    _Mixin = object


class _Grouped(_Mixin):
    """Mixin for a Keras optimiser: parameter groups, weight decay by group, clipping after the sum over replicas.

    Args:
        groups: List of `Group`; a variable in none has multiplier 1 and no decay.
        decay: Factor of the weight decay.
        coupled: Add `decay · w` to the gradient (L2, as the papers on SGD mean it); else take `rate · decay · w` off `w`.
        **kwargs: Of the optimiser.
    """

    def __init__(self, *args: Any, groups: Sequence[Any] = (), decay: float = 0.0, coupled: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups, self.decay, self.coupled = list(groups), decay, coupled
        self._group_of = {}
        self._are_summed = False  # Whether gradients are summed over the replicas before they are accumulated.

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if not self.built:
            self._group_of = {self._var_key(v): group for group in self.groups for v in group.variables}
        super().build(variables)

    def _get_current_learning_rate(self):
        # With accumulated gradients Keras gives a schedule the number of the step; ours counts updates.
        rate = self._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            return rate(self.iterations)
        return super()._get_current_learning_rate()

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        group = self._group_of.get(self._var_key(variable))
        if group is not None:
            learning_rate = ops.cast(learning_rate, variable.dtype) * group.lr_multiplier
            if group.decay and self.decay:
                decay = self.decay * float(group.decay)
                if self.coupled:
                    gradient = ops.cast(gradient, variable.dtype) + decay * variable
                else:
                    self.assign_sub(variable, decay * learning_rate * variable)
        super().update_step(gradient, variable, learning_rate)

    def _backend_apply_gradients(self, grads: list, trainable_variables: list[keras.Variable]) -> None:
        context = tf.distribute.get_replica_context()
        if not self.gradient_accumulation_steps or context is None or context.num_replicas_in_sync == 1:
            return super()._backend_apply_gradients(grads, trainable_variables)
        # Sums over all replicas are what is accumulated, so that every replica and the checkpoint hold the same.
        grads, self._are_summed = context.all_reduce(tf.distribute.ReduceOp.SUM, grads), True
        # The update calls `merge_call`, which no branch may do within a replica: the branches are outside of replicas.
        context.merge_call(lambda strategy, sums: self._accumulate(strategy, sums, trainable_variables), args=(grads,))
        if self.use_ema:
            self._update_model_variables_moving_average(self._trainable_variables)

    def _accumulate(self, strategy: tf.distribute.Strategy, sums: list, variables: list[keras.Variable]) -> None:
        """Outside of replicas: update `variables` in every n-th step, else add `sums` to what is accumulated."""
        steps, update = self.gradient_accumulation_steps, strategy.extended.update
        accumulators = [self._accumulated_gradients[self._get_variable_index(v)] for v in variables]

        def update_in_replica(grads: list) -> None:
            means = [(grad + accumulator.value) / steps for grad, accumulator in zip(grads, accumulators, strict=True)]
            self._backend_update_step(self._clip_gradients(means), variables, self.learning_rate)

        def update_weights() -> None:
            strategy.extended.call_for_each_replica(update_in_replica, args=(sums,))
            for accumulator in accumulators:
                update(accumulator.value, lambda value: value.assign(tf.zeros_like(value)), group=False)

        def add() -> None:
            for accumulator, grad in zip(accumulators, sums, strict=True):
                update(accumulator.value, lambda value, grad: value.assign_add(grad), args=(grad,), group=False)

        ops.cond((self._iterations + 1) % steps == 0, update_weights, add)

    def _clip_gradients(self, grads):
        if not self.global_clipnorm:
            return grads
        context = tf.distribute.get_replica_context()
        if context is not None and not self._are_summed:
            grads = context.all_reduce(tf.distribute.ReduceOp.SUM, grads)
        # In float64: the functions of Keras and TensorFlow refuse gradients of several dtypes.
        norm = tf.sqrt(tf.add_n([tf.cast(tf.reduce_sum(tf.square(g)), tf.float64) for g in grads if g is not None]))
        factor = self.global_clipnorm / tf.maximum(norm, self.global_clipnorm)
        return [g if g is None else g * tf.cast(factor, g.dtype) for g in grads]

    def _all_reduce_sum_gradients(self, grads_and_vars):
        summed = self.global_clipnorm or self._are_summed
        return list(grads_and_vars) if summed else super()._all_reduce_sum_gradients(grads_and_vars)

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        # Keras would write the average over the weights at the end of every `fit`; a run has several.
        pass


class SGD(_Grouped, keras.optimizers.SGD):
    """`keras.optimizers.SGD` with parameter groups."""


class AdamW(_Grouped, keras.optimizers.Adam):
    """`keras.optimizers.AdamW` with parameter groups."""


class Lamb(_Grouped, keras.optimizers.Lamb):
    """`keras.optimizers.Lamb` with parameter groups; as in Keras, the decay is outside the trust ratio."""


class Muon(_Grouped, keras.optimizers.SGD):
    """SGD that makes the updates of some groups of kernels orthogonal, and keeps the norm of these kernels at √filters.

    `keras.optimizers.Muon` does so for dense layers only, trains all else with Adam, and leaves the norm of kernels free.

    Args:
        kernel_rate: Factor on the learning rate of groups with `is_orthogonal`.
        kernel_momentum: Momentum factor of these groups.
        **kwargs: Of `SGD`.

    Source: Jordan et al. (https://kellerjordan.github.io/posts/muon/); the norm of kernels is that of airbench94.
    """

    # Coefficients and number of the iterations: singular values end between 0.5 and 1.5, which is as good as 1.
    coefficients, iterations_per_update = (3.4445, -4.7750, 2.0315), 3

    def __init__(self, *args: Any, kernel_rate: float = 1.0, kernel_momentum: float = 0.6, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernel_rate, self.kernel_momentum = kernel_rate, kernel_momentum

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        group = self._group_of.get(self._var_key(variable))
        if group is None or not group.is_orthogonal:
            super().update_step(gradient, variable, learning_rate)
            return
        rate = ops.cast(learning_rate, variable.dtype) * (group.lr_multiplier * self.kernel_rate)
        momentum = self.momentums[self._get_variable_index(variable)]
        gradient = ops.cast(gradient, variable.dtype)
        total = momentum * self.kernel_momentum + gradient
        self.assign(momentum, total)
        direction = gradient + self.kernel_momentum * total if self.nesterov else total
        scale = variable.shape[-1] ** 0.5 / (tf.norm(variable) + 1e-7)
        update = ops.reshape(self._orthogonal(ops.reshape(direction, (-1, variable.shape[-1]))), variable.shape)
        self.assign(variable, variable * scale - rate * update)

    def _orthogonal(self, matrix: Any) -> Any:
        """The nearest matrix whose singular values are about 1, by Newton-Schulz iterations."""
        a, b, c = self.coefficients
        is_tall = matrix.shape[0] > matrix.shape[1]
        x = ops.transpose(matrix) if is_tall else matrix
        x = x / (ops.norm(x) + 1e-7)
        for _ in range(self.iterations_per_update):
            square = ops.matmul(x, ops.transpose(x))
            x = a * x + ops.matmul(b * square + c * ops.matmul(square, square), x)
        return ops.transpose(x) if is_tall else x


class Slots:
    """The variables that an optimiser keeps per model variable: momentum, moments, averages.

    Keras has them as lists in an order that differs from optimiser to optimiser, so they are recorded when they are made.

    Args:
        optimizer: Any Keras optimiser that is not built yet.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self._slots: dict[int, dict[str, keras.Variable]] = {}
        make = optimizer.add_variable_from_reference

        def add_variable_from_reference(reference_variable: Any, name: str = None, *args: Any, **kwargs: Any) -> Any:
            slot = make(reference_variable, name, *args, **kwargs)
            self._slots.setdefault(id(reference_variable), {})[name] = slot
            return slot

        optimizer.add_variable_from_reference = add_variable_from_reference

    def of(self, variable: keras.Variable) -> dict[str, keras.Variable]:
        """Return the slots of a model variable by name, e.g. `"momentum"` or `"average"`."""
        return self._slots.get(id(variable), {})


def make_optimizer(run: Run, schedule: Any, groups: list[Group]) -> keras.optimizers.Optimizer:
    """Make the optimiser that a `Run` describes.

    Args:
        run: `Run`.
        schedule: Learning rate, or a schedule of it.
        groups: List of `Group`.
    """
    common = {"groups": groups, "decay": run.weight_decay, "global_clipnorm": run.clip_norm or None}
    if run.accumulate > 1:
        common["gradient_accumulation_steps"] = run.accumulate
    if run.ema:
        common |= {"use_ema": True, "ema_momentum": run.ema}
    if run.optimizer == "sgd":
        return SGD(schedule, momentum=run.momentum, nesterov=run.nesterov, coupled=True, **common)
    if run.optimizer == "muon":
        kernels = {"kernel_rate": run.muon_rate / max(scaled_rate(run), 1e-12), "kernel_momentum": run.muon_momentum}
        return Muon(schedule, momentum=run.momentum, nesterov=run.nesterov, coupled=True, **kernels, **common)
    return (AdamW if run.optimizer == "adamw" else Lamb)(schedule, **common)


def inner_of(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return the optimiser itself where loss scaling is wrapped around it."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def last_learning_rate(optimizer: keras.optimizers.Optimizer) -> float:
    """Return the learning rate of the update that was made last."""
    inner = inner_of(optimizer)
    rate = inner._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        return float(rate(ops.maximum(inner.iterations - 1, 0)))
    return float(ops.convert_to_numpy(inner.learning_rate))


def carry_state(
    old: keras.optimizers.Optimizer,
    old_slots: Slots,
    new: keras.optimizers.Optimizer,
    new_slots: Slots,
    pairs: Iterable[tuple[keras.Variable, keras.Variable]],
) -> None:
    """Carry the state of an optimiser over to the optimiser of a model that was rewritten, variable by variable.

    Args:
        old: Optimiser before, perhaps with loss scaling.
        old_slots: Its slots.
        new: Optimiser after, built, of the same kind.
        new_slots: Its slots.
        pairs: `(variable of the old model, variable of the new model)`.
    """
    if old is not inner_of(old):
        for name in ("dynamic_scale", "step_counter"):
            getattr(new, name).assign(ops.convert_to_numpy(getattr(old, name)))
    old, new, pairs = inner_of(old), inner_of(new), list(pairs)
    new._iterations.assign(ops.convert_to_numpy(old._iterations))
    if isinstance(old._learning_rate, keras.Variable) and isinstance(new._learning_rate, keras.Variable):
        new._learning_rate.assign(ops.convert_to_numpy(old._learning_rate))
    for before, after in pairs:
        source = old_slots.of(before)
        for name, slot in new_slots.of(after).items():
            if name in source:
                slot.assign(ops.convert_to_numpy(source[name]))
    carried = {id(after) for before, after in pairs if old_slots.of(before)}
    start_averages(new, new_slots, carried)


def start_averages(optimizer: keras.optimizers.Optimizer, slots: Slots, carried: Collection[int] = ()) -> None:
    """Let the moving average of every variable start at its value instead of zero.

    Args:
        optimizer: Built optimiser.
        slots: Its slots.
        carried: Ids of variables whose averages are under way.
    """
    for variable in inner_of(optimizer)._trainable_variables:
        if id(variable) not in carried and (average := slots.of(variable).get("average")) is not None:
            average.assign(ops.convert_to_numpy(variable))


def saved_config(optimizer: keras.optimizers.Optimizer) -> dict:
    """Return the config under which a model that a callback saves keeps its optimiser: one of Keras' own classes.

    Such a file then loads without this package. Parameter groups stay in the run; the learning rate is the current one.
    """
    inner = inner_of(optimizer)
    # Keras has no Muon for convolutions; its SGD has the same slots.
    known = {SGD: keras.optimizers.SGD, AdamW: keras.optimizers.Adam, Lamb: keras.optimizers.Lamb, Muon: keras.optimizers.SGD}
    if type(inner) not in known:
        return keras.saving.serialize_keras_object(optimizer)
    config = inner.get_config() | {"learning_rate": float(ops.convert_to_numpy(inner.learning_rate))}
    return keras.saving.serialize_keras_object(known[type(inner)].from_config(config))
