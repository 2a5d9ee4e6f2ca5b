"""Stochastic depth for a model that was built without it: residual branches are dropped at random in training."""

from __future__ import annotations

from typing import Any

import keras

from ..blocks.finding import find_blocks
from ..checks import probability
from ..graphs import producer, walk
from ..layers import DropPath, ResidualAdd
from .surgery import copy_model


def with_drop_path(model: keras.Model, rate: float, seed: int | None = None) -> keras.Model:
    """Return a copy of a model that is trained with stochastic depth; in inference it computes the same.

    The rate grows linearly from 0 for the first residual block to `rate` for the last one, as with the zoo's `drop_path`. Blocks
    that have a `DropPath` already get the new rate. `ResidualBlock` layers have no place for one; use `residual_stack` or `grow`.

    Args:
        model: Functional or Sequential model with residual blocks. It is not changed.
        rate: Probability with which the branch of the last block is dropped, for each example, in [0, 1).
        seed: Integer for reproducible drops.

    Returns:
        An uncompiled Functional model.

    Raises:
        ValueError: `rate` is no such probability, or the model has no residual block that could get a `DropPath`.

    Source: Huang et al. 2016 (arXiv 1603.09382), section 3.
    """
    rate = probability("rate", rate)
    order = {id(block.add): index for index, block in enumerate(find_blocks(model))}
    last = max(1, len(order) - 1)
    branches = {}
    for _, _, node in walk(model):
        if isinstance(node.operation, ResidualAdd):
            index = order[id(node.operation)]
            branches[id(node.arguments.keras_tensors[1])] = (node.operation, index, rate * index / last)
    if not branches:
        raise ValueError(
            f"model {model.name!r} has no residual block that training can drop: blocks are found by their `ResidualAdd`, "
            "and `ResidualBlock` layers have no place for a `DropPath`"
        )
    made: dict[int, keras.Layer] = {}

    def rewrite(graph: Any, node: Any, inputs: Any, outputs: Any) -> Any:
        if len(node.outputs) != 1 or id(node.outputs[0]) not in branches:
            return outputs
        add, index, share = branches[id(node.outputs[0])]
        if isinstance(node.operation, DropPath):
            producer(outputs).operation.rate = share
        elif share:
            if id(add) not in made:
                own = None if seed is None else seed + index
                made[id(add)] = DropPath(share, own, dtype=outputs.dtype, name=f"{add.block or add.name}_drop_path")
            return made[id(add)](outputs)
        return outputs

    return copy_model(model, rewrite)
