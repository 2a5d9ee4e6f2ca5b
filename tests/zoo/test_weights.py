"""Weights from files: right numbers in, everything else refused, and never a half-loaded model."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.weights import akamaster, keras_applications, safetensors, timm, torchfile, torchvision
from keras_resnet.weights.files import open_weights
from keras_resnet.weights.matching import adapt_channels, variables_of
from keras_resnet.weights.synthetic import images, state_for
from tests.helpers import randomise

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = {"depths": (1, 1, 1, 1), "num_classes": 9, "input_shape": (64, 64, 3)}


def config_behind(model):
    return kr.config_from_dict(kr.card(model).config)


def small_state(name, origin, seed=0, **changes):
    """A shallow model of a variant, and the arrays a file of that origin would hold for it."""
    model = kr.create_model(name, **{**SMALL, **changes})
    return model, state_for(model, config_behind(model), origin, seed)


def written(tmp_path, arrays, name="state.safetensors", metadata=None):
    path = tmp_path / name
    safetensors.write(path, arrays, metadata)
    return path


@pytest.mark.parametrize("name", ["new_format.pth", "old_format.th"])
def test_torch_files_are_read_without_torch(name):
    """Files that torch 2.13 wrote, in both of its formats, the state dict wrapped as training scripts do."""
    arrays = torchfile.read(FIXTURES / name)
    base = (np.arange(24, dtype="float32") / np.float32(7)).reshape(2, 3, 4)
    np.testing.assert_array_equal(arrays["module.plain"], base)
    np.testing.assert_array_equal(arrays["module.turned"], base.transpose(2, 0, 1))
    np.testing.assert_array_equal(arrays["module.half"], base[1:].astype("float16"))
    np.testing.assert_array_equal(arrays["module.parameter"], base[0] * 2)
    np.testing.assert_allclose(arrays["module.brain"], base, rtol=2**-8)
    assert arrays["module.count"] == 5 and arrays["module.empty"].shape == (0, 3)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_pickle_that_runs_code_is_refused(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Evil()}))
    else:
        path.write_bytes(b"".join(pickle.dumps(item) for item in (0x1950A86A20F9469CFC6C, 1001, {}, Evil())))
    with pytest.raises(ValueError, match=r"posix\.mkdir, which is no tensor"):
        open_weights(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["new_format.pth", "old_format.th"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_torch_files_are_refused(name, share, tmp_path):
    content = (FIXTURES / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="truncated|not loaded"):
        open_weights(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\xff" * 20, "truncated"),
        (b"\x02" + b"\x00" * 7 + b"{]", "header cannot be read"),
        (b"\x40" + b"\x00" * 7 + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}   ', "truncated or damaged"),
        (b"\x40" + b"\x00" * 7 + b'{"a": {"dtype": "F9", "shape": [9], "data_offsets": [0, 36]}}    ', "header cannot be read"),
    ],
)
def test_damaged_safetensors_are_refused(content, message, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_weights(path)


def test_safetensors_round_trip(tmp_path):
    arrays = {
        "b": np.arange(6, dtype="float16").reshape(2, 3),
        "a": np.array(3.5, "float32"),
        "c": np.arange(4).T,
        "d": np.zeros((0, 2), "float64"),
    }
    found, metadata = safetensors.read(written(tmp_path, arrays, metadata={"k": "v"}))
    assert metadata == {"k": "v"} and list(found) == sorted(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_bfloat16_comes_as_float32(tmp_path):
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes([0x80, 0x3F, 0x20, 0xC0]))
    assert safetensors.read(path)[0]["x"].tolist() == [1.0, -2.5]


@pytest.mark.parametrize("suffix", [".safetensors", ".weights.h5", ".keras"])
@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn_w12"])
def test_own_files_come_back_exactly(name, suffix, tmp_path):
    options = {"num_classes": 4, "input_shape": (40, 40, 3), "preprocessing": {"mean": 0.4, "std": 0.3}}
    model = randomise(kr.create_model(name, **options), seed=3)
    path = str(tmp_path / f"model{suffix}")
    {".safetensors": lambda: kr.save_weights(model, path), ".keras": lambda: model.save(path)}.get(
        suffix, lambda: model.save_weights(path)
    )()
    again = kr.create_model(name, weights=path, **({**options, "preprocessing": None} if suffix != ".weights.h5" else options))
    x = images(40, 0) * 50 + 100
    np.testing.assert_array_equal(model(x), again(x))
    assert kr.card(again).preprocessing["mean"] == 0.4


def test_a_file_that_does_not_tell_its_preprocessing_warns(tmp_path):
    model = kr.create_model("resnet20")
    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.warns(UserWarning, match="does not say how its images were normalised"):
        kr.create_model("resnet20", weights=tmp_path / "model.weights.h5")


@pytest.mark.parametrize(
    ("depth", "name", "top", "version"),
    [(50, "resnet50_v1", True, 1), (50, "resnetv2_50_keras", False, 2)],
)
def test_keras_applications_files_in_the_old_format(depth, name, top, version, tmp_path):
    """Written in the layout of the published `.h5` files, biases in front of norms included."""
    build = keras.applications.ResNet50 if version == 1 else keras.applications.ResNet50V2
    theirs = randomise(build(weights=None, include_top=top, input_shape=(64, 64, 3), classes=9, classifier_activation=None))
    path = tmp_path / "resnet50_weights.h5"
    with h5py.File(path, "w") as file:
        layers = [layer for layer in theirs.layers if layer.weights]
        file.attrs["layer_names"] = [layer.name.encode() for layer in layers]
        for layer in layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{weight.name}:0" for weight in layer.weights]
            group.attrs["weight_names"] = [text.encode() for text in names]
            for text, weight in zip(names, layer.weights, strict=True):
                group[text] = np.array(weight)
    model = kr.create_model(
        name, weights=path, include_top=top, input_shape=(64, 64, 3), num_classes=9, include_preprocessing=False
    )
    x = images(64, 0, batch=2)
    expected, found = np.array(theirs(x)), np.array(model(x))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert kr.card(model).weights["origin"] == "keras.applications"
    full = kr.create_model(name, weights=path, include_top=False, input_shape=(64, 64, 3))
    assert kr.card(full).preprocessing["mode"] == {1: "caffe", 2: "tf"}[version]


def test_real_cifar_weights_reach_their_accuracy(shared_data):
    import runpy

    x, y = runpy.run_path(str(shared_data / "cifar10.py"))["load"]("test_even")
    model = kr.create_model("resnet20", weights=shared_data / "weights" / "resnet20-12fca82f.th")
    right = model.predict(x.astype("float32"), batch_size=250, verbose=0).argmax(1) == y
    assert abs(100 * right.mean() - 91.36) <= 0.02
    known = kr.card(model)
    assert known.weights["source"] == "akamaster/resnet20.cifar10" and known.weights["accuracy"] == 91.73
    assert known.labels[:2] == ["airplane", "automobile"] and known.preprocessing["mode"] == "torch"


@pytest.mark.slow
def test_real_cifar_weights_of_depth_56_reach_their_accuracy(shared_data):
    import runpy

    x, y = runpy.run_path(str(shared_data / "cifar10.py"))["load"]("test_even")
    model = kr.create_model("resnet56", weights=shared_data / "weights" / "resnet56-4bfd9763.th")
    right = model.predict(x.astype("float32"), batch_size=250, verbose=0).argmax(1) == y
    assert abs(100 * right.mean() - 93.58) <= 0.02


def test_real_vgg_trunk_is_loaded_into_the_right_layers(shared_data):
    path = shared_data / "weights" / "vgg16_imagenet_notop.npz"
    model = kr.create_model("vgg16", weights=path, include_top=False)
    assert kr.card(model).preprocessing["mode"] == "caffe"
    with np.load(path) as arrays:
        for name, array in arrays.items():
            layer, variable = name.split("/")
            np.testing.assert_array_equal(getattr(model.get_layer(layer), variable), array)
    other = kr.create_model("vgg16", weights=path, num_classes=3, head="pool", head_widths=(), input_shape=(64, 64, 3))
    np.testing.assert_array_equal(other.get_layer("block5_conv3").kernel, model.get_layer("block5_conv3").kernel)


def test_another_number_of_classes_keeps_the_trunk(tmp_path):
    model, state = small_state("resnet18", torchvision.RESNET)
    path = written(tmp_path, state)
    other = kr.create_model("resnet18", weights=path, **{**SMALL, "num_classes": 4})
    same = kr.create_model("resnet18", weights=path, **SMALL)
    assert other.output_shape == (None, 4)
    np.testing.assert_array_equal(other.get_layer("stage4_block1_conv2").kernel, same.get_layer("stage4_block1_conv2").kernel)
    np.testing.assert_array_equal(same.get_layer("predictions").bias, state["fc.bias"])
    with pytest.raises(ValueError, match="give `num_classes` to keep the trunk"):
        kr.create_model("resnet18", weights=path, depths=(1, 1, 1, 1))


def test_trunks_and_stages_take_their_part_of_a_whole_file(tmp_path):
    model, state = small_state("resnetv2_18", timm.RESNETV2)
    path = written(tmp_path, state)
    options = {**SMALL, "include_preprocessing": False}
    whole = kr.create_model("resnetv2_18", weights=path, **options)
    x = images(64, 1)
    maps = kr.create_model("resnetv2_18", weights=path, **options, features_only=("stage2",))(x)
    inner = keras.Model(whole.input, whole.get_layer("stage2_block1_add").output)
    np.testing.assert_array_equal(maps["stage2"], inner(x))
    trunk = kr.create_model("resnetv2_18", weights=path, **options, include_top=False, pooling="avg")
    np.testing.assert_array_equal(trunk(x), keras.Model(whole.input, whole.get_layer("avg_pool").output)(x))


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels_answer_a_grey_image_alike(channels, tmp_path):
    """With the same value in all channels the adapted kernel gives what the RGB kernel gave."""
    _, state = small_state("resnet18", torchvision.RESNET)
    path = written(tmp_path, state)
    options = {**SMALL, "include_preprocessing": False}
    rgb = kr.create_model("resnet18", weights=path, **options)
    adapted = kr.create_model("resnet18", weights=path, **{**options, "input_shape": (64, 64, channels)})
    kernel = adapted.get_layer("stem_conv").kernel.numpy()
    original = rgb.get_layer("stem_conv").kernel.numpy()
    np.testing.assert_array_equal(kernel, adapt_channels(original, channels))
    if channels == 1:
        grey = images(64, 0, channels=1)
        expected = rgb(np.repeat(grey, 3, -1)).numpy()
        np.testing.assert_allclose(adapted(grey), expected, atol=1e-5 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(kernel[:, :, 0], original[:, :, 0] * np.float32(3 / channels))


def test_labels_and_card_come_with_the_file(tmp_path):
    _, state = small_state("resnet20", akamaster.ORIGIN, depths=(3, 3, 3), num_classes=10, input_shape=(32, 32, 3))
    model = kr.create_model("resnet20", weights=written(tmp_path, {f"module.{key}": array for key, array in state.items()}))
    known = kr.card(model)
    assert known.labels == list(akamaster.CLASSES)
    assert known.weights == {
        "source": "state.safetensors",
        "origin": "akamaster",
        "dataset": "CIFAR-10",
        "licence": "BSD-2-Clause",
    }
    same = kr.create_model("resnet20", weights=tmp_path / "state.safetensors", num_classes=10)
    assert kr.card(same).labels == known.labels
    fewer = kr.create_model("resnet20", weights=tmp_path / "state.safetensors", num_classes=3)
    assert kr.card(fewer).labels is None


def test_the_crop_keeps_its_share_at_another_size(tmp_path):
    _, state = small_state("resnet18", torchvision.RESNET)
    path = written(tmp_path, state)
    found = [
        kr.card(kr.create_model("resnet18", weights=path, **{**SMALL, "input_shape": shape})).preprocessing
        for shape in ((224, 224, 3), (112, 140, 3), (None, None, 3))
    ]
    assert [item["size"] for item in found] == [[224, 224], [112, 140], [224, 224]]
    assert [item["resize"] for item in found] == [256, 128, 256]


MISFITS = [
    ("one missing", lambda state: state.pop("layer1.0.bn1.bias"), "1 missing: layer1.0.bn1.bias (for stage1_block1_norm1/beta)"),
    ("one left over", lambda state: state.update(extra=np.zeros(3)), "1 left over: extra"),
    (
        "one of another shape",
        lambda state: state.update({"layer1.0.bn1.bias": np.zeros(65, "float32")}),
        "1 of another shape: layer1.0.bn1.bias (65,) for stage1_block1_norm1/beta (64,)",
    ),
    ("a deeper net", lambda state: state.update({f"layer1.1.conv{k}.weight": np.zeros(2) for k in range(9)}), "and 6 more"),
]


@pytest.mark.parametrize(("what", "change", "message"), MISFITS, ids=[row[0] for row in MISFITS])
def test_misfits_are_named_and_nothing_is_loaded(what, change, message, tmp_path):
    model, state = small_state("resnet18", torchvision.RESNET)
    before = [np.array(variable) for variable in variables_of(model).values()]
    change(state)
    path = written(tmp_path, state)
    with pytest.raises(ValueError) as caught:
        kr.load_weights(model, path)
    assert message in str(caught.value)
    for variable, value in zip(variables_of(model).values(), before, strict=True):
        np.testing.assert_array_equal(variable, value)


WRONG_VARIANTS = [
    ("resnet50", torchvision.RESNET, "resnet50_v1", "stride in the 3×3"),
    ("resnet50_v1", keras_applications.RESNET, "resnet50", "stride in the 1×1"),
    ("resnetv2_50", timm.RESNETV2, "resnetv2_50_keras", "stride in the first block"),
    ("resnetv2_50_keras", keras_applications.RESNETV2, "resnetv2_50", "stride in the last block"),
]


@pytest.mark.parametrize(("name", "origin", "wrong", "message"), WRONG_VARIANTS, ids=[row[2] for row in WRONG_VARIANTS])
def test_weights_that_would_fit_the_wrong_variant_are_refused(name, origin, wrong, message, tmp_path):
    _, state = small_state(name, origin)
    path = written(tmp_path, state)
    kr.create_model(name, weights=path, **SMALL)
    with pytest.raises(ValueError, match=message):
        kr.create_model(wrong, weights=path, **SMALL)


@pytest.mark.parametrize("wrong", ["resnet20_a_fixup", "resnet20_a_avg", "resnet20_b"])
def test_the_three_option_a_are_not_mixed_up(wrong, tmp_path):
    _, state = small_state("resnet20", akamaster.ORIGIN, depths=(3, 3, 3), num_classes=10, input_shape=(32, 32, 3))
    with pytest.raises(ValueError, match="option A with zero channels on both sides"):
        kr.create_model(wrong, weights=written(tmp_path, state))


def test_unknown_files_are_refused(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"")
    for name in ("no.pth", "no.safetensors"):
        with pytest.raises(FileNotFoundError, match="there is no weights file"):
            kr.create_model("resnet20", weights=tmp_path / name)
    with pytest.raises(ValueError, match="must have one of the endings"):
        kr.create_model("resnet20", weights=tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="named like those of none of"):
        kr.create_model("resnet20", weights=written(tmp_path, {"a.b": np.zeros(2)}))
    for name in ("x.npz", "x.h5", "x.keras"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 this is none")
        with pytest.raises(ValueError, match="truncated"):
            kr.create_model("resnet20", weights=tmp_path / name)


def test_only_zoo_models_take_and_give_weights(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    for action in (kr.load_weights, kr.save_weights):
        with pytest.raises(ValueError, match="is not from this zoo"):
            action(model, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="must end in .safetensors"):
        kr.save_weights(kr.create_model("resnet20"), tmp_path / "x.npz")
