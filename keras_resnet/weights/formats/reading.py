"""What all readers of files share: how much a file may unpack to, and what a damaged one makes libraries raise."""

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
    """The bytes a file may still unpack to. What it declares is taken from here before anything of it is read.

    Args:
        size: of the file.
        ratio: times its size it may unpack to; 1 for formats that do not compress.
    """

    def __init__(self, size: int, ratio: int = RATIO) -> None:
        self.size, self.left = size, size if ratio == 1 else max(ratio * size, SMALL)

    def take(self, count: int, what: str) -> None:
        """Take `count` bytes.

        Raises:
            ValueError: less is left; names `what` asked for it.
        """
        if not 0 <= count <= self.left:
            raise ValueError(f"{what} would take {count:,} bytes, more than a file of {self.size:,} bytes can hold")
        self.left -= count
