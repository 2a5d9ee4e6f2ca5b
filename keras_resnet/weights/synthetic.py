"""Weights from a seed and a name: the same numbers in any framework, so that two networks can be compared without a file."""

import math
import zlib

import numpy as np

from .matching import variables_of

# He's factor times this keeps hundreds of blocks within float32, while every branch still moves the logits.
GAIN = 0.7


def values(name, shape, seed, torch_layout, gain=GAIN):
    """Numbers for one parameter; batch-norm statistics are random too, since fresh ones hide errors.

    Args:
        name: as its framework calls it; it decides the numbers together with the seed.
        shape: of the array.
        seed: whole number.
        torch_layout: whether filters are the first axis (torch) or the last (Keras).
        gain: factor on He's deviation.

    Returns:
        float32 array.
    """
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    kind = name.replace("/", ".").rsplit(".", 1)[-1]
    if len(shape) > 1:
        fan_in = math.prod(shape[1:] if torch_layout else shape[:-1])
        return (random.standard_normal(shape, "float32") * gain * math.sqrt(2 / fan_in)).astype("float32")
    if kind in ("running_var", "moving_variance", "weight", "gamma"):
        return random.uniform(0.5, 1.5, shape).astype("float32")
    return (0.1 * random.standard_normal(shape, "float32")).astype("float32")


def state_for(model, config, checkpoint_format, seed):
    """The arrays a file of that checkpoint format would hold for a zoo model, made from a seed.

    Args:
        model: a zoo model.
        config: its config.
        checkpoint_format: `CheckpointFormat` whose names and layout the arrays get.
        seed: whole number.
    """
    arrays = {}
    for name, variable in variables_of(model).items():
        shape = tuple(variable.shape)
        if checkpoint_format.torch_layout and len(shape) > 1:
            shape = (shape[-1], shape[-2], *shape[:-2])
        key = checkpoint_format.translate(config, *name)
        arrays[key] = values(key, shape, seed, checkpoint_format.torch_layout)
    return arrays


def images(size, seed, channels=3, rank=2, batch=1):
    """Normalised images, channels last, from a seed."""
    random = np.random.default_rng([seed, size])
    return random.standard_normal((batch, *(size,) * rank, channels), "float32")
