"""The description of a checkpoint family: how to recognise its files, and how its arrays are named and laid out."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...zoo.config import Config

Arrays = Mapping[str, np.ndarray]

# Keras' names of variables -> those of torch's modules.
TORCH_VARIABLES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


@dataclass(frozen=True)
class CheckpointFormat:
    """A family of checkpoints.

    Attributes:
        name: Name of the family, as the card of a model stores it.
        recognises: `arrays -> bool`: whether a file belongs to the family, by its names and shapes.
        translate: `(config, layer, variable) -> name`: the family's name of a variable of this package.
        family: Family of the configs of its networks (`"resnet"`, `"vgg"`); None for both.
        torch_layout: Whether kernels are laid out as `(out, in, *sides)`, and dense rows run over channels first.
        ignored: Pattern of names that are not weights.
        fits: `(config, arrays) -> reason`: why a file cannot belong to a config although its shapes fit, or None.
        preprocessing: Preprocessing mode of its networks; None if the family does not say.
        card: Further entries of the weights' card.
        image: How an image file becomes the input, for the card of a model.
        labels: Class names, if all networks of the family have the same.
    """

    name: str
    recognises: Callable[[Arrays], bool]
    translate: Callable[[Config, str, str], str]
    family: str | None = None
    torch_layout: bool = False
    ignored: str = r"$^"
    fits: Callable[[Config, Arrays], str | None] = lambda config, arrays: None
    preprocessing: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None

    def refusal(self, config: Config, arrays: Arrays) -> str | None:
        """Return why a file of this family cannot belong to a config, although its shapes may fit, or None."""
        if self.family not in (None, config.family):
            return f"it holds a {self.family} network, the model is a {config.family}"
        return self.fits(config, arrays)


def by_rules(rules: Mapping[str, str], layer: str) -> str:
    """Translate a layer's name by the first rule whose pattern matches the whole name. Other names stay as they are.

    Args:
        rules: Pattern -> template, e.g. `r"stage(\\d+)_block(\\d+)_conv(\\d)"` -> `"layer{0}.{1-1}.conv{2}"`. `{1}` is the second
            group of the pattern, `{1-1}` that number less one.
        layer: Name of the layer in this package.
    """
    for pattern, template in rules.items():
        if match := re.fullmatch(pattern, layer):
            return re.sub(r"\{(\d)([+-]\d)?\}", lambda hole: _fill(match.groups(), hole), template)
    return layer


def _fill(groups: tuple[str, ...], hole: re.Match) -> str:
    value, shift = groups[int(hole[1])], hole[2]
    return str(int(value) + int(shift)) if shift else value
