"""Weights meet models: what `weights=` may be, what it decides about the model, and loading into one that exists."""

import json
import os
import warnings
from dataclasses import dataclass

from keras import ops

from .build import outline
from .config import config_from_dict
from .modelcard import card, set_card
from .weights import safetensors
from .weights.files import WeightFile, open_weights
from .weights.matching import assign, variables_of
from .weights.sources import WeightSource, locate, recognise


@dataclass(frozen=True)
class Pretrained:
    """A file of weights, and what is known about it beyond its arrays.

    Args:
        file: `WeightFile`.
        name: what the user called it.
        source: `WeightSource`, if it has a name.
    """

    file: WeightFile
    name: str
    source: WeightSource | None = None

    @property
    def preprocessing(self):
        """Mode or numbers the network was trained with; None where nothing tells."""
        if self.source:
            return self.source.preprocessing
        if self.file.card and self.file.card.get("preprocessing"):
            saved = self.file.card["preprocessing"]
            if saved["mode"] != "custom":
                return saved["mode"]
            return {key: saved[key] for key in ("mean", "std", "bgr")}
        return self.file.origin.preprocessing

    @property
    def image(self):
        """How an image file becomes the input, for the card."""
        if self.source:
            return self.source.image
        if self.file.card:
            saved = self.file.card.get("preprocessing") or {}
            return {key: saved[key] for key in ("size", "resize", "interpolation") if key in saved}
        return self.file.origin.image

    @property
    def labels(self):
        """Class names, if the origin has them."""
        if self.source:
            labels = self.source.labels
        else:
            labels = (self.file.card or {}).get("labels") or self.file.origin.labels
        return list(labels) if labels else None

    def describe(self):
        """The `weights` entry of the model card."""
        if self.source:
            keys = ("dataset", "accuracy", "licence", "page", "url")
            return {"source": self.name, **{key: getattr(self.source, key) for key in keys}}
        saved = (self.file.card or {}).get("weights")
        return saved or {"source": os.path.basename(self.file.path), "origin": self.file.origin.name, **self.file.origin.card}


def find_weights(weights, model, sources):
    """What `weights=` stands for: a path if there is such a file, else a named source, else a packaged tag.

    Args:
        weights: path, name or tag.
        model: name of the variant.
        sources: name -> `WeightSource`.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: see `open_weights` and `locate`.
    """
    text = os.fspath(weights)
    if os.path.isfile(text) or (os.path.splitext(text)[1] in FILE_ENDINGS and text not in sources):
        file = open_weights(text)
        name, source = recognise(text, model, sources) or (text, None)
        return Pretrained(file, name, source)
    path, source = locate(text, model, sources)
    return Pretrained(open_weights(path), text, source)


FILE_ENDINGS = (".pth", ".pt", ".th", ".safetensors", ".h5", ".keras", ".npz")


def preprocessing_or_warn(pretrained):
    """The mode that comes with the weights, or `"none"` and a warning where the file does not tell."""
    if pretrained.preprocessing is not None:
        return pretrained.preprocessing
    warnings.warn(
        f"{pretrained.name} does not say how its images were normalised, so numbers pass as they are; give `preprocessing=`",
        stacklevel=3,
    )
    return "none"


def fill(model, config, pretrained, *, fresh_head=False):
    """Load weights into a newly built model, which may lack the head or later stages."""
    file, whole = pretrained.file, variables_of(outline(config))
    assign(model, config, file.arrays, file.origin, whole=whole, fresh_head=fresh_head, source=pretrained.name)


def load_weights(model, path):
    """Load a file into a zoo model that exists; unlike Keras' own method it knows foreign formats and names what does not fit.

    Args:
        model: a zoo model.
        path: see `keras_resnet.weights.files.open_weights`.

    Returns:
        The model's new card.

    Raises:
        ValueError: the model is not from this zoo, or the file does not fit; the model keeps its weights then.
    """
    known = card(model)
    if known is None or known.config is None:
        raise ValueError(f"model {model.name!r} is not from this zoo; load its weights with `model.load_weights`")
    pretrained = Pretrained(open_weights(path), os.fspath(path))
    fill(model, config_from_dict(known.config), pretrained)
    mode = pretrained.preprocessing
    if mode is not None and mode != known.preprocessing["mode"] and not isinstance(mode, dict):
        warnings.warn(
            f"{path} was trained with preprocessing {mode!r}, the model has {known.preprocessing['mode']!r}", stacklevel=2
        )
    return set_card(model, weights=pretrained.describe())


def save_weights(model, path):
    """Write weights and card of a zoo model as `.safetensors`, which other frameworks read too.

    Args:
        model: a zoo model.
        path: must end in `.safetensors`; written beside it first, then renamed.

    Raises:
        ValueError: another ending, or no zoo model.
    """
    path, known = os.fspath(path), card(model)
    if not path.endswith(".safetensors"):
        raise ValueError(f"`path` must end in .safetensors, got {path}")
    if known is None:
        raise ValueError(f"model {model.name!r} is not from this zoo; save it with `model.save`")
    arrays = {"/".join(name): ops.convert_to_numpy(variable) for name, variable in variables_of(model).items()}
    safetensors.write(path, arrays, {"card": json.dumps(known.to_dict(), sort_keys=True)})
