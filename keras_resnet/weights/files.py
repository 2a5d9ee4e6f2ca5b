"""A file of weights, whatever its format: its arrays, and where they come from."""

import json
import os
import zipfile
from dataclasses import dataclass, field

import numpy as np

from . import akamaster, keras_applications, keras_hub, kerasfile, native, safetensors, timm, torchfile, torchvision
from .origin import Origin

# The first that recognises the arrays wins.
FOREIGN = (
    akamaster.ORIGIN,
    torchvision.RESNET,
    torchvision.SMALL_RESNET,
    torchvision.VGG,
    timm.RESNETV2,
    timm.VGG,
    keras_hub.ORIGIN,
    keras_applications.RESNETV2,
    keras_applications.RESNET,
    keras_applications.VGG,
)
# keras.applications' VGG names are ours too; only files in Keras' old format, or without one, are taken for theirs.
THEIRS_FIRST, OURS_FIRST = (*FOREIGN, native.ORIGIN), (native.ORIGIN, *FOREIGN)
TORCH_SUFFIXES = (".pth", ".pt", ".th", ".tar", ".bin")
KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")
WRAPPERS = ("module.", "model.", "backbone.")


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds.

    Args:
        path: where it lies.
        arrays: name -> array, named and laid out as in the file.
        origin: `Origin` that recognised them.
        card: the model card the file carries, if any.
    """

    path: str
    arrays: dict = field(repr=False)
    origin: Origin
    card: dict | None = None


def open_weights(path):
    """Read a file of weights and recognise its origin by the names in it; no pickle is run.

    Args:
        path: PyTorch `.pth`, `.pt`, `.th`; `.safetensors`; keras.applications' `.h5`; Keras' `.weights.h5` or `.keras`; `.npz`.

    Returns:
        `WeightFile`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown format, truncated, or names of no known origin.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no weights file {path}")
    arrays, card, origins = _read(path)
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in arrays):
            arrays = {name.removeprefix(wrapper): array for name, array in arrays.items()}
    for origin in origins:
        if origin.recognises(arrays):
            return WeightFile(path, arrays, origin, card)
    some, known = ", ".join(list(arrays)[:3]), ", ".join(sorted({origin.name for origin in THEIRS_FIRST}))
    raise ValueError(f"{path} holds {len(arrays)} arrays ({some} …), named like those of none of: {known}")


def _read(path):
    """`(arrays, card, origins in the order they are tried)`."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in TORCH_SUFFIXES:
        return torchfile.read(path), None, THEIRS_FIRST
    if suffix == ".safetensors":
        arrays, metadata = safetensors.read(path)
        if "card" in metadata:
            return arrays, json.loads(metadata["card"]), OURS_FIRST
        return arrays, None, THEIRS_FIRST
    if suffix in KERAS_SUFFIXES:
        arrays, card, old_format = kerasfile.read(path)
        return arrays, card, THEIRS_FIRST if old_format else OURS_FIRST
    if suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file), None, THEIRS_FIRST
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no readable .npz file, or is truncated ({error})") from error
    known = ", ".join((*TORCH_SUFFIXES, ".safetensors", ".weights.h5", *KERAS_SUFFIXES, ".npz"))
    raise ValueError(f"a weights file must have one of the endings {known}, got {path}")
