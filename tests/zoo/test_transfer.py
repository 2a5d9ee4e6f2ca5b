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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: kr.replace_head(kr.create_model("resnet20", include_top=False), 3),
            "must end in a dense layer, got ResidualAdd",
        ),
        (lambda: kr.replace_head(kr.create_model("resnet20", features_only=True), 3), "must have one output, got 4"),
        (lambda: kr.replace_head(kr.create_model("resnet20"), 3, labels=["a"]), "`labels` must have 3 names, got 1"),
    ],
)
def test_models_without_a_head_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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
