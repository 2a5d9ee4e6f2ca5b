"""What a model's outputs mean, read from its graph: never by an attribute that the layer does not use last."""

import ast
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import keras_resnet
from keras_resnet import graphs
from keras_resnet.graphs import OutputHead, output_heads

PROBABILITIES, BINARY = OutputHead("probabilities", "softmax"), OutputHead("binary", "sigmoid")
MULTILABEL, OTHER = OutputHead("multilabel", "sigmoid"), OutputHead("other")


@keras.saving.register_keras_serializable("tests")
class Scaled(layers.Layer):
    """Has an `activation` that is not its last operation."""

    def __init__(self, activation="sigmoid", **options):
        super().__init__(**options)
        self.activation = keras.activations.get(activation)

    def call(self, inputs):
        return 90 * self.activation(inputs)


class ScaledDense(layers.Dense):
    def call(self, inputs):
        return 90 * super().call(inputs)


class RenamedDense(layers.Dense):
    """Inherits `call`."""


def gate_and_head(x):
    shared = layers.Activation("sigmoid")
    return shared(layers.Dense(3)(layers.Multiply()([x, shared(x)])))


def nested(head):
    inner = keras.Input((4,))
    return keras.Model(inner, head(inner))


def second_output(x):
    inner = keras.Input((4,))
    both = keras.Model(inner, [layers.Dense(3, "softmax")(inner), layers.Dense(3)(inner)])
    return both(x)[1]


HEADS = {
    "linear": (lambda x: layers.Dense(3)(x), OTHER),
    "relu": (lambda x: layers.Dense(3, "relu")(x), OTHER),
    "hard_sigmoid": (lambda x: layers.Dense(3, "hard_sigmoid")(x), OTHER),
    "log_softmax": (lambda x: layers.Dense(3, "log_softmax")(x), OTHER),
    "softmax": (lambda x: layers.Dense(3, "softmax")(x), PROBABILITIES),
    "tf softmax": (lambda x: layers.Dense(3, tf.nn.softmax)(x), PROBABILITIES),
    "tf sigmoid": (lambda x: layers.Dense(3, tf.nn.sigmoid)(x), MULTILABEL),
    "ops.softmax": (lambda x: ops.softmax(layers.Dense(3)(x)), PROBABILITIES),
    "ops.sigmoid": (lambda x: ops.sigmoid(layers.Dense(1)(x)), BINARY),
    "Softmax layer": (lambda x: layers.Softmax()(x), PROBABILITIES),
    "Softmax over another axis": (lambda x: layers.Softmax(1)(layers.Reshape((2, 2))(x)), OTHER),
    "one sigmoid": (lambda x: layers.Dense(1, "sigmoid")(x), BINARY),
    "three sigmoids": (lambda x: layers.Dense(3, "sigmoid")(x), MULTILABEL),
    "Activation": (lambda x: layers.Activation("softmax")(x), PROBABILITIES),
    "dropout after": (lambda x: layers.Dropout(0.5)(layers.Softmax()(x)), PROBABILITIES),
    "reshape after": (lambda x: layers.Reshape((1, 4))(layers.Softmax()(x)), PROBABILITIES),
    "regrouped after": (lambda x: layers.Reshape((2, 2))(layers.Softmax()(x)), OTHER),
    "average": (
        lambda x: layers.Average()([layers.Dense(3, "softmax")(x), layers.Dense(3, "softmax")(x)]),
        OutputHead("probabilities"),
    ),
    "average of unlike": (lambda x: layers.Average()([layers.Dense(3, "softmax")(x), layers.Dense(3)(x)]), OTHER),
    "sum of two": (lambda x: layers.Add()([layers.Softmax()(x), layers.Softmax()(x)]), OTHER),
    "gate and head": (gate_and_head, MULTILABEL),
    "nested": (lambda x: nested(lambda y: layers.Dense(3, "softmax")(y))(x), PROBABILITIES),
    "nested, then scaled": (lambda x: layers.Rescaling(2.0)(nested(lambda y: layers.Dense(3, "softmax")(y))(x)), OTHER),
    "second output of a nested model": (second_output, OTHER),
    "own layer": (lambda x: Scaled()(x), OTHER),
    "subclass that overrides call": (lambda x: ScaledDense(3, "sigmoid")(x), OTHER),
    "subclass that inherits call": (lambda x: RenamedDense(3, "sigmoid")(x), MULTILABEL),
    "recurrent": (lambda x: layers.LSTM(3, activation="softmax")(layers.Reshape((2, 2))(x)), OTHER),
}


@pytest.mark.parametrize("name", HEADS)
def test_output_heads(name):
    head, expected = HEADS[name]
    x = keras.Input((4,))
    model = keras.Model(x, head(x))
    assert output_heads(model) == [expected]
    assert output_heads(keras.Sequential([keras.Input((4,)), model])) == [expected]


def test_several_outputs_in_order():
    x = keras.Input((8, 8, 3))
    y = layers.GlobalAveragePooling2D()(x)
    outputs = {
        "b": layers.Dense(1, "sigmoid")(y),
        "a": layers.Dense(4, "softmax")(y),
        "map": layers.Conv2D(2, 1, activation="softmax")(x),
    }
    model = keras.Model(x, outputs)
    assert dict(zip(sorted(outputs), output_heads(model), strict=True)) == {"b": BINARY, "a": PROBABILITIES, "map": PROBABILITIES}


def test_a_call_replaced_on_one_object_explains_nothing():
    layer = layers.Dense(3, "softmax")
    layer.call = lambda inputs: inputs
    x = keras.Input((4,))
    assert output_heads(keras.Model(x, layer(x))) == [OTHER]


# ---------------------------------------------------------------- private attributes of Keras


def test_private_attributes_of_keras_mean_what_graphs_takes_them_for():
    left, right = keras.Input((4,), name="l"), keras.Input((4,), name="r")
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="dense")], name="inner")
    wrapped = layers.TimeDistributed(layers.Dense(3, name="wrapped"), name="wrapper")
    total = layers.Add(name="add")([inner(left), right])
    model = keras.Model({"l": left, "r": right}, {"out": wrapped(layers.Reshape((1, 4), name="reshape")(total))})

    assert graphs.symbolic_graph(inner) is graphs.graph_of(inner) and graphs.symbolic_graph(model) is model
    assert graphs.graph_of(model) is model and isinstance(graphs.graph_of(inner), keras.Model)
    assert [node.operation.name for node in graphs.nodes(model)] == ["inner", "add", "reshape", "wrapper"]
    assert [path for path, _, _ in graphs.walk(model)] == ["inner", "inner/dense", "add", "reshape", "wrapper"]
    assert graphs.producer(total).operation.name == "add" and graphs.producer(left).operation.name == "l"
    assert {"dense", "wrapped", "wrapper"} <= {layer.name for layer in graphs.layers_in(model)}
    assert [layer.name for layer in graphs.layers_in(wrapped, include_self=False)] == ["wrapped"]

    values = {"l": np.ones((2, 4), "float32"), "r": np.zeros((2, 4), "float32")}
    flat = graphs.flat_inputs(model, values)
    np.testing.assert_array_equal(flat[0], values["l"])
    assert graphs.pack_inputs(model, flat).keys() == {"l", "r"}
    outputs = graphs.replay(model, flat, lambda node, args, kwargs: node.operation(*args, **kwargs))
    assert isinstance(outputs, dict)
    np.testing.assert_array_equal(np.asarray(outputs["out"]), np.asarray(model(values)["out"]))


def test_private_attributes_of_tensors_and_layers():
    embedded = layers.Embedding(5, 3, mask_zero=True)(keras.Input((4,), dtype="int32"))
    assert graphs.mask_of(embedded) is not None and graphs.mask_of(keras.Input((4,))) is None
    logits = ops.convert_to_tensor([[1.0, 2.0]])
    softmax = layers.Activation("softmax")(logits)
    np.testing.assert_array_equal(np.asarray(graphs.logits_of(softmax)), np.asarray(logits))
    assert graphs.logits_of(logits) is logits
    assert graphs.lambda_output_shape(layers.Lambda(lambda x: x, output_shape=(7,))) == (7,)


def test_models_without_values_leave_nothing_behind():
    with graphs.without_values():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(10**6)])
    assert model.count_params() == 5 * 10**6 and model.layers[0].kernel._value is None
    assert layers.Dense(2)(np.ones((1, 4), "float32")).shape == (1, 2)
    assert model.layers[0].kernel._value is None


# Modules that use other private attributes. Those of pickle, of TensorFlow and of the conversion have tests of their own,
# training uses those of optimizers and trainers, the fallback converter one of tf2onnx, and the server those of grpcio.
ELSEWHERE = {
    *("growth/onednn.py", "weights/formats/torchfile.py", "training", "serving/grpc_core.py"),
    *("conversion/keras_internals.py", "conversion/fallback.py"),
}
# What training must not use either, because `graphs` has a function for it.
IN_GRAPHS = set("_flatten_layers _functional _inbound_nodes _keras_history _nodes_by_depth".split())


def _private(tree):
    """What a module uses that is private and not its own."""

    def is_private(name):
        return str(name).startswith("_") and not str(name).startswith("__")

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr != "_exit":  # `os._exit` is public
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if any(package in ast.unparse(node) for package in ("keras.src", "tensorflow.python")):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr"):
            if isinstance(node.args[1], ast.Constant) and is_private(node.args[1].value):
                yield ast.unparse(node)


def _is_elsewhere(file, use):
    """Whether a use is one that a module in `ELSEWHERE` may have."""
    return bool({str(file), file.parts[0]} & ELSEWHERE) and not any(name in use for name in IN_GRAPHS)


@pytest.mark.parametrize("package", ["keras_resnet", "export"])
def test_private_attributes_are_used_in_graphs_only(package):
    root = Path(keras_resnet.__file__).parents[1] / package
    files = {file.relative_to(root): file for file in root.rglob("*.py") if file.name != "graphs.py"}
    uses = [(file, use) for file, path in files.items() for use in _private(ast.parse(path.read_text()))]
    assert len(files) > 50 and [f"{file}: {use}" for file, use in uses if not _is_elsewhere(file, use)] == []


def test_a_use_elsewhere_is_seen():
    tree = ast.parse("a._flatten_layers()\ngetattr(m, '_functional')\nself._own\nfrom keras.src import x\noptimizer._variables")
    uses = sorted(_private(tree))
    assert uses == ["a._flatten_layers", "from keras.src import x", "getattr(m, '_functional')", "optimizer._variables"]
    assert [_is_elsewhere(Path("training/learner.py"), use) for use in uses] == [False, True, False, True]
    assert not any(_is_elsewhere(Path("zoo/plan.py"), use) for use in uses)
