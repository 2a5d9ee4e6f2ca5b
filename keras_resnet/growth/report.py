"""Proof that a grown model computes what the original computes, and which of its parameters can learn."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from ..blocks.finding import find_blocks
from ..blocks.gates import GATES
from ..graphs import require_graph, state_kept
from .drift import batches, gate_value
from .gradients import parameters_without_gradient
from .onednn import backward_problem
from .probing import gate_layer, run_with_fresh_branches

GRAPH_BOUND = 1e-6


@dataclass(frozen=True)
class IdentityReport:
    """What `identity_report` saw. Differences are max |Δ| over all outputs; `scale` is max |output| of the original.

    `graph_noise` is how far the *original* in graph mode is from itself called eagerly: what TensorFlow's fusions do to a
    model that nothing was done to, and so the size of `graph` that means nothing.

    `without_gradient` lists the trainable parameters of the grown model that get no gradient at step 0 (paths), or is
    None where the backend offers no gradient or computing it could crash the process.

    `small_branches` maps the blocks whose fresh branch is more than 100 times smaller than the tensor that it is added to, to the
    ratio of their sizes (RMS); such blocks hardly learn, see `grow(scale="match")`.

    `notes` are messages about what was not measured, and why.
    """

    eager: float
    graph: float
    graph_noise: float
    training: float
    scale: float
    blocks: int
    parameters: int
    added_parameters: int
    added_trainable: int
    without_gradient: list[str] | None
    small_branches: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the outputs are `==` in inference and in training mode, called eagerly."""
        return self.eager == 0 and self.training == 0

    @property
    def graph_exact(self) -> bool:
        """Whether graph mode (`predict`) showed no difference either."""
        return self.graph == 0

    @property
    def holds(self) -> bool:
        """Exact eagerly in inference, and within 1e-6 of the scale in graph mode."""
        return self.eager == 0 and self.graph <= GRAPH_BOUND * self.scale

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "exact": self.exact, "graph_exact": self.graph_exact, "holds": self.holds}

    def __str__(self) -> str:
        unknown = "not measured" if self.notes else "unknown on this backend"
        gradient = unknown if self.without_gradient is None else f"{len(self.without_gradient)} parameter tensors at step 0"
        wake = " (they get one once the gates have moved)" if self.without_gradient else ""
        lines = [
            f"{self.blocks} residual blocks, {self.added_parameters:,} new parameters of {self.parameters:,}, "
            f"{self.added_trainable:,} of them trainable",
            f"max |Δ| eager      {self.eager:g}{' (exact)' if self.eager == 0 else ''}",
            f"max |Δ| graph      {self.graph:g} ({self._graph_in_words()})",
            f"max |Δ| training   {self.training:g}{' (exact)' if self.training == 0 else ''}",
            f"without gradient   {gradient}{wake}",
        ]
        if self.small_branches:
            lines.append(f"note: {_too_small(self.small_branches)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _graph_in_words(self):
        if self.graph_exact:
            return "exact"
        bound = "within" if self.graph <= GRAPH_BOUND * self.scale else "ABOVE"
        relative, noise = (value / (self.scale or 1) for value in (self.graph, self.graph_noise))
        # Fusions explain a difference only where there is none without them.
        cause = "TensorFlow fuses other operations" if self.eager == 0 else "the models differ without graph mode too"
        return f"{relative:.1e} relative, {bound} {GRAPH_BOUND:g}: {cause}; the original's own graph mode is {noise:.1e} off"


def identity_report(model: keras.Model, grown: keras.Model, x: object, seed: int = 0) -> IdentityReport:
    """Compare a model with its grown copy; statistics, seeds and weights of both stay as they are.

    A warning names the blocks whose fresh branch is more than 100 times smaller than the tensor that it is added to.

    Args:
        model: The original.
        grown: What `grow` made of it.
        x: Inputs as the model takes them (array, list or dict), which are compared as one batch; a tuple `(inputs, labels)`; or
            an iterable of batches such as a `tf.data.Dataset`. Gradients and sizes are those of the first batch.
        seed: Seed of the random vector that the output is multiplied with for the gradients.

    Returns:
        `IdentityReport` with the largest differences when called eagerly, in graph mode (`predict`) and in training mode, and the
        parameters without gradient of ⟨output before a final softmax, random vector⟩ at step 0.

    Raises:
        ValueError: The two models have different outputs, or `x` contains no inputs.
    """
    for each in (model, grown):
        require_graph(each)
    refusal = "`x` must be inputs of the model (array, list or dict of arrays, dataset) with at least one row"
    if x is None:
        raise ValueError(refusal)
    problem = backward_problem(grown)
    total = None
    with state_kept(model, grown):
        for inputs, _ in batches(model, x, None):
            leaves = tree.flatten(inputs)
            if not leaves or not all(hasattr(leaf, "shape") and len(leaf) for leaf in leaves):
                raise ValueError(refusal)
            seen = _differences(model, grown, tree.map_structure(ops.convert_to_tensor, inputs))
            if total is None:
                total, first = seen, inputs
            else:
                total = {key: max(value, seen[key]) for key, value in total.items()}
        if total is None:
            raise ValueError(refusal)
        first = tree.map_structure(ops.convert_to_tensor, first)
        silent = None if problem else _without_gradient(grown, first, seed)
        ratios = branch_ratios(grown, first)
    small = {path: ratio for path, ratio in ratios.items() if ratio < SMALL_BRANCH}
    if small:
        warnings.warn(_too_small(small), stacklevel=2)
    new_blocks = [block for block in find_blocks(grown) if block.add.grown]
    return IdentityReport(
        **total,
        blocks=len(new_blocks),
        parameters=grown.count_params(),
        added_parameters=grown.count_params() - model.count_params(),
        added_trainable=sum(_trainable(layer) for block in new_blocks for layer in block.branch),
        without_gradient=silent,
        small_branches=small,
        notes=[problem] if problem else [],
    )


def _differences(model, grown, x):
    """The largest differences on one batch, by the field of the report."""
    before, after = (_arrays(_stateless(m, x, training=False)) for m in (model, grown))
    if [a.shape for a in before] != [a.shape for a in after]:
        raise ValueError(f"the models differ in their outputs: shapes {[a.shape for a in before]} and {[a.shape for a in after]}")
    numpy_x = tree.map_structure(ops.convert_to_numpy, x)
    graph = [_arrays(m.predict_on_batch(numpy_x)) for m in (model, grown)]
    training = [_arrays(_stateless(m, x, training=True)) for m in (model, grown)]
    return {
        "eager": largest_difference(before, after),
        "graph": largest_difference(*graph),
        "graph_noise": largest_difference(before, graph[0]),
        "training": largest_difference(*training),
        "scale": max((float(np.max(np.abs(a), initial=0)) for a in before), default=0.0),
    }


def _without_gradient(grown, x, seed):
    rng = np.random.default_rng(seed)
    outputs = _arrays(_stateless(grown, x, training=False))
    return parameters_without_gradient(grown, x, [rng.standard_normal(a.shape).astype("float32") for a in outputs])


SMALL_BRANCH = 1 / 100


def branch_ratios(grown: keras.Model, x: object) -> dict[str, float]:
    """Compare the size (RMS) of each fresh branch, before its gate, with the tensor that it is added to.

    Args:
        grown: Functional or Sequential model with grown blocks. Moving statistics of its new blocks change.
        x: One batch of inputs.

    Returns:
        `{block: size of the scaled branch / size of the shortcut}` of the grown blocks whose gates are closed.
    """
    blocks = {id(gate_layer(block)): block for block in find_blocks(grown) if _is_fresh(block)}
    adds = {id(block.add): block for block in blocks.values()}
    branch, shortcut = {}, {}

    def visit(layer: keras.Layer, inputs: Any, output: Any) -> None:
        if (block := blocks.get(id(layer))) is not None:
            # A closing norm gives values of size 1 to its γ.
            branch[block.path] = 1.0 if block.gate == "zero_gamma" else _rms(inputs)
        elif (block := adds.get(id(layer))) is not None:
            shortcut[block.path] = _rms(inputs[0])

    run_with_fresh_branches(grown, x, visit)
    scales = {block.path: block.add.scale for block in blocks.values()}
    return {path: scales[path] * size / shortcut[path] for path, size in branch.items() if shortcut.get(path)}


def _is_fresh(block):
    value = gate_value(block) if block.add.grown else None
    return value is not None and value <= GATES[block.gate].bound


def _rms(tensor):
    values = np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")), "float64")
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def _too_small(small):
    path, ratio = min(small.items(), key=lambda item: item[1])
    times = f"{1 / SMALL_BRANCH:g} times smaller"
    many = f"1 new branch is more than {times} than the tensor that it is added to"
    if len(small) > 1:
        many = f"{len(small)} new branches are more than {times} than the tensors that they are added to"
    worst = f"{path!r} {1 / ratio:.0f} times" if ratio else f"{path!r} is zero throughout"
    return f'{many} ({worst}) and would hardly learn; use grow(..., scale="match", data=x)'


def largest_difference(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """max |Δ| over two lists of arrays; NaN and infinity in the same places count as equal."""
    gaps = [0.0]
    for a, b in zip(first, second, strict=True):
        a, b = a.astype("float64"), b.astype("float64")
        differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        with np.errstate(invalid="ignore"):
            gap = np.abs(a - b)[differ]
        gaps.append(float(np.nan_to_num(gap, nan=np.inf).max(initial=0)))
    return max(gaps)


def _arrays(outputs):
    return [np.asarray(ops.convert_to_numpy(output)) for output in tree.flatten(outputs)]


def _trainable(layer):
    return sum(math.prod(variable.shape) for variable in layer.trainable_variables)


def _stateless(model, x, training):
    trainable = [v.value for v in model.trainable_variables]
    outputs, _ = model.stateless_call(trainable, [v.value for v in model.non_trainable_variables], x, training=training)
    return outputs
