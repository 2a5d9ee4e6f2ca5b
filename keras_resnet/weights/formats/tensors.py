"""Number formats numpy does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 from bfloat16 bits held as uint16: they are the upper half."""
    return (bits.astype("<u4") << 16).view("<f4")
