"""Number formats numpy does not know."""


def from_bfloat16(bits):
    """float32 from bfloat16 bits held as uint16: they are the upper half."""
    return (bits.astype("<u4") << 16).view("<f4")
