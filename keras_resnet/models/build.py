"""A config to a model, whatever its family."""

from __future__ import annotations

from typing import Any

import keras

from ..graphs import without_values
from ..growth.surgery import grow
from ..zoo.config import Growth, ResNetConfig, VGGConfig
from ..zoo.resnet import resnet
from ..zoo.vgg import vgg

BUILDERS = {ResNetConfig: resnet, VGGConfig: vgg}


def build(config: Any, **options: Any) -> keras.Model:
    """The model of a config; `options` are the fields of `BuildOptions`.

    Raises:
        ValueError: see the builder of the family; a config with `growth` and an `input_tensor`.
    """
    model = BUILDERS[type(config)](config, **options)
    if not config.growth:
        return model
    if options.get("input_tensor") is not None:
        raise ValueError(f"`input_tensor` does not go with the grown model {model.name!r}; call the model on the tensor")
    return grown(model, config.growth, partial=bool(options.get("features_only")))


def grown(model: keras.Model, growth: Growth | None, partial: bool = False) -> keras.Model:
    """The model with the blocks of a `Growth`, as `keras_resnet.grow` would put them there; a partial one may lack places."""
    names = {layer.name for layer in model.layers}
    # Places of one count go together: every `grow` copies the model.
    for blocks in sorted({count for _, count in growth.blocks}):
        places = [place for place, count in growth.blocks if count == blocks and (place in names or not partial)]
        if places:
            model = grow(model, places, blocks=blocks, block=growth.block, gate=growth.gate)
    return model


def outline(config: Any, **options: Any) -> keras.Model:
    """The same model without numbers in its weights, for names, shapes and counts: it takes no memory at any size."""
    with without_values():
        return build(config, **options)
