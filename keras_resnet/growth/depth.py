"""Which residual blocks a network can do without: a curve of accuracy over cost, and the network for each of its points."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from ..blocks.finding import find_blocks
from ..checks import is_number, whole_number
from ..graphs import layers_in, output_heads
from ..modelcard import card, set_card
from ..tables import text_table
from .drift import BlockDrift, batches, drift
from .program import Left, Program
from .prune import class_labels, named_blocks, noise_batches, remove_blocks
from .scores import default_loss
from .surgery import copy_model

MACS, LATENCY = "macs", "latency"
COSTS = {MACS: "multiply-adds", LATENCY: "latency"}
LOSS, DRIFT = "loss", "drift"
# Every subset is tried for up to this number of blocks.
EXACT_BLOCKS = 8
# Images that batch-norm statistics are recalibrated on, unless others are given.
CALIBRATION_IMAGES = 512
NO_BLOCK = "the model has no residual block that can be left out; see `find_blocks`, whose `removable` says which can"


@dataclass(frozen=True)
class DepthPoint:
    """One network of a curve.

    Attributes:
        removed: Paths of the blocks that are left out, in order of execution.
        share: Its cost as a share of the whole network's.
        macs: Multiply-adds for one input.
        loss: Mean loss on the held-out images, after recalibration; None without data.
        accuracy: Share of the held-out images that it classifies as labelled; None without labels or for another kind of model.
        agreement: Share of the held-out images for which its best class is that of the whole network; None likewise.
    """

    removed: tuple[str, ...]
    share: float
    macs: int
    loss: float | None = None
    accuracy: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class DepthCurve:
    """The networks that `depth_curve` found. Iterate over it for those of the Pareto front, the whole network first.

    Attributes:
        points: The Pareto front of all measured networks: each has the lowest loss among those that cost no more.
        by_drift: The networks that leave out the blocks with the least drift, for comparison.
        cost: What `DepthPoint.share` is a share of, `"macs"` or `"latency"`.
        ranked_by: `"loss"`, or `"drift"` where there were no data.
        images: Number of held-out images.
        calibration_images: Number of images that batch-norm statistics are recalibrated on.
        model: The whole network.
        calibration: Batches of those images.
    """

    points: list[DepthPoint]
    by_drift: list[DepthPoint]
    cost: str
    ranked_by: str
    images: int
    calibration_images: int
    model: keras.Model = field(repr=False)
    calibration: list = field(repr=False, default_factory=list)

    def __iter__(self) -> Iterator[DepthPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def point(self, budget: float) -> DepthPoint:
        """Return the point with the lowest loss that costs at most a share of the whole network.

        Args:
            budget: Share of the cost, a number above 0 and at most 1.

        Raises:
            ValueError: No network of the curve costs so little.
        """
        budget = _share("budget", budget)
        fitting = [point for point in self.points if point.share <= budget + 1e-9]
        if not fitting:
            least = min(point.share for point in self.points)
            raise ValueError(f"no network of the curve meets the budget {budget:g}; the smallest has {_least(least, self.cost)}")
        return fitting[0]

    def at(self, budget: float, recalibrate: bool = True) -> keras.Model:
        """Return the network with the lowest loss that costs at most a share of the whole network.

        Args:
            budget: Share of the cost, a number above 0 and at most 1. At 1 it is a copy of the whole network.
            recalibrate: Whether the batch norms after the first block that is left out get statistics of their own. Without it,
                the network is what `prune(model, blocks=point.removed)` returns.

        Returns:
            An uncompiled Functional model.

        Raises:
            ValueError: No network of the curve costs so little.
        """
        return self.network(self.point(budget), recalibrate)

    def network(self, point: DepthPoint, recalibrate: bool = True) -> keras.Model:
        """Return the network of a point; see `at`. The weights in its card have no accuracy, which was the whole network's."""
        if not point.removed:
            return copy_model(self.model)
        network = self._without(point, recalibrate and bool(self.calibration))
        if (known := card(network)) is not None and known.weights:
            weights = {key: value for key, value in known.weights.items() if key != "accuracy"}
            set_card(network, weights={**weights, "left_out": list(point.removed)})
        return network

    def _without(self, point, recalibrate):
        if not recalibrate:
            return remove_blocks(self.model, named_blocks(find_blocks(self.model), point.removed))
        whole = copy_model(self.model)
        blocks = named_blocks(find_blocks(whole), point.removed)
        _recalibrate(Program(whole, blocks), frozenset(range(len(blocks))), self.calibration)
        return remove_blocks(whole, blocks)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without the network and the images."""
        skipped = ("model", "calibration", "points", "by_drift")
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name not in skipped}
        points = {name: [dataclasses.asdict(point) for point in getattr(self, name)] for name in ("points", "by_drift")}
        return {**own, **points}

    def __str__(self) -> str:
        by_drift = {len(point.removed): point for point in self.by_drift}
        shown = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
        columns = (COSTS[self.cost], "10^6 multiply-adds", "left out", "loss", "accuracy", "agreement", "by drift", "blocks")
        return text_table(
            columns,
            (
                (
                    f"{p.share:.3f}",
                    f"{p.macs / 1e6:.2f}",
                    len(p.removed),
                    shown(p.loss, ".4f"),
                    shown(p.accuracy, ".2%"),
                    shown(p.agreement, ".2%"),
                    shown(by_drift[len(p.removed)].loss if len(p.removed) in by_drift else None, ".4f"),
                    ", ".join(p.removed) or "-",
                )
                for p in self.points
            ),
        )

    def figure(self) -> object:
        """Draw accuracy (or agreement, or loss) over the cost, next to the networks that drift alone would choose.

        Returns:
            A `matplotlib.figure.Figure`; `figure.savefig("depth.png")` writes it.

        Raises:
            ImportError: Matplotlib is not installed; it comes with the extra `train`.
            ValueError: There were no data, so that nothing was measured.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the figure needs matplotlib; install keras-resnet-export[train]") from error
        names = ("accuracy", "agreement", "loss")
        name = next((name for name in names if all(getattr(point, name) is not None for point in self.points)), None)
        if name is None:
            raise ValueError("there is nothing to draw: the curve was made without data, so that no network was measured")
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axis = figure.subplots()
        lines: tuple[tuple[Any, str, dict[str, Any]], ...] = (
            (self.points, "chosen by loss", {"color": "#0072b2", "marker": "o"}),
            (self.by_drift, "chosen by drift", {"color": "#d55e00", "marker": "s", "linestyle": "--"}),
        )
        for points, label, style in lines:
            if points:
                ordered = sorted(points, key=lambda point: point.share)
                values = [getattr(point, name) for point in ordered]
                axis.plot([point.share for point in ordered], values, label=label, markersize=4, **style)
        axis.set(xlabel=f"{COSTS[self.cost]}, as a share of the whole network's", ylabel=f"{name} on held-out images")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if self.by_drift:
            axis.legend()
        return figure


def depth_curve(
    model: keras.Model,
    data: object = None,
    *,
    budgets: Sequence[float] | None = None,
    calibration: object = None,
    loss: str | Callable | None = None,
    cost: str = MACS,
    search_images: int = 256,
    batch_size: int = 64,
    compare_drift: bool = True,
    progress: Callable[[str], object] | None = None,
) -> DepthCurve:
    """Find out which residual blocks a network can do without, and what that costs.

    Blocks that are the identity without their branch can be left out: those of one shape that were grown, are pre-activation, or
    end in a ReLU whose shortcut the graph proves not to be negative. With up to 8 such blocks, every subset is tried. With more,
    the search is greedy: again and again it leaves out the block that raises the loss least per saved cost. In the search, batch
    norms after the first block that is left out use the statistics of each batch. Every network that is reported has statistics
    of its own, recalibrated on images that its loss is not measured on. Train the network with stochastic depth (the recipe
    `"elastic"`), so that leaving out blocks costs little.

    Args:
        model: Functional or Sequential model. It is not changed.
        data: Held-out images: `(inputs, labels)` as arrays, or an iterable of such batches in a random order. Without labels, the
            whole network's own outputs take their place. None ranks the blocks by their drift on random inputs; then nothing is
            measured or recalibrated.
        budgets: Shares of the cost that networks are needed for; the search ends at the smallest. Default: as far as it gets.
        calibration: Inputs that statistics are recalibrated on. Default: the first quarter of `data`, at most 512 images.
        loss: As `growth_scores` takes it. Default: the cross-entropy that fits a classifier's output.
        cost: What a budget is a share of: `"macs"` (multiply-adds) or `"latency"` (of Keras on this machine, one image at a
            time).
        search_images: Number of held-out images that the search uses; the networks it finds are measured on all of them.
        batch_size: Number of images per batch, for arrays. The search needs batches of 32 or more for its statistics.
        compare_drift: Whether to measure the networks that leave out the blocks of least drift, too.
        progress: Callback that gets the name of each step.

    Returns:
        `DepthCurve`; `print` shows a table, `figure()` draws it, and `at(0.7)` returns the network for 70 % of the cost.

    Raises:
        ValueError: No block can be left out, a budget is out of reach, there are too few data, or no loss can be chosen.

    Source: Huang et al. 2016 (arXiv 1603.09382); Veit et al. 2016 (arXiv 1605.06431), section 4.
    """
    if cost not in COSTS:
        raise ValueError(f"`cost` must be one of {', '.join(map(repr, COSTS))}, got {cost!r}")
    budgets = [_share("budgets", budget) for budget in budgets] if budgets is not None else None
    if budgets == []:
        raise ValueError("`budgets` must hold at least one share of the cost, e.g. (0.75, 0.5)")
    step = progress or (lambda name: None)
    copied = _frozen_copy(model)
    blocks = [block for block in find_blocks(copied) if block.removable]
    if not blocks:
        raise ValueError(NO_BLOCK)
    program = Program(copied, blocks)
    held_out, images = _split(model, data, calibration, whole_number("batch_size", batch_size, 1))
    step("count")
    program.count(held_out[0][0] if held_out else _random_inputs(copied))
    costs = _Costs(program, _latencies(copied, program, step) if cost == LATENCY else None)
    _check_reach(costs, budgets, cost)
    least = min(budgets) if budgets else 0.0
    step("drift")
    ranking = _ranking(copied, program, held_out)
    nested = [frozenset(ranking[:count]) for count in range(len(blocks) + 1)]
    nested = nested[: 1 + next((i for i, left in enumerate(nested) if costs.share(left) <= least + 1e-9), len(blocks))]
    make = _Points(program, costs)
    if data is None:
        points = [make.point(left) for left in nested]
        return DepthCurve(points, [], cost, DRIFT, 0, 0, model)
    measure = _Measure(program, held_out, images, *_loss_and_targets(model, held_out, loss))
    found = _search(measure, costs, least, whole_number("search_images", search_images, 1), step)
    points = []
    for number, left in enumerate(found, 1):
        step(f"measure network {number} of {len(found)}")
        points.append(make.point(left, *measure.final(left)))
    by_drift = []
    known = dict(zip(found, points, strict=True))
    for left in nested if compare_drift else []:
        step(f"measure network {len(by_drift) + 1} of {len(nested)} by drift")
        by_drift.append(known[left] if left in known else make.point(left, *measure.final(left)))
    count = lambda given: sum(len(tree.flatten(x)[0]) for x, _ in given)  # noqa: E731
    return DepthCurve(_front([*points, *by_drift]), by_drift, cost, LOSS, count(held_out), count(images), model, images)


# ---------------------------------------------------------------- data


def _split(model, data, calibration, batch_size):
    """Batches of held-out images with their labels, and of images to recalibrate on."""
    if data is None:
        if calibration is not None:
            raise ValueError("`calibration` needs `data`: without them no network is recalibrated")
        return [], []
    given = _in_batches(list(batches(model, data, None)), batch_size)
    if calibration is not None:
        images = list(batches(model, calibration, batch_size))
    else:
        total = sum(len(tree.flatten(x)[0]) for x, _ in given)
        given, images = _cut(given, min(CALIBRATION_IMAGES, total // 4))
    if not given or not images:
        raise ValueError("`data` must hold at least four images: some are recalibrated on, and the others are measured on")
    return given, images


def _in_batches(given, size):
    """Arrays in batches, in a random order: they may be sorted by class."""
    if len(given) != 1:
        return given
    ((x, y),) = given
    order = np.random.default_rng(0).permutation(len(tree.flatten(x)[0]))
    pick = lambda part, rows: None if part is None else tree.map_structure(lambda array: array[rows], part)  # noqa: E731
    return [(pick(x, rows), pick(y, rows)) for rows in np.split(order, range(size, len(order), size))]


def _cut(given, count):
    """Batches without their first rows, and those rows."""
    rest, first = [], []
    for x, y in given:
        size = len(tree.flatten(x)[0])
        taken = min(count, size)
        count -= taken
        parts = [
            tuple(None if part is None else tree.map_structure(lambda array, cut=cut: array[cut], part) for part in (x, y))
            for cut in (slice(0, taken), slice(taken, None))
        ]
        first += parts[:1] if taken else []
        rest += parts[1:] if taken < size else []
    return rest, first


def _random_inputs(model):
    noise = noise_batches(model)
    if noise is None:
        raise ValueError("the sizes of the model's input are not fixed, so there are no random inputs for it; pass `data`")
    return noise[0][0]


def _loss_and_targets(model, held_out, loss):
    """A function of labels and outputs, and a function of the whole network's outputs that stand in for missing labels."""
    same = lambda outputs: tree.map_structure(ops.convert_to_numpy, outputs)  # noqa: E731
    if loss is not None:
        return keras.losses.get(loss), same
    try:
        found = default_loss(model)
    except ValueError:
        if all(y is not None for _, y in held_out):
            raise
        return _squared_error, same
    is_linear = output_heads(model)[0].kind == "other"
    return found, (lambda outputs: ops.convert_to_numpy(ops.softmax(outputs))) if is_linear else same


def _squared_error(targets, outputs):
    """Mean squared error, summed over the outputs."""
    return sum(
        np.mean(np.square(np.asarray(ops.convert_to_numpy(output), "float64") - target))
        for target, output in zip(tree.flatten(targets), tree.flatten(outputs), strict=True)
    )


# ---------------------------------------------------------------- cost


class _Costs:
    """What networks cost, as a share of the whole one.

    Args:
        program: The network, with its multiply-adds counted.
        saved: What each block costs, as a share; by default its multiply-adds count.
    """

    def __init__(self, program: Program, saved: list[float] | None) -> None:
        self.program, self._saved = program, saved
        self._whole = program.cost(frozenset())

    def share(self, left: Left) -> float:
        if self._saved is not None:
            return 1.0 - sum(self._saved[block] for block in left)
        return self.program.cost(left) / self._whole if self._whole else 1.0


def _check_reach(costs, budgets, cost):
    least = costs.share(frozenset(range(len(costs.program.blocks))))
    if budgets and min(budgets) < least - 1e-9:
        count = len(costs.program.blocks)
        left = "the only block that can be left out" if count == 1 else f"all {count} blocks that can be left out"
        raise ValueError(f"no network meets the budget {min(budgets):g}: without {left}, {_least(least, cost)} remain")


def _least(share, cost):
    return f"{share:.3f} of the {COSTS[cost]}"


def _share(name, value):
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"`{name}` must be a share of the cost, above 0 and at most 1, got {value!r}")
    return float(value)


def _latencies(model, program, step):
    """What each block costs, as a share of the latency. Blocks of one make are measured together: one alone is too small."""
    kinds: dict[tuple, list[int]] = {}
    for index, block in enumerate(program.blocks):
        saved = program.cost(frozenset()) - program.cost(frozenset([index]))
        kinds.setdefault((saved, *(tuple(w.shape) for layer in block.branch for w in layer.weights)), []).append(index)
    step("latency")
    models = [model, *(remove_blocks(model, [program.blocks[i] for i in indices]) for indices in kinds.values())]
    x = tree.map_structure(lambda array: array[:1], _random_inputs(model))
    whole, *without = _interleaved([lambda m=m: m.predict_on_batch(x) for m in models])
    saved = [0.0] * len(program.blocks)
    for seconds, indices in zip(without, kinds.values(), strict=True):
        for index in indices:
            saved[index] = max(0.0, (whole - seconds) / whole / len(indices))
    return saved


def _interleaved(calls, warm_up=3, runs=21):
    """Median seconds of each call, the calls in turns."""
    seconds = [[] for _ in calls]
    for turn in range(warm_up + runs):
        for call, taken in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            if turn >= warm_up:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


# ---------------------------------------------------------------- statistics


def _frozen_copy(model):
    """A copy whose batch norms keep their moving statistics when they run on batch statistics."""
    copied = copy_model(model)
    for layer in layers_in(copied):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable, layer.momentum = True, 1.0
    return copied


def _recalibrate(program, left, images):
    """Give the batch norms that leaving out blocks affects the mean statistics of the batches."""
    norms = program.norms(left)
    if not norms or not left:
        return
    before = [(norm.trainable, norm.momentum) for norm in norms]
    seen = 0
    for norm in norms:
        norm.trainable = True
    try:
        for x, _ in images:
            size = len(tree.flatten(x)[0])
            seen += size
            for norm in norms:
                norm.momentum = 1.0 - size / seen
            program.outputs(x, left, batch_statistics=True)
    finally:
        for norm, (trainable, momentum) in zip(norms, before, strict=True):
            norm.trainable, norm.momentum = trainable, momentum


# ---------------------------------------------------------------- search


@dataclass(frozen=True)
class _Points:
    """Makes points of sets of blocks."""

    program: Program
    costs: _Costs

    def point(
        self, left: Left, loss: float | None = None, accuracy: float | None = None, agreement: float | None = None
    ) -> DepthPoint:
        removed = tuple(self.program.blocks[index].path for index in sorted(left))
        return DepthPoint(removed, self.costs.share(left), self.program.cost(left), loss, accuracy, agreement)


class _Measure:
    """Losses of networks.

    Args:
        program: The network.
        held_out: Batches with labels, or None in their place.
        images: Batches to recalibrate on.
        loss: Function of labels and outputs.
        targets: Function of the whole network's outputs, which take the place of missing labels.
    """

    def __init__(self, program: Program, held_out: list, images: list, loss: Callable, targets: Callable) -> None:
        self.program, self.images, self._loss = program, images, loss
        self._whole = [program.outputs(x) for x, _ in held_out]
        self._held_out = [(x, targets(whole) if y is None else y) for (x, y), whole in zip(held_out, self._whole, strict=True)]
        self._labelled = [y is not None for _, y in held_out]
        norms = program.norms(frozenset(range(len(program.blocks))))
        self._statistics = [variable for norm in norms for variable in (norm.moving_mean, norm.moving_variance)]
        self._before = [ops.convert_to_numpy(variable) for variable in self._statistics]

    def search(self, base: Left, candidates: Sequence[Left], most: int) -> list[float]:
        """Estimate the losses of networks that leave out more than a base, on batch statistics."""
        totals, rows = [0.0] * len(candidates), 0
        for x, y in self._held_out:
            size = len(tree.flatten(x)[0])
            if rows >= most:
                break
            for number, outputs in self.program.branching(x, base, candidates):
                totals[number] += size * self._value(y, outputs)
            rows += size
        return [total / rows for total in totals]

    def final(self, left: Left) -> tuple[float, float | None, float | None]:
        """Return `(loss, accuracy, agreement)` of a network with statistics of its own, on all held-out images."""
        _recalibrate(self.program, left, self.images)
        try:
            return self._figures(left)
        finally:
            for variable, value in zip(self._statistics, self._before, strict=True):
                variable.assign(value)

    def _figures(self, left):
        total, right, same, rows = 0.0, 0, 0, 0
        ranked = labelled = True
        for (x, y), whole, has_labels in zip(self._held_out, self._whole, self._labelled, strict=True):
            outputs = self.program.outputs(x, left)
            size = len(tree.flatten(x)[0])
            rows += size
            total += size * self._value(y, outputs)
            flat, reference = ([np.asarray(ops.convert_to_numpy(part)) for part in tree.flatten(o)] for o in (outputs, whole))
            ranked &= len(flat) == 1 and flat[0].ndim == 2 and flat[0].shape[1] > 1
            same += int((flat[0].argmax(-1) == reference[0].argmax(-1)).sum()) if ranked else 0
            classes = class_labels(y, flat) if has_labels else None
            labelled &= classes is not None
            right += int((flat[0].argmax(-1) == classes).sum()) if labelled else 0
        return total / rows, right / rows if labelled else None, same / rows if ranked else None

    def _value(self, y, outputs):
        return float(np.mean(ops.convert_to_numpy(self._loss(y, outputs))))


def _search(measure, costs, least, most, step):
    """The sets of blocks that are worth measuring: those that no cheaper one beats in the search."""
    tried: dict[Left, float] = {}
    blocks = range(len(costs.program.blocks))
    nothing: Left = frozenset()
    if len(blocks) <= EXACT_BLOCKS:
        subsets = [frozenset(c) for size in range(1, len(blocks) + 1) for c in itertools.combinations(blocks, size)]
        step(f"search {len(subsets)} networks")
        tried = dict(zip(subsets, measure.search(nothing, subsets, most), strict=True))
        return [nothing, *_unbeaten(tried, costs)]
    left, loss = nothing, measure.search(nothing, [nothing], most)[0]
    while costs.share(left) > least + 1e-9 and len(left) < len(blocks):
        step(f"search: {len(left)} of {len(blocks)} blocks left out, {costs.share(left):.2f} of the cost")
        more = [left | {block} for block in blocks if block not in left]
        losses = measure.search(left, more, most)
        tried |= dict(zip(more, losses, strict=True))
        # Without savings (latency is noisy) a block goes last.
        rate = [(now - loss) / max(costs.share(left) - costs.share(new), 1e-9) for new, now in zip(more, losses, strict=True)]
        best = int(np.argmin(rate))
        left, loss = more[best], losses[best]
    return [nothing, *_unbeaten(tried, costs)]


def _unbeaten(tried, costs):
    """The networks that have the lowest loss of all that cost no more, the most expensive first."""
    found, lowest = [], np.inf
    for left in sorted(tried, key=lambda left: (costs.share(left), tried[left])):
        if tried[left] < lowest:
            found.append(left)
            lowest = tried[left]
    return found[::-1]


def _front(points):
    """The Pareto front of measured points, the whole network first; it stays even where a smaller one is better."""
    whole, *others = points
    found, lowest = [], np.inf
    for point in sorted(others, key=lambda point: (point.share, point.loss)):
        if point.loss < lowest:
            found.append(point)
            lowest = point.loss
    return [whole, *found[::-1]]


# ---------------------------------------------------------------- drift


def _ranking(model, program, held_out):
    """Positions of the blocks, those with the least drift first; equal ones by their gates."""
    inputs = [x for x, _ in held_out[:4]] or [_random_inputs(model)]
    found: dict[str, BlockDrift] = {block.block: block for block in drift(model, inputs)}
    size = lambda block: (found[block.path].mean, found[block.path].gate_value or 0.0)  # noqa: E731
    return sorted(range(len(program.blocks)), key=lambda index: size(program.blocks[index]))
