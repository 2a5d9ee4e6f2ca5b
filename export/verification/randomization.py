"""Other weights for a second verification: fresh ones hide errors, wild ones drown them in rounding.

A batch norm with mean 0 and variance 1, or a bias or gate of 0, can be wrong unnoticed. Statistics that have nothing to do with
the data make a deep network amplify rounding without bound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..conversion.keras_internals import before_batch_norms

if TYPE_CHECKING:
    import keras


def constant_variables(model: keras.Model) -> list[keras.Variable]:
    """Return the float variables whose entries are all equal: those of an untrained model's batch norms, biases and gates."""
    found = []
    for variable in model.weights:
        if "float" not in str(variable.dtype):
            continue
        values = np.asarray(variable, "float32")
        if values.size and (values.flat[0] == values).all():
            found.append(variable)
    return found


def statistics(model: keras.Model) -> list[keras.Variable]:
    """Return the moving means and variances of a model's batch norms."""
    import keras

    from keras_resnet.graphs import layers_in

    norms = [layer for layer in layers_in(model) if isinstance(layer, keras.layers.BatchNormalization) and layer.built]
    return [variable for layer in norms for variable in (layer.moving_mean, layer.moving_variance)]


@contextlib.contextmanager
def randomised(variables: list[keras.Variable], call: Callable[[], object], seed: int = 0) -> Iterator[None]:
    """Give variables random values while the block runs; they get their own values back afterwards.

    Values respect what is known of a variable's domain: what is positive stays positive (a variance, a temperature, a scale under
    a root), what is negative stays negative, and what is zero becomes small numbers of either sign. Batch-norm statistics among
    them follow the data, so that no layer amplifies what it gets.

    Args:
        variables: Which; see `constant_variables` and `statistics`.
        call: Calls the model once, on the batch that statistics are taken from.
        seed: Seed of the values.
    """
    before = [np.array(variable) for variable in variables]
    rng = np.random.default_rng(seed)
    try:
        for variable in variables:
            variable.assign(_random(rng, np.asarray(variable, "float64")))
        with _following_data(rng, {id(variable) for variable in variables}):
            call()
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _random(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Random values of the same signs and size; for zeros normal numbers of the size of a layer's initial weights."""
    size = 0.3 / max(1.0, float(np.prod(values.shape[:-1]))) ** 0.5
    return np.where(values != 0, values * rng.uniform(0.5, 1.5, values.shape), rng.normal(0, size, values.shape))


def _following_data(rng: np.random.Generator, wanted: set[int]) -> contextlib.AbstractContextManager[None]:
    """Each batch norm that is called while the context is open takes statistics from what it gets, before it is applied.

    Its variance is four times the mean square over all channels: norms that divide each channel by its own deviation amplify
    rounding from layer to layer (0.9 of the output of an EfficientNetB7 with random weights), these do not (1e-6).
    """

    def follow(layer: keras.layers.BatchNormalization, inputs: np.ndarray) -> None:
        if {id(layer.moving_mean), id(layer.moving_variance)} <= wanted:
            shape, power = tuple(layer.moving_mean.shape), 4 * float(np.square(inputs.astype("float64")).mean()) + 1e-6
            layer.moving_mean.assign(0.3 * power**0.5 * rng.normal(size=shape))
            layer.moving_variance.assign(power * rng.uniform(0.5, 1.5, shape))

    return before_batch_norms(follow)
