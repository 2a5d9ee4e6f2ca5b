"""What the readers have in common: a limit for what a file unpacks to, and the exceptions that damaged files cause."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib

# Trained weights hardly compress at all; pruned ones do, but not to a hundredth.
RATIO, SMALL = 100, 64 << 20
UNREADABLE = (
    *(pickle.UnpicklingError, EOFError, KeyError, IndexError, AttributeError, TypeError, OSError, UnicodeDecodeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, OverflowError, MemoryError),
)


class Budget:
    """The number of bytes that a file may still unpack to. A reader takes what the file declares before it reads it.

    Args:
        size: Size of the file in bytes.
        ratio: How many times its size the file may unpack to; 1 for formats that do not compress.
    """

    def __init__(self, size: int, ratio: int = RATIO) -> None:
        self.size, self.left = size, size if ratio == 1 else max(ratio * size, SMALL)

    def take(self, count: int, what: str) -> None:
        """Take some of the bytes.

        Args:
            count: Number of bytes.
            what: What needs them, for the message.

        Raises:
            ValueError: Fewer bytes are left.
        """
        if not 0 <= count <= self.left:
            raise ValueError(f"{what} would take {count:,} bytes, more than a file of {self.size:,} bytes can hold")
        self.left -= count
