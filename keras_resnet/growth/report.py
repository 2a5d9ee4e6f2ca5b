"""Proof that a grown model computes what the original computes, and which of its parameters can learn."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from keras import ops, tree

from ..graphs import require_graph, state_kept
from .blocks import find_blocks
from .gradients import parameters_without_gradient

GRAPH_BOUND = 1e-6


@dataclass(frozen=True)
class IdentityReport:
    """What `identity_report` saw. Differences are max |Δ| over all outputs; `scale` is max |output| of the original.

    `graph_noise` is how far the *original* in graph mode is from itself called eagerly: what TensorFlow's fusions do to a
    model that nothing was done to, and so the size of `graph` that means nothing.

    `without_gradient` lists the trainable parameters of the grown model that get no gradient at step 0 (paths), or is
    None where the backend offers no gradient.
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
    without_gradient: list | None

    @property
    def exact(self):
        """Whether the outputs are `==` in inference and in training mode, called eagerly."""
        return self.eager == 0 and self.training == 0

    @property
    def graph_exact(self):
        """Whether graph mode (`predict`) showed no difference either."""
        return self.graph == 0

    @property
    def holds(self):
        """Exact eagerly in inference, and within 1e-6 of the scale in graph mode."""
        return self.eager == 0 and self.graph <= GRAPH_BOUND * self.scale

    def to_json(self):
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "exact": self.exact, "graph_exact": self.graph_exact, "holds": self.holds}

    def __str__(self):
        if self.graph_exact:
            graph = "exact"
        else:
            bound = "within" if self.graph <= GRAPH_BOUND * self.scale else "ABOVE"
            relative, noise = (value / (self.scale or 1) for value in (self.graph, self.graph_noise))
            graph = f"{relative:.1e} relative, {bound} {GRAPH_BOUND:g}: other fusions"
            graph += f"; the original's own graph mode is {noise:.1e} off"
        gradient = (
            "unknown on this backend" if self.without_gradient is None else f"{len(self.without_gradient)} parameter tensors"
        )
        wake = " (they wake up once the gates have moved)" if self.without_gradient else ""
        return (
            f"{self.blocks} residual blocks, {self.added_parameters:,} new parameters of {self.parameters:,}, "
            f"{self.added_trainable:,} of them trainable\n"
            f"max |Δ| eager      {self.eager:g}{' (exact)' if self.eager == 0 else ''}\n"
            f"max |Δ| graph      {self.graph:g} ({graph})\n"
            f"max |Δ| training   {self.training:g}{' (exact)' if self.training == 0 else ''}\n"
            f"without gradient   {gradient} at step 0{wake}"
        )


def identity_report(model, grown, x, seed=0):
    """Compare a model with its grown copy on one batch; moves no statistics, seeds or weights of either.

    Args:
        model: the original.
        grown: what `grow` made of it.
        x: one batch of inputs, as the model takes it (array, list or dict).
        seed: of the random vector that the output is multiplied with for the gradients.

    Returns:
        `IdentityReport` with max |Δ| when called eagerly, in graph mode (`predict`) and in training mode, and the
        parameters without gradient of ⟨output before a final softmax, random vector⟩ at step 0.

    Raises:
        ValueError: the two models have different outputs, or `x` holds no batch.
    """
    for each in (model, grown):
        require_graph(each)
    if x is None or not tree.flatten(x) or not all(hasattr(leaf, "shape") and len(leaf) for leaf in tree.flatten(x)):
        raise ValueError("`x` must be one batch of inputs (array, list or dict of arrays) with at least one row")
    with state_kept(model, grown):
        return _compare(model, grown, tree.map_structure(ops.convert_to_tensor, x), seed)


def _compare(model, grown, x, seed):
    before, after = (_arrays(_stateless(m, x, training=False)) for m in (model, grown))
    if [a.shape for a in before] != [a.shape for a in after]:
        raise ValueError(f"the models differ in their outputs: shapes {[a.shape for a in before]} and {[a.shape for a in after]}")
    numpy_x = tree.map_structure(ops.convert_to_numpy, x)
    graph = [_arrays(m.predict_on_batch(numpy_x)) for m in (model, grown)]
    training = [_arrays(_stateless(m, x, training=True)) for m in (model, grown)]
    new_blocks = [block for block in find_blocks(grown) if block.add.grown]
    rng = np.random.default_rng(seed)
    vectors = [rng.standard_normal(a.shape).astype("float32") for a in after]
    silent = parameters_without_gradient(grown, x, vectors)
    return IdentityReport(
        eager=largest_difference(before, after),
        graph=largest_difference(*graph),
        graph_noise=largest_difference(before, graph[0]),
        training=largest_difference(*training),
        scale=max((float(np.max(np.abs(a), initial=0)) for a in before), default=0.0),
        blocks=len(new_blocks),
        parameters=grown.count_params(),
        added_parameters=grown.count_params() - model.count_params(),
        added_trainable=sum(_trainable(layer) for block in new_blocks for layer in block.branch),
        without_gradient=silent,
    )


def largest_difference(first, second):
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
