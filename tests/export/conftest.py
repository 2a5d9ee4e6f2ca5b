"""A small model with everything that exporters trip over, built and exported once."""

import keras
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from keras import layers

import resnet_export as rx
from tests.helpers import randomise


def build_mixed(classes=7, activation="softmax"):
    """Convolution with bias and batch norm, grouped, depthwise, pads before conv and pool, pre-activation, SE, residual."""
    keras.utils.set_random_seed(1)
    x = entry = keras.Input((32, 32, 3), name="pixels")
    x = layers.ZeroPadding2D(3, name="stem_pad")(x)
    x = layers.Conv2D(16, 7, strides=2, name="stem_conv")(x)
    x = layers.ZeroPadding2D(1, name="pool_pad")(x)
    x = layers.MaxPooling2D(3, 2, name="pool")(x)
    shortcut = x
    x = layers.BatchNormalization(name="preact_bn")(x)
    x = layers.ReLU(name="preact_relu")(x)
    x = layers.Conv2D(16, 3, padding="same", groups=4, use_bias=False, name="grouped_conv")(x)
    x = layers.BatchNormalization(name="grouped_bn")(x)
    x = layers.ReLU(max_value=6, name="grouped_relu")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.BatchNormalization(name="depthwise_bn")(x)
    squeeze = layers.GlobalAveragePooling2D(keepdims=True, name="se_pool")(x)
    squeeze = layers.Conv2D(16, 1, activation="sigmoid", name="se_conv")(squeeze)
    x = layers.Multiply(name="se")([x, squeeze])
    x = layers.Add(name="add")([shortcut, x])
    x = layers.Conv2D(24, 1, strides=2, activation="silu", name="last_conv")(x)
    x = layers.GlobalAveragePooling2D(name="pool_all")(x)
    return randomise(keras.Model(entry, layers.Dense(classes, activation=activation, name="head")(x), name="mixed"))


@pytest.fixture(scope="session")
def mixed():
    return build_mixed()


@pytest.fixture(scope="session")
def mixed_export(mixed, tmp_path_factory):
    """`(ExportResult, path)` of the mixed model. Do not change the file: copy it."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.onnx"
    labels = [f"class {index}" for index in range(7)]
    return rx.to_onnx(mixed, path, outputs=["logits", "probabilities"], labels=labels), path


@pytest.fixture(scope="session")
def open_export(mixed, tmp_path_factory):
    """`(ExportResult, path)` of the mixed model with open height and width. Do not change the file: copy it."""
    path = tmp_path_factory.mktemp("open") / "open.onnx"
    return rx.to_onnx(mixed, path, dynamic_size=True), path


def noise(count, *shape, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *(shape or (32, 32, 3)))).astype("float32")


def run_onnx(path, *feeds, optimise=True):
    """All outputs of a file, by onnxruntime alone."""
    options = ort.SessionOptions()
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, feeds, strict=True)))


def op_counts(path):
    counts = {}
    for node in onnx.load(path).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def relative(got, reference):
    reference = np.asarray(reference, "float64")
    return np.abs(np.asarray(got, "float64") - reference).max() / np.abs(reference).max()
