"""Residual branches as data: one table, from which the zoo and growth build the same branches.

A row of `BRANCHES` lists the convolutions of a branch. Everything else follows from choices that are the same for all rows: the
activation order puts norms and activations between them (`in_order`), the architecture decides widths and strides
(`plan_convolutions`), and a gate holds the branch at zero (`gates.BlockSpec`). `kit.branch_layers` turns the resulting steps into
Keras layers.

To add a kind of block, add a row. `ResNetConfig(block=…)`, `residual(block=…)` and `grow(block=…)` then know its name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Conv:
    """A convolution in a row of `BRANCHES`.

    Attributes:
        kernel: Size of the kernel along each spatial axis. On vectors `[batch, features]` the convolution is a dense layer.
        inner: Whether it has the inner width of the branch; otherwise it has the width of the block's output.
        is_depthwise: Whether each channel is convolved by itself, so that the number of channels stays what it is.
    """

    kernel: int
    inner: bool = False
    is_depthwise: bool = False


@dataclass(frozen=True)
class Branch:
    """A row of `BRANCHES`.

    Attributes:
        convs: The convolutions, in order.
        expansion: Width of the block's output divided by the inner width.
    """

    convs: tuple[Conv, ...]
    expansion: float = 1


BRANCHES = {
    # arXiv 1512.03385, figure 5
    "basic": Branch((Conv(3, inner=True), Conv(3))),
    "bottleneck": Branch((Conv(1, inner=True), Conv(3, inner=True), Conv(1)), expansion=4),
    # arXiv 1704.04861, section 3.1
    "depthwise": Branch((Conv(3, is_depthwise=True), Conv(1))),
}


# ---------------------------------------------------------------- steps, of which branches are made


@dataclass(frozen=True)
class ConvPlan:
    """A convolution whose sizes are known.

    Attributes:
        filters: Number of channels of its output.
        kernel: Size of the kernel along each spatial axis.
        stride: Stride along each spatial axis.
        dilation: Dilation along each spatial axis.
        groups: Number of groups; for a depthwise convolution the number of its channels.
        bias: Whether it has a bias.
        is_depthwise: Whether it is a depthwise convolution.
        initializer: Initializer of the kernel; None is `kit.conv_initializer`.
    """

    filters: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = False
    is_depthwise: bool = False
    initializer: object = None


@dataclass(frozen=True)
class Norm:
    """A norm; with `zero` its scale γ starts at 0."""

    zero: bool = False


@dataclass(frozen=True)
class Act:
    """The activation of the network. `label` is a part of the layer's name."""

    label: str = "act"


@dataclass(frozen=True)
class Shift:
    """A learned scalar that is added, as in Fixup."""


@dataclass(frozen=True)
class Scale:
    """A learned factor, and perhaps a shift, at the end of a branch; the fields are arguments of `layers.Affine`."""

    scale: str
    initial: float
    shift: bool = False


@dataclass(frozen=True)
class Dropout:
    """Dropout with this probability."""

    rate: float


@dataclass(frozen=True)
class Blur:
    """Blur and subsample by 2."""


@dataclass(frozen=True)
class MaxPool:
    """Take the largest of 2×2 values; a last odd row or column is dropped."""


Step = ConvPlan | Norm | Act | Shift | Scale | Dropout | Blur | MaxPool
Convolution = TypeVar("Convolution")


def in_order(convs: Iterable[Convolution], preact: bool) -> list[Convolution | Norm | Act]:
    """Put norms and activations between convolutions.

    Args:
        convs: The convolutions of a branch.
        preact: Whether norm and activation come before each convolution. Otherwise they come after it, except that the
            last activation belongs after the addition.
    """
    if preact:
        return [step for conv in convs for step in (Norm(), Act(), conv)]
    return [step for conv in convs for step in (conv, Norm(), Act())][:-1]


def plan_convolutions(
    branch: Branch,
    channels: int,
    inner: int,
    filters: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    entry_dilation: int = 1,
    groups: int = 1,
    bias: Sequence[str] = (),
    stride_in: str = "3x3",
) -> tuple[ConvPlan, ...]:
    """Decide the sizes of the convolutions of a branch.

    Args:
        branch: Row of `BRANCHES`.
        channels: Number of channels of the input.
        inner: Inner width.
        filters: Number of channels of the output.
        stride: Stride of the block.
        dilation: Dilation of the stage.
        entry_dilation: Dilation of the first spatial convolution, which a dilated stage takes over from the stage before it.
        groups: Number of groups of the first spatial convolution.
        bias: Which convolutions have a bias, see `ResNetConfig.conv_bias`.
        stride_in: Which convolution has the stride: `"3x3"` is the first spatial one (v1.5), `"1x1"` the first of all (v1).

    Raises:
        ValueError: `groups` does not divide the channels of the convolution.
    """
    first_spatial = next((index for index, conv in enumerate(branch.convs) if conv.kernel > 1), 0)
    strided = first_spatial if stride_in == "3x3" else 0
    plans = []
    for index, conv in enumerate(branch.convs):
        width = channels if conv.is_depthwise else inner if conv.inner else filters
        own_groups = channels if conv.is_depthwise else groups if index == first_spatial else 1
        for what, count in (("filters", width), ("channels", channels)):
            if count % own_groups:
                raise ValueError(f"`groups` must divide the {what} ({count}), got {own_groups}")
        plans.append(
            ConvPlan(
                filters=width,
                kernel=conv.kernel,
                stride=stride if index == strided else 1,
                dilation=1 if conv.kernel == 1 else entry_dilation if index == first_spatial else dilation,
                groups=own_groups,
                bias=("last" if index == len(branch.convs) - 1 else "inner") in bias,
                is_depthwise=conv.is_depthwise,
            )
        )
        channels = width
    return tuple(plans)


@dataclass(frozen=True)
class BlockPlan:
    """A block of an architecture: its branch, and what its shortcut has to bridge.

    Attributes:
        name: Prefix of its layers' names.
        stage: Number of its stage, from 1.
        opens_stage: Whether it is the first block of the stage.
        closes_stage: Whether it is the last block of the stage.
        in_filters: Number of channels of the input.
        convs: The convolutions of the branch.
        stride: Stride of the whole block.
        dilation: Dilation of the stage.
        squeeze: Width of squeeze-and-excitation, 0 for none.
        drop_path: Probability with which the branch is dropped in training.
    """

    name: str
    stage: int
    opens_stage: bool
    closes_stage: bool
    in_filters: int
    convs: tuple[ConvPlan, ...]
    stride: int = 1
    dilation: int = 1
    squeeze: int = 0
    drop_path: float = 0.0

    @property
    def filters(self) -> int:
        """Number of channels of the output."""
        return self.convs[-1].filters

    @property
    def changes_shape(self) -> bool:
        """Whether the shortcut cannot be the identity."""
        return self.stride > 1 or self.in_filters != self.filters

    def projects(self, shortcut: str) -> bool:
        """Return whether a shortcut of this kind (`ResNetConfig.shortcut`) is a 1×1 convolution here."""
        if shortcut == "projection_all" or (shortcut == "projection_first" and self.opens_stage):
            return True
        if shortcut == "subsample":
            return self.in_filters != self.filters
        return self.changes_shape and shortcut in ("projection", "projection_first", "average")
