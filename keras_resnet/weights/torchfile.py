"""Reads `.pth`, `.pt` and `.th` without PyTorch, and without running what a pickle asks to be run."""

import collections
import io
import math
import pickle
import zipfile

import numpy as np

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
# What a truncated or foreign file makes the pickle and zip modules raise.
UNREADABLE = (pickle.UnpicklingError, EOFError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile, OSError)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage:
    """Numbers of one storage; a legacy file fills them in after the tensors that refer to them were made."""

    def __init__(self, kind):
        self.kind, self.data = kind, None

    @property
    def dtype(self):
        return np.dtype("<u2" if self.kind == "bfloat16" else self.kind)


class _Tensor:
    """A view into a storage, resolved once the storage is there."""

    def __init__(self, storage, offset, size, stride, *_):
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)

    def array(self):
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        inside = self.offset >= 0 and min(self.stride, default=0) >= 0 and self.storage.data is not None
        if not inside or (math.prod(self.size) and last >= len(self.storage.data)):
            raise ValueError("a tensor reaches beyond its storage")
        steps = [stride * self.storage.dtype.itemsize for stride in self.stride]
        view = np.lib.stride_tricks.as_strided(self.storage.data[self.offset :], self.size, steps)
        return from_bfloat16(view) if self.storage.kind == "bfloat16" else view.copy()


# All that a file of tensors needs; anything else is refused by name.
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *_: None,
    **{("torch", name): kind for name, kind in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names in `ALLOWED` and no others."""

    def __init__(self, file, storages):
        super().__init__(file, encoding="latin1")
        self.storages = storages

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise ValueError(f"it holds {module}.{name}, which is no tensor; save the `state_dict()` alone, or as .safetensors")
        return ALLOWED[module, name]

    def persistent_load(self, identity):
        tag, kind, key, *_ = identity
        if tag != "storage" or kind not in STORAGES.values():
            raise ValueError(f"it holds an unknown storage ({tag!r}, {kind!r})")
        return self.storages.setdefault(str(key), _Storage(kind))


def read(path):
    """Name -> array of a PyTorch checkpoint, new (zip) or old format; differs from `torch.load` by never running code.

    Args:
        path: the file.

    Raises:
        ValueError: no such format, truncated, or holding anything but tensors and plain values.
    """
    try:
        with open(path, "rb") as file:
            content = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
        return {name: tensor.array() for name, tensor in _tensors(content).items()}
    except UNREADABLE as error:
        raise ValueError(f"{path} is no readable PyTorch file, or is truncated ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not loaded: {error}") from error


def _read_zip(file):
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        index = next((name for name in names if name.endswith("/data.pkl") or name == "data.pkl"), None)
        if index is None:
            raise ValueError("it is a zip file without data.pkl, i.e. no PyTorch checkpoint")
        root, storages = index[: -len("data.pkl")], {}
        content = _Unpickler(io.BytesIO(archive.read(index)), storages).load()
        for key, storage in storages.items():
            storage.data = np.frombuffer(archive.read(f"{root}data/{key}"), storage.dtype)
    return content


def _read_legacy(file):
    file.seek(0)
    storages = {}
    if _Unpickler(file, {}).load() != LEGACY_MAGIC:
        raise ValueError("its beginning is not that of a PyTorch file")
    for _ in ("protocol", "system"):
        _Unpickler(file, {}).load()
    content = _Unpickler(file, storages).load()
    for key in _Unpickler(file, {}).load():
        storage = storages[str(key)]
        count = int(np.frombuffer(file.read(8), "<i8")[0])
        data = file.read(count * storage.dtype.itemsize)
        if len(data) < count * storage.dtype.itemsize:
            raise EOFError("the last storage is cut off")
        storage.data = np.frombuffer(data, storage.dtype)
    return content


def _tensors(content):
    """The tensors of a state dict, also where a training script wrapped it."""
    if not isinstance(content, dict):
        raise ValueError("it holds no state dict")
    found = {str(key): value for key, value in content.items() if isinstance(value, _Tensor)}
    if found:
        return found
    for key in ("state_dict", "model", "model_state_dict", "net"):
        if isinstance(content.get(key), dict):
            return _tensors(content[key])
    raise ValueError(f"it holds no tensors, only {', '.join(map(str, list(content)[:5]))}")
