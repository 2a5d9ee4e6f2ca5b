"""Other weights for a second look: fresh ones hide errors, wild ones drown them in rounding.

A batch norm with mean 0 and variance 1, a bias or a gate of 0 can be wrong unnoticed; statistics that have nothing to do with
the data make a deep network amplify rounding without bound.
"""

import contextlib

import numpy as np

POSITIVE = ("gamma", "variance", "scale")
STATISTICS = ("moving_mean", "moving_variance")


def hiding_variables(model):
    """The float variables whose entries are all equal: those of an untrained model's batch norms, biases and gates."""
    found = []
    for variable in model.weights:
        if "float" not in str(variable.dtype):
            continue
        values = np.asarray(variable, "float32")
        if values.size and (values.flat[0] == values).all():
            found.append(variable)
    return found


def statistics(model):
    """The moving means and variances of a model's batch norms."""
    return [variable for layer in _norms(model) for variable in (layer.moving_mean, layer.moving_variance)]


def _norms(model):
    import keras

    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization) and layer.built]


@contextlib.contextmanager
def randomised(interface, feeds, variables, seed=0):
    """Give variables random values while the block runs; they get their own back afterwards.

    Statistics among them follow the data, so that no layer blows it up.

    Args:
        interface: `interface.Interface` of the model.
        feeds: the batch that statistics are taken from.
        variables: which; see `hiding_variables` and `statistics`.
        seed: seed of the values.
    """
    before = [np.array(variable) for variable in variables]
    rng = np.random.default_rng(seed)
    try:
        for variable in variables:
            variable.assign(_random(rng, variable))
        with _following_data(rng, {id(variable) for variable in variables}):
            interface.reference(feeds)
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _random(rng, variable):
    shape = tuple(variable.shape)
    if any(word in variable.name for word in POSITIVE):
        return rng.uniform(0.5, 1.5, shape)
    return rng.normal(0, 0.3 / max(1.0, np.prod(shape[:-1])) ** 0.5, shape)


@contextlib.contextmanager
def _following_data(rng, wanted):
    """Each batch norm that is called while the block runs takes statistics from what it gets, before it is applied.

    Its variance is four times the mean square over all channels: norms that divide each channel by its own deviation amplify
    rounding from layer to layer (0.9 of the output of an EfficientNetB7 with random weights), these do not (1e-6).
    """
    import keras

    original = keras.layers.BatchNormalization.call

    def followed(layer, inputs, *args, **kwargs):
        if {id(layer.moving_mean), id(layer.moving_variance)} <= wanted:
            shape, power = tuple(layer.moving_mean.shape), 4 * float(np.square(np.asarray(inputs, "float64")).mean()) + 1e-6
            layer.moving_mean.assign(0.3 * power**0.5 * rng.normal(size=shape))
            layer.moving_variance.assign(power * rng.uniform(0.5, 1.5, shape))
        return original(layer, inputs, *args, **kwargs)

    keras.layers.BatchNormalization.call = followed
    try:
        yield
    finally:
        keras.layers.BatchNormalization.call = original
