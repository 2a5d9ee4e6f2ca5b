"""Losses and metrics: those that the user gives, or those that fit what a model returns and what the labels are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import keras
import numpy as np

from ..graphs import OutputHead, final_activation, graph_of, is_weighted, output_heads, producer
from .run import TrainingError

REPLACE = "replace the head by one that returns logits (kr.replace_head(model, num_classes)), or give `loss`"


@dataclass(frozen=True, eq=False)
class Task:
    """What a model is trained for: the arguments of Keras' `compile` apart from the optimiser.

    Args:
        loss: As `Model.compile` takes it.
        loss_weights: As `Model.compile` takes them.
        metrics: As `Model.compile` takes them.
        weighted_metrics: As `Model.compile` takes them.
        note: What was chosen and why, for the log; empty where the user gave the loss.
        is_classification: Whether labels are class numbers or one-hot vectors.
    """

    loss: Any
    loss_weights: Any = None
    metrics: Any = None
    weighted_metrics: Any = None
    note: str = ""
    is_classification: bool = False

    def compile(self, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        """Compile a model for this task; metrics are new objects, so that every model has its own."""
        try:
            model.compile(
                optimizer=optimizer,
                loss=self.loss,
                loss_weights=self.loss_weights,
                metrics=_copied(self.metrics),
                weighted_metrics=_copied(self.weighted_metrics),
                jit_compile=False,
                auto_scale_loss=False,
            )
        except (ValueError, TypeError) as error:
            raise TrainingError(str(error)) from error


def _copied(metrics: Any) -> Any:
    def copy(metric: Any) -> Any:
        return type(metric).from_config(metric.get_config()) if isinstance(metric, keras.metrics.Metric) else metric

    return keras.tree.map_structure(copy, metrics)


def classification(model: keras.Model, classes: int, loss: str = "auto", sparse: bool = False) -> Task:
    """Return the task of a model with one output on images of one class each.

    Args:
        model: Functional or Sequential model.
        classes: Number of classes of the data.
        loss: `"auto"`, `"softmax"` (cross-entropy) or `"sigmoid"` (binary cross-entropy per class).
        sparse: Whether labels are class numbers; else they are one-hot vectors (a column of 0 and 1 for a model with one unit).

    Raises:
        TrainingError: The model's output does not fit the data or the loss.
    """
    if len(model.outputs) != 1:
        raise TrainingError(
            f"the model has {len(model.outputs)} outputs; give `loss`, a loss per output, as `Model.compile` takes"
        )
    output, head = model.outputs[0], head_of(model)
    units, dtype = output.shape[-1], "float64" if output.dtype == "float64" else "float32"
    linear = head.kind == "other"
    losses, metrics = keras.losses, keras.metrics
    if units == 1 and classes <= 2:
        note = "a sigmoid" if head.kind == "binary" else "a logit"
        accuracy = metrics.BinaryAccuracy(name="accuracy", threshold=0.0 if linear else 0.5)
        return Task(
            losses.BinaryCrossentropy(from_logits=linear, dtype=dtype), metrics=[accuracy],
            note=f"binary cross-entropy on {note}", is_classification=True,
        )  # fmt: skip
    if units < classes or len(output.shape) != 2:
        raise TrainingError(
            f"the model must return one output of at least {classes} logits, it returns {output.shape[1:]}; "
            f"kr.replace_head(model, {classes}) makes a new classifier"
        )
    if loss == "auto":
        loss = "sigmoid" if head.kind == "multilabel" else "softmax"
    if not linear and (head.kind == "multilabel") != (loss == "sigmoid"):
        raise TrainingError(f"the model ends in a {head.activation or head.kind}, which does not fit loss {loss!r}; {REPLACE}")
    what = "logits" if linear else "sigmoids" if head.kind == "multilabel" else "probabilities"
    if loss == "sigmoid":
        if sparse:
            raise TrainingError("binary cross-entropy per class needs one-hot labels: keras.utils.to_categorical(labels)")
        accuracy = metrics.CategoricalAccuracy(name="accuracy")
        criterion = losses.BinaryCrossentropy(from_logits=linear, dtype=dtype)
        return Task(criterion, metrics=[accuracy], note=f"binary cross-entropy per class on {what}", is_classification=True)
    kind = losses.SparseCategoricalCrossentropy if sparse else losses.CategoricalCrossentropy
    accuracy = (metrics.SparseCategoricalAccuracy if sparse else metrics.CategoricalAccuracy)(name="accuracy")
    return Task(
        kind(from_logits=linear, dtype=dtype), metrics=[accuracy], note=f"cross-entropy on {what}", is_classification=True
    )


def task_of_labels(model: keras.Model, labels: Any, loss: str = "auto") -> Task:
    """Return the task that labels given as an array stand for.

    Args:
        model: Functional or Sequential model.
        labels: Class numbers, one-hot vectors, vectors of 0 and 1 (several labels per image), or a column of 0 and 1.
        loss: See `classification`.

    Raises:
        TrainingError: The labels do not say what the loss is.
    """
    if len(model.outputs) != 1 or not hasattr(labels, "shape"):
        raise TrainingError(
            "a model with several outputs, or labels of several parts, need `loss`: a loss per output, as `Model.compile` takes"
        )
    values = np.asarray(labels)
    units, shape = model.outputs[0].shape[-1], tuple(values.shape)
    whole = values.dtype.kind in "iub" or (values.dtype.kind == "f" and bool(np.all(values == np.floor(values))))
    if not whole or (values.size and values.min() < 0):
        raise TrainingError(
            f"labels of type {values.dtype} that are not whole numbers of at least 0 do not determine the loss; "
            'give it, e.g. loss="mse" for a regression'
        )
    if len(shape) == 1 or shape[1:] == (1,):
        return classification(model, int(values.max(initial=0)) + 1, loss, sparse=True)
    if shape[1:] != (units,) or values.max(initial=0) > 1:
        raise TrainingError(f"labels of shape {shape} do not fit an output of shape {model.outputs[0].shape}; give `loss`")
    if np.all(values.sum(axis=-1) == 1) and head_of(model).kind != "multilabel":
        return classification(model, units, loss)
    head = head_of(model)
    if head.kind == "probabilities":
        raise TrainingError(f"images with several labels need sigmoids, the model ends in a softmax; {REPLACE}")
    linear = head.kind == "other"
    dtype = "float64" if model.outputs[0].dtype == "float64" else "float32"
    return Task(
        keras.losses.BinaryCrossentropy(from_logits=linear, dtype=dtype),
        metrics=[keras.metrics.BinaryAccuracy(name="accuracy", threshold=0.0 if linear else 0.5)],
        note=f"binary cross-entropy per label on {'logits' if linear else 'sigmoids'}",
        is_classification=True,
    )


def task_of_spec(model: keras.Model, spec: Any) -> Task:
    """Return the task of batches whose labels are known by shape and type only.

    Args:
        model: Functional or Sequential model.
        spec: `element_spec` of the batches.

    Raises:
        TrainingError: That is not enough to choose a loss.
    """
    parts = spec if isinstance(spec, tuple) else (spec,)
    units = model.outputs[0].shape[-1]
    if len(model.outputs) == 1 and len(parts) > 1 and not keras.tree.is_nested(parts[1]):
        shape, kind = parts[1].shape, head_of(model).kind
        is_column = shape.rank == 1 or (shape.rank == 2 and shape[-1] == 1)
        if is_column and parts[1].dtype.is_integer and len(model.outputs[0].shape) == 2:
            return classification(model, min(units, 2) if units == 1 else units, sparse=True)
        if not is_column and shape[-1] == units and kind in ("probabilities", "multilabel"):
            return classification(model, units)
    raise TrainingError(
        "give `loss`, e.g. keras.losses.SparseCategoricalCrossentropy(from_logits=True): types and shapes of the batches do not "
        "say what the labels are"
    )


def head_of(model: keras.Model) -> OutputHead:
    """Return what the only output of a model is: probabilities, sigmoids, or logits (kind `"other"`).

    Raises:
        TrainingError: Something follows a softmax or a sigmoid, so that the output is neither.
    """
    head = output_heads(model)[0]
    if head.kind == "other" and (named := _unusual_activation(model)):
        layer, activation = named
        raise TrainingError(f"the output of layer {layer!r} is a {activation}, for which no loss is chosen; {REPLACE}")
    if head.kind == "other" and (found := _hidden_activation(model)):
        layer, activation = found
        raise TrainingError(
            f"something follows the {activation} of layer {layer!r}, so the model returns neither logits nor probabilities; "
            f"{REPLACE}"
        )
    return head


def _unusual_activation(model: keras.Model) -> tuple[str, str] | None:
    """The layer and name of a last activation whose results are probabilities of another kind, if it is one."""
    node = producer(model.outputs[0])
    if node is None or node.is_input:
        return None
    operation, kind = node.operation, type(node.operation).__name__
    if kind == "Softmax":
        return operation.name, f"softmax over axis {operation.axis}"
    activation = getattr(operation, "activation", None)
    if kind == "HardSigmoid" or getattr(activation, "__name__", None) == "hard_sigmoid":
        return operation.name, "hard sigmoid"
    return None


def _hidden_activation(model: keras.Model) -> tuple[str, str] | None:
    """The layer and name of a softmax or sigmoid between the output and the last layers with weights, if there is one."""
    waiting, seen = [(model.outputs[0], graph_of(model))], set()
    while waiting:
        tensor, graph = waiting.pop()
        node = producer(tensor)
        if node is None or node.is_input or id(node) in seen:
            continue
        seen.add(id(node))
        operation = node.operation
        if isinstance(operation, keras.Model) and (inner := graph_of(operation)) is not None:
            waiting.append((inner.outputs[[id(output) for output in node.outputs].index(id(tensor))], inner))
            continue
        if activation := final_activation(operation):
            return operation.name, activation
        if not is_weighted(operation):
            waiting += [(source, graph) for source in node.input_tensors]
    return None


Loss: TypeAlias = str | keras.losses.Loss | Callable | dict | list
