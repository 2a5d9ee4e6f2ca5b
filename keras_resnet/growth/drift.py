"""How far each residual block has drifted from the identity."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from ..blocks.finding import find_blocks
from ..blocks.gates import gate_parameters
from ..blocks.identity import ResidualBlock
from ..checks import whole_number
from ..graphs import call_inputs, flat_inputs, graph_of, replay, require_graph
from ..layers import ResidualAdd
from ..tables import text_table


@dataclass(frozen=True)
class BlockDrift:
    """Drift of one block, whose output is x + F(x).

    Attributes:
        block: Path of the block.
        gate: Name of its gate, or None.
        mean: Mean of ‖F(x)‖/‖x‖ over the images.
        max: Largest ‖F(x)‖/‖x‖ of an image.
        gate_value: Largest |gate|, or None without a gate.
        variance_share: Variance of F(x) divided by that of x + F(x), over all values of the data.
    """

    block: str
    gate: str | None
    mean: float
    max: float
    gate_value: float | None
    variance_share: float


@dataclass(frozen=True)
class DriftReport:
    """Drift of all blocks in order of execution. Iterating over the report yields the blocks."""

    blocks: list[BlockDrift]
    images: int

    def __iter__(self) -> Iterator[BlockDrift]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        columns = ("block", "gate", "max|gate|", "‖F‖/‖x‖ mean", "max", "var share")
        return text_table(
            columns,
            (
                (
                    b.block,
                    b.gate or "-",
                    "-" if b.gate_value is None else f"{b.gate_value:.3g}",
                    f"{b.mean:.4g}",
                    f"{b.max:.4g}",
                    f"{b.variance_share:.4g}",
                )
                for b in self.blocks
            ),
        )


def drift(model: keras.Model, data: Any, batch_size: int = 32) -> DriftReport:
    """Measure ‖F(x)‖/‖x‖ of every residual block in inference mode. The model is called eagerly.

    Args:
        model: Functional or Sequential model whose residual blocks were grown, come from the zoo, or are `ResidualBlock` layers.
        data: Inputs as arrays (for several inputs a list or dict of arrays), a tuple `(inputs, labels)`, or an iterable of
            batches (`tf.data.Dataset`, list), each of which is inputs or `(inputs, labels)`.
        batch_size: Number of images per batch, for arrays. Default 32.

    Returns:
        The report, which prints as a table.

    Raises:
        ValueError: There are no images in `data`.
    """
    batch_size = whole_number("batch_size", batch_size, 1)
    found = find_blocks(model)
    seen = {id(block.add): _Totals() for block in found}
    images = 0
    for x, _ in batches(model, data, batch_size):
        images += len(tree.flatten(x)[0])
        run_observed(model, x, lambda add, shortcut, branch: seen[id(add)].add(shortcut, branch))
    if not images:
        raise ValueError("there are no images in `data`")
    return DriftReport([_block_drift(block, seen[id(block.add)]) for block in found], images)


def batches(model: keras.Model, data: object, batch_size: int | None = 32) -> Iterator[tuple[object, object]]:
    """Yield `(inputs, labels or None)` batches from what `drift` takes as `data`.

    Args:
        model: Functional or Sequential model that takes the inputs.
        data: See `drift`.
        batch_size: Number of inputs per batch, for arrays; None yields them as one batch.

    Raises:
        TypeError: `data` is neither arrays nor something to iterate over.
    """
    x, y = _split(model, data)
    several = (
        isinstance(x, dict) or len(require_graph(model).inputs) > 1 and isinstance(x, (list, tuple)) and hasattr(x[0], "shape")
    )
    if several or hasattr(x, "shape"):
        size = len(tree.flatten(x)[0])
        batch_size = batch_size or max(1, size)
        for start in range(0, size, batch_size):
            part = slice(start, start + batch_size)
            cut = lambda array, part=part: np.asarray(array)[part]  # noqa: E731
            yield tree.map_structure(cut, x), None if y is None else tree.map_structure(cut, y)
        return
    if not hasattr(x, "__iter__") and not hasattr(x, "__getitem__"):
        raise TypeError(f"`data` must be arrays or batches of them, got {type(data).__name__}")
    for batch in x:
        inputs, labels = _split(model, batch)
        inputs = tree.map_structure(ops.convert_to_numpy, inputs)
        yield inputs, None if labels is None else tree.map_structure(ops.convert_to_numpy, labels)


def _split(model, data):
    """Split `(inputs, labels[, weights])` into `(inputs, labels)`; anything else is inputs. Some models take tuples as inputs."""
    several = len(require_graph(model).inputs) > 1
    if isinstance(data, tuple) and len(data) in (2, 3) and (not several or isinstance(data[0], (tuple, list, dict))):
        return data[0], data[1]
    return data, None


def run_observed(model: keras.Model, x: Any, observe: Callable[[keras.Layer, Any, Any], object]) -> Any:
    """Run a model eagerly, layer by layer, and pass the two summands of every residual addition to a function.

    Args:
        model: Functional or Sequential model.
        x: One batch of inputs.
        observe: Called as `observe(add_layer, shortcut, branch)`.

    Returns:
        The model's outputs.
    """

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        operation = node.operation
        if isinstance(operation, keras.Model) and (graph := graph_of(operation)) is not None:
            return replay(graph, flat_inputs(graph, call_inputs(args, kwargs)), call)
        if isinstance(operation, ResidualBlock) and operation.add is not None:
            observe(operation.add, *_summands(operation.add, *operation.parts(call_inputs(args, kwargs))))
        elif isinstance(operation, ResidualAdd):
            observe(operation, *_summands(operation, *call_inputs(args, kwargs)))
        return operation(*args, **kwargs)

    graph = require_graph(model)
    return replay(graph, flat_inputs(graph, tree.map_structure(ops.convert_to_tensor, x)), call)


def _summands(add, shortcut, branch):
    """The two summands of a residual addition: the shortcut, and the branch times its scale."""
    return shortcut, add.scaled(branch, shortcut.dtype)


class _Totals:
    """Sums over all batches, and over all calls, of one block."""

    def __init__(self) -> None:
        self.ratios, self.branch, self.output = [], np.zeros(3), np.zeros(3)

    def add(self, shortcut: Any, branch: Any) -> None:
        x, f = (np.asarray(ops.convert_to_numpy(ops.cast(t, "float32")), "float64") for t in (shortcut, branch))
        norms = [np.sqrt((t.reshape(len(t), -1) ** 2).sum(1)) for t in (x, f)]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = norms[1] / norms[0]
        self.ratios.append(np.where(norms[1] == 0, 0.0, ratio))
        for total, value in ((self.branch, f), (self.output, x + f)):
            total += value.size, value.sum(), (value**2).sum()

    def variance_share(self) -> float:
        variances = [square / size - (total / size) ** 2 for size, total, square in (self.branch, self.output)]
        return 0.0 if variances[0] <= 0 else float(variances[0] / variances[1]) if variances[1] > 0 else float("inf")


def gate_value(block: Any) -> float | None:
    """Return the largest |gate| of a `Block`, or None if it has no gate."""
    parameters = gate_parameters(block.gate, block.branch)
    return max(float(np.abs(ops.convert_to_numpy(p)).max(initial=0)) for p in parameters) if parameters else None


def _block_drift(block, totals):
    ratios = np.concatenate(totals.ratios)
    return BlockDrift(
        block.path, block.gate, float(ratios.mean()), float(ratios.max()), gate_value(block), totals.variance_share()
    )
