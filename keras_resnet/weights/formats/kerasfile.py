"""Reads Keras' three formats: legacy `.h5`, `.weights.h5` and `.keras`."""

from __future__ import annotations

import io
import json
import os
import zipfile
from typing import Any

import h5py
import numpy as np

from ...layers import STORED_CARD
from .reading import UNREADABLE, Budget

NORM = ("gamma", "beta", "moving_mean", "moving_variance")
DENSE = ("kernel", "bias")


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any] | None, bool]:
    """Read the arrays of a file by `layer/variable`, and the model's card if there is one.

    Nothing is deserialised, so a `.keras` file cannot run code, and other files that it refers to are not opened.

    Returns:
        `(arrays, card dict or None, whether the format is the legacy one)`.

    Raises:
        ValueError: The file has another format, is truncated, or would unpack to far more than its own size.
    """
    try:
        if zipfile.is_zipfile(path):
            return _read_archive(path, Budget(os.path.getsize(path)))
        with h5py.File(path, "r") as file:
            root, budget = file["model_weights"] if "model_weights" in file else file, Budget(os.path.getsize(path))
            if "layer_names" in root.attrs:
                return _read_legacy(root, budget), None, True
            return *_read_keras3(file, budget), False
    except (*UNREADABLE, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable Keras weights file, or it is truncated ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not loaded: {error}") from error


def _read_archive(path, budget):
    with zipfile.ZipFile(path) as archive:
        for name in ("model.weights.h5", "config.json"):
            budget.take(archive.getinfo(name).file_size, name)
        with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
            arrays, _ = _read_keras3(file, budget)
        return arrays, _find_card(json.loads(archive.read("config.json"))), False


def _find_card(config):
    """Return the card in a saved model's config, at any depth of nesting, or None."""
    if isinstance(config, dict):
        if config.get("class_name") == "Card" and "card" in config.get("config", {}):
            return config["config"]["card"]
        config = list(config.values())
    if isinstance(config, list):
        return next((found for item in config if (found := _find_card(item))), None)
    return None


def _array(item, budget):
    """Read a dataset, unless it declares more numbers than the file can hold or refers to another file."""
    if not isinstance(item, h5py.Dataset) or item.external or item.is_virtual:
        raise KeyError(f"{item.name} holds no numbers of this file")
    budget.take(item.nbytes, item.name)
    return np.asarray(item)


def _read_legacy(root, budget):
    arrays = {}
    for layer in root.attrs["layer_names"]:
        group = root[_text(layer)]
        for name in group.attrs["weight_names"]:
            variable = _text(name).split(":")[0].split("/")[-1]
            arrays[f"{_text(layer)}/{variable}"] = _array(group[_text(name)], budget)
    return arrays


def _read_keras3(file, budget):
    """Read a file of Keras 3, which numbers variables and names groups after classes. The layer's name is an attribute.

    Returns:
        `(arrays, card dict or None)`.
    """
    arrays, cards = {}, []

    def visit(path: str, group: Any) -> None:
        if not path.endswith("/vars") or not isinstance(group, h5py.Group) or not len(group):
            return
        if STORED_CARD in group:
            cards.append(json.loads(_array(group[STORED_CARD], budget).tobytes()))
            return
        values = [_array(group[str(number)], budget) for number in range(len(group))]
        # The seeds of dropout layers are not weights.
        if values[0].dtype.kind != "f":
            return
        layer = _text(group.attrs["name"]) if "name" in group.attrs else path.split("/")[-2]
        names = NORM if values[0].ndim < 2 else DENSE
        arrays.update({f"{layer}/{name}": value for name, value in zip(names, values, strict=False)})

    file.visititems(visit)
    if not arrays:
        raise KeyError("no layer in it holds variables")
    return arrays, next(iter(cards), None)


def _text(value):
    return value.decode() if isinstance(value, bytes) else str(value)
