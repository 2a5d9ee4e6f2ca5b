"""Where to grow: how much a block would help at each insertion point, estimated from gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from ..blocks.finding import Block, find_blocks
from ..checks import sides_and_channels, whole_number
from ..graphs import output_heads
from ..modelcard import card
from ..tables import text_table
from .drift import batches
from .gradients import gate_gradients
from .onednn import check_backward
from .points import find_points
from .probing import run_with_fresh_branches
from .scale import MATCH
from .surgery import grow

GATE = "zero_conv"


@dataclass(frozen=True)
class PointScore:
    """How much a block would help at one insertion point.

    Attributes:
        after: Name or path of the layer, as `grow(after=…)` takes it.
        score: Expected decrease of the loss per unit of learning rate and multiply-add of the block. Only comparisons
            between the points of one network mean something. Noise can make it negative where a block would not help.
        gain: The same without the division by the multiply-adds.
        spread: Standard deviation of `gain` over the draws of the block's random weights.
        macs: Multiply-adds of the block for one input.
    """

    after: str
    score: float
    gain: float
    spread: float
    macs: int


@dataclass(frozen=True)
class GrowthScores:
    """Scores of all insertion points, in order of execution. Iterate over it for the points."""

    points: list[PointScore]
    block: str
    batches: int
    draws: int

    def __iter__(self) -> Iterator[PointScore]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def ranking(self) -> list[PointScore]:
        """Return the points from the best to the worst."""
        return sorted(self.points, key=lambda point: point.score, reverse=True)

    def best(self, n: int) -> list[str]:
        """Return the `n` best insertion points, best first, for `grow(after=…)`.

        If `n` exceeds the number of points, the ranking starts again, so that the best points get a second block first.

        Args:
            n: Number of blocks.

        Raises:
            ValueError: `n` is not a positive whole number.
        """
        n = whole_number("n", n, 1)
        ranking = [point.after for point in self.ranking()]
        return [ranking[index % len(ranking)] for index in range(n)]

    def to_json(self) -> dict:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        top = max(abs(point.score) for point in self.points) or 1.0
        return text_table(
            ("after", "score, relative", "gain", "spread", "10^6 multiply-adds"),
            (
                (p.after, f"{p.score / top:.3f}", f"{p.gain:.3g}", f"{p.spread:.3g}", f"{p.macs / 1e6:.2f}")
                for p in self.ranking()
            ),
        )

    def figure(self) -> object:
        """Draw the relative scores as bars, in order of execution.

        Returns:
            A `matplotlib.figure.Figure`; `figure.savefig("scores.png")` writes it.

        Raises:
            ImportError: Matplotlib is not installed; it comes with the extra `train`.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the figure needs matplotlib; install keras-resnet-export[train]") from error
        names = [point.after for point in self.points]
        top = max(abs(point.score) for point in self.points) or 1.0
        per_gain = [0.0 if not point.gain else abs(point.spread * point.score / point.gain) / top for point in self.points]
        figure = Figure(figsize=(6.4, 0.9 + 0.26 * len(names)), layout="constrained")
        axis = figure.subplots()
        axis.barh(names, [point.score / top for point in self.points], xerr=per_gain, color="#0072b2", ecolor="#777777")
        axis.invert_yaxis()
        axis.set_xlabel("growth score per multiply-add, relative to the largest")
        axis.spines[["top", "right"]].set_visible(False)
        return figure


def growth_scores(
    model: keras.Model,
    data: object,
    *,
    after: object = None,
    loss: str | Callable | None = None,
    block: str = "preact",
    draws: int = 3,
    batch_size: int = 32,
    seed: int = 0,
) -> GrowthScores:
    """Estimate how much a new block would help at each insertion point; one backward pass scores all of them.

    A probe block with a closed gate and a matched scale is put at every point. Its score is the inner product of the loss
    gradients with respect to the gate over two disjoint halves of the batches, averaged over several random draws of the
    branch and divided by the block's multiply-adds. (The squared norm of one mean gradient would be biased upwards by
    noise.) The model runs in inference mode; only the norms of the probes use batch statistics. The scores say *where* a
    block helps most, not whether growing is better than training further.

    Args:
        model: Functional or Sequential model. It is not changed.
        data: `(inputs, labels)` as arrays, or an iterable of such batches. A few hundred training images per half are enough.
        after: Insertion points as in `grow`. Default: after every convolution.
        loss: Name of a Keras loss, a loss object, or a function of labels and outputs. Default: the cross-entropy that fits a
            classifier's output, as its graph or its card shows it; labels are class indices, or one-hot.
        block: Kind of the probe blocks: `"preact"` (default), `"bottleneck"` or `"depthwise"`.
        draws: Number of random draws of the probes' other weights. Default 3.
        batch_size: Largest number of images per batch, for arrays. Default 32.
        seed: Seed of the draws.

    Returns:
        `GrowthScores`; `print` shows a table, `figure()` draws it, and `grow(after=scores.best(13))` uses it.

    Raises:
        ValueError: There are fewer than two batches with labels, no loss can be chosen, or no block fits an insertion point.
    """
    draws = whole_number("draws", draws, 1)
    given = _labelled(model, data, whole_number("batch_size", batch_size, 1))
    loss = default_loss(model) if loss is None else keras.losses.get(loss)
    points = find_points(model, after)
    paths = [point.path for point in points]
    probed = grow(model, paths, block=block, gate=GATE, scale=MATCH, data=[x for x, _ in given[:8]], seed=seed)
    check_backward(probed)
    probes = _probes(model, probed, len(points))
    macs = _macs(probed, probes, given[0][0])
    gradients = gate_gradients(probed, probes, loss)
    gains = np.array([_gains(gradients, given) for _ in _drawn(probes, draws, seed)])
    mean, spread = gains.mean(0), gains.std(0, ddof=1) if draws > 1 else np.zeros(len(points))
    scores = [
        PointScore(path, float(m / cost), float(m), float(s), cost)
        for path, m, s, cost in zip(paths, mean, spread, macs, strict=True)
    ]
    return GrowthScores(scores, block, len(given), draws)


def _labelled(model, data, batch_size):
    """The batches with their labels: at least two, so that there are two halves."""
    inputs = data[0] if isinstance(data, tuple) and data else data
    if hasattr(inputs, "shape"):
        batch_size = max(1, min(batch_size, len(inputs) // 2))
    given = list(batches(model, data, batch_size))
    if any(labels is None for _, labels in given):
        raise ValueError("`data` must contain labels: pass `(inputs, labels)`, or batches of them")
    if len(given) < 2:
        raise ValueError("`data` must contain at least two batches, since the score compares two halves of them")
    return given


def default_loss(model: keras.Model) -> Callable[[Any, Any], Any]:
    """Return the cross-entropy that fits a classifier's output, a function of labels and outputs.

    Raises:
        ValueError: Neither the model's graph nor its card shows which.
    """
    heads = output_heads(model)
    kind = heads[0].kind if len(heads) == 1 else "other"
    if kind in ("binary", "multilabel"):
        return keras.losses.BinaryCrossentropy()
    if kind != "probabilities" and (len(heads) > 1 or card(model) is None):
        raise ValueError(
            '`loss` must be given, e.g. loss="mse": neither the graph nor the card of the model shows that it is a classifier'
        )

    def cross_entropy(labels: Any, outputs: Any) -> Any:
        sparse = len(labels.shape) < len(outputs.shape) or labels.shape[-1] == 1 != outputs.shape[-1]
        function = keras.losses.sparse_categorical_crossentropy if sparse else keras.losses.categorical_crossentropy
        return function(labels, outputs, from_logits=kind != "probabilities")

    return cross_entropy


def _probes(model: keras.Model, probed: keras.Model, count: int) -> list[Block]:
    """The probe blocks in the order of the insertion points."""
    old = {block.path for block in find_blocks(model)}
    found = [block for block in find_blocks(probed) if block.path not in old]
    if len(found) != count:
        raise ValueError(f"{count} insertion points gave {len(found)} blocks; name each point once")
    return found


def _macs(probed, probes, x):
    """Multiply-adds of each probe for one input."""
    owner = {id(layer): index for index, block in enumerate(probes) for layer in block.branch}
    totals = [0] * len(probes)

    def visit(layer: keras.Layer, inputs: Any, output: Any) -> None:
        if id(layer) in owner:
            kernels = sum(math.prod(weight.shape) for weight in layer.weights if len(weight.shape) > 1)
            if kernels:
                sides, _ = sides_and_channels(output.shape, getattr(layer, "data_format", "channels_last"))
                totals[owner[id(layer)]] += kernels * math.prod(sides)

    run_with_fresh_branches(probed, keras.tree.map_structure(lambda array: np.asarray(array)[:1], x), visit)
    return totals


def _drawn(probes, draws, seed):
    """Yield once per draw, after giving the probes' layers before the gate other random weights."""
    for draw in range(draws):
        numbers = iter(np.random.SeedSequence([seed, draw]).generate_state(sum(len(block.branch) for block in probes)))
        for block in probes:
            for layer in block.branch[:-1]:
                number = int(next(numbers))
                for weight in layer.weights:
                    if len(weight.shape) > 1:
                        initializer = keras.initializers.VarianceScaling(2.0, "fan_in", seed=number)
                        weight.assign(initializer(weight.shape))
        yield draw


def _gains(gradients, given):
    """The inner product of the mean gradients of two halves of the batches, per probe."""
    halves = [[], []]
    for index, (x, y) in enumerate(given):
        halves[index % 2].append((len(keras.tree.flatten(x)[0]), gradients(x, y)))
    means = []
    for half in halves:
        whole = sum(count for count, _ in half)
        means.append(
            [
                sum(count / whole * part for (count, _), part in zip(half, parts, strict=True))
                for parts in zip(*(g for _, g in half), strict=True)
            ]
        )
    return [float(np.dot(first.astype("float64"), second.astype("float64"))) for first, second in zip(*means, strict=True)]
