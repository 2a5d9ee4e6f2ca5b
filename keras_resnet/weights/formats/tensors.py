"""Number formats that NumPy does not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16 to float32, of which it is the upper half.

    Args:
        bits: The bits of the bfloat16 numbers, as uint16.
    """
    return (bits.astype("<u4") << 16).view("<f4")
