"""Fine-tuning helpers: a new classifier on a pretrained backbone, preprocessing and a card in front of it, frozen batch norm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers, ops

from ..checks import positive_integer, sides_and_channels
from ..graphs import data_format_at, final_activation, graph_of, layers_in, output_heads, producer, replay, require_graph
from ..growth.surgery import copy_model
from ..layers import Card
from ..modelcard import ModelCard, card, card_layer, check_labels, preprocessing_card, set_card
from ..preprocessing import Preprocessing
from ..zoo.config import config_from_dict

DROPOUTS = (layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D)
POOLS = tuple(getattr(layers, f"Global{kind}Pooling{rank}D") for kind in ("Average", "Max") for rank in (1, 2, 3))
CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)


def replace_head(model: keras.Model, num_classes: int, *, labels: Sequence[str] | None = None) -> keras.Model:
    """Copy a classifier or backbone and give it a new classifier; the backbone keeps its weights.

    What is replaced is the last dense layer, or the last convolution of a network that ends in one (MobileNet, SqueezeNet),
    with the softmax or sigmoid after it. A model without a classifier (`include_top=False`) gets one: an average over all
    positions and a dense layer. A last dense layer or convolution with ReLU counts as part of the backbone, unless a softmax
    follows.

    Args:
        model: Functional or Sequential model with one output, grown ones too. It is not changed.
        num_classes: Number of logits of the new layer.
        labels: Class names, in order. They go into the model's card, which is added where it is missing. Classes that the old
            card names too keep their weights. None clears the names.

    Returns:
        A new uncompiled model, which gives logits also where the original had a softmax.

    Raises:
        ValueError: The model has several outputs, or gives a class for every pixel; or the labels are not `num_classes`.
    """
    num_classes = positive_integer("num_classes", num_classes)
    if labels is not None:
        if len(labels) != num_classes:
            raise ValueError(f"`labels` must have {num_classes} names, got {len(labels)}")
        labels = check_labels(labels, num_classes)
    require_graph(model)
    if len(model.outputs) != 1:
        raise ValueError(f"`model` must have one output, got {len(model.outputs)}")
    copied = copy_model(model)
    head = _find_head(copied)
    logits = _new_head(copied, head, num_classes, _kept_classes(copied, labels))
    replaced = copy_model(keras.Model(copied.input, logits, name=model.name))
    known = card(replaced)
    if known is None:
        return replaced if labels is None else with_card(replaced, labels=labels)
    set_card(replaced, config=_config_with_head(known, head, num_classes), labels=labels)
    return replaced


@dataclass(frozen=True)
class _Head:
    """Where a model's classifier begins.

    Attributes:
        layer: The dense layer or convolution to replace; None for a model without a classifier.
        features: The tensor that the new classifier takes.
        between: Pooling layers and rectifiers between `layer` and the logits.
        outer: Calls of nested models around `features`, the outermost first.
    """

    layer: keras.Layer | None
    features: keras.KerasTensor
    between: tuple = ()
    outer: tuple = ()


def _find_head(model: keras.Model) -> _Head:
    result = model.outputs[0]
    heads = output_heads(model)
    if len(result.shape) > 2 and heads[0].activation:
        raise ValueError(
            f"`model` gives {heads[0].activation} values at every position (shape {tuple(result.shape)}), so it is not an image "
            "classifier; give the model without its last layers"
        )
    tensor, passed, outer = result, [], []
    while (node := producer(tensor)) is not None and not node.is_input:
        operation = node.operation
        if isinstance(operation, keras.Model) and (inner := graph_of(operation)) is not None:
            outer.append(node)
            tensor = inner.outputs[[id(output) for output in node.outputs].index(id(tensor))]
            continue
        if _is_classifier(operation, passed, heads[0].activation, len(result.shape)):
            between = tuple(part for part in reversed(passed) if isinstance(part, POOLS) or _rectifies(part))
            return _Head(operation, node.input_tensors[0], between, tuple(outer))
        if not _closes(operation) or len(node.input_tensors) != 1:
            break
        passed.append(operation)
        tensor = node.input_tensors[0]
    return _Head(None, result)


def _is_classifier(operation: Any, passed: list, activation: str | None, rank: int) -> bool:
    """Whether an operation is the weighted layer of a classifier, given what comes after it."""
    if rank != 2 or not isinstance(operation, (layers.Dense, *CONVOLUTIONS)):
        return False
    hidden = _rectifies(operation) or any(map(_rectifies, passed))
    return activation is not None or not hidden


def _rectifies(operation: Any) -> bool:
    """Whether an operation ends in an activation that features have and logits do not."""
    if isinstance(operation, layers.ReLU):
        return True
    function = getattr(operation, "activation", None)
    return callable(function) and getattr(function, "__name__", "") not in ("linear", "softmax", "sigmoid")


def _closes(operation: Any) -> bool:
    """Whether an operation may come after the weighted layer of a classifier."""
    kinds = (layers.Activation, layers.Softmax, layers.ReLU, layers.Reshape, layers.Flatten, layers.Identity, *DROPOUTS, *POOLS)
    return isinstance(operation, kinds) or final_activation(operation) is not None or type(operation).__name__ == "Reshape"


def _new_head(model: keras.Model, head: _Head, num_classes: int, kept: dict[int, int]) -> keras.KerasTensor:
    """The logits of a new classifier on a copy's features."""
    x = _outermost(model, head)
    if head.layer is None:
        x = _pooled(x, data_format_at(model.outputs[0], graph_of(model)), _free_name(model, "avg_pool"))
        return layers.Dense(num_classes, dtype="float32", name=_free_name(model, "predictions"))(x)
    size = "units" if isinstance(head.layer, layers.Dense) else "filters"
    new = type(head.layer).from_config({**head.layer.get_config(), size: num_classes, "activation": "linear"})
    x = new(x)
    for name in ("kernel", "bias"):
        if kept and getattr(new, name, None) is not None:
            values = ops.convert_to_numpy(getattr(new, name)).copy()
            values[..., list(kept)] = ops.convert_to_numpy(getattr(head.layer, name))[..., list(kept.values())]
            getattr(new, name).assign(values)
    for part in head.between:
        x = type(part).from_config(part.get_config())(x)
    return _pooled(x, getattr(new, "data_format", "channels_last"), _free_name(model, "logits_pool"))


def _outermost(model: keras.Model, head: _Head) -> keras.KerasTensor:
    """The features as a tensor of the model itself, where they belong to a nested model too."""
    features = head.features
    for node in reversed(head.outer):
        inner = graph_of(node.operation)
        part = keras.Model(inner.inputs, features, name=node.operation.name)
        args, kwargs = node.arguments.args, node.arguments.kwargs
        features = part(*args, **kwargs)
    return features


def _pooled(x: keras.KerasTensor, data_format: str, name: str) -> keras.KerasTensor:
    """The average over all positions, where there are any."""
    rank = len(x.shape) - 2
    if rank == 0:
        return x
    if rank > 3:
        raise ValueError(f"`model` must give features of at most three dimensions, got the shape {tuple(x.shape)}")
    return getattr(layers, f"GlobalAveragePooling{rank}D")(data_format=data_format, name=name)(x)


def _free_name(model: keras.Model, name: str) -> str:
    names = {layer.name for layer in model.layers}
    return next(free for free in (name, *(f"{name}_{number}" for number in range(1, 1000))) if free not in names)


def _kept_classes(model: keras.Model, labels: Sequence[str] | None) -> dict[int, int]:
    """New class -> old class of the names that the model's card has too."""
    known = card(model)
    old = {label: index for index, label in enumerate(known.labels)} if known and known.labels else {}
    return {index: old[label] for index, label in enumerate(labels or ()) if label in old}


def _config_with_head(known: ModelCard, head: _Head, num_classes: int) -> dict | None:
    if not known.config:
        return None
    config = config_from_dict(known.config).replace(num_classes=num_classes)
    if head.layer is None and config.family == "vgg":
        config = config.replace(head="pool", head_widths=())
    return config.to_dict()


def with_card(model: keras.Model, **fields: Any) -> keras.Model:
    """Copy a model and give the copy a card, or change the one it has; unlike attributes of a model, a card is saved with it.

    Args:
        model: Functional or Sequential model. It is not changed.
        **fields: Fields of `ModelCard`, such as `labels=["cat", "dog"]`.

    Returns:
        A new uncompiled model with a `Card` after its first input.

    Raises:
        ValueError: An unknown field, or labels that are not one per logit.
    """
    if card_layer(model) is not None:
        copied = copy_model(model)
    else:
        described = ModelCard(model.name, preprocessing=preprocessing_card(size=_image_size(model))).to_dict()
        copied = _with_entrance(model, lambda tensor: Card(described, name=_free_name(model, "card"))(tensor))
    set_card(copied, **fields)
    return copied


def add_preprocessing(model: keras.Model, preprocessing: str | dict) -> keras.Model:
    """Copy a model that takes normalised images and let the copy take pixels 0–255.

    Models of `keras.applications` before EfficientNet expect what their `preprocess_input` gives: `"caffe"` for VGG and
    ResNet, `"tf"` for ResNetV2, MobileNet, Inception and Xception, `"torch"` for DenseNet.

    Args:
        model: Functional or Sequential model with one image input and without preprocessing. It is not changed.
        preprocessing: Mode or numbers, see `Preprocessing`.

    Returns:
        A new uncompiled model with a `Card` and a `Preprocessing` layer after its input.

    Raises:
        ValueError: The model has preprocessing already or several inputs, or the mode is unknown.
    """
    known = card(model)
    if known is not None and known.preprocessing.get("mode", "none") != "none":
        raise ValueError(f"model {model.name!r} has preprocessing {known.preprocessing['mode']!r} already")
    if len(model.inputs) != 1:
        raise ValueError(f"preprocessing is for models with one image input; {model.name!r} has {len(model.inputs)} inputs")
    tensor = model.inputs[0]
    layout = data_format_at(tensor, graph_of(model))
    layer = Preprocessing.of(preprocessing, name=_free_name(model, "preprocessing"), data_format=layout)
    entry = preprocessing_card(size=_image_size(model)) | layer.describe()
    if known is not None:
        copied = _with_entrance(model, layer)
        set_card(copied, preprocessing=entry)
        return copied
    described = ModelCard(model.name, preprocessing=entry).to_dict()
    return _with_entrance(model, lambda pixels: layer(Card(described, name=_free_name(model, "card"))(pixels)))


def _image_size(model: keras.Model) -> list[int] | None:
    tensor = model.inputs[0]
    if len(tensor.shape) != 4:
        return None
    sides, _ = sides_and_channels(tensor.shape, data_format_at(tensor, graph_of(model)))
    return None if None in sides else [int(side) for side in sides]


def _with_entrance(model: keras.Model, entrance: Callable) -> keras.Model:
    """A copy of a model whose first input passes through `entrance` before the first layer."""
    copied = copy_model(model)
    graph = require_graph(copied)
    inputs = [type(layer).from_config(layer.get_config()).output for layer in (producer(t).operation for t in graph.inputs)]
    for old, new in zip(graph.inputs, inputs, strict=True):
        new.name = old.name
    tensors = [entrance(inputs[0]), *inputs[1:]]
    outputs = replay(graph, tensors, lambda node, args, kwargs: node.operation(*args, **kwargs))
    structure = keras.tree.pack_sequence_as(copied.input, inputs)
    # The layers were called twice; the copy of the result has been called once.
    return copy_model(keras.Model(structure, outputs, name=model.name))


def freeze_batch_norm(model: keras.Model, frozen: bool = True) -> int:
    """Pin all batch norms to their moving statistics, also in training; γ and β are not trained either.

    Keras takes `trainable = False` of a batch norm for inference mode, unlike other layers, and only until a parent's
    `trainable` is set: call this last, and compile again.

    Args:
        model: Any model, nested ones included.
        frozen: False makes them train again.

    Returns:
        How many batch norms there are.
    """
    norms = [layer for layer in layers_in(model) if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in norms:
        layer.trainable = not frozen
    return len(norms)
