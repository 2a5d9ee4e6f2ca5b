"""Fine-tuning helpers: another classifier on the same trunk, and batch norm that stays as it is."""

import keras

from .config import config_from_dict
from .graphs import producer
from .growth.surgery import copy_model
from .modelcard import card, set_card


def replace_head(model, num_classes, *, labels=None):
    """A copy of a classifier with a new last dense layer; the trunk keeps its weights, and the original is not touched.

    Args:
        model: any Functional or Sequential classifier that ends in a dense layer, perhaps with a softmax behind it; grown
            models too.
        num_classes: logits of the new layer.
        labels: class names for the card, in order; None clears them.

    Returns:
        A new uncompiled model. It has logits even where the original had a softmax.

    Raises:
        ValueError: the model has several outputs or does not end in a dense layer, or the labels are not `num_classes`.
    """
    if labels is not None and len(labels) != num_classes:
        raise ValueError(f"`labels` must have {num_classes} names, got {len(labels)}")
    top = _classifier(model)
    closing = {id(producer(tensor).operation) for tensor in model.outputs} - {id(top)}

    def rewrite(graph, node, inputs, outputs):
        if node.operation is top:
            config = {**top.get_config(), "units": num_classes, "activation": "linear"}
            return keras.layers.Dense.from_config(config)(inputs[0])
        return inputs[0] if id(node.operation) in closing else outputs

    copied = copy_model(model, rewrite)
    known = card(copied)
    if known is not None:
        config = config_from_dict(known.config).replace(num_classes=num_classes).to_dict() if known.config else None
        set_card(copied, config=config, labels=None if labels is None else list(labels))
    return copied


def _classifier(model):
    if len(model.outputs) != 1:
        raise ValueError(f"`model` must have one output, got {len(model.outputs)}")
    layer = producer(model.outputs[0]).operation
    if isinstance(layer, keras.layers.Activation | keras.layers.Softmax):
        layer = producer(layer.input).operation
    if not isinstance(layer, keras.layers.Dense):
        raise ValueError(f"`model` must end in a dense layer, got {type(layer).__name__} {layer.name!r}")
    return layer


def freeze_batch_norm(model, frozen=True):
    """Pin all batch norms to their moving statistics, also in training; γ and β are not trained either.

    Keras takes `trainable = False` of a batch norm for inference mode, unlike other layers, and only until a parent's
    `trainable` is set: call this last, and compile again.

    Args:
        model: any model, nested ones included.
        frozen: False thaws them.

    Returns:
        How many batch norms there are.
    """
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in norms:
        layer.trainable = not frozen
    return len(norms)
