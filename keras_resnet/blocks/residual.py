"""The residual blocks of architectures: branch, shortcut and what closes them, for any rank and data format."""

import dataclasses
from typing import Any

import keras

from ..checks import nearest
from ..layers import ChannelPad, DropPath, ResidualAdd
from .branches import BRANCHES, BlockPlan, Blur, ConvPlan, Dropout, MaxPool, Norm, Step, in_order, plan_convolutions
from .kit import LayerKit, apply, branch_layers
from .style import BlockStyle


def apply_block(x: keras.KerasTensor, plan: BlockPlan, kit: LayerKit) -> keras.KerasTensor:
    """Apply a block: `act(shortcut + branch)`, or `shortcut + branch` with pre-activation.

    The projection of a pre-activation block reads the normed, activated tensor in every block that projects. The paper's text
    does so in the first block only, its code and all that follow it in every one.

    Args:
        x: Feature map.
        plan: The block's sizes.
        kit: Makes the layers; its style must be a `BlockStyle`, such as a `ResNetConfig`.

    Returns:
        Feature map with `plan.filters` channels.

    Source: arXiv 1512.03385, figures 2 and 5; arXiv 1603.05027, figure 1.
    """
    style, name = _block_style(kit), plan.name
    branch = branch_layers(branch_steps(plan, style), plan.in_filters, kit, name)
    shared = 2 if style.preact else 0  # The first norm and activation serve a projection too.
    entry = apply(branch[:shared], x)
    skip = None if style.shortcut == "none" else _shortcut(x, entry, plan, kit)
    y = apply(branch[shared:], entry)
    if plan.squeeze:
        y = kit.squeeze_excite(y, plan.squeeze, name=name)
    if skip is not None:
        if plan.drop_path:
            y = DropPath(plan.drop_path, dtype=kit.dtype, name=f"{name}_drop_path")(y)
        kind = "preact" if style.preact else "postact"
        y = ResidualAdd(name, style.gate, kind, dtype=kit.dtype, name=f"{name}_add")([skip, y])
    return y if style.preact else kit.act(y, name=f"{name}_out")


def _block_style(kit: LayerKit) -> BlockStyle:
    """The style of a kit that makes residual blocks."""
    if not isinstance(kit.style, BlockStyle):
        raise TypeError(f"the style of `kit` must be a BlockStyle or a ResNetConfig, got {type(kit.style).__name__}")
    return kit.style


def branch_steps(plan: BlockPlan, style: BlockStyle) -> list[Step]:
    """Return the steps of a block's branch: its convolutions in order, with gate, dropout and blur as the style says."""
    steps: list[Step] = []
    last, is_blur_due = plan.convs[-1], False
    for step in in_order(plan.convs, style.preact):
        if isinstance(step, ConvPlan):
            if is_blur_due:
                steps.append(Blur())
            is_last = step is last
            if is_last and style.dropout:
                steps.append(Dropout(style.dropout))
            if is_last and style.gate == "zero_conv":
                step = dataclasses.replace(step, initializer="zeros")
            if is_blur_due := style.antialias and step.stride > 1:
                step = dataclasses.replace(step, stride=1)
            elif style.subsampling == "max_pool" and step.stride > 1:
                steps += [dataclasses.replace(step, stride=1), MaxPool()]
                continue
        steps.append(step)
    if style.gate == "zero_gamma":
        steps[-1] = Norm(zero=True)
    return [*steps, Blur()] if is_blur_due else steps


def _shortcut(x: keras.KerasTensor, entry: keras.KerasTensor, plan: BlockPlan, kit: LayerKit) -> keras.KerasTensor:
    """What the branch is added to; see `ResNetConfig.shortcut`."""
    style, name, stride = _block_style(kit), f"{plan.name}_shortcut", plan.stride
    kind = style.shortcut
    if not plan.projects(kind):
        if kind.startswith("pad") and plan.changes_shape:
            return _padded(x, plan, kit, name)
        return kit.pool("Max", x, 1, stride, name=f"{name}_pool") if stride > 1 else x
    if kind == "average":
        if stride > 1:
            entry = kit.pool("Average", entry, 2, stride, name=f"{name}_pool")
        elif plan.dilation > 1:
            entry = kit.dense_average(entry, name=f"{name}_pool")
        stride = 1
    entry = kit.conv(entry, plan.filters, 1, stride=stride, bias="projection" in style.conv_bias, name=f"{name}_conv")
    return kit.norm(entry, name=f"{name}_norm") if style.shortcut_norm and not style.preact else entry


def _padded(x: keras.KerasTensor, plan: BlockPlan, kit: LayerKit, name: str) -> keras.KerasTensor:
    """Option A: fewer pixels, and zeros as the new channels."""
    kind = _block_style(kit).shortcut
    if plan.stride > 1:
        pooling, size = ("Average", plan.stride) if kind == "pad_average" else ("Max", 1)
        x = kit.pool(pooling, x, size, plan.stride, name=f"{name}_pool")
    position = "end" if kind == "pad_end" else "both"
    return ChannelPad(plan.filters, position, data_format=kit.layout, dtype=kit.dtype, name=f"{name}_pad")(x)


def residual(
    x: keras.KerasTensor,
    filters: int,
    *,
    name: str,
    block: str = "basic",
    inner: int | None = None,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    squeeze: int = 0,
    drop_path: float = 0.0,
    style: BlockStyle | None = None,
    kit: LayerKit | None = None,
) -> keras.KerasTensor:
    """Apply a residual block to any feature map. The defaults are the paper's basic block.

    Args:
        x: Feature map.
        filters: Number of channels of the output.
        name: Prefix of the layers' names; must be new to the model.
        block: A key of `BRANCHES`: `"basic"` (default), `"bottleneck"` or `"depthwise"`.
        inner: Inner width of the branch. Default: `filters`, for a bottleneck a quarter of it.
        stride: Stride of the block.
        dilation: Dilation of its spatial convolutions.
        groups: Number of groups of its first spatial convolution; must divide `inner`.
        squeeze: Width of squeeze-and-excitation, 0 (default) for none.
        drop_path: Probability with which the branch is dropped in training.
        style: What the layers have in common. Default: post-activation, option B, batch norm and ReLU.
        kit: Data format and dtype of the layers, and their style if `style` is not given.

    Returns:
        Feature map with `filters` channels.

    Raises:
        ValueError: The block is unknown, groups do not divide, or the gate does not suit the style.

    Source: arXiv 1512.03385, figures 2 and 5.
    """
    if block not in BRANCHES:
        raise ValueError(f"unknown `block` {block!r}{nearest(block, BRANCHES)}")
    kit = kit or LayerKit()
    kit = kit if style is None else dataclasses.replace(kit, style=style)
    style = _block_style(kit)
    if style.gate and style.gate != ("zero_conv" if style.preact else "zero_gamma"):
        raise ValueError(f"`gate` {style.gate!r} does not suit a {'pre' if style.preact else 'post'}-activation block")
    branch, channels = BRANCHES[block], x.shape[kit.axis]
    convs = plan_convolutions(
        branch,
        channels,
        inner or int(filters / branch.expansion),
        filters,
        stride=stride,
        dilation=dilation,
        entry_dilation=dilation,
        groups=groups,
        bias=style.conv_bias,
    )
    return apply_block(x, BlockPlan(name, 1, True, False, channels, convs, stride, dilation, squeeze, drop_path), kit)


def basic(x: keras.KerasTensor, filters: int, *, name: str, **options: Any) -> keras.KerasTensor:
    """Apply two 3×3 convolutions (arXiv 1512.03385, figure 5, left). Options as in `residual`."""
    return residual(x, filters, block="basic", name=name, **options)


def bottleneck(x: keras.KerasTensor, filters: int, *, name: str, **options: Any) -> keras.KerasTensor:
    """Apply 1×1, 3×3 (with the stride: v1.5), 1×1 (arXiv 1512.03385, figure 5, right). Options as in `residual`."""
    return residual(x, filters, block="bottleneck", name=name, **options)


def preactivation(x: keras.KerasTensor, filters: int, *, name: str, **options: Any) -> keras.KerasTensor:
    """Apply a block with norm and activation before each convolution, and nothing after the addition.

    Options as in `residual`, except `style`. Source: arXiv 1603.05027, figure 4e.
    """
    return residual(x, filters, style=BlockStyle(preact=True), name=name, **options)


def plain(x: keras.KerasTensor, filters: int, *, name: str, **options: Any) -> keras.KerasTensor:
    """Apply the basic block without its shortcut: the paper's plain net. Options as in `residual`, except `style`."""
    return residual(x, filters, style=BlockStyle(shortcut="none"), name=name, **options)
