"""What a model knows about itself, and where it is kept: in a `Card` layer, so that it survives save, grow and clone."""

import dataclasses
from dataclasses import dataclass

import keras

from .layers import Card


@dataclass(frozen=True)
class ModelCard:
    """Name, architecture, input treatment, labels and weight source of a model. All fields are plain JSON values.

    Args:
        name: model name, e.g. `"resnet50"`.
        config: the architecture's config as a dict, or None for models from elsewhere.
        preprocessing: `{"mode", "size": [H, W] | None, "resize": int | None, "interpolation"}`; `mode` is what the model's
            first layers do to pixels 0–255; the rest is how an image file becomes `size` pixels: shorter side to `resize`
            and centre crop, or, where `resize` is None, stretched to `size`.
        labels: class names in the order of the logits, or None.
        weights: the weights' own card (`source`, `dataset`, `accuracy`, `licence` …), or None for random weights.
    """

    name: str
    config: dict | None = None
    preprocessing: dict = dataclasses.field(default_factory=lambda: preprocessing_card())
    labels: list | None = None
    weights: dict | None = None

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data):
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def preprocessing_card(mode="none", size=None, resize=None, interpolation="bilinear"):
    """The card's entry on how an image becomes the model's input; see `ModelCard`."""
    return {"mode": mode, "size": size, "resize": resize, "interpolation": interpolation}


def card_layer(model):
    """The model's `Card` layer, searched depth-first through nested models, or None."""
    for layer in model.layers:
        if isinstance(layer, Card):
            return layer
        if isinstance(layer, keras.Model) and (found := card_layer(layer)) is not None:
            return found
    return None


def card(model):
    """The `ModelCard` of a model, or None if it carries none (a model from elsewhere)."""
    layer = card_layer(model)
    return None if layer is None else ModelCard.from_dict(layer.card)


def set_card(model, **changes):
    """Change fields of the model's card in place and return the new `ModelCard`.

    Raises:
        ValueError: the model carries no card, or a card has no such field.
    """
    fields = {field.name for field in dataclasses.fields(ModelCard)}
    if unknown := set(changes) - fields:
        raise ValueError(f"a card has no field {', '.join(sorted(unknown))}; it has {', '.join(sorted(fields))}")
    if changes.get("labels") is not None:
        changes["labels"] = [str(label) for label in changes["labels"]]
    layer = card_layer(model)
    if layer is None:
        raise ValueError(
            f"model {model.name!r} carries no card; build it with keras_resnet, "
            "or put a `keras_resnet.layers.Card` behind its input"
        )
    new = ModelCard.from_dict(layer.card).replace(**changes)
    layer.card = new.to_dict()
    return new
