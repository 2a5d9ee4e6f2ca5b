"""Blocks for any rank and layout: convolution, norm, activation and pooling are bound once, in a `LayerKit`."""

from dataclasses import dataclass

from keras import layers

from ..layers import ChannelPad, DropPath, ResidualAdd
from .branches import BRANCHES, BlockPlan
from .kit import LayerKit


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


def apply_block(x, plan, style=None, kit=None):
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
    style, kit = style or BlockStyle(), kit or LayerKit()
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
