"""The safetensors format, by the library of that name."""

import os

import ml_dtypes  # noqa: F401 -- NumPy knows bfloat16 only once this is imported.
import numpy as np
import safetensors
from safetensors.numpy import save


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read all arrays of a file, and its metadata.

    Args:
        path: The file.

    Returns:
        `(arrays by name, metadata)`. Formats that NumPy does not know, such as bfloat16, come as float32.

    Raises:
        ValueError: The file is truncated or damaged, or it is not a safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
            metadata = dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file, or it is truncated ({error})") from error
    return {name: array.astype("float32") if array.dtype.kind == "V" else array for name, array in arrays.items()}, metadata


def write(path: str | os.PathLike[str], arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a file next to its target, then rename it into place.

    The library's own `save_file` is not used, because it raises other exceptions than `OSError` and only its newest versions
    rename.

    Args:
        path: The file; one that exists is replaced.
        arrays: Arrays by name.
        metadata: Strings by name.

    Raises:
        OSError: The file cannot be written; the old one is kept.
    """
    content = save({name: np.asarray(array, order="C") for name, array in arrays.items()}, metadata)
    partial = f"{os.fspath(path)}.part"
    try:
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
