"""What an exported file says about itself: written here, read by `artifact`."""

from __future__ import annotations

import hashlib
import json
import warnings
from importlib import metadata as distributions
from typing import TYPE_CHECKING, Any

import numpy as np

from . import artifact
from .conversion.prepare import Prepared
from .conversion.signature import Signature, image_preprocessing
from .errors import UsageError
from .options import ExportOptions

if TYPE_CHECKING:
    import keras
    import onnx_ir as ir

# Bound of max |difference| relative to the scale of the output; int8 has bounds on agreement instead.
TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "int8": None}


def metadata_of(
    prepared: Prepared, options: ExportOptions, labels: list[str] | None = None, precision: str = "float32"
) -> dict[str, Any]:
    """Return the metadata of a file; see `artifact` for the keys.

    Raises:
        UsageError: The number of labels is not the number of classes.
    """
    return {
        "card": card_of(prepared.signature, labels),
        "options": options.changed(),
        "outputs": prepared.signature.kinds(),
        "sha256": model_digest(prepared.signature.model),
        "tolerances": {"relative": TOLERANCES[precision], "precision": precision},
        "versions": versions(),
    }


def stamp(model: ir.Model, metadata: dict[str, Any]) -> None:
    """Put metadata into an onnx-ir model."""
    model.metadata_props.clear()
    model.metadata_props.update(artifact.encode_metadata(metadata))


def card_of(signature: Signature, labels: list[str] | None = None) -> dict[str, Any]:
    """Return the model's card as a dict, with the input's size and the labels filled in; models from elsewhere get a plain one.

    Raises:
        UsageError: The number of labels is not the number of classes.
    """
    from keras_resnet.modelcard import ModelCard, card

    found = card(signature.model) or ModelCard(signature.model.name)
    labels = list(labels) if labels is not None else found.labels
    if labels is not None:
        _check_labels(signature, labels)
    preprocessing = image_preprocessing(signature.model)
    if signature.fit:  # what is left to do outside the graph
        preprocessing |= {"size": None, "resize": None}
    return found.replace(preprocessing=preprocessing, labels=labels).to_dict()


def _check_labels(signature: Signature, labels: list[str]) -> None:
    """One label per class of each output that scores classes; two for a single sigmoid unit."""
    for output in signature.outputs:
        if output.kind == "other" or output.source not in ("model", "softmax", "logits"):
            continue
        units = signature.model.outputs[output.index].shape[-1]
        classes = 2 if output.kind == "binary" else units
        if len(labels) != classes:
            raise UsageError(f"`labels` must name the {classes} classes of the output `{output.name}`, got {len(labels)}")


def model_digest(model: keras.Model) -> str:
    """sha256 over a model's config and its weights in order, hexadecimal; of a model without a config, over its layers' names."""
    from keras_resnet.graphs import layers_in

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of lambdas, which are not loaded here
            config = model.get_config()
    except Exception:  # a layer of the user's own without `get_config`, which does not have to be serialisable for an export
        config = [(type(layer).__name__, layer.name) for layer in layers_in(model)]
    total = hashlib.sha256(json.dumps(config, sort_keys=True, default=lambda thing: type(thing).__name__).encode())
    for variable in model.weights:
        total.update(np.ascontiguousarray(variable.numpy()).data)
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what made the file."""
    from keras_resnet._version import __version__

    return {"keras_resnet_export": __version__} | {
        name: distributions.version(name) for name in ("keras", "onnx", "onnx-ir", "tensorflow", "tf2onnx")
    }
