"""A file of weights, whatever its file format: its arrays, and the checkpoint family that they belong to."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass, field

import numpy as np

from ..modelcard import ModelCard, check_labels
from ..preprocessing import Preprocessing
from ..zoo.config import config_from_dict
from .families import FORMATS, FORMATS_OURS_FIRST
from .families.checkpoint_format import CheckpointFormat
from .formats import kerasfile, safetensors, torchfile
from .formats.reading import UNREADABLE, Budget

TORCH_SUFFIXES = (".pth", ".pt", ".th", ".tar", ".bin")
KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", *KERAS_SUFFIXES, ".npz")


@dataclass(frozen=True)
class WeightFile:
    """The content of a file of weights.

    Attributes:
        path: The file.
        arrays: Arrays by name, named and laid out as in the file.
        checkpoint_format: The family that recognised them.
        card: The card that the file stores, or None.
    """

    path: str
    arrays: dict[str, np.ndarray] = field(repr=False)
    checkpoint_format: CheckpointFormat
    card: ModelCard | None = None


def open_weights(path: str | os.PathLike[str]) -> WeightFile:
    """Read a file of weights and recognise its checkpoint family by the names in it. No pickle is executed.

    Args:
        path: PyTorch `.pth`, `.pt`, `.th`, `.pth.tar`, `.bin`; `.safetensors`; keras.applications' `.h5`; Keras'
            `.weights.h5` or `.keras`; `.npz`.

    Returns:
        `WeightFile`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file format is unknown, the file is truncated, its card is damaged, or no family recognises its names.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no weights file {path}")
    arrays, data, checkpoint_formats = _read(path)
    try:
        card = None if data is None else _checked(ModelCard.from_dict(data))
    except ValueError as error:
        raise ValueError(f"{path} is not loaded: its card is damaged, {error}") from error
    while True:
        for checkpoint_format in checkpoint_formats:
            if checkpoint_format.recognises(arrays):
                return WeightFile(path, arrays, checkpoint_format, card)
        if (inner := _unwrapped(arrays)) is None:
            break
        arrays = inner
    some, known = ", ".join(list(arrays)[:3]), ", ".join(sorted({known.name for known in FORMATS}))
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
    """`(arrays, card dict or None, checkpoint formats in the order they are tried)`."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in TORCH_SUFFIXES:
        return torchfile.read(path), None, FORMATS
    if suffix == ".safetensors":
        arrays, metadata = safetensors.read(path)
        if "card" not in metadata:
            return arrays, None, FORMATS
        try:
            return arrays, json.loads(metadata["card"]), FORMATS_OURS_FIRST
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not loaded: its card is damaged, {error}") from error
    if suffix in KERAS_SUFFIXES:
        arrays, card, old_format = kerasfile.read(path)
        return arrays, card, FORMATS if old_format else FORMATS_OURS_FIRST
    if suffix == ".npz":
        return _read_npz(path), None, FORMATS
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
        raise ValueError(f"{path} is not a readable .npz file, or it is truncated ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not loaded: {error}") from error
