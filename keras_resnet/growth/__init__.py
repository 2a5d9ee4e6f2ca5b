"""Growing trained models by residual blocks that start as the identity; measuring and undoing it."""

from ..blocks.finding import find_blocks
from ..blocks.gates import GATES, KINDS, BlockSpec
from ..blocks.identity import ResidualBlock, append_block, residual_stack
from .depth import DepthCurve, DepthPoint, depth_curve
from .drift import BlockDrift, DriftReport, drift
from .onednn import check_backward
from .prune import PruneReport, prune, without_blocks
from .report import IdentityReport, identity_report
from .scale import block_scales
from .scores import GrowthScores, PointScore, growth_scores
from .stochastic import with_drop_path
from .surgery import copy_model, grow

__all__ = [
    "GATES", "KINDS", "BlockDrift", "BlockSpec", "DepthCurve", "DepthPoint", "DriftReport", "GrowthScores", "IdentityReport",
    "PointScore", "PruneReport", "ResidualBlock", "append_block", "block_scales", "check_backward", "copy_model", "depth_curve",
    "drift", "find_blocks", "grow", "growth_scores", "identity_report", "prune", "residual_stack",
    "with_drop_path", "without_blocks",
]  # fmt: skip
