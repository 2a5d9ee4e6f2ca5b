"""The card of a model, which says what the model is. A `Card` layer stores it, so that it survives save, grow and clone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import keras

from .layers import Card


@dataclass(frozen=True)
class ModelCard:
    """Name, architecture, input treatment, labels and weight source of a model. All fields are plain JSON values.

    Args:
        name: Name of the model, e.g. `"resnet50"`.
        config: Config of the architecture as a dict, or None for a model from elsewhere.
        preprocessing: `{"mode", "size": [H, W] | None, "resize": int | None, "interpolation"}`. `mode` is what the first
            layers of the model do to pixels 0–255. The rest is how an image file becomes `size` pixels: its shorter side is
            resized to `resize` and the centre is cropped, or the image is stretched to `size` if `resize` is None.
        labels: Class names in the order of the logits, or None.
        weights: Card of the weights (`source`, `dataset`, `accuracy`, `licence` …), or None for random weights.
    """

    name: str
    config: dict[str, Any] | None = None
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=lambda: preprocessing_card())
    labels: list[str] | None = None
    weights: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelCard:
        if not isinstance(data, dict) or "name" not in data:
            raise ValueError(f"a card must be a dict with a `name`, got {data!r:.80}")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})

    def replace(self, **changes: Any) -> ModelCard:
        return dataclasses.replace(self, **changes)

    @property
    def mode(self) -> str | dict[str, Any]:
        """The preprocessing as `create_model(preprocessing=…)` takes it: a mode, or the numbers of a custom one."""
        mode = self.preprocessing["mode"]
        return mode if mode != "custom" else {key: self.preprocessing[key] for key in ("mean", "std", "bgr")}


def check_labels(labels: Iterable[str], num_classes: int | None = None) -> list[str]:
    """Return class names as a list of strings.

    Args:
        labels: Class names in the order of the logits.
        num_classes: Number of names that there must be. Default: any.

    Raises:
        ValueError: `labels` is not a list, or does not have one name per logit.
    """
    if isinstance(labels, str | dict) or not isinstance(labels, Sized):
        raise ValueError(f"`labels` must be a list of class names, got {labels!r}")
    if num_classes is not None and len(labels) != num_classes:
        raise ValueError(f"`labels` must have one name per logit ({num_classes}), got {len(labels)}")
    return [str(label) for label in labels]


def preprocessing_card(
    mode: str = "none", size: Sequence[int] | None = None, resize: int | None = None, interpolation: str = "bilinear"
) -> dict[str, Any]:
    """Make the entry of a card that says how an image becomes the input of the model; see `ModelCard`."""
    return {"mode": mode, "size": size, "resize": resize, "interpolation": interpolation}


def card_layer(model: keras.Model) -> keras.Layer | None:
    """Find the `Card` layer of a model, depth-first through nested models. None if there is none."""
    for layer in model.layers:
        if isinstance(layer, Card):
            return layer
        if isinstance(layer, keras.Model) and (found := card_layer(layer)) is not None:
            return found
    return None


def card(model: keras.Model) -> ModelCard | None:
    """Return the card of a model, or None for a model without one, which was not built with this package."""
    layer = card_layer(model)
    return None if layer is None else ModelCard.from_dict(layer.card)


def set_card(model: keras.Model, **changes: Any) -> ModelCard:
    """Change fields of a model's card in place.

    Args:
        model: Model with a card.
        **changes: Fields of `ModelCard`.

    Returns:
        The new card.

    Raises:
        ValueError: The model has no card, a card has no such field, or there is not one label per logit.
    """
    fields = {field.name for field in dataclasses.fields(ModelCard)}
    if unknown := set(changes) - fields:
        raise ValueError(f"a card has no field {', '.join(sorted(unknown))}; it has {', '.join(sorted(fields))}")
    layer = card_layer(model)
    if layer is None:
        raise ValueError(
            f"model {model.name!r} has no card; build it with keras_resnet, or make a copy that has one: "
            "`keras_resnet.with_card(model)`"
        )
    new = ModelCard.from_dict(layer.card).replace(**changes)
    if changes.get("labels") is not None:
        shapes = [tensor.shape for tensor in model.outputs]
        one_logit_each = len(shapes) == 1 and len(shapes[0]) == 2
        binary = one_logit_each and shapes[0][-1] == 1 and len(new.labels) == 2
        new = new.replace(labels=check_labels(new.labels, shapes[0][-1] if one_logit_each and not binary else None))
    layer.card = new.to_dict()
    return new
