"""The preprocessing layer agrees with that of other libraries, serialises, and leaves its input alone."""

import keras
import numpy as np
import pytest

import keras_resnet as kr

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype("float32")


def theirs(mode):
    if mode == "cifar10":
        return (PIXELS / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
    return keras.applications.imagenet_utils.preprocess_input(PIXELS.copy(), mode=mode)


@pytest.mark.parametrize("mode", ["torch", "caffe", "tf", "cifar10"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_modes_agree_with_their_origins(mode, data_format):
    layer = kr.Preprocessing(mode, data_format=data_format)
    x = PIXELS if data_format == "channels_last" else np.moveaxis(PIXELS, -1, 1).copy()
    before = x.copy()
    found = np.array(layer(x))
    np.testing.assert_array_equal(x, before)
    found = found if data_format == "channels_last" else np.moveaxis(found, 1, -1)
    expected = theirs(mode)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_none_passes_numbers_as_they_are():
    np.testing.assert_array_equal(kr.Preprocessing("none")(PIXELS), PIXELS)


@pytest.mark.parametrize("spec", ["caffe", {"mean": 0.3, "std": 0.2}, {"mean": [0.1, 0.2, 0.3], "std": 0.5, "bgr": True}])
def test_named_and_own_numbers_survive_a_round_trip(spec):
    layer = kr.Preprocessing.of(spec)
    again = kr.Preprocessing.from_config(layer.get_config())
    np.testing.assert_array_equal(layer(PIXELS), again(PIXELS))
    assert layer.describe() == again.describe()
    if isinstance(spec, dict):
        mean, std = (np.broadcast_to(spec[key], 3) for key in ("mean", "std"))
        expected = (PIXELS / 255 - mean) / std
        expected = expected[..., ::-1] if spec.get("bgr") else expected
        np.testing.assert_allclose(layer(PIXELS), expected, atol=1e-5)


def test_pixels_are_not_rounded_under_a_mixed_policy():
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        found = kr.create_model("resnet20", preprocessing="torch").get_layer("preprocessing")(PIXELS)
    finally:
        keras.config.set_dtype_policy(policy)
    np.testing.assert_array_equal(found, kr.Preprocessing("torch")(PIXELS))


def test_grey_images_get_the_mean_over_the_colours():
    found = np.array(kr.Preprocessing("torch")(PIXELS[..., :1]))
    np.testing.assert_allclose(found, (PIXELS[..., :1] / 255 - 0.449) / 0.226, atol=1e-5)


REFUSED = [
    (lambda: kr.Preprocessing("imagenet"), "must be one of 'none', 'torch'"),
    (lambda: kr.Preprocessing("torch", mean=0.5), 'need mode "custom"'),
    (lambda: kr.Preprocessing("custom", mean=0.5, std=0.0), "a positive `std`"),
    (lambda: kr.Preprocessing.of({"mean": 0.5, "std": 1.0, "scale": 2}), "may hold `mean`, `std` and `bgr`, got scale"),
    (lambda: kr.create_model("resnet20", preprocessing="torch", input_shape=(32, 32, 4)), "the input has 4 channels"),
]


@pytest.mark.parametrize(("action", "message"), REFUSED)
def test_bad_numbers_are_refused(action, message):
    with pytest.raises(ValueError, match="preprocessing|mode|mean") as caught:
        action()
    assert message in str(caught.value)
