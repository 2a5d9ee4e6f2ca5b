"""Finding the residual blocks of a model by their `ResidualAdd`, whoever built them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import keras
from keras import tree

from ..graphs import ancestors, producer, walk
from ..layers import ResidualAdd
from .identity import ResidualBlock
from .signs import callers, is_non_negative, is_relu


@dataclass(frozen=True)
class Block:
    """A residual block found in a model.

    `path` names it, `add` is its `ResidualAdd`, `branch` its layers that have weights, in order; `same_shape` tells
    whether it could be the identity: the shortcut is the very tensor that the branch starts from. `keeps_shortcut` tells
    whether nothing after the addition changes the shortcut: there is no activation, or a ReLU of a tensor that is proven not
    to be negative.
    """

    path: str
    add: ResidualAdd
    branch: list = field(repr=False)
    same_shape: bool = False
    keeps_shortcut: bool = True

    @property
    def gate(self) -> str | None:
        return self.add.gate

    @property
    def removable(self) -> bool:
        """Whether `prune` may take it out: without its branch the block is the identity."""
        return self.same_shape and self.keeps_shortcut


def closing_name(add: ResidualAdd) -> str:
    """Return the name of the activation that belongs to a post-activation block."""
    return f"{add.block}_out"


def find_blocks(model: keras.Model) -> list[Block]:
    """Find all residual blocks of a model by their `ResidualAdd`, also in nested models and `ResidualBlock` layers.

    Args:
        model: Functional or Sequential model.

    Returns:
        List of `Block` in order of execution; a block that is called more than once appears once.
    """
    found, seen, closing = [], set(), _Closing(model)
    for path, _, node in walk(model):
        operation = node.operation
        if id(operation) in seen:
            continue
        seen.add(id(operation))
        if isinstance(operation, ResidualBlock) and operation.add is not None:
            found.append(Block(path, operation.add, [layer for layer in operation.branch if layer.weights], True))
        elif isinstance(operation, ResidualAdd):
            layers, same_shape = _branch(*node.arguments.keras_tensors)
            prefix, _, own = path.rpartition("/")
            path = "/".join(filter(None, (prefix, operation.block or own)))
            found.append(Block(path, operation, layers, same_shape, closing.keeps_shortcut(operation)))
    return found


class _Closing:
    """Whether what follows the additions of a model leaves their shortcuts as they are. Works only where it is asked."""

    def __init__(self, model: keras.Model) -> None:
        self._model, self._known = model, {}
        self._calls: list[Any] | None = None
        self._outer: dict[int, Any] | None = None

    def keeps_shortcut(self, add: ResidualAdd) -> bool:
        if add.grown or add.kind == "preact":
            return True  # Post-activation blocks are grown only where the shortcut is not negative.
        if self._calls is None:
            self._calls, self._outer = [node for _, _, node in walk(self._model)], callers(self._model)
        sums = [node for node in self._calls if node.operation is add]
        outputs = {id(node.outputs[0]) for node in sums}
        return all(is_non_negative(node.arguments.keras_tensors[0], self._outer, self._known) for node in sums) and all(
            is_relu(node.operation)
            for node in self._calls
            if node.operation.name == closing_name(add) and any(id(t) in outputs for t in node.arguments.keras_tensors)
        )


def _branch(shortcut, branch):
    """Layers with weights of the branch alone, in order; whether the branch starts at the shortcut and nowhere else.

    Masks do not count as a start: they say which values are valid, and are not values themselves.
    """
    backbone = ancestors(shortcut)
    layers, seen, starts = [], set(), set()

    def visit(tensor: Any) -> None:
        if id(tensor) in backbone or (node := producer(tensor)) is None or node.is_input:
            starts.add(id(tensor))
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            for parent in _values_into(node):
                visit(parent)
            if getattr(node.operation, "weights", None):
                layers.append(node.operation)

    visit(branch)
    return layers, starts == {id(shortcut)}


def _values_into(node):
    """The symbolic tensors that a call takes, without its mask."""
    kwargs = {key: value for key, value in node.arguments.kwargs.items() if key != "mask"}
    return [x for x in tree.flatten((node.arguments.args, kwargs)) if isinstance(x, keras.KerasTensor)]
