"""Named weights: files of other projects on the network, and those that lie in this package."""

import difflib
import fnmatch
import functools
import hashlib
import json
from dataclasses import dataclass
from importlib import resources

from .download import fetch

PACKAGED = resources.files(__package__) / "data"


@dataclass(frozen=True)
class WeightSource:
    """One set of weights under a name such as `"torchvision/resnet50.IMAGENET1K_V2"`: where it lies, and its card.

    Args:
        model: the variant it belongs to.
        url: where it lies.
        digest: sha256 (64 digits, or the leading ones that were published) or md5 (32 digits); None where none is published.
        num_classes: of its classifier.
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
    num_classes: int = 1000
    preprocessing: str | dict = "torch"
    size: int = 224
    resize: int | None = None
    interpolation: str = "bilinear"
    dataset: str = "ImageNet-1k"
    accuracy: float | None = None
    licence: str = "unknown"
    page: str = ""
    labels: tuple | None = None

    @property
    def image(self):
        """The part of a model card's `preprocessing` that this source decides."""
        return {"size": [self.size, self.size], "resize": self.resize, "interpolation": self.interpolation}


@functools.cache
def built_in_sources():
    """Name -> `WeightSource` of the table in `data/sources.json`."""
    table = json.loads((PACKAGED / "sources.json").read_text(encoding="utf-8"))
    return {name: WeightSource(**{**table["defaults"][name.split("/")[0]], **row}) for name, row in table["sources"].items()}


def all_sources(plugins=()):
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


def recognise(path, model, sources):
    """`(name, WeightSource)` of a variant's source whose published sha256 a file has, so that its card comes along, or None."""
    published = {name: source for name, source in sources.items() if source.model == model and source.digest}
    if not published:
        return None
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return next(((name, source) for name, source in published.items() if digest.startswith(source.digest)), None)


def packaged(model):
    """Tag -> path of the weights in this package for a variant, e.g. `"cifar10"`."""
    if not PACKAGED.is_dir():
        return {}
    names = [entry.name for entry in PACKAGED.iterdir() if fnmatch.fnmatch(entry.name, f"{model}.*.safetensors")]
    return {name.removeprefix(f"{model}.").removesuffix(".safetensors"): str(PACKAGED / name) for name in sorted(names)}


def locate(weights, model, sources):
    """The file behind `weights=`, downloaded if it has to be.

    Args:
        weights: name of a source, or a tag of packaged weights.
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
    tags = packaged(model)
    if weights in tags:
        return tags[weights], None
    known = [*tags, *(name for name, source in sources.items() if source.model == model)]
    near = difflib.get_close_matches(weights, [*tags, *sources], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    have = ", ".join(known) if known else "none"
    raise ValueError(f"there is no file and no source of weights {weights!r} for {model}{hint}; it has: {have}")
