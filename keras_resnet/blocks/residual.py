"""Blocks for any rank and layout: convolution, norm, activation and pooling are bound once, in a `LayerKit`."""

from dataclasses import dataclass
from functools import cached_property

import keras
from keras import layers

from .layers import BlurPool, ChannelPad, DropPath, GroupNormalization, InfinityPad, ResidualAdd, standardized_conv
from .plan import BRANCHES, BlockPlan


def conv_initializer():
    """He's normal by outgoing connections: it keeps the variance of the gradient; torchvision, timm and the paper use it.

    A new one for each layer, since one initializer draws the same numbers every time.
    """
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal")


@dataclass(frozen=True)
class LayerKit:
    """The layers of one model, with everything bound that its blocks have in common.

    Args:
        rank: spatial axes: 1, 2 or 3.
        data_format: `"channels_last"` or `"channels_first"`; None is Keras' setting.
        dtype: dtype or policy of all layers; None is Keras' setting.
        padding: `"symmetric"` or `"same"`, see `ResNetConfig`.
        norm: `"batch"` or `"group"`.
        norm_groups: of a group norm.
        norm_epsilon: added to the variance.
        norm_momentum: of moving statistics, Keras style.
        activation: any name Keras knows.
        weight_standardization: standardise convolution kernels per filter.
    """

    rank: int = 2
    data_format: str | None = None
    dtype: str | None = None
    padding: str = "symmetric"
    norm_kind: str = "batch"
    norm_groups: int = 32
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    activation: str = "relu"
    weight_standardization: bool = False

    @classmethod
    def of(cls, config, data_format=None, dtype=None):
        """The kit of a `ResNetConfig`."""
        return cls(
            rank=config.rank,
            data_format=data_format,
            dtype=dtype,
            padding=config.padding,
            norm_kind=config.norm,
            norm_groups=config.norm_groups,
            norm_epsilon=config.norm_epsilon,
            norm_momentum=config.norm_momentum,
            activation=config.activation,
            weight_standardization=config.weight_standardization,
        )

    @cached_property
    def layout(self):
        """The data format in force."""
        return self.data_format or keras.config.image_data_format()

    @property
    def axis(self):
        """The channel axis."""
        return -1 if self.layout == "channels_last" else 1

    def ranked(self, name):
        """The Keras layer of this rank, e.g. `ranked("Conv")` is `Conv2D`."""
        return getattr(layers, f"{name}{self.rank}D")

    def conv(self, x, filters, kernel, *, stride=1, dilation=1, groups=1, bias=False, zero=False, activation=None, name):
        """A convolution; at stride 2 padded like torch (one zero on either side), where Keras pads one side only.

        Raises:
            ValueError: `groups` does not divide the filters or the channels.
        """
        for what, count in (("filters", filters), ("channels", x.shape[self.axis])):
            if count % groups:
                raise ValueError(f"`groups` must divide the {what} ({count}), got {groups}")
        symmetric = self.padding == "symmetric" and stride > 1 and kernel > 1
        if symmetric:
            x = self.ranked("ZeroPadding")(kernel // 2, data_format=self.layout, dtype=self.dtype, name=f"{name}_pad")(x)
        layer = standardized_conv(self.rank) if self.weight_standardization else self.ranked("Conv")
        return layer(
            filters,
            kernel,
            strides=stride,
            dilation_rate=dilation,
            groups=groups,
            padding="valid" if symmetric else "same",
            use_bias=bias,
            activation=activation,
            kernel_initializer="zeros" if zero else conv_initializer(),
            data_format=self.layout,
            dtype=self.dtype,
            name=name,
        )(x)

    def norm(self, x, *, zero=False, name):
        """A batch or group norm; `zero` starts its scale at 0.

        Raises:
            ValueError: the groups of a group norm do not divide the channels.
        """
        gamma = "zeros" if zero else "ones"
        common = {"axis": self.axis, "epsilon": self.norm_epsilon, "gamma_initializer": gamma, "dtype": self.dtype, "name": name}
        if self.norm_kind == "batch":
            return layers.BatchNormalization(momentum=self.norm_momentum, **common)(x)
        if x.shape[self.axis] % self.norm_groups:
            raise ValueError(f"`norm_groups` must divide the channels ({x.shape[self.axis]}), got {self.norm_groups}")
        return GroupNormalization(groups=self.norm_groups, **common)(x)

    def act(self, x, *, name):
        """The activation."""
        return layers.Activation(self.activation, dtype=self.dtype, name=name)(x)

    def norm_act(self, x, suffix, *, name):
        """Norm and activation, named `{name}_norm{suffix}` and `{name}_act{suffix}`."""
        return self.act(self.norm(x, name=f"{name}_norm{suffix}"), name=f"{name}_act{suffix}")

    def pool(self, kind, x, size, stride, *, padding="same", name):
        """`"Max"` or `"Average"` pooling; the average leaves padded places out of the count, as torch's `ceil_mode` does."""
        pooling = self.ranked(f"{kind}Pooling")
        return pooling(size, stride, padding, data_format=self.layout, dtype=self.dtype, name=name)(x)

    def dense_average(self, x, *, name):
        """2×2 average at stride 1: zeros at the far side count, as in timm's dilated D shortcuts, where Keras leaves them out."""
        far = (0, 1) if self.rank == 1 else ((0, 1),) * self.rank
        x = self.ranked("ZeroPadding")(far, data_format=self.layout, dtype=self.dtype, name=f"{name}_pad")(x)
        return self.pool("Average", x, 2, 1, padding="valid", name=name)

    def blur(self, x, *, name):
        """Blur and subsample by 2."""
        return BlurPool(data_format=self.layout, dtype=self.dtype, name=name)(x)

    def max_pool(self, x, *, zeros=False, antialias=False, name):
        """The stem's 3×3 max pool at stride 2, padded on both sides, where Keras' `same` pads one side on even sizes.

        Args:
            zeros: pad with zeros and not with −∞. Where all values are ≥ 0 the two agree, and zeros are cheaper to export.
            antialias: pool at stride 1, then blur.
        """
        if antialias:
            return self.blur(self.pool("Max", x, 3, 1, name=name), name=f"{name}_blur")
        common = {"data_format": self.layout, "dtype": self.dtype, "name": f"{name}_pad"}
        x = self.ranked("ZeroPadding")(1, **common)(x) if zeros else InfinityPad(**common)(x)
        return self.pool("Max", x, 3, 2, padding="valid", name=name)

    def global_pool(self, kind, x, *, keepdims=False, name):
        """`"Average"` or `"Max"` over all positions."""
        pooling = self.ranked(f"Global{kind}Pooling")
        return pooling(data_format=self.layout, keepdims=keepdims, dtype=self.dtype, name=name)(x)

    def squeeze_excite(self, x, squeeze, *, name):
        """Channels weighted by what the whole map holds (arXiv 1709.01507, section 3)."""
        gate = self.global_pool("Average", x, keepdims=True, name=f"{name}_se_pool")
        plain = LayerKit(self.rank, self.layout, self.dtype)
        gate = plain.conv(gate, squeeze, 1, bias=True, name=f"{name}_se_fc1")
        gate = layers.Activation("relu", dtype=self.dtype, name=f"{name}_se_act")(gate)
        gate = plain.conv(gate, x.shape[self.axis], 1, bias=True, name=f"{name}_se_fc2")
        gate = layers.Activation("sigmoid", dtype=self.dtype, name=f"{name}_se_gate")(gate)
        return layers.Multiply(dtype=self.dtype, name=f"{name}_se_scale")([x, gate])


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of one network share beside their layers; the fields are those of `ResNetConfig`."""

    preact: bool = False
    shortcut: str = "projection"
    shortcut_norm: bool = True
    projection_bias: bool = False
    antialias: bool = False
    gate: str | None = None
    dropout: float = 0.0

    @classmethod
    def of(cls, config):
        """The style of a `ResNetConfig`."""
        return cls(
            config.preact,
            config.shortcut,
            config.shortcut_norm,
            "projection" in config.conv_bias,
            config.antialias,
            config.gate,
            config.dropout,
        )


def apply_block(x, plan, style=BlockStyle(), kit=LayerKit()):
    """One block as its `BlockPlan` says: `act(shortcut + branch)`, or `shortcut + branch` with pre-activation.

    The projection of a pre-activation block reads the normed, activated tensor in every projecting block; the paper's text
    does so in the first block only, its code and all descendants in every one.

    Args:
        x: feature map.
        plan: `BlockPlan`.
        style: `BlockStyle`.
        kit: `LayerKit`.

    Returns:
        Feature map with `plan.filters` channels.

    Source: arXiv 1512.03385, figures 2 and 5; arXiv 1603.05027, figure 1.
    """
    entry = kit.norm_act(x, 1, name=plan.name) if style.preact else x
    skip = None if style.shortcut == "none" else _shortcut(x, entry, plan, style, kit)
    branch = _branch(entry, plan, style, kit)
    if plan.squeeze:
        branch = kit.squeeze_excite(branch, plan.squeeze, name=plan.name)
    if skip is not None:
        if plan.drop_path:
            branch = DropPath(plan.drop_path, dtype=kit.dtype, name=f"{plan.name}_drop_path")(branch)
        kind = "preact" if style.preact else "postact"
        branch = ResidualAdd(plan.name, style.gate, kind, dtype=kit.dtype, name=f"{plan.name}_add")([skip, branch])
    return branch if style.preact else kit.act(branch, name=f"{plan.name}_out")


def _branch(x, plan, style, kit):
    """The convolutions, with norm and activation between them (and a norm behind the last, without pre-activation)."""
    last = len(plan.convs)
    for number, conv in enumerate(plan.convs, start=1):
        if number == last and style.dropout:
            x = layers.Dropout(style.dropout, dtype=kit.dtype, name=f"{plan.name}_dropout")(x)
        blurred = style.antialias and conv.stride > 1
        x = kit.conv(
            x,
            conv.filters,
            conv.kernel,
            stride=1 if blurred else conv.stride,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias,
            zero=number == last and style.gate == "zero_conv",
            name=f"{plan.name}_conv{number}",
        )
        if number < last:
            x = kit.norm_act(x, number + style.preact, name=plan.name)
        elif not style.preact:
            x = kit.norm(x, zero=style.gate == "zero_gamma", name=f"{plan.name}_norm{number}")
        if blurred:
            x = kit.blur(x, name=f"{plan.name}_blur")
    return x


def _shortcut(x, entry, plan, style, kit):
    """What stands beside the branch; see `ResNetConfig.shortcut`."""
    name, kind, stride = f"{plan.name}_shortcut", style.shortcut, plan.stride
    if not plan.projects(kind):
        if kind.startswith("pad") and plan.changes_shape:
            return _padded(x, plan, kind, kit, name)
        return kit.pool("Max", x, 1, stride, name=f"{name}_pool") if stride > 1 else x
    if kind == "average":
        if stride > 1:
            entry = kit.pool("Average", entry, 2, stride, name=f"{name}_pool")
        elif plan.dilation > 1:
            entry = kit.dense_average(entry, name=f"{name}_pool")
        stride = 1
    entry = kit.conv(entry, plan.filters, 1, stride=stride, bias=style.projection_bias, name=f"{name}_conv")
    return kit.norm(entry, name=f"{name}_norm") if style.shortcut_norm and not style.preact else entry


def _padded(x, plan, kind, kit, name):
    """Option A: fewer pixels, and zeros as the new channels."""
    if plan.stride > 1:
        pooling, size = ("Average", plan.stride) if kind == "pad_average" else ("Max", 1)
        x = kit.pool(pooling, x, size, plan.stride, name=f"{name}_pool")
    position = "end" if kind == "pad_end" else "both"
    return ChannelPad(plan.filters, position, data_format=kit.layout, dtype=kit.dtype, name=f"{name}_pad")(x)


def residual(
    x, filters, *, name, block="basic", inner=None, stride=1, dilation=1, groups=1, squeeze=0, drop_path=0.0, style=None, kit=None
):
    """A residual block on any feature map; differs from the paper by nothing at the defaults.

    Args:
        x: feature map.
        filters: channels that go out.
        name: prefix of the layers' names; must be new to the model.
        block: `"basic"` or `"bottleneck"`.
        inner: filters of the 3×3; None is `filters`, for a bottleneck a quarter of it.
        stride: of the block.
        dilation: of its 3×3.
        groups: of its 3×3; must divide `inner`.
        squeeze: width of squeeze-and-excitation, 0 for none.
        drop_path: probability to drop the branch in training.
        style: `BlockStyle`; None is a post-activation block with option B.
        kit: `LayerKit`; None has batch norm and ReLU.

    Returns:
        Feature map of `filters` channels.

    Raises:
        ValueError: a bad block name, groups that do not divide, a gate that does not suit the style.

    Source: arXiv 1512.03385, figures 2 and 5.
    """
    if block not in BRANCHES:
        raise ValueError(f"`block` must be one of {', '.join(map(repr, BRANCHES))}, got {block!r}")
    style, kit = style or BlockStyle(), kit or LayerKit()
    if style.gate and style.gate != ("zero_conv" if style.preact else "zero_gamma"):
        raise ValueError(f"`gate` {style.gate!r} does not suit a {'pre' if style.preact else 'post'}-activation block")
    inner = inner or (filters // 4 if block == "bottleneck" else filters)
    convs = BRANCHES[block](inner, filters, stride=stride, dilation=dilation, entry_dilation=dilation, groups=groups)
    plan = BlockPlan(name, 1, True, False, x.shape[kit.axis], convs, stride, dilation, squeeze, drop_path)
    return apply_block(x, plan, style, kit)


def basic(x, filters, *, name, **options):
    """Two 3×3 convolutions, post-activation (arXiv 1512.03385, figure 5 left). Options as in `residual`."""
    return residual(x, filters, block="basic", name=name, **options)


def bottleneck(x, filters, *, name, **options):
    """1×1, 3×3 with the stride (v1.5), 1×1, post-activation (arXiv 1512.03385, figure 5 right). Options as in `residual`."""
    return residual(x, filters, block="bottleneck", name=name, **options)


def preactivation(x, filters, *, name, **options):
    """Norm and activation first, nothing behind the sum (arXiv 1603.05027, figure 4e). Options as in `residual`, less `style`."""
    return residual(x, filters, style=BlockStyle(preact=True), name=name, **options)


def plain(x, filters, *, name, **options):
    """The basic block's layers without its shortcut: the paper's plain net. Options as in `residual`, less `style`."""
    return residual(x, filters, style=BlockStyle(shortcut="none"), name=name, **options)
