"""Named weights: files of other projects that are downloaded, and files in this package."""

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
    """A set of weights with a name such as `"torchvision/resnet50.IMAGENET1K_V2"`: its address and its card.

    Args:
        model: Name of the variant that the weights belong to.
        url: Address of the file.
        digest: Sha256 (64 digits, or the leading ones that were published) or md5 (32 digits). None if none is published.
        num_classes: Number of classes of the classifier. None is the variant's own number.
        preprocessing: Mode, or `{"mean": …, "std": …}`.
        size: Side of the images that the weights were evaluated on, in pixels.
        resize: Shorter side before the centre crop, in pixels. None stretches the image.
        interpolation: Interpolation of that resizing.
        dataset: Data set that the weights were trained on.
        accuracy: Published top-1 accuracy in per cent at `size`, or None.
        licence: Licence of the weights.
        page: Address of their description.
        labels: Class names, or None.
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
        """What the source decides about `preprocessing` in the card of a model."""
        return {"size": [self.size, self.size], "resize": self.resize, "interpolation": self.interpolation}


@functools.cache
def built_in_sources() -> dict[str, WeightSource]:
    """Return `{name: WeightSource}` of the table in `data/sources.json`."""
    table = json.loads((PACKAGED / "sources.json").read_text(encoding="utf-8"))
    return {name: WeightSource(**{**table["defaults"][name.split("/")[0]], **row}) for name, row in table["sources"].items()}


def all_sources(plugins: Iterable[tuple[str, Any]] = ()) -> dict[str, WeightSource]:
    """Return `{name: WeightSource}`, including those of plug-ins.

    Args:
        plugins: Pairs `(owner, Plugin)`.

    Raises:
        ValueError: Two owners declare one name.
    """
    found = {name: (source, "keras_resnet") for name, source in built_in_sources().items()}
    for owner, plugin in plugins:
        for name, source in plugin.sources.items():
            if name in found:
                raise ValueError(f"weights {name!r} are declared by {found[name][1]} and by {owner}; one must rename them")
            found[name] = (source, owner)
    return {name: source for name, (source, _) in found.items()}


def recognise(path: str | os.PathLike[str], model: str, sources: Mapping[str, WeightSource]) -> tuple[str, WeightSource] | None:
    """Find the source whose published sha256 a file has, since its card is then known too.

    Args:
        path: The file.
        model: Name of the variant that it is loaded into.
        sources: Result of `all_sources`.

    Returns:
        `(name, WeightSource)`, or None if the file is from no source.

    Raises:
        ValueError: The file belongs to another variant.
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
    """Return `(model, tag)` -> path of the weights in this package, e.g. for `("resnet20", "cifar10")`."""
    entries = sorted(PACKAGED.iterdir(), key=lambda entry: entry.name) if PACKAGED.is_dir() else ()
    found = {}
    for entry in entries:
        model, _, tag = entry.name.removesuffix(".safetensors").partition(".")
        if entry.name.endswith(".safetensors"):
            found[model, tag] = str(entry)
    return found


def locate(weights: str, model: str, sources: Mapping[str, WeightSource]) -> tuple[str, WeightSource | None]:
    """Find the file that `weights=` names, and download it if necessary.

    Args:
        weights: Name of a source, or tag of packaged weights (`"cifar10"`, in full `"keras_resnet/resnet20.cifar10"`).
        model: Name of the variant.
        sources: Result of `all_sources`.

    Returns:
        `(path, WeightSource or None)`.

    Raises:
        ValueError: There are no such weights, or they belong to another variant.
        ConnectionError: The download failed.
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
