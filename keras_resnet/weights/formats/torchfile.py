"""Reads `.pth`, `.pt` and `.th` without PyTorch, and without running what a pickle asks to be run."""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from .reading import UNREADABLE, Budget
from .tensors import from_bfloat16

STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage:
    """Numbers of one storage; they are filled in after the tensors that refer to them were made."""

    def __init__(self, kind: str) -> None:
        self.kind, self.numbers = kind, None

    @property
    def itemsize(self) -> int:
        return self._stored.itemsize

    @property
    def _stored(self):
        return np.dtype("<u2" if self.kind == "bfloat16" else self.kind)

    def fill(self, content: bytes) -> None:
        numbers = np.frombuffer(content, self._stored)
        self.numbers = from_bfloat16(numbers) if self.kind == "bfloat16" else numbers


class _Tensor:
    """A view into a storage, resolved once the storage is there; no tensor is copied, so many take no more than one."""

    def __init__(self, storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)

    def array(self) -> np.ndarray:
        numbers = self.storage.numbers
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        if numbers is None or min((self.offset, *self.size, *self.stride)) < 0:
            raise ValueError("a tensor has no storage, or a negative size")
        if (count := math.prod(self.size)) and not last < len(numbers) >= count:
            raise ValueError("a tensor reaches beyond its storage")
        steps = [stride * numbers.itemsize for stride in self.stride]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.size, steps, writeable=False)


class _Ignored:
    """Stands for what training scripts put beside the tensors (options, scores): nothing of it is made or run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# All that a file of tensors needs; anything else is refused by name.
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *_: None,
    **{("torch", name): kind for name, kind in STORAGES.items()},
    ("argparse", "Namespace"): _Ignored,
    ("_codecs", "encode"): _Ignored,
    ("numpy", "dtype"): _Ignored,
    ("numpy", "ndarray"): _Ignored,
    **{(f"numpy.{core}.multiarray", name): _Ignored for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
}
# Where training scripts put the state dict; what else they save does not look like one.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights")


class _Unpickler(pickle._Unpickler):
    """Knows the names in `ALLOWED` and no others. In Python, since the one in C allocates what a few bytes ask for."""

    def __init__(self, file: Any, storages: dict[str, _Storage]) -> None:
        super().__init__(file, encoding="latin1")
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ValueError(f"it holds {module}.{name}, which is no tensor; save the `state_dict()` alone, or as .safetensors")
        return ALLOWED[module, name]

    def persistent_load(self, identity: Any) -> _Storage:
        tag, kind, key, *_ = identity
        if tag != "storage" or not isinstance(kind, str) or kind not in STORAGES.values():
            raise ValueError(f"it holds an unknown storage ({tag!r}, {kind!r})")
        return self.storages.setdefault(str(key), _Storage(kind))


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Name -> array of a PyTorch checkpoint, new (zip) or old format; differs from `torch.load` by never running code.

    Args:
        path: the file.

    Returns:
        Dict of read-only arrays, views into the storages. They take no more memory than the file has bytes (twice for bfloat16).

    Raises:
        ValueError: no such format, truncated, holding anything but tensors and plain values, or unpacking to more than it is.
    """
    try:
        with open(path, "rb") as file:
            budget = Budget(os.fstat(file.fileno()).st_size, ratio=1)
            content = _read_zip(file, budget) if zipfile.is_zipfile(file) else _read_legacy(file, budget)
        return {name: tensor.array() for name, tensor in _state_dict(content).items()}
    except UNREADABLE as error:
        raise ValueError(f"{path} is no readable PyTorch file, or is truncated ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not loaded: {error}") from error


def _read_zip(file, budget):
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        index = next((name for name in names if name.endswith("/data.pkl") or name == "data.pkl"), None)
        if index is None:
            raise ValueError("it is a zip file without data.pkl, i.e. no PyTorch checkpoint")

        def member(name: str) -> Any:
            # torch does not compress, so nothing may be larger than the file.
            budget.take(archive.getinfo(name).file_size, name)
            return archive.read(name)

        root, storages = index[: -len("data.pkl")], {}
        content = _Unpickler(io.BytesIO(member(index)), storages).load()
        for key, storage in storages.items():
            storage.fill(member(f"{root}data/{key}"))
    return content


def _read_legacy(file, budget):
    file.seek(0)
    storages = {}
    if _Unpickler(file, {}).load() != LEGACY_MAGIC:
        raise ValueError("its beginning is not that of a PyTorch file")
    for _ in ("protocol", "system"):
        _Unpickler(file, {}).load()
    content = _Unpickler(file, storages).load()
    for key in _Unpickler(file, {}).load():
        storage = storages[str(key)]
        size = int.from_bytes(file.read(8), "little", signed=True) * storage.itemsize
        budget.take(size, f"storage {key}")
        data = file.read(size)
        if len(data) < size:
            raise EOFError("the last storage is cut off")
        storage.fill(data)
    return content


def _state_dict(content):
    """The tensors of a state dict, also where a training script wrapped it."""
    if not isinstance(content, dict):
        raise ValueError("it holds no state dict")
    if not (found := _tensors(content)):
        raise ValueError(f"it holds no tensors, only {', '.join(map(str, list(content)[:5]))}")
    return found


def _tensors(content):
    inner = (_tensors(content[key]) for key in WRAPPERS if isinstance(content.get(key), dict))
    own = {str(key): value for key, value in content.items() if isinstance(value, _Tensor)}
    return next(filter(None, inner), own)
