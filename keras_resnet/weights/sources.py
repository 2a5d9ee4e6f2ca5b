"""Named weights: files of other projects on the network, and those that lie in this package."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..checks import closest
from ..zoo.config import FAMILIES
from .download import fetch

# Prefix of the names of packaged weights.
OWN = "keras_resnet"
PACKAGED = resources.files(__package__) / "data"


@dataclass(frozen=True)
class WeightSource:
    """One set of weights under a name such as `"torchvision/resnet50.IMAGENET1K_V2"`: where it lies, and its card.

    Args:
        model: the variant it belongs to.
        url: where it lies.
        digest: sha256 (64 digits, or the leading ones that were published) or md5 (32 digits); None where none is published.
        num_classes: of its classifier; None is the variant's own number.
        preprocessing: mode, or `{"mean": …, "std": …}`.
        size: side of the images it was evaluated on.
        resize: shorter side before the centre crop; None stretches.
        interpolation: of that resizing.
        dataset: it was trained on.
        accuracy: published top-1 in percent at `size`, None where none is.
        licence: of the weights.
        page: where they are described.
        labels: class names, or None.
    """

    model: str
    url: str
    digest: str | None = None
    num_classes: int | None = None
    preprocessing: str | dict = "torch"
    size: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"
    dataset: str = "ImageNet-1k"
    accuracy: float | None = None
    licence: str = "unknown"
    page: str = ""
    labels: tuple[str, ...] | None = None

    @property
    def image(self) -> dict[str, Any]:
        """The part of a model card's `preprocessing` that this source decides."""
        return {"size": [self.size, self.size], "resize": self.resize, "interpolation": self.interpolation}


@functools.cache
def built_in_sources() -> dict[str, WeightSource]:
    """Name -> `WeightSource` of the table in `data/sources.json`."""
    table = json.loads((PACKAGED / "sources.json").read_text(encoding="utf-8"))
    return {name: WeightSource(**{**table["defaults"][name.split("/")[0]], **row}) for name, row in table["sources"].items()}


def all_sources(plugins: Iterable[tuple[str, Any]] = ()) -> dict[str, WeightSource]:
    """Name -> `WeightSource`, those of plug-ins included.

    Args:
        plugins: `(owner, Plugin)` pairs.

    Raises:
        ValueError: two owners declare one name.
    """
    found = {name: (source, "keras_resnet") for name, source in built_in_sources().items()}
    for owner, plugin in plugins:
        for name, source in plugin.sources.items():
            if name in found:
                raise ValueError(f"weights {name!r} are declared by {found[name][1]} and by {owner}; one must rename them")
            found[name] = (source, owner)
    return {name: source for name, (source, _) in found.items()}


def recognise(path: str | os.PathLike[str], model: str, sources: Mapping[str, WeightSource]) -> tuple[str, WeightSource] | None:
    """The source whose published sha256 a file has, so that its card comes along.

    Args:
        path: the file.
        model: name of the variant it is to be loaded into.
        sources: what `all_sources` gave.

    Returns:
        `(name, WeightSource)`, or None for a file of another or no source.

    Raises:
        ValueError: it is the file of another variant.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    matching = [(name, source) for name, source in sources.items() if source.digest and digest.startswith(source.digest)]
    own = next((item for item in matching if item[1].model == model), None)
    if matching and own is None and model not in FAMILIES:
        name, source = matching[0]
        raise ValueError(f"{path} is {name} and belongs to {source.model}, got the model {model!r}")
    return own


def packaged() -> dict[tuple[str, str], str]:
    """`(model, tag)` -> path of the weights in this package, e.g. for `("resnet20", "cifar10")`."""
    entries = sorted(PACKAGED.iterdir(), key=lambda entry: entry.name) if PACKAGED.is_dir() else ()
    found = {}
    for entry in entries:
        model, _, tag = entry.name.removesuffix(".safetensors").partition(".")
        if entry.name.endswith(".safetensors"):
            found[model, tag] = str(entry)
    return found


def locate(weights: str, model: str, sources: Mapping[str, WeightSource]) -> tuple[str, WeightSource | None]:
    """The file behind `weights=`, downloaded if it has to be.

    Args:
        weights: name of a source, or a tag of packaged weights (`"cifar10"`, in full `"keras_resnet/resnet20.cifar10"`).
        model: name of the variant.
        sources: what `all_sources` gave.

    Returns:
        `(path, WeightSource or None)`.

    Raises:
        ValueError: no such weights, or weights of another variant.
        ConnectionError: the download failed.
    """
    if weights in sources:
        source = sources[weights]
        if source.model != model:
            raise ValueError(f"weights {weights!r} belong to {source.model}, got the model {model!r}")
        return fetch(source.url, source.digest), source
    tags = {tag: path for (owner, tag), path in packaged().items() if owner == model}
    if (tag := weights.removeprefix(f"{OWN}/{model}.")) in tags:
        return tags[tag], None
    names = [*tags, *(name for name, source in sources.items() if source.model == model)]
    near = closest(weights, [*tags, *sources], count=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    have = ", ".join(names) if names else "none"
    raise ValueError(f"there is no file and no source of weights {weights!r} for {model}{hint}; it has: {have}")
