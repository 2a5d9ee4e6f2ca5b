"""The safetensors format, read and written with numpy alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping

import numpy as np

from .tensors import from_bfloat16

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
NAMES = {np.dtype(code): name for name, code in DTYPES.items() if name != "BF16"}
MAX_HEADER = 100 << 20


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Name -> array, and the file's metadata.

    Returns:
        `(arrays, metadata)`; bfloat16 comes as float32.

    Raises:
        ValueError: truncated, or no safetensors file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path} is no safetensors file, or is truncated: header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
            metadata = dict(header.pop("__metadata__", {}))
            entries = {name: _entry(entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is no safetensors file: its header cannot be read ({error})") from error
        if sum(end - begin for *_, begin, end in entries.values()) > size:
            raise ValueError(f"{path} is damaged: its arrays overlap")
        arrays = {}
        for name, (code, shape, begin, end) in entries.items():
            dtype = np.dtype(DTYPES[code])
            if end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                have = size - 8 - length
                raise ValueError(f"{path} is truncated or damaged: {name} should take bytes {begin} to {end} of {have}")
            file.seek(8 + length + begin)
            array = np.frombuffer(file.read(end - begin), dtype).reshape(shape)
            arrays[name] = from_bfloat16(array) if code == "BF16" else array
    return arrays, metadata


def _entry(entry):
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in DTYPES or any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
        raise ValueError(f"dtype {entry['dtype']}, shape {shape}, offsets {begin} to {end}")
    return entry["dtype"], shape, begin, end


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write arrays and text metadata, beside the target first and renamed into place.

    Args:
        path: the file; overwritten.
        arrays: name -> array.
        metadata: text -> text.
    """
    header, offset = ({"__metadata__": metadata} if metadata else {}), 0
    arrays = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
    for name, array in arrays.items():
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    partial = f"{path}.part"
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(array.tobytes())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
