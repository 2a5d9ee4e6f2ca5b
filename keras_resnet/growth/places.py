"""Places: where in a model's tree a block can go, and what is known about the tensor there."""

import difflib
import fnmatch
from dataclasses import dataclass

import keras

from .graph import is_convolution, nodes, producer, walk


@dataclass(frozen=True)
class Place:
    """A tensor behind which blocks can go: the only output of `node`, in `graph`, at `path`."""

    path: str
    graph: object
    node: object
    tensor: object

    @property
    def name(self):
        return self.node.operation.name


def find_places(model, after, node=None):
    """The calls that `after` names.

    Args:
        model: Functional or Sequential model.
        after: a name or path, a pattern (`*`, `?`), a list of those, a predicate of a layer, or None for every
            convolution.
        node: index of the call, for a layer that is called more than once.

    Returns:
        List of `Place` in order of execution.

    Raises:
        ValueError: nothing matches, or a layer is called more than once and `node` is not given.
    """
    calls = {}
    for path, graph, call in walk(model):
        calls.setdefault(path, []).append((graph, call))
    chosen = []
    for path in _matching(calls, after):
        if node is None and len(calls[path]) > 1:
            raise ValueError(
                f'layer "{path}" is called {len(calls[path])} times; say which call with `node=0` … `node={len(calls[path]) - 1}`'
            )
        index = node or 0
        if not -len(calls[path]) <= index < len(calls[path]):
            raise ValueError(f'layer "{path}" is called {len(calls[path])} times, so `node` must be below that, got {node}')
        graph, call = calls[path][index]
        if len(call.outputs) != 1:
            raise ValueError(f'no block fits behind "{path}": it has {len(call.outputs)} outputs, a block needs one')
        chosen.append(Place(path, graph, call, call.outputs[0]))
    return chosen


def _matching(calls, after):
    if after is None:
        return [path for path, found in calls.items() if is_convolution(found[0][1].operation)]
    if callable(after):
        matches = [path for path, found in calls.items() if after(found[0][1].operation)]
        if not matches:
            raise ValueError("the predicate `after` holds for no layer of the model")
        return matches
    patterns = [after] if isinstance(after, str) else list(after)
    matches = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"`after` must be a name, a pattern, a list of those or a predicate, got {pattern!r}")
        hits = [path for path in calls if path == pattern] or [path for path in calls if fnmatch.fnmatchcase(path, pattern)]
        if not hits:
            raise ValueError(f'no layer of the model matches "{pattern}"{_hint(pattern, calls)}')
        matches.update(hits)
    return [path for path in calls if path in matches]


def _hint(pattern, paths):
    plain = pattern.replace("*", "").replace("?", "")
    full = {path.rpartition("/")[2]: path for path in paths} | {path: path for path in paths}
    close = difflib.get_close_matches(plain, full, n=1, cutoff=0.4)
    return f'; did you mean "{full[close[0]]}"?' if close else f"; it has {len(full)}, see `model.summary()`"


def data_format_at(place):
    """`"channels_last"` or `"channels_first"`: that of the nearest layer before the place that has one."""
    queue, seen = [place.tensor], set()
    while queue:
        tensor = queue.pop(0)
        node = producer(tensor)
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if (found := getattr(node.operation, "data_format", None)) is not None:
            return found
        queue += node.arguments.keras_tensors
    # A place at the very beginning of a graph: what follows tells.
    for node in nodes(place.graph):
        if (found := getattr(node.operation, "data_format", None)) is not None:
            return found
    return keras.config.image_data_format()
