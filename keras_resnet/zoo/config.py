"""Architecture as data: every choice that changes a logit is a field here, and survives `save` and `load_model`."""

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_origin

from ..blocks.branches import BRANCHES
from ..blocks.style import BlockStyle, LayerStyle
from ..checks import is_number, positive_integer, positive_number, probability
from ..layers import config_differences

CHOICES = {
    "block": tuple(BRANCHES),
    "shortcut": (
        "projection",
        "projection_all",
        "projection_first",
        "average",
        "subsample",
        "pad",
        "pad_end",
        "pad_average",
        "none",
    ),
    "stem_pool": ("max", "max_zero", "conv", None),
    "stride_in": ("3x3", "1x1"),
    "stride_block": ("first", "last"),
    "padding": ("symmetric", "same"),
    "initializer": ("he", "dirac"),
    "subsampling": ("stride", "max_pool"),
    "head_pool": ("average", "max"),
    "norm": ("batch", "group"),
    "gate": (None, "zero_gamma", "zero_conv"),
    "head": ("dense", "pool"),
    "rank": (1, 2, 3),
}
BIASED = ("stem", "inner", "last", "projection")
CIFAR_STEM = {"stem_widths": (16,), "stem_kernel": 3, "stem_stride": 1, "stem_pool": None, "num_classes": 10, "input_size": 32}


@dataclass(frozen=True)
class Growth:
    """Residual blocks that `keras_resnet.grow` adds to a network, where they are a part of its architecture.

    Args:
        blocks: Pairs of an insertion point, which is the name of a layer, and the number of blocks after it, e.g.
            `(("block1_pool", 2), ("block5_pool", 3))`. Points that a part of the network (`features_only`) lacks are ignored.
        block: Kind of block, see `grow`.
        gate: Gate of the blocks, see `grow`. None is the block's default.

    Raises:
        ValueError: `blocks` are not pairs of a name and a whole number.
    """

    blocks: tuple[tuple[str, int], ...]
    block: str = "preact"
    gate: str | None = None

    def __post_init__(self) -> None:
        try:
            pairs = tuple((str(place), count) for place, count in self.blocks)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`blocks` must be pairs of an insertion point and a number, got {self.blocks!r}") from error
        for place, count in pairs:
            positive_integer(f"growth of {place}", count)
        object.__setattr__(self, "blocks", pairs)


class Config:
    """What the configs of all families share: checked choices, a JSON form, and copies with changes.

    Subclasses are dataclasses, which have these fields among others.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    family: ClassVar[str]
    widths: tuple[int, ...]
    num_classes: int
    input_size: int
    channels: int
    rank: int
    norm_epsilon: float
    growth: Growth | None

    def __post_init__(self) -> None:
        if isinstance(self.growth, dict):
            object.__setattr__(self, "growth", Growth(**self.growth))
        if not isinstance(self.growth, Growth | None):
            raise ValueError(f"`growth` must be a Growth or None, got {self.growth!r}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            elif (get_origin(field.type) or field.type) is tuple and not isinstance(value, tuple):
                raise ValueError(f"`{field.name}` must be a tuple, got {value!r}")
            if field.name in CHOICES and value not in CHOICES[field.name]:
                raise ValueError(f"`{field.name}` must be one of {', '.join(map(repr, CHOICES[field.name]))}, got {value!r}")
        for name in ("num_classes", "input_size", "channels", "rank"):
            positive_integer(name, getattr(self, name))
        if not is_number(self.norm_epsilon) or self.norm_epsilon <= 0:
            raise ValueError(f"`norm_epsilon` must be a number above 0, got {self.norm_epsilon!r}")

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed; it is checked like a new config."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with the family under `"family"`; `config_from_dict` reads them."""
        return {"family": self.family, **_plain(dataclasses.asdict(self))}


@dataclass(frozen=True)
class ResNetConfig(Config, BlockStyle):
    """A residual network. The defaults are torchvision's ResNet-v1.5, in which the 3×3 convolution has the stride, not the 1×1.

    Args:
        depths: Number of residual blocks of each stage, e.g. `(3, 4, 6, 3)`.
        widths: Base width of each stage. The output of a bottleneck has four times as many channels.
        block: A key of `blocks.BRANCHES`: `"basic"` (two 3×3), `"bottleneck"` (1×1, 3×3, 1×1) or `"depthwise"` (3×3 per channel,
            1×1).
        preact: Whether norm and activation come before each convolution, and once more after the last block (v2).
        shortcut: What the branch is added to where its shape changes: `"projection"` (option B: 1×1 convolution),
            `"projection_all"` (option C: in every block), `"projection_first"` (in the first block of every stage: TF Garden),
            `"average"` (D: 2×2 average pool, then 1×1),
            `"subsample"` (projection where the width changes, else every n-th pixel: keras.applications' V2),
            `"pad"`, `"pad_end"`, `"pad_average"` (option A as published by akamaster, Fixup and TF Garden: subsampling or
            average pooling, zero channels on both sides or at the end), `"none"` (a plain net).
        shortcut_norm: Whether a norm follows a projection. A pre-activation net never has one.
        groups: Number of groups of the 3×3 in a bottleneck (ResNeXt's cardinality).
        base_width: Filters per group of a bottleneck at width 64.
        stem_widths: Filters of each convolution of the stem, the first of which has the stride.
        stem_kernel: Kernel size of these convolutions.
        stem_stride: Stride of the first of them.
        stem_whitening: Whether the stem is one fixed convolution without padding or norm, whose filters whiten patches of
            training images; see `keras_resnet.whiten_stem`.
        stem_pool: `"max"` (3×3, stride 2, padded with −∞), `"max_zero"` (padded with zeros), `"conv"` (a 3×3 convolution
            with stride 2, norm and activation) or None.
        stride_in: Which convolution of a bottleneck has the stride: `"3x3"` (v1.5) or `"1x1"` (v1). The parameters are the same,
            the logits are not.
        stride_block: Which block of a stage has the stride: `"first"`, or `"last"` as in keras.applications' V2 (in all stages
            but the last one).
        first_stride: Stride of the first stage, 1 or 2; that of the others is 2.
        padding: `"symmetric"` (torch, Caffe) or `"same"` (TensorFlow: one-sided at stride 2 on even sizes).
        se_ratio: Width of squeeze-and-excitation as a share of the block's output channels; 0 for none.
        se_divisor: Number of which that width is made a multiple (8 in timm, 1 in the paper).
        norm: `"batch"` or `"group"`.
        norm_groups: Number of groups of a group norm.
        norm_scale: Whether norms have a scale γ.
        norm_epsilon: Number that is added to the variance.
        norm_momentum: Momentum of the moving statistics, as Keras defines it (0.9 is torch's 0.1).
        weight_standardization: Whether kernels are standardised per filter before use (BiT).
        conv_bias: Which convolutions have a bias: any of `"stem"`, `"inner"`, `"last"`, `"projection"`.
        activation: Any name that Keras knows.
        antialias: Whether a 3×3 binomial blur does the subsampling in branch and stem pool.
        subsampling: What subsamples in a branch: the `"stride"` of a convolution, or a 2×2 `"max_pool"` after it, which a
            plain net can have.
        initializer: What kernels start as: `"he"` (random) or `"dirac"` (the identity where the width allows it, see
            `keras_resnet.layers.Dirac`).
        gate: What holds a branch at zero in the beginning: `"zero_gamma"`, `"zero_conv"` or None.
        output_stride: Total stride of the backbone; later strides become dilations. None keeps all strides.
        drop_path: Probability with which the deepest branch is dropped in training; it grows linearly from 0 at the first.
        dropout: Dropout rate before the last convolution of a branch (Wide ResNet).
        head_dropout: Dropout rate before the classifier.
        head_pool: Pooling of the last feature map over all positions: `"average"` or `"max"`.
        head_scale: Constant factor of the features that the classifier takes, which scales the logits.
        rank: Number of spatial axes: 1, 2 or 3.
        num_classes: Number of logits.
        input_size: Pixels per side that the network was published for.
        channels: Number of channels of the input.
        growth: Blocks that `grow` adds, or None.

    Raises:
        ValueError: A value is out of range; the message names the field and what it may be.

    Source: He et al. (arXiv 1512.03385, 1603.05027). `variants.py` names the sources of the variants.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    block: str = "bottleneck"
    groups: int = 1
    base_width: int = 64
    stem_widths: tuple[int, ...] = (64,)
    stem_kernel: int = 7
    stem_stride: int = 2
    stem_whitening: bool = False
    stem_pool: str | None = "max"
    stride_in: str = "3x3"
    stride_block: str = "first"
    first_stride: int = 1
    se_ratio: float = 0.0
    se_divisor: int = 8
    output_stride: int | None = None
    drop_path: float = 0.0
    head_dropout: float = 0.0
    head_pool: str = "average"
    head_scale: float = 1.0
    num_classes: int = 1000
    input_size: int = 224
    channels: int = 3
    growth: Growth | None = None

    family = "resnet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(f"`depths` and `widths` must have one entry per stage, got {self.depths} and {self.widths}")
        for name in ("depths", "widths", "stem_widths"):
            for index, value in enumerate(getattr(self, name)):
                positive_integer(f"{name}[{index}]", value)
        for name in ("groups", "base_width", "stem_kernel", "stem_stride", "se_divisor", "norm_groups"):
            positive_integer(name, getattr(self, name))
        for name in ("drop_path", "dropout", "head_dropout"):
            probability(name, getattr(self, name))
        if not is_number(self.se_ratio) or self.se_ratio < 0:
            raise ValueError(f"`se_ratio` must be a number of at least 0, got {self.se_ratio!r}")
        if self.expansion == 1 and (self.groups, self.base_width) != (1, 64):
            got = f"groups={self.groups}, base_width={self.base_width}"
            raise ValueError(f'`groups` and `base_width` need block="bottleneck", got {got}')
        if unknown := set(self.conv_bias) - set(BIASED):
            raise ValueError(f"`conv_bias` may hold {', '.join(BIASED)}, got {', '.join(sorted(unknown))}")
        if (self.gate == "zero_conv") != (self.gate is not None and self.preact):
            allowed = '"zero_conv" (a norm follows no zero convolution)' if self.preact else '"zero_gamma"'
            kind = "pre" if self.preact else "post"
            raise ValueError(f"`gate` of a {kind}-activation net must be None or {allowed}, got {self.gate!r}")
        positive_number("head_scale", self.head_scale)
        self._check_subsampling()
        if self.gate == "zero_gamma" and not self.norm_scale:
            raise ValueError('`gate` "zero_gamma" needs norms with a scale (norm_scale=True)')
        if self.gate and self.shortcut == "none":
            raise ValueError(f"`gate` must be None in a plain net, whose output would be zero, got {self.gate!r}")
        if self.norm == "group":
            for filters in {self.inner_filters(stage) for stage in range(len(self.depths))}:
                if filters % self.norm_groups:
                    raise ValueError(f"`norm_groups` must divide the filters ({filters}), got {self.norm_groups}")
        if self.output_stride is not None:
            allowed = [self.stem_reduction * self.first_stride * 2**k for k in range(len(self.depths))]
            if self.output_stride not in allowed:
                raise ValueError(f"`output_stride` must be one of {', '.join(map(str, allowed))}, got {self.output_stride}")

    def _check_subsampling(self) -> None:
        if self.first_stride not in (1, 2) or (self.first_stride == 2 and self.stride_block == "last"):
            raise ValueError(f'`first_stride` must be 1, or 2 with stride_block="first", got {self.first_stride!r}')
        if self.subsampling == "max_pool" and (self.shortcut != "none" or self.antialias):
            raise ValueError('`subsampling` "max_pool" is for plain nets (shortcut="none") without antialias')
        if not self.stem_whitening:
            return
        most = 2 * self.channels * self.stem_kernel**self.rank
        if len(self.stem_widths) != 1 or self.stem_widths[0] % 2 or self.stem_widths[0] > most:
            raise ValueError(
                f"`stem_widths` of a whitening stem must be one even number of at most {most} (plus and minus each component "
                f"of a patch), got {self.stem_widths}"
            )
        if self.stem_stride != 1 or self.stem_pool is not None or self.preact or "stem" in self.conv_bias:
            raise ValueError("a whitening stem has stem_stride=1, stem_pool=None, no bias, and no pre-activation after it")

    @classmethod
    def cifar(cls, depth: int, *, block: str = "basic", **changes: Any) -> Self:
        """Describe the paper's network for 32×32 images: `n` blocks in each of three stages of 16, 32, 64 filters.

        Args:
            depth: Weighted layers: 6n+2 for basic blocks, 9n+2 for bottlenecks.
            block: `"basic"` or `"bottleneck"`.
            **changes: Any other field.

        Raises:
            ValueError: The depth has another form; the message names the nearest depths of that form.

        Source: arXiv 1512.03385, section 4.2; arXiv 1603.05027 for bottlenecks.
        """
        blocks = _blocks_per_stage(depth, step=9 if block == "bottleneck" else 6, extra=2)
        return cls(**{"depths": (blocks,) * 3, "widths": (16, 32, 64), "block": block, **CIFAR_STEM, **changes})

    @classmethod
    def wide(cls, depth: int, widen: int, **changes: Any) -> Self:
        """Describe a Wide ResNet for 32×32 images. Its depth is 6n+4, because projections count as layers.

        Args:
            depth: 6n+4.
            widen: Factor on the widths 16, 32, 64.
            **changes: Any other field.

        Raises:
            ValueError: The depth has another form; the message names the nearest depths of that form.

        Source: arXiv 1605.07146, table 1.
        """
        blocks = _blocks_per_stage(depth, step=6, extra=4)
        fields = {"depths": (blocks,) * 3, "widths": (16 * widen, 32 * widen, 64 * widen), "block": "basic", "preact": True}
        return cls(**{**fields, **CIFAR_STEM, **changes})

    @property
    def expansion(self) -> float:
        """Number of channels of a block's output divided by its inner width."""
        return BRANCHES[self.block].expansion

    @property
    def stem_reduction(self) -> int:
        """Stride of the stem, pool included."""
        return self.stem_stride * (1 if self.stem_pool is None else 2)

    @property
    def reduction(self) -> int:
        """Total stride of the backbone."""
        return self.output_stride or self.stem_reduction * self.first_stride * 2 ** (len(self.depths) - 1)

    @property
    def smallest_side(self) -> int:
        """Pixels per side that an input must have."""
        return self.reduction + (self.stem_kernel - 1 if self.stem_whitening else 0)

    def inner_filters(self, stage: int) -> int:
        """Filters of the 3×3 in a stage (counted from 0)."""
        if self.expansion == 1:
            return self.widths[stage]
        return int(self.widths[stage] * self.base_width / 64) * self.groups

    def squeeze_filters(self, filters: int) -> int:
        """Width of the squeeze for a block of `filters`, 0 without squeeze-and-excitation; rounds halves up, like timm."""
        if not self.se_ratio:
            return 0
        return max(self.se_divisor, int(filters * self.se_ratio + self.se_divisor / 2) // self.se_divisor * self.se_divisor)


@dataclass(frozen=True)
class VGGConfig(Config, LayerStyle):
    """A VGG network. Unlike the paper's, its head also fits small inputs, and other sizes are pooled to 7×7.

    Args:
        stages: Number of 3×3 convolutions of each stage; a 2×2 max pool closes the stage.
        widths: Filters of each stage.
        width: Per cent of `widths` and `head_widths` that are built (25: a quarter of the filters).
        batch_norm: Whether a norm comes between convolution and activation.
        norm_epsilon: Number that is added to the variance.
        norm_momentum: Momentum of the moving statistics, as Keras defines it.
        head: `"dense"` flattens `head_size`×`head_size` features (average-pooled to that size where they differ, as torchvision
            does); `"pool"` takes their global average.
        head_widths: Units of the hidden layers before the classifier.
        head_size: Side of the features that the dense head was trained on.
        head_dropout: Dropout rate after each hidden layer.
        activation: Any name that Keras knows.
        rank: Number of spatial axes: 1, 2 or 3.
        num_classes: Number of logits.
        input_size: Pixels per side that the network was published for.
        channels: Number of channels of the input.
        growth: Blocks that `grow` adds, or None.

    Source: Simonyan and Zisserman (arXiv 1409.1556), table 1.
    """

    stages: tuple[int, ...] = (2, 2, 3, 3, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    width: int = 100
    batch_norm: bool = False
    head: str = "dense"
    head_widths: tuple[int, ...] = (4096, 4096)
    head_size: int = 7
    head_dropout: float = 0.5
    num_classes: int = 1000
    input_size: int = 224
    channels: int = 3
    growth: Growth | None = None

    family = "vgg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages or len(self.stages) != len(self.widths):
            raise ValueError(f"`stages` and `widths` must have one entry per stage, got {self.stages} and {self.widths}")
        for name in ("stages", "widths", "head_widths"):
            for index, value in enumerate(getattr(self, name)):
                positive_integer(f"{name}[{index}]", value)
        for name in ("width", "head_size"):
            positive_integer(name, getattr(self, name))
        probability("head_dropout", self.head_dropout)

    @property
    def reduction(self) -> int:
        """Total stride of the backbone."""
        return 2 ** len(self.stages)

    @property
    def smallest_side(self) -> int:
        """Pixels per side that an input must have."""
        return self.reduction

    def scaled(self, filters: int) -> int:
        """`filters` at this width, at least one."""
        return max(1, math.floor(filters * self.width / 100 + 0.5))


FAMILIES = {family.family: family for family in (ResNetConfig, VGGConfig)}


def config_from_dict(data: dict[str, Any]) -> ResNetConfig | VGGConfig:
    """Read a config that `Config.to_dict` wrote, e.g. `config_from_dict(kr.card(model).config)`.

    Raises:
        ValueError: The family or a field is unknown (the file is from a newer version).
    """
    fields = dict(data)
    family = FAMILIES.get(fields.pop("family", None))
    if family is None:
        raise ValueError(f"`family` must be one of {', '.join(FAMILIES)}, got {data.get('family')!r}")
    if unknown := set(fields) - {field.name for field in dataclasses.fields(family)}:
        raise ValueError(f"{family.__name__} has no field {', '.join(sorted(unknown))}; was the file written by a newer version?")
    return family(**fields)


def differences(saved: dict, config: Config, may_differ: Collection[str] = ()) -> list[str]:
    """Compare the network that weights were trained in with the model that they are loaded into.

    Args:
        saved: Config of the file, as `Config.to_dict` writes it. Fields that it lacks have their default.
        config: Config of the model.
        may_differ: Fields that may differ in addition to those that never change the outputs.

    Returns:
        One message for each field that changes the outputs, e.g. `["shortcut='pad', the model has 'none'"]`.

    Raises:
        ValueError: `saved` is not a config; see `config_from_dict`.
    """
    return config_differences(config_from_dict(saved).to_dict(), config.to_dict(), may_differ)


def _plain(value):
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _blocks_per_stage(depth, step, extra):
    blocks, rest = divmod(depth - extra, step)
    if rest or blocks < 1:
        low = max(1, blocks)
        near = f"{low * step + extra} and {(low + 1) * step + extra}"
        raise ValueError(f"`depth` must be of the form {step}n+{extra}, got {depth}; the nearest are {near}")
    return blocks
