"""Building a model from a config of any family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from ..graphs import without_values
from ..growth.surgery import grow
from ..zoo.config import Growth, ResNetConfig, VGGConfig
from ..zoo.resnet import resnet
from ..zoo.vgg import vgg

BUILDERS: dict[type, Callable[..., keras.Model]] = {ResNetConfig: resnet, VGGConfig: vgg}


def build(config: Any, **options: Any) -> keras.Model:
    """Build the model of a config; `options` are the fields of `BuildOptions`.

    Raises:
        ValueError: The builder of the family refuses it, or a config with `growth` is combined with `input_tensor`.
    """
    model = BUILDERS[type(config)](config, **options)
    if not config.growth:
        return model
    if options.get("input_tensor") is not None:
        raise ValueError(f"`input_tensor` does not go with the grown model {model.name!r}; call the model on the tensor")
    return grown(model, config.growth, partial=bool(options.get("features_only")))


def grown(model: keras.Model, growth: Growth | None, partial: bool = False) -> keras.Model:
    """Add the blocks of a `Growth` as `keras_resnet.grow` does. A partial model may lack insertion points."""
    names = {layer.name for layer in model.layers}
    # Insertion points with the same number of blocks go together, since every `grow` copies the model.
    for blocks in sorted({count for _, count in growth.blocks}):
        points = [point for point, count in growth.blocks if count == blocks and (point in names or not partial)]
        if points:
            model = grow(model, points, blocks=blocks, block=growth.block, gate=growth.gate)
    return model


def outline(config: Any, **options: Any) -> keras.Model:
    """Build the same model without numbers in its weights, for names, shapes and counts. It takes no memory at any size."""
    with without_values():
        return build(config, **options)
