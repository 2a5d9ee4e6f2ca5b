"""Weights meet models: what `weights=` may be, what it decides about the model, and loading into one that exists."""

from __future__ import annotations

import difflib
import json
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from ..modelcard import card, set_card
from ..weights.files import SUFFIXES, WeightFile, open_weights
from ..weights.formats import safetensors
from ..weights.matching import WeightsMismatch, assign, class_count, match, variables_of
from ..weights.sources import WeightSource, locate, recognise
from ..zoo.config import Config, ResNetConfig, VGGConfig, config_from_dict, differences
from ..zoo.counting import arithmetic
from .build import outline

if TYPE_CHECKING:
    from ..modelcard import ModelCard


@dataclass(frozen=True)
class Pretrained:
    """A file of weights, and what is known about it beyond its arrays.

    Args:
        file: `WeightFile`.
        name: What the user called it.
        source: `WeightSource`, if it has a name.
    """

    file: WeightFile
    name: str
    source: WeightSource | None = None

    @property
    def preprocessing(self) -> str | dict[str, Any] | None:
        """Mode or numbers the network was trained with; None where nothing tells."""
        if self.source:
            return self.source.preprocessing
        return self.file.card.mode if self.file.card else self.file.checkpoint_format.preprocessing

    @property
    def image(self) -> dict[str, Any]:
        """How an image file becomes the input, for the card."""
        if self.source:
            return self.source.image
        if self.file.card:
            saved = self.file.card.preprocessing
            return {key: saved[key] for key in ("size", "resize", "interpolation") if key in saved}
        return self.file.checkpoint_format.image

    @property
    def labels(self) -> list[str] | None:
        """Class names, if the checkpoint format has them."""
        known = self.source or self.file.card or self.file.checkpoint_format
        return list(known.labels) if known.labels else None

    def num_classes(self, config: Config) -> int | None:
        """Return the number of classes of the file's classifier, else of its source or card; None if nothing states it.

        Args:
            config: Config of the model that the file is for.
        """
        if (count := class_count(self.file.arrays, self.file.checkpoint_format, config)) is not None:
            return count
        if self.source:
            return self.source.num_classes
        saved = self.file.card and self.file.card.config
        return saved["num_classes"] if saved else None

    def describe(self) -> dict[str, Any] | None:
        """Return the `weights` entry of the model card."""
        if self.source:
            keys = ("dataset", "accuracy", "licence", "page", "url")
            return {"source": self.name, **{key: getattr(self.source, key) for key in keys}}
        if self.file.card and self.file.card.weights:
            return self.file.card.weights
        known = self.file.checkpoint_format
        # Cards of version 0.1 have this key already.
        return {"source": os.path.basename(self.file.path), "origin": known.name, **known.card}


def find_weights(weights: str | os.PathLike[str], model: str, sources: Mapping[str, WeightSource]) -> Pretrained:
    """Return what `weights=` stands for: a path if there is such a file, else a named source, else a packaged tag.

    Args:
        weights: Path, name or tag.
        model: Name of the variant.
        sources: Name -> `WeightSource`.

    Raises:
        TypeError: `weights` is neither a string nor a path.
        FileNotFoundError, ValueError, ConnectionError: See `open_weights` and `locate`.
    """
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(f"`weights` must be None, a file, or a name from `list_weights()`, got {weights!r}")
    text = os.fspath(weights)
    if os.path.isfile(text) or (os.path.splitext(text)[1].lower() in SUFFIXES and text not in sources):
        file = open_weights(text)
        name, source = recognise(text, model, sources) or (text, None)
        return Pretrained(file, name, source)
    path, source = locate(text, model, sources)
    return Pretrained(open_weights(path), text, source)


def preprocessing_or_warn(pretrained: Pretrained) -> str | dict[str, Any]:
    """Return the mode that comes with the weights, or `"none"` and a warning where the file does not tell."""
    if pretrained.preprocessing is not None:
        return pretrained.preprocessing
    warnings.warn(
        f"{pretrained.name} does not say how its images were normalised, so numbers pass as they are; give `preprocessing=`",
        stacklevel=3,
    )
    return "none"


def fill(
    model: keras.Model,
    config: Config,
    pretrained: Pretrained,
    *,
    fresh_head: bool = False,
    kept_classes: dict[int, int] | None = None,
) -> None:
    """Load weights into a model, which may lack the head or later stages; args as in `assign`."""
    file, whole = pretrained.file, variables_of(outline(config))
    assign(
        model, config, file.arrays, file.checkpoint_format,
        whole=whole, fresh_head=fresh_head, kept_classes=kept_classes, source=pretrained.name,
    )  # fmt: skip


def kept_classes(old: list | None, new: list | None) -> dict[int, int] | None:
    """New class -> old class of the names that two lists share; None where the classifier is to be taken or left as a whole.

    Lists of one length whose shared names are in the same places are one list, some of whose names were changed.

    Args:
        old: Class names that come with the weights, or None.
        new: Class names that the model is to have, or None.
    """
    if not old or not new:
        return None
    places = {str(label): index for index, label in enumerate(old)}
    shared = {index: places[str(label)] for index, label in enumerate(new) if str(label) in places}
    if len(old) == len(new) and all(index == place for index, place in shared.items()):
        return None
    return shared


def check_variant(name: str, config: Config, pretrained: Pretrained, chosen: Collection[str] = ()) -> None:
    """Refuse weights of a variant that has the same shapes and other logits, if the file's checkpoint format or its card tells.

    Args:
        name: Name of the model they are to be loaded into.
        config: Its config.
        pretrained: The weights.
        chosen: Fields of the config that the caller set; where they differ from the card's there is a warning only.

    Raises:
        WeightsMismatch: The weights were trained in a network that computes something else; names the fields.
    """
    if reason := _refusal(config, pretrained, chosen):
        raise WeightsMismatch(f"{pretrained.name} {reason.format(name=name)}")
    saved = pretrained.file.card and pretrained.file.card.config
    if saved and (found := differences(saved, config)):
        warnings.warn(f"{pretrained.name} was trained with {'; '.join(found)}; loaded as asked", stacklevel=3)


def _refusal(config: Config, pretrained: Pretrained, chosen: Collection[str]) -> str | None:
    file = pretrained.file
    if reason := file.checkpoint_format.refusal(config, file.arrays):
        return f"({file.checkpoint_format.name}) does not belong to {{name}}: {reason}"
    saved = file.card and file.card.config
    if saved and (found := differences(saved, config, chosen)):
        hint = "; to load it all the same, give these fields as arguments" if saved.get("family") == config.family else ""
        return f"does not belong to {{name}}: it was trained with {'; '.join(found)}{hint}"
    return None


def fitting_variant(pretrained: Pretrained, name: str, configs: dict[str, Config]) -> str | None:
    """Find a variant that a file of weights fits, by trying.

    Args:
        pretrained: The weights.
        name: Name of the variant that they do not fit; those with similar names are tried first.
        configs: Name -> config of the variants to try, with as many classes as the file.

    Returns:
        Name of the first variant whose names and shapes the file has, and that its checkpoint format or card does not rule out,
            or None.
    """
    file = pretrained.file
    likeness = {other: difflib.SequenceMatcher(None, name, other).ratio() for other in configs}
    for other in sorted(configs, key=lambda other: (-likeness[other], other)):
        config = configs[other]
        if other == name or _refusal(config, pretrained, ()) or not _may_fit(config, file):
            continue
        if not match(outline(config), config, file.arrays, file.checkpoint_format).problems:
            return other
    return None


def _may_fit(config: Config, file: WeightFile) -> bool:
    """Whether a file has about as many numbers as a network; building all 170 variants to see takes a minute."""
    arrays = {key: array for key, array in file.arrays.items() if not re.fullmatch(file.checkpoint_format.ignored, key)}
    if bool(config.growth) != any("_grow" in key for key in arrays):
        return False
    if isinstance(config, ResNetConfig):
        # Some files have biases in front of a norm, which a network does without.
        return 0.98 < arithmetic(config).total / max(1, sum(array.size for array in arrays.values())) < 1.02
    first = arrays.get(file.checkpoint_format.translate(config, "block1_conv1", "bias"))
    return first is not None and isinstance(config, VGGConfig) and first.shape == (config.scaled(config.widths[0]),)


def load_weights(model: keras.Model, path: str | os.PathLike[str]) -> ModelCard:
    """Load a file into a zoo model that exists; unlike Keras' own method it knows foreign formats and names what does not fit.

    Args:
        model: A zoo model.
        path: See `keras_resnet.weights.files.open_weights`.

    Returns:
        The model's new card.

    Raises:
        ValueError: The model is not from this zoo, or the file does not fit; the model keeps its weights then.
    """
    known = card(model)
    if known is None or known.config is None:
        raise ValueError(f"model {model.name!r} is not from this zoo; load its weights with `model.load_weights`")
    pretrained = Pretrained(open_weights(path), os.fspath(path))
    config = config_from_dict(known.config)
    check_variant(model.name, config, pretrained)
    fill(model, config, pretrained)
    mode = pretrained.preprocessing
    if mode is not None and mode != known.mode:
        warnings.warn(f"{path} was trained with preprocessing {mode!r}, the model has {known.mode!r}", stacklevel=2)
    return set_card(model, weights=pretrained.describe())


def save_weights(model: keras.Model, path: str | os.PathLike[str], *, dtype: str | None = None) -> None:
    """Write weights and card of a zoo model as `.safetensors`, which other frameworks read too.

    Args:
        model: A model of the zoo, which may have been grown.
        path: File to write, which must end in `.safetensors`. It is replaced only once the new one is complete.
        dtype: `"float16"` halves the size: kernels are rounded; biases, norms and their statistics are not. None rounds nothing.

    Raises:
        ValueError: The ending or dtype is another, the model is not from the zoo, or a kernel exceeds the range of float16.
    """
    path, known = os.fspath(path), card(model)
    if not path.endswith(".safetensors"):
        raise ValueError(f"`path` must end in .safetensors, got {path}")
    if dtype not in (None, "float16"):
        raise ValueError(f'`dtype` must be None or "float16", got {dtype!r}')
    if known is None:
        raise ValueError(f"model {model.name!r} is not from this zoo; save it with `model.save`")
    arrays = {"/".join(name): ops.convert_to_numpy(variable) for name, variable in variables_of(model).items()}
    if dtype:
        arrays = {name: _halved(name, array) if array.ndim > 1 else array for name, array in arrays.items()}
    safetensors.write(path, arrays, {"card": json.dumps(known.to_dict(), sort_keys=True)})


def _halved(name, array):
    if not np.abs(array).max(initial=0) <= np.finfo("float16").max:
        raise ValueError(f'`dtype` "float16" cannot hold {name}, whose largest number is {np.abs(array).max():.3g}')
    return array.astype("float16")
