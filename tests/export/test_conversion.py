"""Conversion without verification: what onnxruntime computes from the graph is what the untouched Keras model computes."""

import hashlib

import keras
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tensorflow as tf
from keras import layers

try:
    from resnet_export.conversion.convert import convert
    from resnet_export.conversion.signature import signature_of
except ImportError:  # before they moved
    from resnet_export.conversion.signature import interface as signature_of
    from resnet_export.exporters import convert
from tests.helpers import randomise


def chain(*steps, shape=(None, None, 3)):
    x = entry = keras.Input(shape)
    for step in steps:
        x = step(x)
    return randomise(keras.Model(entry, x))


def converted(model, opset=17, **options):
    """`(serialised file, ops in order, method)`."""
    keras.utils.set_random_seed(0)
    found, method = convert(signature_of(model, **options), opset)
    proto = ir.to_proto(found)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(deterministic=True), [node.op_type for node in found.graph], method


def outputs_of(content, feeds, optimise=True):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: feed for value, feed in zip(session.get_inputs(), feeds, strict=True)})


def feeds_of(model, sizes, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [[2, *(size or sizes[axis % len(sizes)] for axis, size in enumerate(tensor.shape[1:]))] for tensor in model.inputs]
    return [rng.uniform(-2, 2, shape).astype(tensor.dtype) for shape, tensor in zip(shapes, model.inputs, strict=True)]


def check(model, opset=17, sizes=(9, 11, 10), tolerance=1e-5, **options):
    """Compare outputs of both of onnxruntime's modes with Keras; returns the ops in order."""
    content, ops, _ = converted(model, opset, **options)
    feeds = feeds_of(model, sizes)
    expected = keras.tree.flatten(model(feeds if len(feeds) > 1 else feeds[0], training=False))
    for optimise in (True, False):
        for got, want in zip(outputs_of(content, feeds, optimise), expected, strict=True):
            want = np.asarray(want)
            assert got.shape == want.shape and got.dtype == want.dtype
            scale = max(np.abs(want).max(), 1e-9) if want.size else 1
            np.testing.assert_allclose(got / scale, want / scale, atol=tolerance, rtol=0)
    return ops


# ---------------------------------------------------------------- convolutions of dynamic size

TRANSPOSED = [  # kernel, stride, padding, output padding
    (1, 1, "same", None),
    (1, 2, "valid", None),
    (1, 3, "same", None),
    (2, 3, "same", None),
    (3, 2, "same", None),
    (4, 2, "same", None),
    (5, 2, "valid", None),
    (5, 2, "same", 1),
    (7, 3, "valid", 2),
    ((3, 2), (1, 3), "same", None),
]


@pytest.mark.parametrize("shape", [(None, None, 3), (9, 11, 3)])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolutions_are_one_node(case, shape):
    kernel, stride, padding, more = case
    transposed = layers.Conv2DTranspose(4, kernel, strides=stride, padding=padding, output_padding=more)
    model = chain(transposed, layers.BatchNormalization(), layers.ReLU(), layers.Conv2D(2, 1), shape=shape)
    assert check(model) == ["Transpose", "ConvTranspose", "Relu", "Conv", "Transpose"]


@keras.saving.register_keras_serializable("tests")
class OwnSize(layers.Layer):
    """A transposed convolution whose output's size is not a fixed number of pixels from a multiple of the input's."""

    def call(self, x):
        batch, height, width = tf.unstack(tf.shape(x)[:3])
        return tf.nn.conv2d_transpose(x, tf.ones((5, 5, 2, 3)), [batch, 2 * height - height % 2, 2 * width, 2], 2)

    def compute_output_shape(self, shape):
        return (*shape[:3], 2)


def test_transposed_convolution_of_any_computed_size():
    for sizes in ((9, 11), (10, 8)):
        check(chain(OwnSize(), layers.Conv2D(2, 1)), sizes=sizes)


DILATED = {
    "convolution": lambda padding: layers.Conv2D(4, (2, 3), dilation_rate=(2, 3), padding=padding),
    "grouped": lambda padding: layers.Conv2D(6, 3, dilation_rate=2, padding=padding, groups=3),
    "depthwise": lambda padding: layers.DepthwiseConv2D(3, dilation_rate=2, padding=padding, depth_multiplier=2),
    "separable": lambda padding: layers.SeparableConv2D(4, 3, dilation_rate=2, padding=padding),
    "transposed": lambda padding: layers.Conv2DTranspose(4, 3, dilation_rate=2, padding=padding),
}


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kind", DILATED)
def test_dilated_convolutions_absorb_what_follows(kind, padding):
    ops = check(chain(DILATED[kind](padding), layers.BatchNormalization(), layers.ReLU()))
    assert set(ops) <= {"Transpose", "Conv", "ConvTranspose", "Relu"} and len(ops) <= 5


def test_dilation_with_stride():
    for padding in ("same", "valid"):
        check(chain(layers.DepthwiseConv2D(3, strides=2, dilation_rate=2, padding=padding), layers.BatchNormalization()))


LINES_AND_VOLUMES = {
    "line": (layers.Conv1D(4, 3, dilation_rate=2, padding="same"), 1),
    "causal": (layers.Conv1D(4, 3, dilation_rate=2, padding="causal"), 1),
    "transposed line": (layers.Conv1DTranspose(4, 3, strides=2, padding="same"), 1),
    "volume": (layers.Conv3D(4, 3, dilation_rate=2, padding="same"), 3),
    "transposed volume": (layers.Conv3DTranspose(4, 3, strides=2, padding="same"), 3),
}


@pytest.mark.parametrize("case", LINES_AND_VOLUMES)
def test_lines_and_volumes(case):
    layer, rank = LINES_AND_VOLUMES[case]
    layer = type(layer).from_config(layer.get_config())
    check(chain(layer, layers.BatchNormalization(), layers.ReLU(), shape=(*[None] * rank, 3)))


# ---------------------------------------------------------------- resizing


@pytest.mark.parametrize("opset", [13, 18, 23])
@pytest.mark.parametrize("shape", [(None, None, 3), (9, 11, 3), (9, 11, 1)])
@pytest.mark.parametrize("head", ["none", "pooling", "1x1"])
def test_resizing_gives_the_size_it_is_told(head, shape, opset):
    """14 / 11 as a float32 times 11 is a little less than 14, and its integer part 13."""
    heads = {"none": [], "pooling": [layers.AveragePooling2D(2)], "1x1": [layers.Conv2D(2, 1)]}
    for kind in ({}, {"interpolation": "nearest"}, {"crop_to_aspect_ratio": True}):
        model = chain(layers.Resizing(16, 14, **kind), *heads[head], shape=shape)
        keras_again = chain(layers.Conv2D(3, 1), layers.Resizing(16, 14, **kind), shape=shape)
        check(model, opset)
        if opset == 18:
            check(keras_again, opset)


# ---------------------------------------------------------------- the fallback


def test_fallback_then_convolution():
    model = chain(layers.ConvLSTM2D(4, 3, padding="same"), layers.Conv2D(2, 1), shape=(4, 8, 8, 3))
    assert check(model)[-2:] == ["Conv", "Transpose"]
    assert converted(model)[2] == "stock"


def test_same_bytes_twice():
    for model in (chain(layers.Conv2DTranspose(4, 3, strides=2)), chain(layers.Resizing(8, 8))):
        assert len({hashlib.sha256(converted(model)[0]).hexdigest() for _ in range(2)}) == 1
