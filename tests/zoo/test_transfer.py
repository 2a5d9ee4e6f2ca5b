"""Another head on the same trunk, and batch norm that stays as it is."""

import keras
import numpy as np
import pytest

import keras_resnet as kr
from tests.helpers import assert_unchanged, images, randomise, weights_of


@pytest.mark.parametrize("softmax", [False, True])
def test_a_new_head_sits_on_the_old_features(softmax):
    model = randomise(kr.create_model("resnet20", labels=list("abcdefghij")))
    if softmax:
        model = keras.Model(model.input, keras.layers.Softmax()(model.output))
    before = weights_of(model)
    other = kr.replace_head(model, 3, labels=["x", "y", "z"])
    features = keras.Model(model.input, model.get_layer("avg_pool").output)
    x = images(2, 32)
    head = other.get_layer("predictions")
    expected = np.array(features(x)) @ np.array(head.kernel) + np.array(head.bias)
    np.testing.assert_allclose(other(x), expected, atol=1e-4 * np.abs(expected).max())
    assert kr.card(other).labels == ["x", "y", "z"] and kr.card(other).config["num_classes"] == 3
    assert kr.card(model).config["num_classes"] == 10
    other.get_layer("stem_conv").kernel.assign(np.zeros((3, 3, 3, 16)))
    assert_unchanged(model, before)


def test_a_head_is_replaced_on_a_grown_model():
    grown = kr.grow(kr.create_model("vgg16_w12"), after="block*_pool")
    other = kr.replace_head(grown, 2)
    assert other.output_shape == (None, 2)
    assert len(kr.find_blocks(other)) == len(kr.find_blocks(grown))


def pooled(x):
    return np.asarray(x).mean(axis=tuple(range(1, x.ndim - 1))) if x.ndim > 2 else np.asarray(x)


def applied(model, x, layer):
    """What a dense layer or 1×1 convolution of `model` makes of pooled features."""
    kernel = np.array(layer.kernel)
    return x @ kernel.reshape(-1, kernel.shape[-1]) + np.array(layer.bias)


BACKBONES = {
    "VGG16": {"input_shape": (64, 64, 3)},
    "MobileNet": {"input_shape": (64, 64, 3)},
    "MobileNetV2": {"input_shape": (64, 64, 3), "pooling": "avg"},
    "MobileNetV3Small": {"input_shape": (64, 64, 3), "pooling": "max"},
    "ConvNeXtTiny": {"input_shape": (64, 64, 3)},
    "DenseNet121": {"input_shape": (None, None, 3)},
}


@pytest.mark.parametrize("name", [*BACKBONES][:2] + [pytest.param(name, marks=pytest.mark.slow) for name in [*BACKBONES][2:]])
def test_a_backbone_gets_a_head(name):
    backbone = getattr(keras.applications, name)(weights=None, include_top=False, **BACKBONES[name])
    randomise(backbone)
    before = weights_of(backbone)
    model = kr.replace_head(backbone, 5, labels=list("abcde"))
    x = images(2, 64) / 255
    expected = applied(model, pooled(backbone(x, training=False)), model.layers[-1])
    np.testing.assert_allclose(model(x, training=False), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert kr.card(model).labels == list("abcde") and model.output_shape == (None, 5)
    assert_unchanged(backbone, before)
    assert backbone.layers[-1].output is backbone.outputs[0], "its layers were not called again"


@pytest.mark.parametrize("pooling", [None, "avg"])
def test_a_backbone_of_the_zoo_becomes_the_classifier_of_the_zoo(pooling, tmp_path):
    for name in ("resnet20", "vgg16_w12"):
        backbone = kr.create_model(name, include_top=False, pooling=pooling, input_shape=(32, 32, 3))
        model = kr.replace_head(backbone, 3, labels=list("abc"))
        kr.save_weights(model, tmp_path / "w.safetensors")
        changes = {} if name == "resnet20" else {"head": "pool", "head_widths": ()}
        again = kr.create_model(name, weights=tmp_path / "w.safetensors", **changes, input_shape=(32, 32, 3))
        x = images(2, 32)
        np.testing.assert_array_equal(again(x), model(x))
        assert kr.card(again).labels == list("abc")


def squeeze(activation="softmax", relu=True):
    x = inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(8, 3, activation="relu", name="features")(x)
    x = keras.layers.Dropout(0.5)(x)
    x = keras.layers.Conv2D(10, 1, name="scores")(x)
    x = keras.layers.ReLU()(x) if relu else x
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Activation(activation)(x))


def hidden_pool():
    x = inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(8, 3, activation="relu", name="scores")(x)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))


def hidden_dense():
    x = inputs = keras.Input((32, 32, 3))
    x = keras.layers.Flatten()(keras.layers.Conv2D(4, 3, strides=4)(x))
    return keras.Model(inputs, keras.layers.Dense(8, activation="relu")(x))


# Model, and the layer whose output the new classifier takes; None for the model's own output.
CONVOLUTIONAL = {
    "MobileNet": (lambda: keras.applications.MobileNet(weights=None, input_shape=(64, 64, 3), classes=7), "dropout"),
    "MobileNet, logits": (
        lambda: keras.applications.MobileNet(weights=None, input_shape=(64, 64, 3), classes=7, classifier_activation=None),
        "dropout",
    ),
    "MobileNetV3": (
        lambda: keras.applications.MobileNetV3Small(weights=None, input_shape=(64, 64, 3), classes=7, dropout_rate=0.1),
        "dropout",
    ),
    "scores averaged": (lambda: squeeze(relu=False), "features"),
    "scores averaged, no softmax": (lambda: squeeze("linear", relu=False), "features"),
    "hidden convolution": (hidden_pool, None),
    "hidden dense layer": (hidden_dense, None),
}


@pytest.mark.parametrize("case", CONVOLUTIONAL)
def test_convolutional_heads_are_replaced_and_features_are_kept(case):
    make, name = CONVOLUTIONAL[case]
    model = randomise(make())
    new = kr.replace_head(model, 4, labels=list("wxyz"))
    assert new.output_shape == (None, 4) and kr.card(new).labels == list("wxyz")
    size = model.input_shape[1]
    x = images(2, size) / 255
    layer = next((layer for layer in model.layers if name and layer.name.startswith(name)), None)
    features = model if layer is None else keras.Model(model.inputs, layer.output)
    head = next(layer for layer in reversed(new.layers) if layer.weights)
    expected = applied(new, pooled(features(x, training=False)), head)
    np.testing.assert_allclose(new(x, training=False), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_rectified_scores_stay_rectified():
    model = squeeze()
    new = kr.replace_head(model, 4)
    features = np.asarray(keras.Model(model.inputs, model.get_layer("features").output)(images(2, 32)))
    scores = np.maximum(applied(new, features, new.get_layer("scores")), 0)
    np.testing.assert_allclose(new(images(2, 32)), scores.mean((1, 2)), rtol=1e-4)


@pytest.mark.parametrize("order", ["channels_last", "channels_first"])
def test_nested_classifiers_and_layouts(order, tmp_path):
    shape = (32, 32, 3) if order == "channels_last" else (3, 32, 32)
    inner = kr.create_model("resnet20", depths=(1, 1, 1), data_format=order, input_shape=shape, name="inner")
    x = inputs = keras.Input(shape)
    outer = keras.Model(inputs, keras.layers.Softmax()(inner(keras.layers.Rescaling(0.5)(x))))
    new = kr.replace_head(outer, 2, labels=list("ab"))
    data = images(2, 32) if order == "channels_last" else images(2, 32).transpose(0, 3, 1, 2)
    features = keras.Model(inner.inputs, inner.get_layer("avg_pool").output)(0.5 * data)
    np.testing.assert_allclose(new(data), applied(new, np.asarray(features), new.layers[-1]), rtol=1e-4, atol=1e-5)
    backbone = kr.create_model("resnet20", depths=(1, 1, 1), data_format=order, input_shape=shape, include_top=False)
    maps = np.asarray(backbone(data)).mean((1, 2) if order == "channels_last" else (2, 3))
    headed = kr.replace_head(backbone, 2)
    np.testing.assert_allclose(headed(data), applied(headed, maps, headed.layers[-1]), rtol=1e-4, atol=1e-5)
    new.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "m.keras")(data), new(data))


def test_classes_that_both_know_keep_their_weights():
    model = randomise(kr.create_model("resnet20", depths=(1, 1, 1), labels=list("abcdefghij")))
    new = kr.replace_head(model, 3, labels=["j", "new", "b"])
    x = images(2, 32)
    np.testing.assert_allclose(np.asarray(new(x))[:, [0, 2]], np.asarray(model(x))[:, [9, 1]], rtol=1e-5, atol=1e-5)
    assert not np.isclose(np.asarray(new(x))[:, 1:2], np.asarray(model(x))).any()
    other = kr.replace_head(model, 10)
    assert not np.isclose(np.asarray(other(x)), np.asarray(model(x))).any(), "without names nothing is kept"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kr.replace_head(kr.create_model("resnet20", features_only=True), 3), "must have one output, got 4"),
        (lambda: kr.replace_head(kr.create_model("resnet20"), 3, labels=["a"]), "`labels` must have 3 names, got 1"),
        (lambda: kr.replace_head(kr.create_model("resnet20"), 0), "`num_classes` must be a whole number of at least 1, got 0"),
        (
            lambda: kr.replace_head(
                keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(5, 1, activation="softmax")]), 3
            ),
            "softmax values at every position",
        ),
    ],
)
def test_models_without_a_place_for_a_head_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("mode", ["caffe", {"mean": [0.1, 0.2, 0.3], "std": 0.5}])
def test_preprocessing_in_front_of_a_model_without(mode):
    backbone = randomise(keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(64, 64, 3), classes=3))
    model = kr.add_preprocessing(backbone, mode)
    x = images(2, 64)
    expected = backbone(np.asarray(kr.Preprocessing.of(mode)(x)), training=False)
    np.testing.assert_allclose(model(x, training=False), expected, rtol=1e-5, atol=1e-6)
    assert kr.card(model).mode == mode if isinstance(mode, str) else kr.card(model).preprocessing["mean"] == mode["mean"]
    assert kr.card(model).preprocessing["size"] == [64, 64] and backbone.layers[1].output is not None
    assert [layer.name for layer in model.layers][3:] == [layer.name for layer in backbone.layers][1:], "flat, not nested"
    with pytest.raises(ValueError, match="has preprocessing .* already"):
        kr.add_preprocessing(model, "tf")
    grown = kr.grow(kr.replace_head(model, 2), after="conv_pw_3_relu")
    assert grown.output_shape == (None, 2) and kr.card(grown).preprocessing["size"] == [64, 64]


def test_a_card_is_added_once_and_saved(tmp_path):
    a, b = keras.Input((8,), name="a"), keras.Input((4,), name="b")
    model = keras.Model({"a": a, "b": b}, keras.layers.Dense(2)(keras.layers.Concatenate()([a, b])))
    labelled = kr.with_card(kr.with_card(model, labels=["x", "y"]), name="named")
    labelled.save(tmp_path / "m.keras")
    again = kr.load_model_file(tmp_path / "m.keras")
    assert kr.card(again).labels == ["x", "y"] and kr.card(again).name == "named" and kr.card(model) is None
    assert sum(isinstance(layer, kr.layers.Card) for layer in again.layers) == 1
    x = {"a": np.ones((1, 8), "float32"), "b": np.ones((1, 4), "float32")}
    np.testing.assert_array_equal(again(x), model(x))


def test_frozen_batch_norm_moves_nothing_and_uses_its_statistics():
    model = randomise(kr.create_model("resnet20", depths=(1, 1, 1)))
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert kr.freeze_batch_norm(model) == len(norms)
    x = images(4, 32)
    before = [weights_of(layer) for layer in norms]
    np.testing.assert_array_equal(model(x, training=True), model(x, training=False))
    for layer, values in zip(norms, before, strict=True):
        assert_unchanged(layer, values)
        assert not layer.trainable_weights
    kr.freeze_batch_norm(model, frozen=False)
    model(x, training=True)
    assert any(
        (np.array(v) != old).any()
        for layer, values in zip(norms, before, strict=True)
        for v, old in zip(layer.variables, values, strict=True)
    )


def test_batch_norms_inside_nested_models_are_frozen_too():
    trunk = kr.create_model("resnet20", include_top=False, depths=(1, 1, 1), input_shape=(32, 32, 3))
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(trunk(inputs)))
    count = kr.freeze_batch_norm(model)
    assert count == sum(isinstance(layer, keras.layers.BatchNormalization) for layer in trunk.layers) > 0
    assert not any(layer.trainable for layer in trunk.layers if isinstance(layer, keras.layers.BatchNormalization))
