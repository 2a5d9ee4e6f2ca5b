"""Matching the size of a new branch to the tensor that it is added to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from ..blocks.finding import find_blocks
from ..checks import positive_number
from ..graphs import call_inputs, flat_inputs, graph_of, replay, require_graph
from .drift import batches

MATCH = "match"


def check_scale(scale: object, data: object) -> None:
    """Refuse a `scale` that `grow` cannot use, before anything is computed.

    Raises:
        ValueError: `scale` is neither None, `"match"`, a positive number nor a mapping; or `data` is missing or not needed.
    """
    if scale == MATCH and data is None:
        raise ValueError('`scale="match"` is measured on data; pass `data=x`, a few hundred inputs of the model')
    if scale != MATCH and data is not None:
        raise ValueError(f'`data` is only used by `scale="match"`, got scale={scale!r}')
    if isinstance(scale, str) and scale != MATCH:
        raise ValueError(f'`scale` must be "match", a positive number or a mapping of block names to numbers, got {scale!r}')
    if scale is not None and not isinstance(scale, (str, Mapping)):
        positive_number("scale", scale)


def block_scales(model: keras.Model) -> dict[str, float]:
    """Return the scale of every grown block by its name, as `grow(scale=…)` takes it.

    With it, a model can be grown again exactly as before without the data that the scales were measured on.

    Args:
        model: Functional or Sequential model.

    Returns:
        `{block: scale}` in order of execution; a block in a nested model has its path as name.
    """
    return {block.path: block.add.scale for block in find_blocks(model) if block.add.grown}


def measure_rms(model: keras.Model, calls: dict, data: object, batch_size: int = 32) -> dict[int, float]:
    """Measure the root mean square of the output of some calls of a model, in inference mode.

    Args:
        model: Functional or Sequential model.
        calls: Name by the id of each call, for messages. A call in a nested model counts each time that model is called.
        data: What `drift` takes.
        batch_size: Number of inputs per step, for arrays.

    Returns:
        RMS over all values, by the id of the call.

    Raises:
        ValueError: There are no data, or the RMS of a tensor is zero or not finite.
    """
    totals = {key: np.zeros(2) for key in calls}

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        operation = node.operation
        if isinstance(operation, keras.Model) and (graph := graph_of(operation)) is not None:
            outputs = replay(graph, flat_inputs(graph, call_inputs(args, kwargs)), call)
        else:
            outputs = operation(*args, **kwargs)
        if id(node) in totals:
            values = np.asarray(ops.convert_to_numpy(ops.cast(tree.flatten(outputs)[0], "float32")), "float64")
            totals[id(node)] += np.square(values).sum(), values.size
        return outputs

    graph = require_graph(model)
    for x, _ in batches(model, data, batch_size):
        replay(graph, flat_inputs(graph, tree.map_structure(ops.convert_to_tensor, x)), call)
    return {key: _rms(calls[key], *total) for key, total in totals.items()}


def _rms(name, squares, size):
    if not size:
        raise ValueError("`data` contains no inputs")
    if not 0 < (rms := float(np.sqrt(squares / size))) < np.inf:
        raise ValueError(
            f'the output of "{name}" has a root mean square of {rms:g} on `data`, so no scale matches it; '
            "check the range of the inputs, or leave this insertion point out"
        )
    return rms
