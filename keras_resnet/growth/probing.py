"""Running a grown model so that its fresh branches can be measured: their norms use batch statistics, the backbone does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops, tree

from ..blocks.finding import Block, find_blocks
from ..blocks.identity import ResidualBlock
from ..graphs import call_inputs, flat_inputs, graph_of, replay, require_graph


def run_with_fresh_branches(model: keras.Model, x: object, visit: Callable) -> object:
    """Run a model layer by layer, grown branches in training mode and everything else in inference mode.

    The norms of a fresh branch have statistics that fit nothing yet; only in training mode do they normalise. Their moving
    statistics change.

    Args:
        model: Functional or Sequential model.
        x: One batch of inputs.
        visit: `visit(layer, inputs, output)`, called after every layer; the layers inside a `ResidualBlock` are visited too.

    Returns:
        The model's outputs.
    """
    fresh = {id(layer) for block in find_blocks(model) if block.add.grown for layer in block.branch}

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        operation = node.operation
        if isinstance(operation, keras.Model) and (graph := graph_of(operation)) is not None:
            return replay(graph, flat_inputs(graph, call_inputs(args, kwargs)), call)
        if isinstance(operation, ResidualBlock) and operation.add is not None:
            return operation.run(call_inputs(args, kwargs), training=True, visit=visit)
        outputs = operation(*args, **kwargs, **({"training": True} if id(operation) in fresh else {}))
        visit(operation, call_inputs(args, kwargs), outputs)
        return outputs

    graph = require_graph(model)
    return replay(graph, flat_inputs(graph, tree.map_structure(ops.convert_to_tensor, x)), call)


def gate_layer(block: Block) -> keras.layers.Layer:
    """Return the layer that holds a block's branch at zero."""
    # The zero convolution of `fixup` is followed by its multiplier.
    return block.branch[-2 if block.gate == "fixup" else -1]
