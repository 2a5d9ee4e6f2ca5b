"""The wide plain net that starts as the identity: against a forward pass in NumPy, its stem, its kernels, what is refused."""

import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.layers import Dirac
from keras_resnet.zoo.config import config_from_dict

from ..helpers import images, randomise


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(3)
    made = randomise(kr.create_model("cifar_speed", preprocessing="cifar10", widths=(32, 48, 48)))
    kr.whiten_stem(made, images(300, 32))
    return made


def convolved(x, kernel, pad):
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
    return np.einsum("nhwcij,ijcf->nhwf", windows, kernel, optimize=True)


def normed(x, layer):
    beta, mean, variance = (np.array(v, "float64") for v in (layer.beta, layer.moving_mean, layer.moving_variance))
    return (x - mean) / np.sqrt(variance + layer.epsilon) + beta


def silu(x):
    return x / (1 + np.exp(-x))


def test_logits_are_those_of_a_forward_pass_in_numpy(model):
    x = images(4, 32, seed=1)
    y = (x.astype("float64") / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
    kernel = {layer.name: np.array(layer.kernel, "float64") for layer in model.layers if hasattr(layer, "kernel")}
    y = silu(convolved(y, kernel["stem_conv"], 0))
    for stage in (1, 2, 3):
        name = f"stage{stage}_block1"
        y = convolved(y, kernel[f"{name}_conv1"], 1)
        half = y.shape[1] // 2
        y = y[:, : 2 * half, : 2 * half].reshape(len(y), half, 2, half, 2, -1).max((2, 4))
        y = silu(normed(y, model.get_layer(f"{name}_norm1")))
        y = silu(normed(convolved(y, kernel[f"{name}_conv2"], 1), model.get_layer(f"{name}_norm2")))
    head = model.get_layer("predictions")
    expected = y.max((1, 2)) / 9 @ kernel["predictions"] + np.array(head.bias, "float64")
    np.testing.assert_allclose(model(x), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_stem_whitens_patches():
    rng = np.random.default_rng(0)
    x = np.cumsum(np.cumsum(rng.normal(0, 9, (400, 32, 32, 3)), 1), 2).astype("float32") @ rng.normal(0, 1, (3, 3)).astype(
        "float32"
    )
    x = 255 * (x - x.min()) / (x.max() - x.min())
    keras.utils.set_random_seed(0)
    model = kr.create_model("cifar_speed", preprocessing={"mean": 0.5, "std": 0.1})
    kr.whiten_stem(model, x, epsilon=0.0)
    kernel = np.array(model.get_layer("stem_conv").kernel)
    np.testing.assert_array_equal(kernel[..., :12], -kernel[..., 12:])
    seen = (
        np.array(keras.Model(model.inputs[0], model.get_layer("stem_conv").output)(x)).reshape(-1, 24)[:, :12].astype("float64")
    )
    np.testing.assert_allclose(seen.T @ seen / len(seen), np.eye(12), atol=0.02)
    assert not model.get_layer("stem_conv").trainable_variables

    first = kr.create_model("cifar_speed", preprocessing={"mean": 0.5, "std": 0.1}, data_format="channels_first")
    kr.whiten_stem(first, np.moveaxis(x, -1, 1), epsilon=0.0)
    np.testing.assert_allclose(first.get_layer("stem_conv").kernel, kernel, rtol=1e-4, atol=1e-5)
    # The strongest components come first, and fewer filters take these.
    kr.whiten_stem(
        few := kr.create_model("cifar_speed", preprocessing={"mean": 0.5, "std": 0.1}, stem_widths=(8,)), x, epsilon=0.0
    )
    np.testing.assert_allclose(few.get_layer("stem_conv").kernel[..., :4], kernel[..., :4], rtol=1e-4, atol=1e-5)


def test_only_a_whitening_stem_is_whitened():
    model = kr.create_model("resnet20")
    with pytest.raises(ValueError, match="'resnet20' has no whitening stem"):
        kr.whiten_stem(model, images(2, 32))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_dirac_kernels_pass_all_channels_on(rank):
    layer = getattr(keras.layers, f"Conv{rank}D")(7, 3, padding="same", use_bias=False, kernel_initializer=Dirac(seed=1))
    x = np.random.default_rng(0).normal(size=(2, *(6,) * rank, 4)).astype("float32")
    y = np.array(layer(x))
    np.testing.assert_array_equal(y[..., :4], x)
    others = np.array(layer.kernel)[..., 4:]
    limit = (4 * 3**rank) ** -0.5
    assert 0.8 * limit < np.abs(others).max() <= limit and len(np.unique(others)) == others.size
    again = Dirac.from_config(layer.kernel_initializer.get_config())(layer.kernel.shape)
    np.testing.assert_array_equal(again, layer.kernel)
    # A convolution that narrows passes on as many channels as it has filters.
    np.testing.assert_array_equal(np.array(Dirac(0)((3, 3, 5, 2)))[1, 1], np.eye(5, 2))


def test_kernels_start_as_the_identity_and_differ_between_layers():
    keras.utils.set_random_seed(0)
    model = kr.create_model("cifar_speed")
    kernels = [np.array(model.get_layer(f"stage{k}_block1_conv{n}").kernel) for k in (1, 2, 3) for n in (1, 2)]
    for kernel in kernels:
        channels = kernel.shape[2]
        assert np.array_equal(kernel[1, 1, :, :channels], np.eye(channels)) and kernel[..., :channels].sum() == channels
    assert not np.array_equal(kernels[0][..., 24:48], kernels[2][..., :24, 64:88])
    keras.utils.set_random_seed(0)
    np.testing.assert_array_equal(kr.create_model("cifar_speed").get_layer("stage1_block1_conv1").kernel, kernels[0])


def test_files_keep_the_network(model, tmp_path):
    x = images(3, 32, seed=2)
    expected = np.array(model(x))
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), expected)
    kr.save_weights(model, tmp_path / "weights.safetensors")
    again = kr.create_model("cifar_speed", weights=tmp_path / "weights.safetensors", widths=(32, 48, 48))
    np.testing.assert_array_equal(again(x), expected)
    assert config_from_dict(kr.card(again).config) == config_from_dict(kr.card(model).config)
    with pytest.warns(UserWarning, match="was trained with head_scale"):
        kr.create_model("cifar_speed", weights=tmp_path / "weights.safetensors", widths=(32, 48, 48), head_scale=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem_widths": (26,)}, "at most 24"),
        ({"stem_widths": (7,)}, "one even number"),
        ({"stem_widths": (8, 8)}, "one even number"),
        ({"channels": 1}, "at most 8"),
        ({"stem_stride": 2}, "a whitening stem has stem_stride=1"),
        ({"conv_bias": ("stem",)}, "a whitening stem has stem_stride=1"),
        ({"shortcut": "pad"}, "for plain nets"),
        ({"first_stride": 3}, "`first_stride` must be 1, or 2"),
        ({"stride_block": "last"}, "`first_stride` must be 1, or 2"),
        ({"head_scale": 0}, "`head_scale` must be a positive finite number"),
        ({"head_pool": "mean"}, "`head_pool` must be one of 'average', 'max'"),
        ({"initializer": "zeros"}, "`initializer` must be one of 'he', 'dirac'"),
        ({"input_shape": (8, 8, 3)}, "at least 9"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        kr.create_model("cifar_speed", **changes)


def test_a_scale_is_needed_to_gate_by_it():
    with pytest.raises(ValueError, match="needs norms with a scale"):
        kr.create_model("resnet20", norm_scale=False, gate="zero_gamma")


def test_smallest_input():
    assert kr.create_model("cifar_speed", input_shape=(9, 9, 3)).get_layer("stage3_block1_out").output.shape == (None, 1, 1, 256)
