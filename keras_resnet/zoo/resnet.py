"""All residual networks: one builder that reads a `ResNetConfig`. A variant is a row in `variants.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras import layers

from ..blocks.kit import LayerKit
from ..blocks.residual import apply_block
from .assembly import BuildOptions, entrance, finish, logits
from .plan import block_plans
from .whitening import WHITENED

if TYPE_CHECKING:
    import keras

    from .config import ResNetConfig


def resnet(config: ResNetConfig, **options: Any) -> keras.Model:
    """Build a residual network. Unlike keras.applications', it takes pixels 0–255 and returns float32 logits.

    Args:
        config: `ResNetConfig`.
        **options: The fields of `BuildOptions`.

    Returns:
        A Functional `keras.Model`, uncompiled, that stores a card (`keras_resnet.card(model)`).

    Raises:
        ValueError: The input is too small or of the wrong rank, groups that do not divide, and the like.

    Source: arXiv 1512.03385; `variants.py` names the sources of the variants.
    """
    options = BuildOptions(**options)
    kit = LayerKit(config, options.data_format, options.dtype)
    inputs, x = entrance(config, options)
    x = _stem(x, config, kit)
    features = {"stem": x}
    x = _stem_pool(x, config, kit)
    for plan in block_plans(config):
        x = apply_block(x, plan, kit)
        if plan.closes_stage:
            features[f"stage{plan.stage}"] = x
    if config.preact:
        x = kit.norm_act(x, "", name="head")
    return finish(config, options, inputs, x, features, kit, lambda x: _classifier(x, config, kit))


def _stem(x, config, kit):
    """The convolutions in front of the first stage. With pre-activation the last has no norm: the first block brings it."""
    if config.stem_whitening:
        return kit.act(kit.fixed_conv(x, config.stem_widths[0], config.stem_kernel, name=WHITENED), name="stem_act")
    last = len(config.stem_widths)
    for number, filters in enumerate(config.stem_widths, start=1):
        suffix = number if last > 1 else ""
        stride, kernel = (config.stem_stride if number == 1 else 1), config.stem_kernel
        x = kit.conv(x, filters, kernel, stride=stride, bias="stem" in config.conv_bias, name=f"stem_conv{suffix}")
        if number < last or not config.preact:
            x = kit.norm_act(x, suffix, name="stem")
    return x


def _stem_pool(x, config, kit):
    """Halves the sides once more, unless `stem_pool` is None. After a ReLU, zeros do the work of −∞ and are cheaper to export."""
    if config.stem_pool is None:
        return x
    if config.stem_pool == "conv":
        x = kit.conv(x, config.stem_widths[-1], 3, stride=1 if config.antialias else 2, name="stem_pool_conv")
        x = kit.blur(x, name="stem_pool_blur") if config.antialias else x
        return kit.norm_act(x, "", name="stem_pool")
    non_negative = config.activation == "relu" and not config.preact
    zeros = config.stem_pool == "max_zero" or non_negative
    return kit.max_pool(x, zeros=zeros, antialias=config.antialias, name="stem_pool")


def _classifier(x, config, kit):
    kind = config.head_pool
    x = kit.global_pool(kind.capitalize(), x, name={"average": "avg_pool", "max": "max_pool"}[kind])
    if config.head_dropout:
        x = layers.Dropout(config.head_dropout, dtype=kit.dtype, name="head_dropout")(x)
    if config.head_scale != 1:
        x = layers.Rescaling(config.head_scale, dtype="float32", name="head_scale")(x)
    return logits(x, config.num_classes)
