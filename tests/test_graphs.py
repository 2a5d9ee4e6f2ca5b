"""What a model's outputs mean, read from its graph: never by an attribute that the layer does not use last."""

import keras
import pytest
import tensorflow as tf
from keras import layers, ops

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
