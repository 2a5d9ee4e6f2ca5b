"""Insertion points: where in the tree of a model a block can be added, and what is known about the tensor there."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import Any

import keras

from ..checks import closest, whole_number
from ..graphs import is_convolution, producer, walk


@dataclass(frozen=True)
class InsertionPoint:
    """A tensor after which blocks can be added: the only output of the call `node`, which `graph` contains and `path` names."""

    path: str
    graph: keras.Model
    node: Any
    tensor: keras.KerasTensor

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.node.operation.name


def find_points(model: keras.Model, after: object, node: int | None = None) -> list[InsertionPoint]:
    """Find the calls that `after` names.

    Args:
        model: Functional or Sequential model.
        after: A name or path, a pattern (`*`, `?`), a list of those, a layer, a predicate of a layer, or None for every
            convolution.
        node: Index of the call, for a layer that is called more than once.

    Returns:
        Insertion points in order of execution.

    Raises:
        ValueError: Nothing matches, or a layer is called more than once and `node` is not given.
    """
    calls = {}
    for path, graph, call in walk(model):
        calls.setdefault(path, []).append((graph, call))
    chosen = []
    if node is not None:
        node = whole_number("node", node, 0)
    for path in _matching(calls, after):
        if node is None and len(calls[path]) > 1:
            raise ValueError(
                f'layer "{path}" is called {len(calls[path])} times; say which call with `node=0` … `node={len(calls[path]) - 1}`'
            )
        index = node or 0
        if index >= len(calls[path]):
            raise ValueError(f'layer "{path}" is called {len(calls[path])} times, so `node` must be below that, got {node}')
        graph, call = calls[path][index]
        if len(call.outputs) != 1:
            raise ValueError(f'no block can be added after "{path}": it has {len(call.outputs)} outputs, a block needs one')
        chosen.append(InsertionPoint(path, graph, call, call.outputs[0]))
    return chosen


# Parts of blocks grown before: patterns and predicates match the backbone only; an exact name still reaches them.
_GROWN_PART = re.compile(r"_grow\d+_(norm|relu|conv|dense|shift|scale|unmask|add|out)\d*$")


def is_grown_part(path: str) -> bool:
    """Return whether a layer is named like a part of a block that `grow` added."""
    return bool(_GROWN_PART.search(path))


def _matching(calls, after):
    """Paths that `after` names, in order of execution."""
    backbone = {path: found[0][1].operation for path, found in calls.items() if not is_grown_part(path)}
    if after is None:
        return [path for path, operation in backbone.items() if is_convolution(operation)]
    if isinstance(after, type):
        raise TypeError(
            f"`after` must be a predicate of a layer, not a class: `lambda layer: isinstance(layer, {after.__name__})`"
        )
    if isinstance(after, keras.layers.Layer):
        matches = [path for path, found in calls.items() if found[0][1].operation is after]
        if not matches:
            raise ValueError(f'layer "{after.name}" is not part of the model')
        return matches
    if callable(after):
        return _matching_predicate(backbone, after)
    if not isinstance(after, (str, list, tuple, set)):
        raise TypeError(f"`after` must be a name, a pattern, a list of those or a predicate, got {after!r}")
    matches = set()
    for pattern in [after] if isinstance(after, str) else after:
        if not isinstance(pattern, str):
            raise TypeError(f"`after` must be a name, a pattern, a list of those or a predicate, got {pattern!r}")
        hits = [path for path in calls if path == pattern] or [path for path in backbone if fnmatch.fnmatchcase(path, pattern)]
        if not hits:
            raise ValueError(f'no layer of the model matches "{pattern}"{_hint(pattern, calls)}')
        matches.update(hits)
    return [path for path in calls if path in matches]


def _matching_predicate(backbone, predicate):
    matches = []
    for path, operation in backbone.items():
        if isinstance(operation, keras.layers.Layer):
            try:
                holds = predicate(operation)
            except AttributeError as error:
                raise ValueError(
                    f'the predicate `after` fails for layer "{path}": {error}; ask with `getattr` or `isinstance`'
                ) from error
            if holds:
                matches.append(path)
    if not matches:
        raise ValueError("the predicate `after` holds for no layer of the model")
    return matches


def _hint(pattern, paths):
    """What may have been meant by a pattern that matches nothing."""
    if any(
        pattern == tensor.name or pattern == producer(tensor).operation.name
        for found in paths.values()
        for tensor in found[0][0].inputs
    ):
        return "; an input is not an insertion point, since a block follows a layer"
    plain = pattern.replace("*", "").replace("?", "")
    full = {path.rpartition("/")[2]: path for path in paths} | {path: path for path in paths}
    close = closest(plain, full, cutoff=0.4)
    return f'; did you mean "{full[close[0]]}"?' if close else f"; it has {len(full)}, see `model.summary()`"
