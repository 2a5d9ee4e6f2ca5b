"""The walk over stages and blocks, done once: the builder and the parameter arithmetic both read these plans."""

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


def block_plans(config):
    """All blocks of a `ResNetConfig` in order, strides already turned into dilations where `output_stride` asks for it.

    Source: drop-path's linear rule, arXiv 1603.09382, section 3.
    """
    branch = BRANCHES[config.block]
    filters, reduction, dilation, count, total = config.stem_widths[-1], config.stem_reduction, 1, 0, sum(config.depths)
    for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        for index in range(depth):
            stride, entry_dilation = _stage_stride(config, stage, index), dilation
            if stride > 1 and reduction >= config.reduction:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            out = width * config.expansion
            yield BlockPlan(
                name=f"stage{stage + 1}_block{index + 1}",
                stage=stage + 1,
                opens_stage=index == 0,
                closes_stage=index == depth - 1,
                in_filters=filters,
                convs=branch(
                    config.inner_filters(stage),
                    out,
                    stride=stride,
                    dilation=dilation,
                    entry_dilation=entry_dilation,
                    groups=config.groups,
                    bias=config.conv_bias,
                    stride_in=config.stride_in,
                ),
                stride=stride,
                dilation=dilation,
                squeeze=config.squeeze_filters(out),
                drop_path=config.drop_path * count / max(1, total - 1),
            )
            filters, count = out, count + 1


def _stage_stride(config, stage, index):
    if config.stride_block == "first":
        return 2 if stage > 0 and index == 0 else 1
    return 2 if stage < len(config.depths) - 1 and index == config.depths[stage] - 1 else 1
