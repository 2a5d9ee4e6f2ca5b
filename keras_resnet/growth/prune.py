"""Remove residual blocks that still are the identity, or that were grown, and measure what that changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from ..blocks.finding import Block, closing_name, find_blocks
from ..blocks.identity import ResidualBlock
from ..checks import nearest
from ..graphs import pack_inputs, require_graph, walk
from ..modelcard import card
from .drift import batches, drift, gate_value
from .points import is_grown_part
from .report import largest_difference
from .surgery import copy_model


@dataclass(frozen=True)
class PruneReport:
    """What `prune` removed and what that changed.

    Attributes:
        removed: Paths of the blocks that were removed.
        kept: Paths of the other residual blocks.
        criterion: What a block had to fulfil to be removed.
        parameters_before: Number of parameters of the model.
        parameters_after: Number of parameters of the pruned model.
        change: Largest difference of the outputs, or None where no input could be made (unknown sizes and no data).
        scale: Largest absolute output of the model, or None as `change`.
        accuracy: `(before, after)` for a classifier and data with its labels (class indices or one-hot), else None.
    """

    removed: list[str]
    kept: list[str]
    criterion: str
    parameters_before: int
    parameters_after: int
    change: float | None
    scale: float | None
    accuracy: tuple[float, float] | None = None

    def to_json(self) -> dict:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        change = "not measured" if self.change is None else f"{self.change:g} of {self.scale:g}"
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy[0]:.2%} -> {self.accuracy[1]:.2%}"
        return (
            f"{len(self.removed)} of {len(self.removed) + len(self.kept)} blocks removed ({self.criterion}), "
            f"{self.parameters_before:,} -> {self.parameters_after:,} parameters, max |Δ| {change}{accuracy}"
        )


IDENTITY, GROWN = "identity", "grown"


def prune(
    model: keras.Model, data: object = None, tolerance: float = 0.0, blocks: str | Sequence[str] = IDENTITY
) -> tuple[keras.Model, PruneReport]:
    """Remove residual blocks that are the identity; if they are exactly that, the output does not change at all.

    Only blocks that are the identity without their branch are removed: those of one shape that were grown, are pre-activation, or
    end in a ReLU whose shortcut the graph proves not to be negative. Without its branch, any other block still is a projection
    or a ReLU.

    Args:
        model: Functional or Sequential model. It is not changed.
        data: What `drift` takes. With data, a block is removed if its largest ‖F(x)‖/‖x‖ over the images is at most
            `tolerance`. Without data, its largest |gate| counts instead.
        tolerance: Largest size of a branch that counts as zero. Default 0.
        blocks: `"identity"` (default) removes what is the identity within `tolerance`. `"grown"` removes all blocks that were
            grown, whatever they compute, see `without_blocks`. A list of paths, as `find_blocks` and `drift` give them, removes
            those blocks, whatever they compute. `tolerance` is not used in the last two cases.

    Returns:
        `(pruned model, PruneReport)`; the model is uncompiled.

    Raises:
        ValueError: `tolerance` is negative, `blocks` is unknown, or a block cannot be removed.
    """
    if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ValueError(f"`tolerance` must be a number of at least 0, got {tolerance!r}")
    if isinstance(blocks, str) and blocks not in (IDENTITY, GROWN):
        raise ValueError(f'`blocks` must be "identity" or "grown" or a list of paths, got {blocks!r}')
    found = find_blocks(model)
    if isinstance(data, Iterator):
        data = list(data)  # It is iterated over twice.
    if not isinstance(blocks, str):
        gone, criterion = named_blocks(found, blocks), "named"
    elif blocks == GROWN:
        gone, criterion = _grown(model, found), "grown"
    else:
        gone, criterion = _identities(model, found, data, tolerance)
    removed = {id(block.add) for block in gone}
    pruned = remove_blocks(model, gone)
    change, scale, accuracy = _change(model, pruned, data)
    return pruned, PruneReport(
        removed=[block.path for block in gone],
        kept=[block.path for block in found if id(block.add) not in removed],
        criterion=criterion,
        parameters_before=model.count_params(),
        parameters_after=pruned.count_params(),
        change=change,
        scale=scale,
        accuracy=accuracy,
    )


def without_blocks(model: keras.Model) -> keras.Model:
    """Return a copy of a grown model without its grown blocks, trained or not: the network as it was before growth.

    If the backbone was frozen while the blocks were trained, the copy computes exactly what the original did, bit by bit.

    Args:
        model: Functional or Sequential model. It is not changed.

    Returns:
        An uncompiled Functional model.

    Raises:
        ValueError: A grown block cannot be removed, because it has no shortcut (`block="plain"`) or was rewired.
    """
    return prune(model, blocks=GROWN)[0]


def _identities(model, found, data, tolerance):
    """The blocks that are the identity within a tolerance, and the criterion in words."""
    if data is None:
        distance = {id(block.add): gate_value(block) for block in found}
    else:
        distance = {id(block.add): d.max for block, d in zip(found, drift(model, data), strict=True)} if found else {}
    gone = [b for b in found if b.removable and distance[id(b.add)] is not None and distance[id(b.add)] <= tolerance]
    return gone, f"max {'|gate|' if data is None else '‖F‖/‖x‖'} ≤ {tolerance:g}"


def _grown(model, found):
    """All grown blocks."""
    gone = [block for block in found if block.add.grown]
    if fixed := [block.path for block in gone if not block.removable]:
        raise ValueError(f'block "{fixed[0]}" cannot be removed: its branch does not start where its shortcut does')
    inside = {id(layer) for block in gone for layer in block.branch}
    for path, _, node in walk(model):
        plain = isinstance(node.operation, ResidualBlock) and node.operation.add is None
        if plain or (is_grown_part(path) and getattr(node.operation, "weights", None) and id(node.operation) not in inside):
            raise ValueError(
                f'layer "{path}" belongs to a plain block, which cannot be removed: without a shortcut it is not the identity'
            )
    return gone


def named_blocks(found: Sequence[Block], names: Sequence[str]) -> list[Block]:
    """Return the blocks of some paths, in the order of execution.

    Raises:
        ValueError: There is no such block, or it cannot be removed; the message says why.
    """
    known, wanted = {block.path: block for block in found}, list(names)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"there is no residual block {unknown[0]!r}{nearest(unknown[0], known)}")
    for block in (known[name] for name in wanted):
        if not block.same_shape:
            raise ValueError(f'block "{block.path}" cannot be removed: its branch does not start where its shortcut does')
        if not block.removable:
            raise ValueError(
                f'block "{block.path}" cannot be removed: it ends in an activation that is not proven to leave its shortcut as '
                "it is, which only a ReLU of a shortcut that cannot be negative does"
            )
    return [block for block in found if block.path in set(wanted)]


def remove_blocks(model: keras.Model, blocks: Sequence[Block]) -> keras.Model:
    """Return an uncompiled copy of a model without some blocks, which must be removable; its weights are those of the model."""
    ends = block_ends(model, blocks)

    def rewrite(graph: Any, node: Any, inputs: Any, outputs: Any) -> Any:
        return inputs[0] if id(node.operation) in ends else outputs

    return copy_model(model, rewrite)


def block_ends(model: keras.Model, blocks: Sequence[Block]) -> set[int]:
    """Ids of the operations that give back their first input where blocks are left out: their additions, or `ResidualBlock`
    layers, and the ReLUs that belong to them. (Others may read a sum too.)"""
    adds = {id(block.add): block.add for block in blocks}
    calls = [node for _, _, node in walk(model)]
    sums = {id(node.outputs[0]): adds[id(node.operation)] for node in calls if id(node.operation) in adds}
    closed = {key: closing_name(add) for key, add in sums.items() if add.kind == "postact"}
    return {
        id(node.operation)
        for node in calls
        if id(node.operation) in adds
        or (isinstance(node.operation, ResidualBlock) and id(node.operation.add) in adds)
        or any(closed.get(id(tensor)) == node.operation.name for tensor in node.arguments.keras_tensors)
    }


def _change(model, pruned, data):
    given = batches(model, data) if data is not None else noise_batches(model)
    if given is None:
        return None, None, None
    change, scale, right, count = 0.0, 0.0, np.zeros(2), 0
    for x, y in given:
        x = tree.map_structure(ops.convert_to_tensor, x)
        before, after = (tree.map_structure(ops.convert_to_numpy, tree.flatten(m(x, training=False))) for m in (model, pruned))
        change = max(change, largest_difference(before, after))
        scale = max([scale] + [float(np.abs(a).max(initial=0)) for a in before])
        if (labels := class_labels(y, before)) is not None:
            right += [(a[0].argmax(-1) == labels).sum() for a in (before, after)]
            count += len(labels)
    return change, scale, tuple(float(r) / count for r in right) if count else None


def class_labels(y: Any, outputs: Sequence[np.ndarray]) -> np.ndarray | None:
    """Return class indices `(N,)` where outputs and labels are those of one classifier, else None: accuracy has no meaning."""
    if not hasattr(y, "shape") or len(outputs) != 1 or outputs[0].ndim != 2 or outputs[0].shape[1] < 2:
        return None
    if y.shape == outputs[0].shape:
        return y.argmax(-1)
    if y.size == len(outputs[0]) and np.issubdtype(y.dtype, np.integer):
        return y.reshape(-1)
    return None


def noise_batches(model: keras.Model) -> list | None:
    """Return one batch of two seeded noise images, in the range that the model takes; None where a size is not known."""
    rng = np.random.default_rng(0)
    pixels = card(model) is not None
    inputs = require_graph(model).inputs
    if any(None in tensor.shape[1:] or tensor.dtype == "string" for tensor in inputs):
        return None
    draw = [rng.uniform(0, 255, (2, *t.shape[1:])) if pixels else rng.standard_normal((2, *t.shape[1:])) for t in inputs]
    return [
        (
            pack_inputs(require_graph(model), [a.astype(t.dtype) for a, t in zip(draw, inputs, strict=True)]),
            None,
        )
    ]
