"""The last steps: dtypes of the file, names that depend on the model alone, nothing in the file that no one needs."""

from collections import Counter

import numpy as np
import onnx_ir as ir

from .common import array, remove_unused


def round_weights(graph):
    """Bring constants, which were float64 while folding, to the dtype that the graph states; once."""
    for value in graph.initializers.values():
        wanted = value.dtype.numpy()
        if value.const_value.dtype != value.dtype and np.issubdtype(wanted, np.floating):
            value.const_value = ir.tensor(array(value).astype(wanted), name=value.name)


def canonical_names(graph, inputs, outputs):
    """Name everything after the model: inputs and outputs as told, values after the Keras layer that made them, weights after
    their Keras path, the rest after its op and a running number. tf2onnx's names hold counters of the process.

    Args:
        graph: the graph.
        inputs, outputs: names in order.
    """
    taken = Counter([*inputs, *outputs])
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
            if value is not None and value.is_initializer() and id(value) not in order:
                order[id(value)] = value
                value.name = _free(value.meta.get("path") or f"{node.name}.{index}", taken)
    graph.initializers.clear()
    for value in [*order.values(), *(value for value in old_initializers if id(value) not in order)]:
        graph.initializers[value.name] = value


def _free(name, taken):
    free = name
    while taken[free]:
        free = f"{name}__{taken[name]}"
        taken[name] += 1
    taken[free] += 1
    return free


SPATIAL = {3: ["length"], 4: ["height", "width"], 5: ["depth", "height", "width"]}


def name_dimensions(graph, channels_first):
    """`batch` for the first axis of every input and output, `height` and `width` for open sizes of an image input."""
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


def strip(model):
    """Drop shapes of inner values (onnxruntime infers them), documentation, and opset domains that no node uses."""
    graph = model.graph
    remove_unused(graph)
    outer = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for node in graph:
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            if id(value) not in outer:
                value.shape, value.type = None, None
    graph.doc_string, graph.name = None, "keras_resnet"
    model.doc_string, model.producer_name, model.producer_version = None, "resnet_export", None
    used = {node.domain for node in graph.all_nodes()} | {""}
    for domain in [domain for domain in model.opset_imports if domain not in used]:
        del model.opset_imports[domain]
