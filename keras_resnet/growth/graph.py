"""Reading a model's graph. Nothing here changes a model; the attributes of Keras that are not public are used here only.

A *graph* is a Functional model, or the Functional inside a Sequential one. Graphs nest; a *path* such as
`"trunk/block5_pool"` names an operation in a nested graph.
"""

import warnings

import keras
from keras import tree
from keras.src.models.functional import Functional


def graph_of(operation):
    """The Functional graph behind a model or layer, or None if its calls are not a known graph.

    Subclasses of Functional count as long as they do not override `call`.
    """
    if isinstance(operation, keras.Sequential):
        return operation._functional if type(operation).call is keras.Sequential.call else None
    if isinstance(operation, Functional) and type(operation).call is Functional.call:
        return operation
    return None


def require_graph(model):
    """As `graph_of`, with a sentence instead of None."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a Keras model, got {type(model).__name__}")
    if (graph := graph_of(model)) is None:
        mend = (
            "call `model.build(input_shape)` first"
            if isinstance(model, keras.Sequential)
            else "rebuild it with the functional API"
        )
        raise ValueError(f"model {model.name!r} ({type(model).__name__}) has no graph that can be read; {mend}")
    return graph


def nodes(graph):
    """The graph's calls in order of execution, inputs left out."""
    by_depth = graph._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if node.operation and not node.is_input]


def replay(graph, inputs, call):
    """Run a graph on tensors, symbolic or real.

    Args:
        graph: Functional.
        inputs: flat list of tensors, in the order of `graph.inputs`.
        call: `call(node, args, kwargs) -> outputs`, in order of execution.

    Returns:
        Outputs in the graph's output structure.
    """
    values = dict(zip(map(id, graph.inputs), inputs, strict=True))
    for node in nodes(graph):
        args, kwargs = node.arguments.fill_in(values)
        outputs = call(node, args, kwargs)
        values.update(zip(map(id, node.outputs), tree.flatten(outputs), strict=True))
    return tree.pack_sequence_as(graph._outputs_struct, [values[id(output)] for output in graph.outputs])


def flat_inputs(graph, x):
    """Inputs as a caller gives them (tensor, list, dict by name), as the flat list that `replay` takes."""
    with warnings.catch_warnings():
        # Keras warns where a lone tensor stands for a list of one; both are fine here.
        warnings.simplefilter("ignore")
        return tree.flatten(graph._standardize_inputs(x))


def walk(model, path=""):
    """Yield `(path, graph, node)` of every call in the model's tree, in order of execution.

    A nested model comes before its parts, and its parts come once, however often it is called.
    """
    yield from _walk(require_graph(model), path, set())


def _walk(graph, path, seen):
    for node in nodes(graph):
        name = path + node.operation.name
        yield name, graph, node
        inner = graph_of(node.operation) if isinstance(node.operation, keras.Model) else None
        if inner is not None and id(inner) not in seen:
            seen.add(id(inner))
            yield from _walk(inner, name + "/", seen)


def call_inputs(args, kwargs):
    """What a layer was called on, whether given by position or as `inputs=`."""
    return args[0] if args else next(iter(kwargs.values()))


def producer(tensor):
    """The node that made a symbolic tensor, or None."""
    history = getattr(tensor, "_keras_history", None)
    return None if history is None or history.operation is None else history.operation._inbound_nodes[history.node_index]


def is_convolution(operation):
    """Whether an operation is a layer with a kernel over space: `Conv*`, `DepthwiseConv*`, `SeparableConv*`."""
    named = "Conv" in type(operation).__name__ and "LSTM" not in type(operation).__name__
    return isinstance(operation, keras.layers.Layer) and named and hasattr(operation, "kernel_size")


def is_weighted(operation):
    """Whether an operation counts as a weighted layer, as papers count depth: it holds a kernel (not just vectors)."""
    if isinstance(operation, keras.Model) or not isinstance(operation, keras.layers.Layer):
        return False
    return any(len(weight.shape) >= 2 for weight in operation.weights)
