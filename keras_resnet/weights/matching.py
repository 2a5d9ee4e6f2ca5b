"""Strict assignment of the arrays of a file to the variables of a model: all of them or none."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from ..zoo.config import Config
from .families.checkpoint_format import CheckpointFormat

FIRST_CONVOLUTIONS = ("stem_conv", "stem_conv1", "block1_conv1")
CLASSIFIER = "predictions"
SHOWN = 3


def variables_of(model: keras.Model) -> dict[tuple[str, str], keras.Variable]:
    """Return `{(layer, variable): Keras variable}` of all weights of a zoo model; seeds of dropout layers are not weights."""
    return {
        (layer.name, variable.name): variable
        for layer in model.layers
        for variable in layer.weights
        if str(variable.dtype).startswith(("float", "bfloat"))
    }


class WeightsMismatch(ValueError):
    """A file of weights that does not belong to a model."""


@dataclass(frozen=True)
class Assignment:
    """What a file gives to the variables of a model.

    Attributes:
        values: `(layer, variable)` -> array in Keras' layout.
        problems: What is missing, left over or of another shape; empty if the file fits.
        only_classes: Whether the only problem is another number of classes.
    """

    values: dict
    problems: str
    only_classes: bool = False


def assign(
    model: keras.Model,
    config: Config,
    arrays: dict,
    checkpoint_format: CheckpointFormat,
    *,
    whole: Collection = (),
    fresh_head: bool = False,
    kept_classes: dict[int, int] | None = None,
    source: str = "the file",
) -> None:
    """Load arrays into a model by name; differs from `load_weights(skip_mismatch=True)` by refusing anything left over.

    Args:
        model: A zoo model.
        config: Its config.
        arrays: The file's names -> arrays.
        checkpoint_format: `CheckpointFormat` of the file.
        whole: Names of the whole network's variables, where the model lacks a part of it (head, later stages).
        fresh_head: Whether the model keeps its own classifier if the file's has another number of classes, or if it has none.
        kept_classes: New class -> the file's class, for a classifier that starts fresh but for these classes; None where the
            number of classes decides.
        source: What the message calls the file.

    Raises:
        WeightsMismatch: Something is missing, left over or of another shape; nothing is assigned then.
    """
    wanted, count = variables_of(model), class_count(arrays, checkpoint_format, config)
    fresh = {}
    if (fresh_head and count != config.num_classes) or kept_classes is not None:
        fresh = {name: variable for name, variable in wanted.items() if name[0] == CLASSIFIER}
    wanted = {name: variable for name, variable in wanted.items() if name not in fresh}
    found = match(model, config, arrays, checkpoint_format, whole=whole, wanted=wanted)
    if found.problems:
        what = f"{source} ({checkpoint_format.name}) does not fit {model.name}: {found.problems}"
        hint = f"; build the model with `num_classes={count}`, and replace its head afterwards" if found.only_classes else ""
        raise WeightsMismatch(what + hint)
    for name, value in found.values.items():
        wanted[name].assign(value)
    for name, variable in fresh.items() if kept_classes and count else ():
        old = _convert(np.asarray(arrays[checkpoint_format.translate(config, *name)]), name, variable, config, checkpoint_format)
        values = ops.convert_to_numpy(variable).copy()
        values[..., list(kept_classes)] = old[..., list(kept_classes.values())]
        variable.assign(values)


def match(
    model: keras.Model,
    config: Config,
    arrays: dict,
    checkpoint_format: CheckpointFormat,
    *,
    whole: Collection = (),
    wanted: dict | None = None,
) -> Assignment:
    """Find the value of every variable of a model in a file.

    Args:
        model: A zoo model, perhaps without numbers (`keras_resnet.models.build.outline`).
        config, arrays, checkpoint_format, whole: As in `assign`.
        wanted: The variables to fill, as `variables_of` gives them; None for all.

    Returns:
        `Assignment`.
    """
    wanted = variables_of(model) if wanted is None else wanted
    keys = {name: checkpoint_format.translate(config, *name) for name in {*variables_of(model), *wanted, *whole}}
    folds = _folded_biases(wanted, config, checkpoint_format, arrays)
    values = {
        name: _convert(np.asarray(arrays[keys[name]]), name, variable, config, checkpoint_format)
        for name, variable in wanted.items()
        if keys[name] in arrays
    }
    for name in folds.keys() & values.keys():
        values[name] = values[name] - arrays[folds[name]]
    known = {*keys.values(), *folds.values()}
    missing = [f"{keys[name]} (for {'/'.join(name)})" for name in wanted if name not in values]
    left_over = [key for key in arrays if key not in known and not re.fullmatch(checkpoint_format.ignored, key)]
    misfits = [name for name, value in values.items() if value.shape != tuple(wanted[name].shape)]
    shapes = [f"{keys[name]} {values[name].shape} for {'/'.join(name)} {tuple(wanted[name].shape)}" for name in misfits]
    problems = [_listed("missing", missing), _listed("left over", left_over), _listed("of another shape", shapes)]
    only_classes = bool(misfits) and all(layer == CLASSIFIER for layer, _ in misfits) and not missing + left_over
    return Assignment(values, "; ".join(filter(None, problems)), only_classes)


def _listed(what, items):
    if not items:
        return ""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {what}: {', '.join(items[:SHOWN])}{more}"


def class_count(arrays: dict, checkpoint_format: CheckpointFormat, config: Config) -> int | None:
    """Classes of the file's own classifier, None if it has none; half a classifier is one, and will be missed.

    Args:
        arrays: The file's names -> arrays.
        checkpoint_format: `CheckpointFormat` of the file.
        config: Config of the model that the file is for.
    """
    if checkpoint_format.family not in (None, config.family):
        return None
    for kind, axis in (("bias", 0), ("kernel", 0 if checkpoint_format.torch_layout else -1)):
        array = arrays.get(checkpoint_format.translate(config, CLASSIFIER, kind))
        if array is not None and array.ndim:
            return int(array.shape[axis])
    return None


def _convert(value, name, variable, config, checkpoint_format):
    """The array in Keras' layout and, for the first convolution, with the model's channels."""
    layer, kind = name
    if value.dtype == "float16":
        value = value.astype("float32")
    if kind != "kernel" or value.ndim < 2:
        return value
    if checkpoint_format.torch_layout:
        if len(variable.shape) > 2:
            value = np.moveaxis(value, (0, 1), (-1, -2))
        elif layer == "fc1" and config.head == "dense":
            value = _rows_channels_last(value, config)
        else:
            value = value.reshape(len(value), -1).T
    if layer in FIRST_CONVOLUTIONS and value.ndim > 2:
        value = adapt_channels(value, variable.shape[-2])
    return value


def _rows_channels_last(value, config):
    """The first dense layer of a VGG: torch flattens (channels, sides), Keras (sides, channels)."""
    sides, channels = (config.head_size,) * config.rank, config.scaled(config.widths[-1])
    if value[0].size != channels * config.head_size**config.rank:
        return value.reshape(len(value), -1).T
    return np.moveaxis(value.reshape(len(value), channels, *sides), (0, 1), (-1, -2)).reshape(-1, len(value))


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Return a first convolution for RGB made to take `channels`: summed for one, repeated and scaled for more.

    Args:
        kernel: (sides, 3, filters); of another channel count it is returned as it is.
        channels: What the model takes.

    Source: the rule is that of timm's `adapt_input_conv`.
    """
    if kernel.shape[-2] != 3 or channels == 3:
        return kernel
    if channels == 1:
        return kernel.sum(axis=-2, keepdims=True)
    repeated = np.concatenate([kernel] * -(-channels // 3), axis=-2)[..., :channels, :]
    return repeated * (3 / channels)


def _folded_biases(wanted, config, checkpoint_format, arrays):
    """Moving mean -> the file's bias that it absorbs: a bias in front of a batch norm only shifts the mean."""
    if config.family != "resnet" or config.preact:
        return {}
    folds = {}
    for layer, kind in wanted:
        convolution = layer.replace("norm", "conv")
        if kind == "moving_mean" and (convolution, "bias") not in wanted:
            key = checkpoint_format.translate(config, convolution, "bias")
            if key in arrays:
                folds[layer, kind] = key
    return folds
