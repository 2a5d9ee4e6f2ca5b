"""A file of weights, whatever its format: its arrays, and where they come from."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass, field

import numpy as np

from ..modelcard import ModelCard, check_labels
from ..preprocessing import Preprocessing
from ..zoo.config import config_from_dict
from .families import akamaster, keras_applications, keras_hub, native, small, timm, torchvision
from .families.origin import Origin
from .formats import kerasfile, safetensors, torchfile
from .formats.reading import UNREADABLE, Budget

# The first that recognises the arrays wins.
FOREIGN = (
    akamaster.ORIGIN,
    small.KUANGLIU,
    small.RESNET,
    small.WIDE_RESNET,
    small.CIFAR100,
    small.VGG,
    torchvision.RESNET,
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
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", *KERAS_SUFFIXES, ".npz")


@dataclass(frozen=True)
class WeightFile:
    """What a file of weights holds.

    Args:
        path: where it lies.
        arrays: name -> array, named and laid out as in the file.
        origin: `Origin` that recognised them.
        card: the `ModelCard` the file carries, if any.
    """

    path: str
    arrays: dict[str, np.ndarray] = field(repr=False)
    origin: Origin
    card: ModelCard | None = None


def open_weights(path: str | os.PathLike[str]) -> WeightFile:
    """Read a file of weights and recognise its origin by the names in it; no pickle is run.

    Args:
        path: PyTorch `.pth`, `.pt`, `.th`, `.pth.tar`, `.bin`; `.safetensors`; keras.applications' `.h5`; Keras'
            `.weights.h5` or `.keras`; `.npz`.

    Returns:
        `WeightFile`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown format, truncated, a damaged card, or names of no known origin.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no weights file {path}")
    arrays, data, origins = _read(path)
    try:
        card = None if data is None else _checked(ModelCard.from_dict(data))
    except ValueError as error:
        raise ValueError(f"{path} is not loaded: its card is damaged, {error}") from error
    while True:
        for origin in origins:
            if origin.recognises(arrays):
                return WeightFile(path, arrays, origin, card)
        if (inner := _unwrapped(arrays)) is None:
            break
        arrays = inner
    some, known = ", ".join(list(arrays)[:3]), ", ".join(sorted({origin.name for origin in THEIRS_FIRST}))
    raise ValueError(f"{path} holds {len(arrays)} arrays ({some} …), named like those of none of: {known}")


def _checked(card: ModelCard) -> ModelCard:
    """The card, if its parts are what they should be; one from a file may contain anything."""
    for part, kind in {"name": str, "config": dict | None, "preprocessing": dict, "weights": dict | None}.items():
        if not isinstance(getattr(card, part), kind):
            raise ValueError(f"its `{part}` must not be {getattr(card, part)!r}")
    try:
        if card.config:
            config_from_dict(card.config)
        Preprocessing.of(card.mode)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its `config` or `preprocessing` cannot be read ({error})") from error
    return card if card.labels is None else card.replace(labels=check_labels(card.labels))


def _unwrapped(arrays):
    """The arrays without the first part of their names (`module.`, `model.` …) if all have it in common, else None."""
    parts = {name.partition(".")[0] for name in arrays}
    if len(parts) != 1 or not all("." in name for name in arrays):
        return None
    return {name.partition(".")[2]: array for name, array in arrays.items()}


def _read(path):
    """`(arrays, card dict or None, origins in the order they are tried)`."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in TORCH_SUFFIXES:
        return torchfile.read(path), None, THEIRS_FIRST
    if suffix == ".safetensors":
        arrays, metadata = safetensors.read(path)
        if "card" not in metadata:
            return arrays, None, THEIRS_FIRST
        try:
            return arrays, json.loads(metadata["card"]), OURS_FIRST
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not loaded: its card is damaged, {error}") from error
    if suffix in KERAS_SUFFIXES:
        arrays, card, old_format = kerasfile.read(path)
        return arrays, card, THEIRS_FIRST if old_format else OURS_FIRST
    if suffix == ".npz":
        return _read_npz(path), None, THEIRS_FIRST
    raise ValueError(f"a weights file must have one of the endings {', '.join(SUFFIXES)}, got {path}")


def _read_npz(path):
    budget = Budget(os.path.getsize(path))
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                budget.take(member.file_size, member.filename)
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except UNREADABLE as error:
        raise ValueError(f"{path} is no readable .npz file, or is truncated ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not loaded: {error}") from error
