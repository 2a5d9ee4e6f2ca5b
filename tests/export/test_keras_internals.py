"""The private APIs that the conversion relies on are still what they were: each test names one and what would break."""

import inspect

import keras
import keras.src.backend.tensorflow.core as keras_core
import keras.src.backend.tensorflow.nn as keras_nn
import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend.common import global_state

from resnet_export.conversion import keras_internals


def ops_of(call, shape):
    graph = tf.function(call).get_concrete_function(tf.TensorSpec(shape, "float32")).graph
    return [operation.type for operation in graph.get_operations()]


def test_modules_reach_tensorflow_through_a_global_name():
    assert keras_nn.tf is tf and keras_core.tf is tf


@pytest.mark.parametrize("name", ["convolution", "depthwise_conv2d", "separable_conv2d"])
def test_replacements_take_what_keras_passes(name):
    """Keras calls `tf.nn.convolution` and its kin by these names; the replacements have the same arguments."""
    assert f"tf.nn.{name}(" in inspect.getsource(keras_nn)
    theirs = list(inspect.signature(getattr(tf.nn, name)).parameters)
    ours = list(inspect.signature(getattr(keras_internals, name)).parameters)
    assert ours == theirs[: len(ours)]


def test_grouped_convolutions_hide_in_a_function():
    """As long as this holds, `plain_grouped_convolutions` is needed; and with it, the convolution is seen. TensorFlow has none of
    three dimensions without XLA, so these stay inside where the graph is to run."""
    layer = keras.layers.Conv2D(4, 3, groups=2)
    layer.build((None, 8, 8, 4))
    assert "Conv2D" not in ops_of(layer.call, (None, 8, 8, 4))
    for to_convert in (True, False):
        with keras_internals.plain_grouped_convolutions(to_convert):
            assert "Conv2D" in ops_of(layer.call, (None, 8, 8, 4))
    assert keras_nn.tf is tf and not hasattr(keras_nn.conv, "__wrapped__")
    layer = keras.layers.Conv3D(4, 3, groups=2)
    layer.build((None, 8, 8, 8, 4))
    for to_convert in (True, False):
        with keras_internals.plain_grouped_convolutions(to_convert):
            assert ("Conv3D" in ops_of(layer.call, (None, 8, 8, 8, 4))) is to_convert


@pytest.mark.parametrize("kind", ["Conv2D", "DepthwiseConv2D", "SeparableConv2D"])
def test_dilated_convolutions_go_through_batches(kind):
    options = {"filters": 4} if kind != "DepthwiseConv2D" else {}
    layer = getattr(keras.layers, kind)(kernel_size=3, dilation_rate=2, padding="same", **options)
    layer.build((None, None, None, 4))
    assert "SpaceToBatchND" in ops_of(layer.call, (None, None, None, 4))
    with keras_internals.native_dilation():
        assert "SpaceToBatchND" not in ops_of(layer.call, (None, None, None, 4))
    assert keras_nn.tf is tf


def test_native_dilation_computes_the_same():
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 9, 11, 4)), "float32")
    layer = keras.layers.Conv2D(4, (2, 3), dilation_rate=(2, 3), padding="same")
    expected = layer(x)
    with keras_internals.native_dilation():
        np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_names_of_layers_become_scopes():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="a layer (of two)")])
    with pytest.raises(ValueError, match="is not a valid"):
        ops_of(model, (None, 4))
    global_state.get_global_attribute("name_scope_stack").clear()  # Keras leaves a scope open that TensorFlow refused
    with keras_internals.clean_scope_names():
        assert "MatMul" in ops_of(model, (None, 4))
    assert keras_core.tf is tf


def test_variables_have_a_name_that_can_be_set():
    variable = keras.layers.Dense(2)
    variable.build((None, 3))
    inner = variable.kernel.value
    before = inner._handle_name
    with keras_internals.clean_variable_names([inner]):
        assert inner._handle_name == ":".join(map(keras_internals.clean_name, before.split(":")))
    assert inner._handle_name == before


def test_layers_are_called_through_one_method():
    seen = []
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")], name="inner")
    model = keras.Sequential([keras.Input((4,)), inner], name="outer")
    with keras_internals.calls_of_layers(lambda path, result: seen.append((path, tuple(result.shape)))):
        model(np.ones((2, 4), "float32"))
    assert ("inner/dense", (2, 3)) in seen and seen[-1] == ("outer", (2, 3))
    assert keras.Layer.__call__.__qualname__ == "Layer.__call__"


def test_rewriters_of_tf2onnx_run_only_on_graphs_with_an_op_of_their_row(monkeypatch):
    """Every name in the table is a rewriter of tf2onnx, and runs only on graphs with an op of its row; others always run."""
    from tf2onnx import tfonnx

    ran = []
    for name in keras_internals.REWRITERS:
        assert callable(getattr(tfonnx, name))
    monkeypatch.setattr(tfonnx, "run_rewriters", lambda graph, rewriters, *args: ran.append({one.__name__ for one in rewriters}))
    rewriters = [getattr(tfonnx, name) for name in ("rewrite_eye", "rewrite_cond", "rewrite_dropout", "rewrite_gemm")]
    for ops in ({"MatMul"}, {"MatMul", "If"}, {"MatrixDiag"}, {"RandomUniform"}):
        with keras_internals.needed_rewriters(ops):
            tfonnx.run_rewriters(None, rewriters, False)
    assert ran == [{"rewrite_gemm"}, *({"rewrite_gemm", name} for name in ("rewrite_cond", "rewrite_eye", "rewrite_dropout"))]


def test_layers_that_need_their_sizes_still_do():
    """Keras refuses to unroll over an unknown length, maps `TimeDistributed` over it, and passes an input through as it is."""
    x = keras.KerasTensor((None, None, 3))
    with pytest.raises(ValueError, match="Cannot unroll"):
        keras.layers.RNN(keras.layers.SimpleRNNCell(2), unroll=True).call(x)
    time_distributed = keras.layers.TimeDistributed
    assert list(inspect.signature(time_distributed.call).parameters) == ["self", "inputs", "training", "mask"]
    assert "vectorized_map" in inspect.getsource(time_distributed.call)
    assert time_distributed(keras.layers.Dropout(0.5)).layer._call_has_training_arg
    image = keras.KerasTensor((None, 8, 8, 3))
    assert keras.layers.Equalization().compute_output_spec(image) is image
