"""What is known about a place weights come from: how it names and lays out its arrays, and what its networks are like."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


# Names of a torch module's arrays by ours.
TORCH_VARIABLES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


@dataclass(frozen=True)
class Origin:
    """One place weights come from.

    Args:
        name: as it stands in the card.
        recognises: whether arrays (name -> array) are from there.
        translate: `(config, layer name, variable name)` -> the origin's name for it.
        family: of its networks' configs; None for both.
        torch_layout: kernels are (out, in, sides) and dense rows run over channels first.
        ignored: pattern of names that are no weights.
        fits: `(config, arrays)` -> None, or why this file cannot belong to that config although its shapes would fit.
        preprocessing: mode its networks were trained with; None where the file does not tell.
        card: further entries of the weights' card.
        image: how an image file becomes the input, for the model's card.
        labels: class names, where the origin has one data set.
    """

    name: str
    recognises: Callable
    translate: Callable
    family: str | None = None
    torch_layout: bool = False
    ignored: str = r"$^"
    fits: Callable = lambda config, arrays: None
    preprocessing: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None

    def refusal(self, config: Any, arrays: Mapping[str, np.ndarray]) -> str | None:
        """Why a file from here cannot belong to a config, although its shapes may fit, or None."""
        if self.family not in (None, config.family):
            return f"it holds a {self.family} network, the model is a {config.family}"
        return self.fits(config, arrays)


def by_rules(rules: Mapping[str, str], layer: str) -> str:
    """The first rule whose pattern matches the whole layer name, filled in; numbers in `{n-1}` style count from 0.

    Args:
        rules: pattern -> template, e.g. `r"stage(\\d+)_block(\\d+)_conv(\\d)"` -> `"layer{0}.{1-1}.conv{2}"`.
        layer: our name.
    """
    for pattern, template in rules.items():
        if match := re.fullmatch(pattern, layer):
            return re.sub(r"\{(\d)([+-]\d)?\}", lambda hole: _fill(match.groups(), hole), template)
    return layer


def _fill(groups, hole):
    value, shift = groups[int(hole[1])], hole[2]
    return str(int(value) + int(shift)) if shift else value
