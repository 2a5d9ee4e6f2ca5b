"""JSON text to values and back: with orjson where it is installed (several times faster), else with Python's own module.

Both are strict: NaN and infinity, which Python would accept, are not JSON. Both write numbers so that the same numbers are read
back.
"""

import json
from typing import Any

import numpy as np

try:
    import orjson
except ModuleNotFoundError:
    orjson = None


def loads(text: bytes | bytearray | memoryview) -> Any:
    """Parse JSON.

    Args:
        text: UTF-8.

    Returns:
        The value.

    Raises:
        ValueError: The text is not JSON.
        RecursionError: It is nested too deeply.
    """
    if orjson:
        try:
            return orjson.loads(text)
        except ValueError:  # Python's own module says better what is wrong
            pass
    return json.loads(str(text, "utf-8"), parse_constant=_refuse_constant)


def dumps(value: Any) -> bytes:
    """Write plain values as compact JSON; raises `ValueError` for NaN and infinity."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def dump_numbers(array: np.ndarray) -> bytes:
    """Write a one-dimensional array of numbers or booleans as JSON, without the brackets.

    Args:
        array: Finite values; not float16.

    Returns:
        Numbers separated by commas, each with as many digits as its dtype needs to be read back unchanged.
    """
    if orjson:
        return orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
    return json.dumps(array.tolist(), separators=(",", ":")).encode()[1:-1]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; send such values as binary data")
