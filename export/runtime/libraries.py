"""Which shared libraries an execution provider of onnxruntime needs, and which of them cannot be loaded here."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
from pathlib import Path

from ..errors import UsageError

PROVIDER_FILES = {
    "cuda": "libonnxruntime_providers_cuda.so",
    "tensorrt": "libonnxruntime_providers_tensorrt.so",
    "openvino": "libonnxruntime_providers_openvino.so",
}
# onnxruntime opens these only when an operator asks for them, so that they are not among what the provider names.
LATE = {"cuda": {"13": ("libcudnn.so.9", "libcufft.so.12"), "12": ("libcudnn.so.9", "libcufft.so.11")}}


def provider_file(device: str) -> Path | None:
    """Return the provider's library in the installed onnxruntime, or None."""
    import onnxruntime

    path = Path(onnxruntime.__file__).parent / "capi" / PROVIDER_FILES.get(device, "-")
    return path if path.is_file() else None


def missing(device: str) -> list[str]:
    """Return names of the libraries that a device needs and the loader does not find; empty where nothing is known of it."""
    path = provider_file(device)
    if path is None:
        return []
    names = needed(path)
    cuda = next((name.rsplit(".", 1)[1] for name in names if name.startswith("libcudart.so.")), None)
    late = LATE.get(device, {}).get(cuda, ())
    own = {file.name for file in path.parent.iterdir()}
    return [name for name in (*names, *late) if name not in own and not _loads(name)]


def _loads(name):
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def nvidia_driver() -> str | None:
    """Return the version of the NVIDIA driver, as nvidia-smi reports it, or None."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0].strip()
    return None


def tensorrt_version() -> int | None:
    """Return version of the TensorRT library that onnxruntime would load, as a number, or None."""
    path = provider_file("tensorrt")
    names = [name for name in needed(path) if name.startswith("libnvinfer.so")] if path else []
    with contextlib.suppress(OSError, AttributeError, IndexError):
        return ctypes.CDLL(names[0]).getInferLibVersion()
    return None


def needed(path: str | os.PathLike[str]) -> list[str]:
    """Return the names under DT_NEEDED of a 64-bit little-endian ELF file.

    Raises:
        UsageError: The file is something else.
    """
    with open(path, "rb") as file:
        if file.read(6) != b"\x7fELF\x02\x01":
            raise UsageError(f"{path} is not a 64-bit little-endian ELF library")
        file.seek(32)
        (headers,) = struct.unpack("<Q", file.read(8))
        file.seek(54)
        size, count = struct.unpack("<HH", file.read(4))
        segments = [_segment(file, headers + index * size) for index in range(count)]
        dynamic = next(((offset, length) for kind, offset, _, length in segments if kind == 2), None)
        if dynamic is None:
            return []
        entries = _dynamic(file, *dynamic)
        (strings,) = (value for tag, value in entries if tag == 5)
        base = next(
            offset + strings - start
            for kind, offset, start, length in segments
            if kind == 1 and start <= strings < start + length
        )
        return [_text(file, base + value) for tag, value in entries if tag == 1]


def _segment(file, position):
    """`(type, file offset, address, size in the file)` of a program header."""
    file.seek(position)
    kind, _, offset, address, _, length = struct.unpack("<IIQQQQ", file.read(40))
    return kind, offset, address, length


def _dynamic(file, offset, length):
    file.seek(offset)
    content = file.read(length)
    entries = [struct.unpack_from("<qQ", content, position) for position in range(0, length - 15, 16)]
    return entries[: next((index for index, (tag, _) in enumerate(entries) if tag == 0), len(entries))]


def _text(file, position):
    file.seek(position)
    return file.read(4096).split(b"\0", 1)[0].decode()
