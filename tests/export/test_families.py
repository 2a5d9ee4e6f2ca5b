"""All convolutional families of keras.applications and the zoo's special cases: exported, verified, clean."""

import keras
import numpy as np
import pytest

import keras_resnet as kr
import resnet_export as rx
from tests.helpers import randomise

from .conftest import noise, op_counts, relative, run_onnx

APPLICATIONS = {
    "VGG16": 32,
    "ResNet50": 64,
    "ResNet101V2": 64,
    "MobileNet": 64,
    "MobileNetV2": 64,
    "MobileNetV3Small": 64,
    "MobileNetV3Large": 64,
    "EfficientNetB0": 64,
    "EfficientNetV2B0": 64,
    "DenseNet121": 64,
    "InceptionV3": 96,
    "InceptionResNetV2": 96,
    "Xception": 96,
    "NASNetMobile": 224,
    "VGG19": 32,
    "DenseNet201": 64,
    "ConvNeXtSmall": 64,
    "ConvNeXtTiny": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_applications(name, tmp_path):
    size = APPLICATIONS[name]
    build = getattr(keras.applications, name)
    model = randomise(build(weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None))
    result = rx.to_onnx(model, tmp_path / "m.onnx")
    assert result.method == "weightless" and result.report.passed
    x = noise(2, size, size, 3, seed=9)
    assert relative(run_onnx(tmp_path / "m.onnx", x)[0], np.asarray(model(x, training=False))) < 1e-5


def test_resnet50_is_as_clean_as_promised(tmp_path):
    model = randomise(keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=10))
    rx.to_onnx(model, tmp_path / "m.onnx", outputs=["logits"])
    counts = op_counts(tmp_path / "m.onnx")
    assert counts == {
        "Conv": 53,
        "Relu": 49,
        "Add": 16,
        "Transpose": 1,
        "MaxPool": 1,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }


SLOW = ("resnet20", "resnet20_c", "plain20", "preresnet110", "resnext29_8x64d", "seresnext50_32x4d")
ZOO = ["resnet20_a_fixup", "vgg11_w25", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name, tmp_path):
    model = randomise(kr.create_model(name, preprocessing="cifar10", input_shape=(32, 32, 3)))
    result = rx.to_onnx(model, tmp_path / "m.onnx", input_dtype="uint8")
    assert result.method == "weightless"
    counts = op_counts(tmp_path / "m.onnx")
    assert counts.get("Transpose", 0) <= 1 and counts.get("Identity", 0) == 0
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("uint8")
    assert relative(run_onnx(tmp_path / "m.onnx", x)[0], np.asarray(model(x.astype("float32"), training=False))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet50", "resnext50_32x4d", "seresnet50", "resnetv2_50", "wide_resnet50_2", "resnet50d", "resnetv2_50x1_bit"]
)
def test_zoo_at_imagenet_size(name, tmp_path):
    model = randomise(kr.create_model(name, preprocessing="torch"))
    assert rx.to_onnx(model, tmp_path / "m.onnx", dynamic_size=True).report.passed


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A small VGG, the same with a block after every pool, and the latter's export."""
    trunk = randomise(kr.create_model("vgg11_w25", num_classes=10, input_shape=(32, 32, 3)))
    deep = kr.grow(trunk, after=lambda layer: isinstance(layer, keras.layers.MaxPooling2D), blocks=1)
    path = tmp_path_factory.mktemp("grown") / "deep.onnx"
    return trunk, deep, rx.to_onnx(deep, path)


def test_grown_model(grown):
    trunk, _, result = grown
    assert any("verified again with random values" in note for note in result.report.notes)
    x = noise(2)
    assert relative(run_onnx(result.path, x)[0], np.asarray(trunk(x, training=False))) < 1e-5


def test_prune_identity_gives_the_trunk(grown, tmp_path):
    trunk, deep, exported = grown
    rx.to_onnx(trunk, tmp_path / "trunk.onnx")
    result = rx.to_onnx(deep, tmp_path / "pruned.onnx", prune_identity=True)
    assert "5 of 5 blocks removed" in result.notes[0]
    assert op_counts(tmp_path / "pruned.onnx") == op_counts(tmp_path / "trunk.onnx") != op_counts(exported.path)
    x = noise(2)
    np.testing.assert_array_equal(run_onnx(tmp_path / "pruned.onnx", x)[0], run_onnx(tmp_path / "trunk.onnx", x)[0])
    assert rx.verify(tmp_path / "pruned.onnx", deep).passed
