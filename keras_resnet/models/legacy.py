"""Configs of models that Keras 2 saved, as Keras 3 reads them."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import keras

ANY = object()
MODELS = ("Sequential", "Functional", "Model")
MODULES = {"keras.layers": keras.layers, "keras": keras}
# Entries of wrappers, Bidirectional for one, that hold the configs of other layers.
INNER = ("layer", "backward_layer", "cell", "cells")
WITHOUT_GROUPS = "Conv1DTranspose Conv2DTranspose Conv3DTranspose SeparableConv1D SeparableConv2D DepthwiseConv1D DepthwiseConv2D"
RECURRENT = "RNN SimpleRNN GRU LSTM ConvLSTM1D ConvLSTM2D ConvLSTM3D"
RANDOM = "RandomBrightness RandomContrast RandomCrop RandomFlip RandomRotation RandomTranslation RandomZoom"
# Entries that Keras 2 wrote and Keras 3 refuses: names of layers, the entry, and the value with which it has no effect.
OBSOLETE = (
    (WITHOUT_GROUPS, "groups", 1),
    *(("SeparableConv1D SeparableConv2D", f"kernel_{kind}", ANY) for kind in ("initializer", "regularizer", "constraint")),
    (RECURRENT, "time_major", False),
    ("SpatialDropout1D SpatialDropout2D SpatialDropout3D", "noise_shape", ANY),
    ("SpatialDropout1D SpatialDropout2D SpatialDropout3D Discretization", "trainable", ANY),
    *(("MultiHeadAttention", f"{name}_shape", ANY) for name in ("query", "key", "value")),
    ("MultiHeadAttention", "softmax_robust_masking", False),
    ("Attention", "score_mode", "dot"),  # the default, and Keras 3 takes the word for its function of that name
    (RANDOM, "rng_type", ANY),
)
DROPPED = {(layer, entry): value for layers, entry, value in OBSOLETE for layer in layers.split()}


@keras.saving.register_keras_serializable("keras_resnet")
def keras_2_hard_sigmoid(x: Any) -> Any:
    """Compute `hard_sigmoid` as Keras 2 did, max(0, min(1, 0.2x + 0.5)). Keras 3's function of that name has the slope 1/6."""
    return keras.ops.clip(0.2 * x + 0.5, 0, 1)


def as_keras_3(node: Any, keras_2: bool) -> Any:
    """Return the config of a model in an HDF5 file, or a part of it, as Keras 3 reads it.

    Args:
        node: The config. It is not changed.
        keras_2: Whether a version before Keras 3 wrote it.
    """
    if isinstance(node, list):
        return [as_keras_3(inner, keras_2) for inner in node]
    if not isinstance(node, dict):
        return node
    found = {key: as_keras_3(value, keras_2) for key, value in node.items()}
    if keras_2:
        function = {"class_name": "function", "config": "hard_sigmoid"}
        for key in ("activation", "recurrent_activation"):
            if found.get(key) == "hard_sigmoid" or (isinstance(found.get(key), dict) and function.items() <= found[key].items()):
                found[key] = keras.saving.serialize_keras_object(keras_2_hard_sigmoid)
    name, config = found.get("class_name"), found.get("config")
    if isinstance(config, dict):
        found["config"] = {key: value for key, value in config.items() if not _is_obsolete(name, key, value)}
        if keras_2 and name in ("GRU", "GRUCell"):  # versions before the option existed computed as without it
            found["config"].setdefault("reset_after", False)
        for key in INNER:
            if key in found["config"]:
                found["config"][key] = _with_module(found["config"][key])
        axis = config.get("axis")
        if isinstance(axis, list) and len(axis) == 1:  # Keras 3 does this too, but not within nested models
            found["config"]["axis"] = axis[0]
    if name == "Sequential":
        return _sequential(found)
    return _functional(found) if keras_2 and name in MODELS and "output_layers" in found["config"] else found


def _with_module(node: Any) -> Any:
    """A layer inside a wrapper with the module that Keras 3 looks it up in; versions before 2.13 did not write it."""
    if isinstance(node, list):
        return [_with_module(inner) for inner in node]
    if not isinstance(node, dict) or "module" in node or node.get("class_name") in keras.saving.get_custom_objects():
        return node
    module = next((name for name, where in MODULES.items() if hasattr(where, str(node.get("class_name")))), None)
    if module is None:
        return node
    config = {key: value for key, value in node["config"].items() if key != "batch_input_shape"}
    return {**node, "module": module, "registered_name": None, "config": config}


def _is_obsolete(layer: str | None, entry: str, value: Any) -> bool:
    key = (str(layer), entry)
    return key in DROPPED and (DROPPED[key] is ANY or DROPPED[key] == value)


def _sequential(node: dict[str, Any]) -> dict[str, Any]:
    """A Sequential model as a dict that begins with an `InputLayer`.

    Before Keras 2.2.3 it was a list of layers. An input shape that its first layer holds is read by Keras 3 with the batch axis
    twice.
    """
    config = node["config"] if isinstance(node["config"], dict) else {"layers": node["config"]}
    config = {"name": node.get("name", "sequential"), **config}
    first, *others = config["layers"] or [{}]
    shape = first.get("config", {}).get("batch_input_shape")
    if shape and first["class_name"] != "InputLayer":
        first = {**first, "config": {key: value for key, value in first["config"].items() if key != "batch_input_shape"}}
        entry = {
            "batch_shape": shape,
            "dtype": first["config"].get("dtype", "float32"),
            "name": f"{first['config']['name']}_input",
        }
        config = {**config, "layers": [{"class_name": "InputLayer", "config": entry}, first, *others]}
    return {**node, "config": config}


def _functional(node: dict[str, Any]) -> dict[str, Any]:
    """A functional model that returns its only output as a tensor, and numbers the calls of inner models as Keras 3 does.

    Keras 2 counted from 1. Keras 3 counts from 0, except for functional models among the outputs. Of a list of one output Keras 3
    returns a list, which no layer after it takes.
    """
    config = node["config"]
    layers = config.get("layers", [])
    kinds = {
        layer.get("name", layer["config"].get("name")): layer["class_name"] for layer in layers if layer["class_name"] in MODELS
    }
    references = [*(layer.get("inbound_nodes", []) for layer in layers), config["output_layers"]]
    calls = [(tensor[0], tensor[1]) for tensor in _tensors(references, kinds)]
    first = {name: min(call for inner, call in calls if inner == name) for name in {name for name, _ in calls}}
    sequential = {name: call for name, call in first.items() if kinds[name] == "Sequential"}
    layers = [{**layer, "inbound_nodes": _renumbered(layer.get("inbound_nodes", []), first)} for layer in layers]
    outputs = _renumbered(config["output_layers"], sequential)
    if isinstance(outputs, list) and len(outputs) == 1:
        outputs = outputs[0]
    return {**node, "config": {**config, "layers": layers, "output_layers": outputs}}


def _renumbered(part: Any, first: dict[str, int]) -> Any:
    """A part of a config in which the calls of some layers are numbered from 0, given their first numbers."""
    if isinstance(part, dict):
        return {key: _renumbered(value, first) for key, value in part.items()}
    if not isinstance(part, list):
        return part
    if _is_tensor(part, first):
        part = [part[0], part[1] - first[part[0]], *part[2:]]
    return [_renumbered(inner, first) for inner in part]


def _tensors(part: Any, layers: Container[str]) -> Iterator[list]:
    """The references to outputs of some layers, `[layer, number of its call, number of the output, …]`, in a config."""
    if isinstance(part, list) and _is_tensor(part, layers):
        yield part
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    for value in inner:
        yield from _tensors(value, layers)


def _is_tensor(part: list, layers: Container[str]) -> bool:
    return len(part) >= 3 and isinstance(part[0], str) and part[0] in layers and all(isinstance(n, int) for n in part[1:3])
