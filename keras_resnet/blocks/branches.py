"""Residual branches as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvPlan:
    """One convolution of a branch. `filters`, `kernel` (side), `stride`, `dilation`, `groups`, `bias` as in Keras."""

    filters: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = False


@dataclass(frozen=True)
class BlockPlan:
    """One block: its branch, and what its shortcut has to bridge.

    Args:
        name: prefix of its layers' names.
        stage: counted from 1.
        opens_stage: whether it is the stage's first.
        closes_stage: whether it is the stage's last.
        in_filters: channels that come in.
        convs: the branch.
        stride: of the block as a whole.
        dilation: of the stage.
        squeeze: width of the squeeze, 0 for none.
        drop_path: probability to drop the branch.
    """

    name: str
    stage: int
    opens_stage: bool
    closes_stage: bool
    in_filters: int
    convs: tuple
    stride: int = 1
    dilation: int = 1
    squeeze: int = 0
    drop_path: float = 0.0

    @property
    def filters(self):
        """Channels that go out."""
        return self.convs[-1].filters

    @property
    def changes_shape(self):
        """Whether the shortcut cannot be the identity."""
        return self.stride > 1 or self.in_filters != self.filters

    def projects(self, shortcut):
        """Whether a shortcut of this kind (`ResNetConfig.shortcut`) is a 1×1 convolution here."""
        if shortcut == "projection_all" or (shortcut == "projection_first" and self.opens_stage):
            return True
        if shortcut == "subsample":
            return self.in_filters != self.filters
        return self.changes_shape and shortcut in ("projection", "projection_first", "average")


def basic_convs(inner, filters, *, stride=1, dilation=1, entry_dilation=1, groups=1, bias=(), stride_in="3x3"):
    """Two 3×3 convolutions; `stride_in` has no meaning here. `bias` as in `ResNetConfig.conv_bias`."""
    return (
        ConvPlan(inner, 3, stride, entry_dilation, groups, "inner" in bias),
        ConvPlan(filters, 3, 1, dilation, groups, "last" in bias),
    )


def bottleneck_convs(inner, filters, *, stride=1, dilation=1, entry_dilation=1, groups=1, bias=(), stride_in="3x3"):
    """1×1, 3×3, 1×1. A dilated stage's first 3×3 keeps the dilation before it, `entry_dilation`."""
    first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
    return (
        ConvPlan(inner, 1, first, bias="inner" in bias),
        ConvPlan(inner, 3, second, entry_dilation, groups, "inner" in bias),
        ConvPlan(filters, 1, bias="last" in bias),
    )


BRANCHES = {"basic": basic_convs, "bottleneck": bottleneck_convs}
