"""Take out the residual blocks that still are the identity, and measure what that changed."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from keras import ops, tree

from ..graphs import require_graph, walk
from ..layers import ResidualAdd
from ..modelcard import card
from .blocks import ResidualBlock, find_blocks
from .drift import batches, drift, gate_value
from .report import largest_difference
from .surgery import copy_model


@dataclass(frozen=True)
class PruneReport:
    """What `prune` took out and what that changed.

    `change` is max |Δ| of the outputs, `scale` max |output| before; both None where no input could be made (unknown
    sizes and no data). `accuracy` is `(before, after)` for a classifier and data with its labels (class indices or one-hot).
    """

    removed: list
    kept: list
    criterion: str
    parameters_before: int
    parameters_after: int
    change: float | None
    scale: float | None
    accuracy: tuple | None = None

    def to_json(self):
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self):
        change = "not measured" if self.change is None else f"{self.change:g} of {self.scale:g}"
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy[0]:.2%} -> {self.accuracy[1]:.2%}"
        return (
            f"{len(self.removed)} of {len(self.removed) + len(self.kept)} blocks removed ({self.criterion}), "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters, max |Δ| {change}{accuracy}"
        )


def prune(model, data=None, tolerance=0.0):
    """Remove residual blocks that are the identity; with exact identities the output does not change at all.

    Touches only blocks of one shape that were grown or are pre-activation: without its branch, any other block still is
    a projection or a ReLU.

    Args:
        model: Functional or Sequential model; not changed.
        data: None, or what `drift` takes. Without data a block goes if max |gate| ≤ `tolerance`; with data, if max
            ‖F(x)‖/‖x‖ over the images is.
        tolerance: Default 0.

    Returns:
        `(pruned model, PruneReport)`; the model is uncompiled.

    Raises:
        ValueError: a negative tolerance.
    """
    if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ValueError(f"`tolerance` must be a number of at least 0, got {tolerance!r}")
    found = find_blocks(model)
    if isinstance(data, Iterator):
        data = list(data)  # It is gone through twice.
    if data is None:
        distance = {id(block.add): gate_value(block) for block in found}
    else:
        distance = {id(block.add): d.max for block, d in zip(found, drift(model, data), strict=True)} if found else {}
    gone = [b for b in found if b.removable and distance[id(b.add)] is not None and distance[id(b.add)] <= tolerance]
    removed = {id(block.add) for block in gone}
    pruned = copy_model(model, _remover(removed, _closing_relus(model, removed)))
    change, scale, accuracy = _change(model, pruned, data)
    return pruned, PruneReport(
        removed=[block.path for block in gone],
        kept=[block.path for block in found if id(block.add) not in removed],
        criterion=f"max {'|gate|' if data is None else '‖F‖/‖x‖'} ≤ {tolerance:g}",
        parameters_before=model.count_params(),
        parameters_after=pruned.count_params(),
        change=change,
        scale=scale,
        accuracy=accuracy,
    )


def _closing_relus(model, removed):
    """Ids of the activations that belong to the removed post-activation blocks; others may read the sum too."""
    outputs = {
        id(node.outputs[0]): f"{node.operation.block}_out"
        for _, _, node in walk(model)
        if isinstance(node.operation, ResidualAdd) and id(node.operation) in removed and node.operation.kind == "postact"
    }
    return {
        id(node.operation)
        for _, _, node in walk(model)
        if any(outputs.get(id(tensor)) == node.operation.name for tensor in node.arguments.keras_tensors)
    }


def _remover(removed, relus):
    def rewrite(graph, node, inputs, outputs):
        operation = node.operation
        goes = id(operation) in removed or id(operation) in relus
        goes |= isinstance(operation, ResidualBlock) and id(operation.add) in removed
        return inputs[0] if goes else outputs

    return rewrite


def _change(model, pruned, data):
    given = batches(model, data) if data is not None else _noise(model)
    if given is None:
        return None, None, None
    change, scale, right, count = 0.0, 0.0, np.zeros(2), 0
    for x, y in given:
        x = tree.map_structure(ops.convert_to_tensor, x)
        before, after = (tree.map_structure(ops.convert_to_numpy, tree.flatten(m(x, training=False))) for m in (model, pruned))
        change = max(change, largest_difference(before, after))
        scale = max([scale] + [float(np.abs(a).max(initial=0)) for a in before])
        if (labels := _class_labels(y, before)) is not None:
            right += [(a[0].argmax(-1) == labels).sum() for a in (before, after)]
            count += len(labels)
    return change, scale, tuple(float(r) / count for r in right) if count else None


def _class_labels(y, outputs):
    """Class indices `(N,)` where outputs and labels are those of one classifier, else None: accuracy has no meaning then."""
    if not hasattr(y, "shape") or len(outputs) != 1 or outputs[0].ndim != 2 or outputs[0].shape[1] < 2:
        return None
    if y.shape == outputs[0].shape:
        return y.argmax(-1)
    if y.size == len(outputs[0]) and np.issubdtype(y.dtype, np.integer):
        return y.reshape(-1)
    return None


def _noise(model):
    """Two seeded noise images, in the range that the model takes; None where a size is not known."""
    rng = np.random.default_rng(0)
    pixels = card(model) is not None
    inputs = require_graph(model).inputs
    if any(None in tensor.shape[1:] or tensor.dtype == "string" for tensor in inputs):
        return None
    draw = [rng.uniform(0, 255, (2, *t.shape[1:])) if pixels else rng.standard_normal((2, *t.shape[1:])) for t in inputs]
    return [
        (
            tree.pack_sequence_as(
                require_graph(model)._inputs_struct, [a.astype(t.dtype) for a, t in zip(draw, inputs, strict=True)]
            ),
            None,
        )
    ]
