"""Helpers that tests of several rooms use."""

import functools

import keras
import numpy as np

import keras_resnet as kr


def randomise(model, seed=0):
    """Give batch-norm statistics, γ, β and all biases random values: fresh ones hide errors. Returns the model."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built:
            for variable in layer.variables:
                positive = variable.name in ("gamma", "moving_variance")
                variable.assign(rng.uniform(0.5, 1.5, variable.shape) if positive else rng.normal(0, 0.3, variable.shape))
    for variable in model.variables:
        if variable.name == "bias":
            variable.assign(rng.normal(0, 0.3, variable.shape))
    return model


@functools.cache
def grown26(trunk, **options):
    """A VGG as the zoo's rows `…_grown26` have it, made by `grow`."""
    for place, blocks in {"block1_pool": 4, "block2_pool": 4, "block3_pool": 3, "block4_pool": 2}.items():
        trunk = kr.grow(trunk, after=place, blocks=blocks, gate="zero_gamma", **options)
    return trunk


def application(name, size=64):
    """A trunk of keras.applications without top, randomised. Shared between tests: do not change it."""
    return randomise(getattr(keras.applications, name)(weights=None, include_top=False, input_shape=(size, size, 3)))


def images(count, size=64, channels=3, seed=0):
    """Float32 noise images 0–255."""
    return np.random.default_rng(seed).uniform(0, 255, (count, size, size, channels)).astype("float32")


def weights_of(model):
    """Copies of all variables, seeds and statistics included."""
    return [np.array(variable.value) for variable in model.variables]


def assert_unchanged(model, before):
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(np.array(variable.value), value, err_msg=variable.path)
