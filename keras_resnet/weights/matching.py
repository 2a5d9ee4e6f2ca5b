"""Strict assignment of a file's arrays to a model's variables: all of them or none."""

import re

import numpy as np

FIRST_CONVOLUTIONS = ("stem_conv", "stem_conv1", "block1_conv1")
CLASSIFIER = "predictions"
SHOWN = 3


def variables_of(model):
    """`(layer, variable)` names -> Keras variable, for all weights of a zoo model; seeds of dropout layers are none."""
    return {
        (layer.name, variable.name): variable
        for layer in model.layers
        for variable in layer.weights
        if str(variable.dtype).startswith(("float", "bfloat"))
    }


def assign(model, config, arrays, origin, *, whole=(), fresh_head=False, source="the file"):
    """Load arrays into a model by name; differs from `load_weights(skip_mismatch=True)` by refusing anything left over.

    Args:
        model: a zoo model.
        config: its config.
        arrays: the file's names -> arrays.
        origin: `Origin` of the file.
        whole: names of the whole network's variables, where the model lacks a part of it (head, later stages).
        fresh_head: keep the model's own classifier if the file's has another number of classes, or if it has none.
        source: what the message calls the file.

    Raises:
        ValueError: something is missing, left over or of another shape; nothing is assigned then.
    """
    wanted = variables_of(model)
    keys = {name: origin.translate(config, *name) for name in {*wanted, *whole}}
    if fresh_head and _classes(arrays, keys, origin) != config.num_classes:
        wanted = {name: variable for name, variable in wanted.items() if name[0] != CLASSIFIER}
    folds = _folded_biases(wanted, config, origin, arrays)
    values = {
        name: _convert(np.asarray(arrays[keys[name]]), name, variable, config, origin)
        for name, variable in wanted.items()
        if keys[name] in arrays
    }
    for name in folds.keys() & values.keys():
        values[name] = values[name] - arrays[folds[name]]
    _refuse_misfits(f"{source} ({origin.name}) does not fit {model.name}", wanted, values, keys, arrays, folds, origin)
    for name, value in values.items():
        wanted[name].assign(value)


def _refuse_misfits(what, wanted, values, keys, arrays, folds, origin):
    known = {*keys.values(), *folds.values()}
    missing = [f"{keys[name]} (for {'/'.join(name)})" for name in wanted if name not in values]
    left_over = [key for key in arrays if key not in known and not re.fullmatch(origin.ignored, key)]
    shapes = [
        f"{keys[name]} {value.shape} for {'/'.join(name)} {tuple(wanted[name].shape)}"
        for name, value in values.items()
        if value.shape != tuple(wanted[name].shape)
    ]
    problems = [_listed("missing", missing), _listed("left over", left_over), _listed("of another shape", shapes)]
    if any(problems):
        hint = ""
        if shapes and all(f"for {CLASSIFIER}/" in shape for shape in shapes) and not missing + left_over:
            hint = "; give `num_classes` to keep the trunk and start a new classifier"
        raise ValueError(f"{what}: {'; '.join(filter(None, problems))}{hint}")


def _listed(what, items):
    if not items:
        return ""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {what}: {', '.join(items[:SHOWN])}{more}"


def _classes(arrays, keys, origin):
    """Classes of the file's own classifier, None if it has none; half a classifier is one, and will be missed."""
    for kind, axis in (("bias", 0), ("kernel", 0 if origin.torch_layout else -1)):
        array = arrays.get(keys.get((CLASSIFIER, kind)))
        if array is not None and array.ndim:
            return array.shape[axis]
    return None


def _convert(value, name, variable, config, origin):
    """The array in Keras' layout and, for the first convolution, with the model's channels."""
    layer, kind = name
    if value.dtype == "float16":
        value = value.astype("float32")
    if kind != "kernel" or value.ndim < 2:
        return value
    if origin.torch_layout:
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


def adapt_channels(kernel, channels):
    """A first convolution for RGB made to take `channels`: summed for one, repeated and scaled for more.

    Args:
        kernel: (sides, 3, filters); of another channel count it is returned as it is.
        channels: what the model takes.

    Source: the rule is that of timm's `adapt_input_conv`.
    """
    if kernel.shape[-2] != 3 or channels == 3:
        return kernel
    if channels == 1:
        return kernel.sum(axis=-2, keepdims=True)
    repeated = np.concatenate([kernel] * -(-channels // 3), axis=-2)[..., :channels, :]
    return repeated * (3 / channels)


def _folded_biases(wanted, config, origin, arrays):
    """Moving mean -> the file's bias that it absorbs: a bias in front of a batch norm only shifts the mean."""
    if config.family != "resnet" or config.preact:
        return {}
    folds = {}
    for layer, kind in wanted:
        convolution = layer.replace("norm", "conv")
        if kind == "moving_mean" and (convolution, "bias") not in wanted:
            key = origin.translate(config, convolution, "bias")
            if key in arrays:
                folds[layer, kind] = key
    return folds
