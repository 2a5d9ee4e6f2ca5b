"""Reads `.pth`, `.pt` and `.th` files without PyTorch, and without running code from their pickles."""

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
    """The numbers of one storage, which are read after the tensors that refer to them have been made."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.numbers: np.ndarray | None = None

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
    """A view into a storage. Tensors are never copied, so several views of one storage need no more memory than one."""

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
    """Replaces objects that training scripts save together with the tensors (options, scores). They are not created."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# All names that a file of tensors needs. Any other is refused, and the message names it.
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
# Keys under which training scripts save the state dict. Nothing else that they save looks like one.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights")


class _Unpickler(pickle._Unpickler):
    """Unpickles only the names in `ALLOWED`. It is the one in Python, since the one in C allocates as much as a file asks for."""

    def __init__(self, file: Any, storages: dict[str, _Storage]) -> None:
        super().__init__(file, encoding="latin1")
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ValueError(
                f"it holds {module}.{name}, which is not a tensor; save the `state_dict()` alone, or as .safetensors"
            )
        return ALLOWED[module, name]

    def persistent_load(self, identity: Any) -> _Storage:
        tag, kind, key, *_ = identity
        if tag != "storage" or not isinstance(kind, str) or kind not in STORAGES.values():
            raise ValueError(f"it holds an unknown storage ({tag!r}, {kind!r})")
        return self.storages.setdefault(str(key), _Storage(kind))


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the arrays of a PyTorch checkpoint in the new (zip) or the old format. Unlike `torch.load` it never runs code.

    Args:
        path: The file.

    Returns:
        Read-only arrays by name, which are views into the storages. They need as many bytes as the file has, twice as many for
        bfloat16.

    Raises:
        ValueError: The file has another format, is truncated, contains more than tensors and plain values, or would unpack to
            more bytes than it has.
    """
    try:
        with open(path, "rb") as file:
            budget = Budget(os.fstat(file.fileno()).st_size, ratio=1)
            content = _read_zip(file, budget) if zipfile.is_zipfile(file) else _read_legacy(file, budget)
        return {name: tensor.array() for name, tensor in _state_dict(content).items()}
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a readable PyTorch file, or it is truncated ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not loaded: {error}") from error


def _read_zip(file, budget):
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        index = next((name for name in names if name.endswith("/data.pkl") or name == "data.pkl"), None)
        if index is None:
            raise ValueError("it is a zip file without data.pkl, so it is not a PyTorch checkpoint")

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
    """Return the tensors of a state dict, which may be an entry of another dict."""
    if not isinstance(content, dict):
        raise ValueError("it holds no state dict")
    if not (found := _tensors(content)):
        raise ValueError(f"it holds no tensors, only {', '.join(map(str, list(content)[:5]))}")
    return found


def _tensors(content):
    inner = (_tensors(content[key]) for key in WRAPPERS if isinstance(content.get(key), dict))
    own = {str(key): value for key, value in content.items() if isinstance(value, _Tensor)}
    return next(filter(None, inner), own)
