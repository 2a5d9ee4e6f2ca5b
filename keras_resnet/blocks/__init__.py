"""Residual branches, described once as data, and the blocks made of them: for architectures (`residual`), and for growth, where
they start as the identity (`ResidualBlock`)."""

from .branches import BRANCHES, BlockPlan, Branch, Conv, ConvPlan
from .finding import Block, find_blocks
from .gates import GATES, KINDS, BlockSpec
from .identity import ResidualBlock, append_block, residual_stack
from .kit import LayerKit, conv_initializer
from .residual import apply_block, basic, bottleneck, plain, preactivation, residual
from .style import BlockStyle, LayerStyle
