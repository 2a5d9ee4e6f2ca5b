"""The walk over stages and blocks of a `ResNetConfig`: the builder and the parameter arithmetic both read these plans."""

from collections.abc import Iterator

from ..blocks.branches import BRANCHES, BlockPlan, plan_convolutions
from .config import ResNetConfig


def block_plans(config: ResNetConfig) -> Iterator[BlockPlan]:
    """Yield all blocks of a `ResNetConfig` in order, strides already turned into dilations where `output_stride` asks for it.

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
            out = int(width * config.expansion)
            yield BlockPlan(
                name=f"stage{stage + 1}_block{index + 1}",
                stage=stage + 1,
                opens_stage=index == 0,
                closes_stage=index == depth - 1,
                in_filters=filters,
                convs=plan_convolutions(
                    branch,
                    filters,
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
        return 1 if index > 0 else config.first_stride if stage == 0 else 2
    return 2 if stage < len(config.depths) - 1 and index == config.depths[stage] - 1 else 1
