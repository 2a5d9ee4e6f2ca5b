"""What every pass needs: constants in and out of an onnx-ir graph, and safe removal.

Weights may be float64 while passes run, so that folding rounds once; `passes.finish` brings them back to their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def array(value: ir.Value | None) -> np.ndarray | None:
    """Return the numpy array of a constant value, or None if it depends on data."""
    if value is None or value.const_value is None or value.producer() is not None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.producer() is None and not value.is_graph_input()


def constant(graph: ir.Graph, name: str, content: np.ndarray | np.generic, like: ir.Value | None = None) -> ir.Value:
    """Register a constant under a fresh name.

    Args:
        graph: The graph that gets it.
        name: Wished name; a counter is added if it is taken.
        content: numpy array.
        like: Value whose dtype (in the file), layer and weight path the new one takes over.

    Returns:
        The new `onnx_ir.Value`.
    """
    content = np.asarray(content)
    free, count = name, 0
    while free in graph.initializers:
        count += 1
        free = f"{name}__{count}"
    value = ir.Value(name=free, shape=ir.Shape(content.shape), const_value=ir.tensor(content, name=free))
    in_file = np.dtype("float32") if content.dtype == np.float64 else content.dtype
    value.dtype = like.dtype if like is not None and like.dtype is not None else ir.DataType.from_numpy(in_file)
    if like is not None and "path" in like.meta:
        value.meta["path"] = like.meta["path"]
    graph.register_initializer(value)
    return value


def shape(value: ir.Value | None) -> list[int] | None:
    """Shape as a list with -1 for unknown sizes, or None if the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else -1 for size in value.shape]


def set_shape(value: ir.Value, sizes: Sequence[int] | None) -> None:
    value.shape = None if sizes is None else ir.Shape([None if size < 0 else int(size) for size in sizes])


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return an attribute's value, or the default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def set_attribute(node: ir.Node, name: str, value: Any) -> None:
    node.attributes[name] = ir.convenience.convert_attribute(name, value)


def only_user(graph: ir.Graph, value: ir.Value) -> ir.Node | None:
    """Return the one node in this graph that uses a value once, or None if it is an output or has other users."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    ((node, _),) = uses
    return node if node.graph is graph else None


def insert(
    graph: ir.Graph,
    before: ir.Node | None,
    op: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any] | None = None,
    *,
    like: ir.Value | None = None,
    sizes: Sequence[int] | None = None,
    meta: dict[str, Any] | None = None,
) -> ir.Value:
    """Insert a node with one output before another node, and return that output.

    Args:
        like: Value whose dtype the output takes over.
        sizes: Shape of the output, -1 for unknown.
        meta: Entries for the output's meta data.
    """
    node = ir.node(op, inputs, attributes or {})
    output = node.outputs[0]
    if like is not None and like.type is not None:
        output.dtype = like.dtype
    if sizes is not None:
        set_shape(output, sizes)
    output.meta.update(meta or {})
    graph.insert_before(before, node)
    return output


def replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let all users of `old` use `new` (as graph outputs too), and remove the node that made `old`."""
    if "layer" in old.meta and "layer" not in new.meta:
        new.meta["layer"] = old.meta["layer"]
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(old.producer(), safe=True)


def remove_unused(graph: ir.Graph) -> None:
    """Drop nodes and constants that no output depends on."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
