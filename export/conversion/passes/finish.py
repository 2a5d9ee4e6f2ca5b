"""The last steps: dtypes of the file, names that depend on the model alone, nothing in the file that no one needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .common import array


def round_weights(graph: ir.Graph) -> None:
    """Bring constants, which were float64 while folding, to the dtype that the graph states; once."""
    for value in graph.initializers.values():
        wanted = value.dtype.numpy()
        if value.const_value.dtype != value.dtype and np.issubdtype(wanted, np.floating):
            value.const_value = ir.tensor(array(value).astype(wanted), name=value.name)


def separate_outputs(graph: ir.Graph) -> None:
    """Give every output a value of its own: passes may find that two of them are equal, or that one is an input."""
    taken = set(graph.inputs)
    for index, value in enumerate(graph.outputs):
        if value in taken:
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
        taken.add(value)


def canonical_order(graph: ir.Graph) -> None:
    """Order nodes by what they compute alone: depth first from the outputs, inputs from left to right, also inside nested graphs.

    tf2onnx sorts by names with counters in them, so that a second conversion in one process may give another order.
    """
    _sort(graph)


def _settle_copies(graph):
    """Of two outputs of which one is a copy of the other, let the second be the copy; tf2onnx writes either."""
    for node in graph:
        if node.op_type != "Identity":
            continue
        (source,), (copy,), outputs = node.inputs, node.outputs, list(graph.outputs)
        if source in outputs and copy in outputs and outputs.index(copy) < outputs.index(source):
            first, second = outputs.index(copy), outputs.index(source)
            outputs[first], outputs[second] = source, copy
            graph.outputs[:] = outputs


def _sort(graph):
    """Sort a graph; returns the values of graphs around it that it reads, in the order in which it reads them."""
    _settle_copies(graph)
    outer = {node: [value for inner in _graphs(node) for value in _sort(inner)] for node in graph}
    done, captured = {}, {}
    stack = [(value, False) for value in reversed(graph.outputs)]
    while stack:
        value, ready = stack.pop()
        node = value.producer()
        if node is None or node.graph is not graph:
            if value.graph is not graph:
                captured[value] = None
        elif ready:
            done[node] = None
        elif node not in done:
            stack.append((value, True))
            stack.extend((source, False) for source in reversed([*node.inputs, *outer[node]]) if source is not None)
    for node in [*done, *(node for node in list(graph) if node not in done)]:
        graph.append(node)
    return list(captured)


def _graphs(node):
    """The graphs inside a node, in the order of its attributes' names."""
    for name in sorted(node.attributes):
        attribute = node.attributes[name]
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.value
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.value


def canonical_names(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Order and name everything after the model: inputs and outputs as told, values after the Keras layer that made them, weights
    after their Keras path, the rest after its op and a running number. tf2onnx's names hold counters of the process.

    Args:
        graph: The graph.
        inputs, outputs: Names in order.
    """
    canonical_order(graph)
    _name(graph, inputs, outputs, Counter([*inputs, *outputs]))


def _name(graph, inputs, outputs, taken):
    old_initializers = list(graph.initializers.values())
    for value, name in zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True):
        value.name = name
    io = {id(value) for value in (*graph.inputs, *graph.outputs)}
    order = {}
    for node in graph:
        for value in node.outputs:
            if id(value) not in io:
                value.name = _free(value.meta.get("layer") or node.op_type.lower(), taken)
        node.name = node.outputs[0].name
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value.graph is graph and id(value) not in order:
                order[id(value)] = value
                value.name = _free(value.meta.get("path") or f"{node.name}.{index}", taken)
        for inner in _graphs(node):
            inner.name = node.op_type.lower()
            ports = [[_free(f"{node.name}/{kind}", taken) for _ in values] for kind, values in _ports(inner)]
            _name(inner, *ports, taken)
    rest = [value for value in old_initializers if id(value) not in order]
    for value in rest:  # read by nested graphs, or an output
        if id(value) not in io:
            value.name = _free(value.meta.get("path") or "constant", taken)
    graph.initializers.clear()
    for value in [*order.values(), *rest]:
        graph.initializers[value.name] = value


def _ports(graph):
    return ("input", graph.inputs), ("output", graph.outputs)


def _free(name, taken):
    free = name
    while taken[free]:
        free = f"{name}__{taken[name]}"
        taken[name] += 1
    taken[free] += 1
    return free


SPATIAL = {3: ["length"], 4: ["height", "width"], 5: ["depth", "height", "width"]}


def name_dimensions(graph: ir.Graph, channels_first: bool) -> None:
    """`batch` for the first axis of every input and output, `height` and `width` for dynamic sizes of an image input."""
    for value in graph.inputs:
        sizes = list(value.shape)
        names = SPATIAL.get(len(sizes), [])
        start = 2 if channels_first else 1
        labels = {0: "batch"} | {start + index: name for index, name in enumerate(names)}
        value.shape = ir.Shape(
            [size if isinstance(size, int) else labels.get(axis, f"{value.name}_{axis}") for axis, size in enumerate(sizes)]
        )
    for value in graph.outputs:
        value.shape = ir.Shape(
            [
                size if isinstance(size, int) else "batch" if axis == 0 else f"{value.name}_{axis}"
                for axis, size in enumerate(value.shape)
            ]
        )


def _strip(graph):
    outer = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for node in graph:
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            if id(value) not in outer:
                value.shape, value.type = None, None
        for inner in _graphs(node):
            inner.doc_string = None
            _strip(inner)
            for value in (*inner.inputs, *inner.outputs):  # onnxruntime needs the shapes of a Loop's inputs
                if value.shape is not None:  # without names of sizes, which come from counters
                    value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])


def strip(model: ir.Model) -> None:
    """Drop shapes of inner values (onnxruntime infers them), documentation, and the converter's name."""
    graph = model.graph
    _strip(graph)
    graph.doc_string, graph.name = None, "keras_resnet"
    model.doc_string, model.producer_name, model.producer_version = None, "resnet_export", None
