"""Weights from a seed and a name: the same numbers in any framework, so that two networks can be compared without a file."""

from __future__ import annotations

import math
import zlib

import keras
import numpy as np

from ..zoo.config import Config
from .families.checkpoint_format import CheckpointFormat
from .matching import variables_of

# He's factor times this keeps hundreds of blocks within float32, while every branch still moves the logits.
GAIN = 0.7


def values(name: str, shape: tuple[int, ...], seed: int, torch_layout: bool, gain: float = GAIN) -> np.ndarray:
    """Draw the values of one parameter. Statistics of batch norms are random too, since fresh ones hide errors.

    Args:
        name: Name of the parameter in its framework; name and seed decide the values.
        shape: Shape of the array.
        seed: Whole number.
        torch_layout: Whether filters are the first axis (torch) or the last (Keras).
        gain: Factor on He's standard deviation.

    Returns:
        Array of float32.
    """
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    kind = name.replace("/", ".").rsplit(".", 1)[-1]
    if len(shape) > 1:
        fan_in = math.prod(shape[1:] if torch_layout else shape[:-1])
        return (random.standard_normal(shape, "float32") * gain * math.sqrt(2 / fan_in)).astype("float32")
    if kind in ("running_var", "moving_variance", "weight", "gamma"):
        return random.uniform(0.5, 1.5, shape).astype("float32")
    return (0.1 * random.standard_normal(shape, "float32")).astype("float32")


def state_for(model: keras.Model, config: Config, checkpoint_format: CheckpointFormat, seed: int) -> dict[str, np.ndarray]:
    """Make the arrays that a checkpoint of a family has for a model of the zoo, from a seed.

    Args:
        model: Model of the zoo.
        config: Its config.
        checkpoint_format: Family whose names and layout the arrays get.
        seed: Whole number.
    """
    arrays = {}
    for name, variable in variables_of(model).items():
        shape = tuple(variable.shape)
        if checkpoint_format.torch_layout and len(shape) > 1:
            shape = (shape[-1], shape[-2], *shape[:-2])
        key = checkpoint_format.translate(config, *name)
        arrays[key] = values(key, shape, seed, checkpoint_format.torch_layout)
    return arrays


def images(size: int, seed: int, channels: int = 3, rank: int = 2, batch: int = 1) -> np.ndarray:
    """Make normalised images, channels last, from a seed."""
    random = np.random.default_rng([seed, size])
    return random.standard_normal((batch, *(size,) * rank, channels), "float32")
