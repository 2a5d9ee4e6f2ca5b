"""VGG 11 to 19, with or without batch norm, at any width and with any head; layers are named as in keras.applications."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import layers

from ..blocks.kit import LayerKit
from ..checks import sides_and_channels
from ..layers import AdaptiveAverage
from .assembly import BuildOptions, entrance, finish, logits

if TYPE_CHECKING:
    import keras

    from .config import VGGConfig


def vgg(config: VGGConfig, **options: Any) -> keras.Model:
    """Build a VGG. Unlike keras.applications', it returns logits, and batch norm, widths and a head for small inputs are options.

    Args:
        config: `VGGConfig`.
        **options: The fields of `BuildOptions`.

    Returns:
        A Functional `keras.Model`, uncompiled, that stores a card (`keras_resnet.card(model)`).

    Raises:
        ValueError: The input is smaller than the stride (32 for five stages), or has the wrong rank.

    Source: arXiv 1409.1556, table 1.
    """
    options = BuildOptions(**options)
    kit = LayerKit(config, options.data_format, options.dtype)
    inputs, x = entrance(config, options)
    features = {}
    for stage, (count, width) in enumerate(zip(config.stages, config.widths, strict=True), start=1):
        for number in range(1, count + 1):
            x = _conv(x, config, kit, config.scaled(width), f"block{stage}", number)
        x = features[f"stage{stage}"] = kit.pool("Max", x, 2, 2, padding="valid", name=f"block{stage}_pool")
    return finish(config, options, inputs, x, features, kit, lambda x: _classifier(x, config, kit))


def _conv(x, config, kit, filters, block, number):
    """One weighted layer; without a norm the activation is part of it, as in keras.applications."""
    if not config.batch_norm:
        return kit.conv(x, filters, 3, bias=True, activation=config.activation, name=f"{block}_conv{number}")
    x = kit.conv(x, filters, 3, bias=True, name=f"{block}_conv{number}")
    return kit.norm_act(x, number, name=block)


def _classifier(x, config, kit):
    if config.head == "pool":
        x = kit.global_pool("Average", x, name="avg_pool")
    else:
        x = layers.Flatten(kit.layout, dtype=kit.dtype, name="flatten")(_to_head_size(x, config, kit))
    for number, units in enumerate(config.head_widths, start=1):
        x = layers.Dense(config.scaled(units), activation=config.activation, dtype=kit.dtype, name=f"fc{number}")(x)
        if config.head_dropout:
            x = layers.Dropout(config.head_dropout, dtype=kit.dtype, name=f"dropout{number}")(x)
    return logits(x, config.num_classes)


def _to_head_size(x, config, kit):
    """The features at the side the dense layers expect; a layer only where they differ or are not known."""
    sides, _ = sides_and_channels(x.shape, kit.layout)
    if all(side == config.head_size for side in sides):
        return x
    if None not in sides and any(side < config.head_size for side in sides):
        return AdaptiveAverage(config.head_size, data_format=kit.layout, dtype=kit.dtype, name="head_pool")(x)
    pooling = kit.ranked("AdaptiveAveragePooling")
    return pooling(config.head_size, data_format=kit.layout, dtype=kit.dtype, name="head_pool")(x)
