"""Growing trained models by residual blocks that start as the identity; measuring and undoing it."""

from .blocks import ResidualBlock, append_block, find_blocks, residual_stack
from .drift import BlockDrift, DriftReport, drift
from .gates import GATES, KINDS, BlockSpec
from .prune import PruneReport, prune
from .report import IdentityReport, identity_report
from .surgery import copy_model, grow

__all__ = [
    "GATES", "KINDS", "BlockDrift", "BlockSpec", "DriftReport", "IdentityReport", "PruneReport", "ResidualBlock",
    "append_block", "copy_model", "drift", "find_blocks", "grow", "identity_report", "prune", "residual_stack",
]  # fmt: skip
