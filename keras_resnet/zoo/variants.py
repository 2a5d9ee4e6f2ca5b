"""The named variants, one row each. To add a variant, add a row; the comments name the sources of each group."""

from __future__ import annotations

import re
from typing import Any

from .config import Growth, ResNetConfig, VGGConfig

# arXiv 1512.03385, table 1; 10, 14, 26 and 200 are timm's.
BASIC = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
DEPTHS = {**BASIC, **BOTTLENECK}

# arXiv 1812.01187, figures 1 and 2: C replaces the stem, D the shortcut too; S and T are timm's other stems.
DEEP = {"stem_kernel": 3, "stem_widths": (32, 32, 64)}
STYLE_C = DEEP
STYLE_D = {**DEEP, "shortcut": "average"}
STYLE_S = {"stem_kernel": 3, "stem_widths": (64, 64, 128)}
STYLE_T = {"stem_kernel": 3, "stem_widths": (24, 32, 64), "shortcut": "average"}

KERAS_NORM = {"norm_epsilon": 1.001e-5, "norm_momentum": 0.99}
# The stride in the first 1×1, as in the paper and in keras.applications.
V1 = {"stride_in": "1x1", **KERAS_NORM}
V2 = {"preact": True}
# keras.applications' V2 pads a signed map with zeros in front of its pool, and strides in the last block of a stage.
V2_KERAS = {
    "preact": True,
    "shortcut": "subsample",
    "stride_block": "last",
    "stem_pool": "max_zero",
    "conv_bias": ("stem", "last", "projection"),
    **KERAS_NORM,
}
# arXiv 1912.11370, section 3: group norm, weight standardisation, a stem padded with zeros.
BIT = {"preact": True, "norm": "group", "weight_standardization": True, "stem_pool": "max_zero"}
# arXiv 1709.01507; timm rounds the squeeze width to a multiple of 8.
SE = {"se_ratio": 1 / 16}
# arXiv 2103.07579, section 4.3.
RS = {**STYLE_D, "stem_pool": "conv", "se_ratio": 0.25, "head_dropout": 0.25}


def _resnet(depth, **fields):
    block = "basic" if depth in BASIC else "bottleneck"
    return ResNetConfig(**{"depths": DEPTHS[depth], "block": block, **fields})


def _bit(depth, factor):
    widths = tuple(width * factor for width in (64, 128, 256, 512))
    return _resnet(depth, widths=widths, stem_widths=(64 * factor,), **BIT)


RESNETS = {
    **{f"resnet{depth}": _resnet(depth) for depth in (18, 26, 34, 50, 101, 152, 200)},
    **{f"resnet{depth}_v1": _resnet(depth, **V1) for depth in (50, 101, 152)},
    **{f"resnet{depth}c": _resnet(depth, **STYLE_C) for depth in (50, 101, 152)},
    **{f"resnet{depth}d": _resnet(depth, **STYLE_D) for depth in (18, 26, 34, 50, 101, 152, 200)},
    **{f"resnet{depth}s": _resnet(depth, **STYLE_S) for depth in (50, 101, 152)},
    **{f"resnet{depth}t": _resnet(depth, **STYLE_T) for depth in (10, 14, 26, 50)},
    **{f"resnetv2_{depth}": _resnet(depth, **V2) for depth in (18, 34, 50, 101, 152, 200)},
    **{f"resnetv2_{depth}d": _resnet(depth, **V2, **STYLE_D) for depth in (18, 34, 50, 101, 152)},
    "resnetv2_50t": _resnet(50, **V2, **STYLE_T),
    "resnetv2_50d_gn": _resnet(50, **V2, **STYLE_D, norm="group"),
    **{f"resnetv2_{depth}_keras": _resnet(depth, **V2_KERAS) for depth in (50, 101, 152)},
    # arXiv 1904.11486
    "resnetblur18": _resnet(18, antialias=True),
    "resnetblur50": _resnet(50, antialias=True),
    "resnetblur50d": _resnet(50, antialias=True, **STYLE_D),
    # arXiv 1611.05431, table 1
    "resnext50_32x4d": _resnet(50, groups=32, base_width=4),
    "resnext50d_32x4d": _resnet(50, groups=32, base_width=4, **STYLE_D),
    "resnext101_32x4d": _resnet(101, groups=32, base_width=4),
    "resnext101_32x8d": _resnet(101, groups=32, base_width=8),
    "resnext101_32x16d": _resnet(101, groups=32, base_width=16),
    "resnext101_32x32d": _resnet(101, groups=32, base_width=32),
    "resnext101_64x4d": _resnet(101, groups=64, base_width=4),
    # arXiv 1605.07146, table 8: the 3×3 twice as wide
    "wide_resnet50_2": _resnet(50, base_width=128),
    "wide_resnet101_2": _resnet(101, base_width=128),
    **{f"seresnet{depth}": _resnet(depth, **SE) for depth in (18, 34, 50, 101, 152)},
    "seresnet50t": _resnet(50, **SE, **STYLE_T),
    "seresnet152d": _resnet(152, **SE, **STYLE_D),
    "seresnext26d_32x4d": _resnet(26, groups=32, base_width=4, **SE, **STYLE_D),
    "seresnext26t_32x4d": _resnet(26, groups=32, base_width=4, **SE, **STYLE_T),
    "seresnext50_32x4d": _resnet(50, groups=32, base_width=4, **SE),
    "seresnext101_32x4d": _resnet(101, groups=32, base_width=4, **SE),
    "seresnext101_32x8d": _resnet(101, groups=32, base_width=8, **SE),
    "resnetrs50": _resnet(50, **RS, input_size=160),
    "resnetrs101": _resnet(101, **RS, input_size=192),
    "resnetrs152": _resnet(152, **RS, input_size=256),
    "resnetrs200": _resnet(200, **RS, input_size=256),
    "resnetv2_50x1_bit": _bit(50, 1),
    "resnetv2_50x3_bit": _bit(50, 3),
    "resnetv2_101x1_bit": _bit(101, 1),
    "resnetv2_101x3_bit": _bit(101, 3),
    "resnetv2_152x2_bit": _bit(152, 2),
    "resnetv2_152x4_bit": _bit(152, 4),
    **{f"plain{depth}": _resnet(depth, shortcut="none") for depth in (18, 34)},
}

# arXiv 1512.03385, section 4.2. Option A without a suffix, since akamaster's weights are the ones in use.
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)
CIFAR_SHORTCUTS = {"": "pad", "_a_fixup": "pad_end", "_a_avg": "pad_average", "_b": "projection", "_c": "projection_all"}
CIFAR = {
    **{
        f"resnet{depth}{suffix}": ResNetConfig.cifar(depth, shortcut=shortcut)
        for suffix, shortcut in CIFAR_SHORTCUTS.items()
        for depth in CIFAR_DEPTHS
    },
    **{f"plain{depth}": ResNetConfig.cifar(depth, shortcut="none") for depth in (20, 32, 44, 56, 110)},
    # arXiv 1603.05027, table 4
    "preresnet110": ResNetConfig.cifar(110, preact=True),
    "preresnet164": ResNetConfig.cifar(164, block="bottleneck", preact=True, stride_in="1x1"),
    "preresnet1001": ResNetConfig.cifar(1001, block="bottleneck", preact=True, stride_in="1x1"),
    # arXiv 1605.07146, table 5
    **{
        f"wrn{depth}_{widen}": ResNetConfig.wide(depth, widen)
        for depth, factors in {16: (1, 2, 4, 8, 10), 28: (1, 2, 4, 8, 10, 12), 40: (1, 2, 4, 8, 10)}.items()
        for widen in factors
    },
    # arXiv 1611.05431, section 5.3
    **{
        f"resnext29_{groups}x64d": ResNetConfig.cifar(
            29, block="bottleneck", widths=(64, 128, 256), stem_widths=(64,), groups=groups
        )
        for groups in (8, 16)
    },
}

# arXiv 2404.00498, section 3: a plain net that starts as the identity, wide and shallow, for the most accuracy per hour.
# SiLU in place of GELU, whose exact form takes as long as the convolutions on a CPU; no bias in the stem.
CIFAR["cifar_speed"] = ResNetConfig(
    depths=(1, 1, 1),
    widths=(64, 256, 256),
    block="basic",
    shortcut="none",
    stem_widths=(24,),
    stem_kernel=2,
    stem_stride=1,
    stem_whitening=True,
    stem_pool=None,
    first_stride=2,
    subsampling="max_pool",
    initializer="dirac",
    activation="silu",
    norm_scale=False,
    norm_momentum=0.6,
    head_pool="max",
    head_scale=1 / 9,
    num_classes=10,
    input_size=32,
)

# arXiv 1409.1556, table 1; slim widths get a head for small inputs.
VGG_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
SLIM: dict[str, Any] = {"head": "pool", "head_widths": (), "num_classes": 10, "input_size": 32}


def slim_vgg(name: str) -> VGGConfig | None:
    """Config of `vgg{depth}[_bn]_w{percent}` at any width of 1 to 200 per cent, or None for another name."""
    match = re.fullmatch(r"vgg(11|13|16|19)(_bn)?_w([1-9]\d{0,2})", str(name))
    if match is None or int(match.group(3)) > 200:
        return None
    return VGGConfig(VGG_STAGES[int(match.group(1))], width=int(match.group(3)), batch_norm=bool(match.group(2)), **SLIM)


VGGS = {
    **{f"vgg{depth}": VGGConfig(stages) for depth, stages in VGG_STAGES.items()},
    **{f"vgg{depth}_bn": VGGConfig(stages, batch_norm=True) for depth, stages in VGG_STAGES.items()},
    **{
        (name := f"vgg{depth}{'_bn' * norm}_w{width}"): slim_vgg(name)
        for depth in VGG_STAGES
        for norm in (False, True)
        for width in (12, 16, 25, 50)
    },
    # 26 more weighted layers, most of them early, where they have few weights.
    **{
        f"{name}_grown26": slim_vgg(name).replace(
            growth=Growth(
                tuple((f"block{stage}_pool", blocks) for stage, blocks in enumerate((4, 4, 3, 2), 1)), gate="zero_gamma"
            )
        )
        for name in ("vgg16_w16", "vgg16_bn_w16")
    },
}

VARIANTS = {**RESNETS, **CIFAR, **VGGS}

# What a docstring must say because the name does not.
NOTES = {
    "resnet50": "v1.5: the 3×3 convolution has the stride, as in torchvision and timm; keras.applications has `resnet50_v1`",
    "cifar_speed": "airbench94's network with SiLU; `whiten_stem` fills its first convolution from training images",
    "resnet20": "shortcuts take every second pixel and add zero channels on both sides, as akamaster's option A does",
    "resnetv2_50": "v2 as in timm: the first block of a stage has the stride; keras.applications has `resnetv2_50_keras`",
    "preresnet164": "the first 1×1 has the stride, as in the authors' code; others have it in the 3×3 (`stride_in`)",
    **{
        f"{name}_grown26": f"`{name}` with 4, 4, 3 and 2 pre-activation blocks after its first four pools (gate `zero_gamma`)"
        for name in ("vgg16_w16", "vgg16_bn_w16")
    },
    "seresnet18": "squeeze width rounded to a multiple of 8, as in timm; the paper's is `se_divisor=1`",
}
