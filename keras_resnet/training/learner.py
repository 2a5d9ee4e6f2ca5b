"""The model under training with its optimiser: grown, frozen, averaged, saved and restored as one."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from ..graphs import layers_in, walk
from ..growth import grow
from ..growth.scale import MATCH, block_scales
from ..growth.surgery import copy_model
from . import optimizers
from .fused import fuse
from .groups import new_layers, parameter_groups
from .run import Run, TrainingError
from .segments import Segment
from .steps import Steps
from .strategies import Placement
from .tasks import Task
from .views import averaged_over_views

# Makes batches `(inputs, None)` of training examples.
Sample: TypeAlias = Callable[[], Iterable[tuple[Any, None]]]
# Below this many images per replica, batch statistics are taken over all replicas unless the run says otherwise.
SMALL_BATCH = 16


class Learner:
    """The copy of a model that a run trains.

    Args:
        model: Model to copy; it is not changed.
        run: The run.
        placement: Where its replicas are.
        task: Losses and metrics.
        schedule: Learning rate, or a schedule of it.
        optimizer: Keras optimiser to copy instead of the one that the run describes.
        per_call: Training steps per call of the device loop.
        scales: Measured scales of the blocks that have grown, by name; growth adds its own.

    Attributes:
        model: The copy, compiled. Growth replaces it by another object.
        steps: Its compiled steps.
    """

    def __init__(
        self,
        model: keras.Model,
        run: Run,
        placement: Placement,
        task: Task,
        schedule: Any,
        *,
        optimizer: keras.optimizers.Optimizer | None = None,
        per_call: int = 1,
        scales: dict[str, float] | None = None,
    ) -> None:
        self.scales = {} if scales is None else scales
        self.run, self.placement, self.task, self.schedule = run, placement, task, schedule
        self._own_optimizer, self.steps_per_call = optimizer, per_call
        with placement.strategy.scope():
            try:
                self.model = copy_model(model)
            except ValueError as error:
                raise TrainingError(str(error)) from error
        self._input_spec = self.model.input_spec
        self._learnable = {path: layer.trainable for path, layer in self._layers()}
        self.optimizer: keras.optimizers.Optimizer | None = None
        self._slots: optimizers.Slots | None = None

    # ------------------------------------------------------------ segments

    def grow(self, segment: Segment, sample: Sample | None) -> list[str]:
        """Grow the model as a segment begins.

        Args:
            segment: The segment.
            sample: Makes examples that matched scales are measured on; None where `scales` has them, in a run that resumes.

        Returns:
            A line for the log per growth event.

        Raises:
            TrainingError: A scale cannot be measured.
        """
        lines, run = [], self.run
        for _, after, blocks in segment.growth:
            seed = run.seed + 1 + segment.start
            options = {"blocks": blocks, "block": run.growth_block, "gate": run.growth_gate, "seed": seed}
            scale, told = run.growth_scale, ""
            if scale == MATCH:
                if sample is not None:
                    told = self._measure(after, options, sample)
                scale = self.scales
            with self.placement.strategy.scope():
                self.model = grow(self.model, after, scale=scale, **options)
            lines.append(f"grown before epoch {segment.start + 1}: {blocks} block(s) after {after}{told}")
        return lines

    def _measure(self, after: str, options: dict[str, Any], sample: Sample) -> str:
        """Add the scales of new blocks to `scales`, the same in every process; what they are, for the log."""
        try:
            with self.placement.strategy.scope():
                grown = block_scales(grow(self.model, after, scale=MATCH, data=sample(), **options))
        except ValueError as error:
            raise TrainingError(str(error)) from error
        new = grown.keys() - block_scales(self.model).keys()
        found = {name: self.placement.of_chief(grown[name]) for name in sorted(new)}
        self.scales |= found
        return f", scaled by {', '.join(f'{scale:.3g}' for scale in sorted(set(found.values())))}"

    def enter(self, segment: Segment, sample: Sample | None = None) -> list[str]:
        """Grow, freeze and compile the model for a segment; the optimiser's state is carried over from the one before.

        Args:
            segment: The segment.
            sample: As for `grow`.

        Returns:
            As `grow`.
        """
        before, former, former_slots = self._variables(), self.optimizer, self._slots
        lines = self.grow(segment, sample)
        self._freeze(segment)
        self.model.input_spec = None if segment.small else self._input_spec
        for layer in self._norms():
            layer.synchronized = self.synchronised
        if self.run.fused_norm:
            fuse(self._norms())
        with self.placement.strategy.scope():
            self.optimizer, self._slots = self._make_optimizer(segment)
            self.task.compile(self.model, self.optimizer)
            self.model.get_compile_config = self._compile_config(self.model)
            self.steps = Steps(self.model, self.placement, self.steps_per_call, self.run.jit)
            self.optimizer.build(self.model.trainable_variables)
            if former is None:
                optimizers.start_averages(self.optimizer, self._slots)
            else:
                after = self._variables()
                pairs = [(a, b) for path in before.keys() & after.keys() for a, b in zip(before[path], after[path], strict=True)]
                optimizers.carry_state(former, former_slots, self.optimizer, self._slots, pairs)
        return lines

    def _compile_config(self, model: keras.Model) -> Callable[[], dict]:
        """What Keras writes into files that callbacks save: losses and metrics, and an optimiser that Keras itself has."""
        original = type(model).get_compile_config

        def get_compile_config() -> dict:
            config = original(model)
            return config | {"optimizer": optimizers.saved_config(model.optimizer)} if config else config

        return get_compile_config

    def _freeze(self, segment: Segment) -> None:
        if not self.run.frozen_epochs:
            return
        grown, head = new_layers(self.model)
        fresh = {id(layer) for layer in [*grown, *head]}
        for path, layer in self._layers():
            layer.trainable = self._learnable.get(path, True) and (not segment.frozen or id(layer) in fresh)

    def _make_optimizer(self, segment: Segment) -> tuple[keras.optimizers.Optimizer, optimizers.Slots]:
        if self._own_optimizer is not None:
            optimizer = type(self._own_optimizer).from_config(self._own_optimizer.get_config())
        else:
            backbone = 1.0 if segment.frozen else self.run.backbone_lr_multiplier
            groups = parameter_groups(
                self.model,
                gate_lr_multiplier=self.run.gate_lr_multiplier,
                backbone_lr_multiplier=backbone,
                new_lr_multiplier=self.run.new_lr_multiplier,
                new_decay_multiplier=self.run.new_decay_multiplier,
                beta_lr_multiplier=self.run.beta_lr_multiplier,
                beta_decay_multiplier=self.run.beta_decay_multiplier,
                orthogonal=self.run.optimizer == "muon",
            )
            optimizer = optimizers.make_optimizer(self.run, self.schedule, groups)
        slots = optimizers.Slots(optimizers.inner_of(optimizer))
        half = any(layer.dtype_policy.name == "mixed_float16" for layer in layers_in(self.model, include_self=False))
        if half and not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        return optimizer, slots

    @property
    def synchronised(self) -> bool:
        """Whether batch norm takes its statistics over all replicas."""
        if self.placement.replicas == 1 or not self._norms():
            return False
        small = self.run.batch_size // self.placement.replicas < SMALL_BATCH
        return small if self.run.sync_batch_norm is None else self.run.sync_batch_norm

    def _norms(self) -> list[keras.layers.Layer]:
        return [layer for layer in layers_in(self.model) if isinstance(layer, keras.layers.BatchNormalization)]

    def _layers(self) -> list[tuple[str, keras.layers.Layer]]:
        """`(path, layer)` of the layers with weights, without nested models."""
        found = [(path, node.operation) for path, _, node in walk(self.model) if isinstance(node.operation, keras.layers.Layer)]
        return [(path, layer) for path, layer in found if layer.weights and not isinstance(layer, keras.Model)]

    def _variables(self) -> dict[str, list[keras.Variable]]:
        """The variables of every layer by the layer's path in the model's tree; Keras' own paths repeat between nested models."""
        return {path: list(layer.variables) for path, layer in self._layers()}

    # ------------------------------------------------------------ weights

    def average_statistics(self) -> None:
        """Average what replicas measure on their own, such as moving means, so that all of them hold the saved model.

        Every process must call it.
        """
        strategy = self.placement.strategy
        if self.placement.replicas == 1:
            return
        # What is frozen is equal everywhere, and must not be rounded.
        layers = [layer for _, layer in self._layers() if layer.trainable]
        found = [v for layer in layers for v in layer.non_trainable_variables if keras.backend.is_float_dtype(v.dtype)]
        if not found:
            return
        values = strategy.run(lambda: [tf.identity(variable.value) for variable in found])
        for variable, value in zip(found, values, strict=True):
            variable.assign(strategy.reduce("MEAN", value, axis=None))

    @contextlib.contextmanager
    def averages(self) -> Iterator[None]:
        """Exchange the weights for their moving averages, where the run keeps some, while the block lasts."""
        self.swap_averages()
        yield
        self.swap_averages()

    def swap_averages(self) -> None:
        """Exchange the weights and their moving averages; a second call undoes it."""
        if not self.run.ema or self._own_optimizer is not None:
            return
        for variable in self.model.trainable_variables:
            average = self._slots.of(variable)["average"]
            value = ops.convert_to_numpy(variable)
            variable.assign(ops.convert_to_numpy(average))
            average.assign(value)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that a training step changes, by a name that says where it belongs. Every process must call it together."""
        groups = {"model": self.model.variables, "optimizer": self.optimizer.variables, "metrics": self.steps.metric_variables}
        return {f"{kind}/{i}": _array(v) for kind, found in groups.items() for i, v in enumerate(found)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Assign weights and optimiser state that `arrays` gave.

        Raises:
            TrainingError: The arrays are those of another model or optimiser; nothing is assigned then.
        """
        pairs = []
        for kind, variables in (("model", self.model.variables), ("optimizer", self.optimizer.variables)):
            found = [name for name in arrays if name.startswith(f"{kind}/")]
            shapes = [arrays.get(f"{kind}/{i}", np.empty(0)).shape for i in range(len(variables))]
            if len(found) != len(variables) or shapes != [tuple(v.shape) for v in variables]:
                raise TrainingError(
                    f"the checkpoint belongs to another {kind} ({len(found)} arrays for {len(variables)} variables); "
                    "choose another --out, or remove it"
                )
            pairs += [(variable, arrays[f"{kind}/{i}"]) for i, variable in enumerate(variables)]
        for variable, value in pairs:
            variable.assign(value)

    def restore_metrics(self, arrays: dict[str, np.ndarray]) -> None:
        """Assign the metrics of an epoch that was broken off."""
        for i, variable in enumerate(self.steps.metric_variables):
            if f"metrics/{i}" in arrays:
                variable.assign(arrays[f"metrics/{i}"])

    def steps_on_views(self, kind: str) -> Steps:
        """Return steps that evaluate the model with test-time augmentation; see `averaged_over_views`."""
        with self.placement.strategy.scope():
            model = averaged_over_views(self.model, kind)
            self.task.compile(model, keras.optimizers.SGD())
            return Steps(model, self.placement)

    def finalize(self) -> None:
        """The end of training as the user's own optimiser wants it: with `use_ema`, averages become weights."""
        if self._own_optimizer is not None:
            self.optimizer.finalize_variable_values(self.model.trainable_weights)

    def finished(self) -> keras.Model:
        """Return the trained model: uncompiled, not under any strategy, with the layers trainable that were so at first."""
        for layer in self._norms():
            layer.synchronized = False
        for path, layer in self._layers():
            layer.trainable = self._learnable.get(path, True)
        self.model.input_spec = self._input_spec
        return copy_model(self.model)


def _array(variable: keras.Variable) -> np.ndarray:
    array = ops.convert_to_numpy(variable)
    return array.astype("float32") if variable.dtype == "bfloat16" else array
