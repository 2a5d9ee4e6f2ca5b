"""Weights from a seed and a name: the same numbers in any framework, so that two networks can be compared without a file."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .matching import variables_of

if TYPE_CHECKING:
    import keras

    from .families.origin import Origin


# He's factor times this keeps hundreds of blocks within float32, while every branch still moves the logits.
GAIN = 0.7


def values(name: str, shape: Sequence[int], seed: int, torch_layout: bool, gain: float = GAIN) -> np.ndarray:
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


def state_for(model: keras.Model, config: Any, origin: Origin, seed: int) -> dict[str, np.ndarray]:
    """The arrays a file of that origin would hold for a zoo model, made from a seed.

    Args:
        model: a zoo model.
        config: its config.
        origin: `Origin` whose names and layout the arrays get.
        seed: whole number.
    """
    arrays = {}
    for name, variable in variables_of(model).items():
        shape = tuple(variable.shape)
        if origin.torch_layout and len(shape) > 1:
            shape = (shape[-1], shape[-2], *shape[:-2])
        key = origin.translate(config, *name)
        arrays[key] = values(key, shape, seed, origin.torch_layout)
    return arrays


def images(size: int, seed: int, channels: int = 3, rank: int = 2, batch: int = 1) -> np.ndarray:
    """Normalised images, channels last, from a seed."""
    random = np.random.default_rng([seed, size])
    return random.standard_normal((batch, *(size,) * rank, channels), "float32")
