"""Weights from files: right numbers in, everything else refused, and never a half-loaded model."""

import argparse
import json
import os
import pickle
import re
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.weights.families import akamaster, keras_applications, small, timm, torchvision
from keras_resnet.weights.files import open_weights
from keras_resnet.weights.formats import safetensors, torchfile
from keras_resnet.weights.matching import adapt_channels, variables_of
from keras_resnet.weights.synthetic import images, state_for
from tests.helpers import randomise

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = {"depths": (1, 1, 1, 1), "widths": (16, 24, 32, 40), "num_classes": 9, "input_shape": (64, 64, 3)}


def config_behind(model):
    return kr.config_from_dict(kr.card(model).config)


CIFAR = {"depths": (3, 3, 3), "widths": (16, 32, 64), "num_classes": 10, "input_shape": (32, 32, 3)}
STATES = {}


def small_state(name, checkpoint_format, **changes):
    """A shallow model of a variant, and the arrays that a file of that format has for it. The model is shared."""
    key = (name, checkpoint_format.name, *sorted(changes.items()))
    if key not in STATES:
        model = kr.create_model(name, **{**SMALL, **changes})
        STATES[key] = model, state_for(model, config_behind(model), checkpoint_format, 0)
    model, state = STATES[key]
    return model, dict(state)


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
    with pytest.raises(ValueError, match=r"posix\.mkdir, which is not a tensor"):
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
        (b"\x02" + b"\x00" * 7 + b"{]", "not a readable safetensors file"),
        (b"\x40" + b"\x00" * 7 + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}   ', "truncated"),
        (
            b"\x40" + b"\x00" * 7 + b'{"a": {"dtype": "F9", "shape": [9], "data_offsets": [0, 36]}}    ',
            "not a readable safetensors file.*header",
        ),
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
    options |= {"depths": (1, 1, 1)} if name == "resnet20" else {"stages": (1,) * 5}
    model = randomise(kr.create_model(name, **options), seed=3)
    path = saved_as(model, tmp_path / f"model{suffix}")
    again = kr.create_model(name, weights=path, **{**options, "preprocessing": None})
    x = images(40, 0) * 50 + 100
    np.testing.assert_array_equal(model(x), again(x))
    assert kr.card(again).preprocessing["mean"] == 0.4


def test_a_file_that_does_not_tell_its_preprocessing_warns(tmp_path):
    _, state = small_state("resnet20_b", small.RESNET, **{**CIFAR, "depths": (1, 1, 1)})
    with pytest.warns(UserWarning, match="does not say how its images were normalised"):
        kr.create_model("resnet20_b", weights=written(tmp_path, state), depths=(1, 1, 1))


def saved_as(model, path):
    """The model's weights in the format of the path."""
    path = str(path)
    if path.endswith(".safetensors"):
        kr.save_weights(model, path)
    else:
        (model.save if path.endswith(".keras") else model.save_weights)(path)
    return path


SHALLOW = {"depths": (1, 1, 1), "input_shape": (32, 32, 3)}
BOTTLENECK = SMALL
OWN_WRONG_VARIANTS = [
    ("resnet20", "plain20", SHALLOW, "shortcut='pad', the model has 'none'"),
    ("resnet20", "resnet20_a_avg", SHALLOW, "shortcut='pad', the model has 'pad_average'"),
    ("resnet50_v1", "resnet50", BOTTLENECK, "stride_in='1x1', the model has '3x3'"),
    ("resnet50", "resnetblur50", BOTTLENECK, "antialias=False, the model has True"),
    ("resnet18", "vgg11", {}, "family='resnet', the model has 'vgg'"),
]


@pytest.mark.parametrize(
    ("name", "wrong", "options", "message", "suffix"),
    [
        *((*row, ".safetensors") for row in OWN_WRONG_VARIANTS),
        *((*row, suffix) for row in OWN_WRONG_VARIANTS[:2] for suffix in (".weights.h5", ".keras")),
    ],
)
def test_own_files_of_another_variant_are_refused(name, wrong, options, message, suffix, tmp_path):
    """The shapes are the same; only the card in the file tells."""
    path = saved_as(kr.create_model(name, **(options or BOTTLENECK)), tmp_path / f"model{suffix}")
    hint = "" if wrong == "vgg11" else f".*; to load it all the same, give these fields as arguments; it fits '{name}'$"
    with pytest.raises(ValueError, match=f"{re.escape(message)}{hint}"):
        kr.create_model(wrong, weights=path, **(options or {"width": 3, "input_shape": (32, 32, 3)}))


def test_weights_of_another_variant_do_not_get_into_a_model_that_exists(tmp_path):
    path = saved_as(randomise(kr.create_model("resnet20", **SHALLOW)), tmp_path / "model.safetensors")
    model = kr.create_model("plain20", **SHALLOW)
    before = [np.array(variable) for variable in model.variables]
    with pytest.raises(ValueError, match="shortcut='pad'"):
        kr.load_weights(model, path)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_a_variant_that_is_asked_for_by_its_field_is_loaded_with_a_warning(tmp_path):
    path = saved_as(kr.create_model("resnet20", **SHALLOW), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="was trained with activation='relu', the model has 'gelu'; loaded as asked"):
        model = kr.create_model("resnet20", weights=path, activation="gelu", **SHALLOW)
    assert kr.card(model).config["activation"] == "gelu"


def test_what_changes_no_meaning_may_differ(tmp_path, recwarn):
    path = saved_as(kr.create_model("resnet50", **BOTTLENECK), tmp_path / "model.safetensors")
    free = {"drop_path": 0.2, "gate": "zero_gamma", "norm_momentum": 0.99, "output_stride": 8, "head_dropout": 0.5}
    kr.create_model("resnet50", weights=path, **{**BOTTLENECK, "num_classes": 4, "input_shape": (64, 64, 1)}, **free)
    assert not [warning for warning in recwarn if "trained" in str(warning.message)]


def test_keras_own_loading_warns_too(tmp_path, recwarn):
    model = kr.create_model("resnet20", **SHALLOW)
    path = saved_as(model, tmp_path / "model.weights.h5")
    model.load_weights(path)
    kr.grow(model, after="stage1_block1_out")
    keras.models.clone_model(model)
    assert not [warning for warning in recwarn if "another network" in str(warning.message)]
    with pytest.warns(UserWarning, match="trained in another network: shortcut='pad', the model has 'none'"):
        kr.create_model("plain20", **SHALLOW).load_weights(path)


def test_the_number_of_classes_comes_with_the_weights(tmp_path):
    model = kr.create_model("resnet20", num_classes=4, labels=list("abcd"), **SHALLOW)
    again = kr.create_model("resnet20", weights=saved_as(model, tmp_path / "model.safetensors"), **SHALLOW)
    assert again.output_shape == (None, 4) and kr.card(again).labels == list("abcd")


DAMAGED_CARDS = [
    ("{", "its card is damaged"),
    ("[1]", "a card must be a dict"),
    ('{"config": {}}', "a card must be a dict with a `name`"),
    ('{"name": "x", "config": {"family": "resnet", "depths": 3}}', "`depths` must be a tuple"),
    (
        '{"name": "x", "config": {"family": "resnet", "depths": [1], "widths": [8], "groups": "a"}}',
        "`groups` must be a whole number",
    ),
    ('{"name": "x", "config": {"family": "rnn"}}', "`family` must be one of"),
    ('{"name": "x", "preprocessing": {}}', "cannot be read"),
    ('{"name": "x", "preprocessing": {"mode": "sepia"}}', "preprocessing must be one of"),
    ('{"name": "x", "preprocessing": null}', "its `preprocessing` must not be None"),
    ('{"name": "x", "weights": 3}', "its `weights` must not be 3"),
    ('{"name": "x", "labels": "cat"}', "`labels` must be a list"),
]


@pytest.mark.parametrize(("card", "message"), DAMAGED_CARDS)
def test_a_damaged_card_is_refused_in_one_sentence(card, message, tmp_path):
    path = written(tmp_path, {"stage1_block1_conv1/kernel": np.zeros(2, "float32")}, metadata={"card": card})
    with pytest.raises(ValueError, match=f"state.safetensors is not loaded: .*{message}"):
        open_weights(path)


def torch_pickle(tensors):
    """A pickle as torch writes it, from `name -> (storage key, offset, size, stride)`."""

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def numbers(values):
        return b"(" + b"".join(b"J" + value.to_bytes(4, "little", signed=True) for value in values) + b"t"

    content = b"\x80\x02}("
    for name, (key, offset, size, stride) in tensors.items():
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + b"K\x01tQ"
        arguments = storage + b"J" + offset.to_bytes(4, "little", signed=True) + numbers(size) + numbers(stride)
        content += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
    return content + b"u."


def torch_zip(path, storages, tensors, compression=zipfile.ZIP_STORED):
    """A file as torch writes it, the bytes of its storages by key."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", torch_pickle(tensors))
        for key, numbers in storages.items():
            archive.writestr(f"archive/data/{key}", numbers)
    return path


def torch_bomb(path):
    return torch_zip(path, {"0": bytes(100 << 20)}, {"w": ("0", 0, (25 << 20,), (1,))}, zipfile.ZIP_DEFLATED)


def stride_bomb(path):
    return torch_zip(path, {"0": bytes(64)}, {"w": ("0", 0, (1 << 13, 1 << 13), (0, 0))})


def memo_bomb(path):
    """A pickle of a few bytes that makes the unpickler in C reserve room for a thousand million entries."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}r" + (1 << 26).to_bytes(4, "little") + b".")
    return path


def legacy_bomb(path):
    parts = [
        *map(pickle.dumps, (0x1950A86A20F9469CFC6C, 1001, {})),
        torch_pickle({"w": ("0", 0, (1,), (1,))}),
        pickle.dumps(["0"]),
    ]
    path.write_bytes(b"".join(parts) + (1 << 40).to_bytes(8, "little") + bytes(64))
    return path


def hdf5_bomb(path):
    """Declared, never written: takes a few bytes of the file and 256 MiB of memory."""
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", shape=(1 << 26,), dtype="float32")
    return path


def hdf5_of_another_file(path):
    (path.parent / "secret").write_bytes(bytes(64))
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/conv2d/vars/0", shape=(16,), dtype="float32", external=[(str(path.parent / "secret"), 0, 64)])
    return path


def npz_bomb(path):
    np.savez_compressed(path, w=np.zeros(30 << 20, "float32"))
    return path


def overlapping(path):
    entry = {"dtype": "F32", "shape": [4096], "data_offsets": [0, 16384]}
    header = json.dumps({f"w{number}": entry for number in range(1000)}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16384))
    return path


BOMBS = [
    (torch_bomb, "x.pth", "would take 104,857,600 bytes, more than a file of"),
    (stride_bomb, "x.pth", "reaches beyond its storage"),
    (memo_bomb, "x.pth", "holds no tensors"),
    (legacy_bomb, "x.th", "more than a file of"),
    (hdf5_bomb, "x.weights.h5", "would take 268,435,456 bytes"),
    (hdf5_of_another_file, "x.weights.h5", "holds no numbers of this file"),
    (npz_bomb, "x.npz", "would take"),
    (overlapping, "x.safetensors", "invalid offset"),
]


@pytest.mark.parametrize(("make", "name", "message"), BOMBS, ids=[row[0].__name__ for row in BOMBS])
def test_files_that_unpack_to_far_more_than_they_are_take_no_memory(make, name, message, tmp_path):
    path = make(tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            open_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def test_what_training_scripts_put_next_to_the_tensors_is_ignored(tmp_path):
    """Options and scores are no reason to refuse a file; nothing of them is made."""
    beside = pickle.dumps({"args": argparse.Namespace(lr=0.1), "best": np.float64(93.1), "rows": np.ones(2)}, 2)
    # {"args": …, "best": …, "net": {"w": …}}: the tensors' dict becomes an entry of the other, which is still on the stack.
    merged = beside[:-1] + b"X\x03\x00\x00\x00net" + torch_pickle({"w": ("0", 0, (3,), (1,))})[2:-1] + b"s."
    with zipfile.ZipFile(tmp_path / "y.pth", "w") as archive:
        archive.writestr("archive/data.pkl", merged)
        archive.writestr("archive/data/0", np.arange(3, dtype="float32").tobytes())
    assert torchfile.read(tmp_path / "y.pth")["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".pth", ".th", ".safetensors", ".npz", ".weights.h5", ".keras"])
def test_no_damage_ends_in_anything_but_a_sentence(suffix, tmp_path):
    """Bytes turned over at random: the file is refused, or it is read; nothing else is raised."""
    path = tmp_path / f"whole{suffix}"
    if suffix in (".pth", ".th"):
        path.write_bytes((FIXTURES / {".pth": "new_format.pth", ".th": "old_format.th"}[suffix]).read_bytes())
    elif suffix == ".npz":
        np.savez(path, **{"stage1_block1_conv1/kernel": np.ones((3, 3, 2, 2), "float32")})
    else:
        saved_as(kr.create_model("vgg11_w12", stages=(1, 1), widths=(8, 8)), path)
    content, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    other = tmp_path / f"damaged{suffix}"
    for _ in range(60):
        damaged = bytearray(content)
        for place in random.integers(0, len(content), 4):
            damaged[place] = random.integers(256)
        # The beginning and the end hold what the readers steer by.
        damaged[random.integers(0, min(300, len(content)))] ^= 1 << random.integers(8)
        other.write_bytes(damaged)
        try:
            open_weights(other)
        except ValueError as error:
            refused += 1
            assert "damaged" in str(error)
    assert refused


def old_h5(path, arrays):
    """Arrays named `layer/variable` in the layout of keras.applications' published files."""
    layers = {}
    for name, array in arrays.items():
        layers.setdefault(name.split("/")[0], []).append((name.split("/")[1], array))
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, variables in layers.items():
            group = file.create_group(layer)
            names = [f"{layer}/{variable}:0" for variable, _ in variables]
            group.attrs["weight_names"] = [text.encode() for text in names]
            for text, (_, array) in zip(names, variables, strict=True):
                group[text] = np.array(array)
    return path


def test_the_old_h5_format_holds_what_any_other_does(tmp_path):
    _, state = small_state("resnet50_v1", keras_applications.RESNET)
    old, new = old_h5(tmp_path / "old.h5", state), written(tmp_path, state)
    x = images(64, 0) * 50 + 100
    np.testing.assert_array_equal(*(kr.create_model("resnet50_v1", weights=path, **SMALL)(x) for path in (old, new)))


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "name", "top", "version"), [(50, "resnet50_v1", True, 1), (50, "resnetv2_50_keras", False, 2)])
def test_keras_applications_files_in_the_old_format(depth, name, top, version, tmp_path):
    """Written in the layout of the published `.h5` files, biases in front of norms included."""
    build = keras.applications.ResNet50 if version == 1 else keras.applications.ResNet50V2
    theirs = randomise(build(weights=None, include_top=top, input_shape=(64, 64, 3), classes=9, classifier_activation=None))
    arrays = {f"{layer.name}/{weight.name}": weight for layer in theirs.layers for weight in layer.weights}
    path = old_h5(tmp_path / "resnet50_weights.h5", arrays)
    model = kr.create_model(
        name, weights=path, include_top=top, input_shape=(64, 64, 3), num_classes=9, include_preprocessing=False
    )
    x = images(64, 0, batch=2)
    expected, found = np.array(theirs(x)), np.array(model(x))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert kr.card(model).weights["origin"] == "keras.applications"
    full = kr.create_model(name, weights=path, include_top=False, input_shape=(64, 64, 3))
    assert kr.card(full).preprocessing["mode"] == {1: "caffe", 2: "tf"}[version]


def test_real_cifar_weights_reach_their_accuracy(shared_data, cifar_test):
    x, y = cifar_test
    model = kr.create_model("resnet20", weights=shared_data / "weights" / "resnet20-12fca82f.th")
    right = model.predict(x.astype("float32"), batch_size=250, verbose=0).argmax(1) == y
    assert abs(100 * right.mean() - 91.36) <= 0.02
    known = kr.card(model)
    assert known.weights["source"] == "akamaster/resnet20.cifar10" and known.weights["accuracy"] == 91.73
    assert known.labels[:2] == ["airplane", "automobile"] and known.preprocessing["mode"] == "torch"


@pytest.mark.slow
def test_real_cifar_weights_of_depth_56_reach_their_accuracy(shared_data, cifar_test):
    x, y = cifar_test
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


def test_dense_rows_of_a_vgg_are_turned_to_channels_last(tmp_path):
    """torch flattens channels first: the file's own product with features laid out its way must come out."""
    changes = {"stages": (1, 1), "widths": (8, 12), "head_widths": (16, 16), "head_size": 3, "num_classes": 5}
    model = kr.create_model("vgg11", **changes, input_shape=(12, 12, 3))
    state = state_for(model, config_behind(model), torchvision.VGG, 0)
    path = written(tmp_path, state)
    loaded = kr.create_model("vgg11", weights=path, **changes, input_shape=(12, 12, 3), preprocessing="none")
    x = images(12, 0) * 60 + 120
    features = np.array(keras.Model(loaded.input, loaded.get_layer("block2_pool").output)(x))
    hidden = features.transpose(0, 3, 1, 2).reshape(1, -1)
    for name in ("classifier.0", "classifier.3"):
        hidden = np.maximum(hidden @ state[f"{name}.weight"].T + state[f"{name}.bias"], 0)
    expected = hidden @ state["classifier.6.weight"].T + state["classifier.6.bias"]
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_another_number_of_classes_keeps_the_trunk(tmp_path):
    model, state = small_state("resnet18", torchvision.RESNET)
    path = written(tmp_path, state)
    other = kr.create_model("resnet18", weights=path, **{**SMALL, "num_classes": 4})
    same = kr.create_model("resnet18", weights=path, **SMALL)
    assert other.output_shape == (None, 4)
    np.testing.assert_array_equal(other.get_layer("stage4_block1_conv2").kernel, same.get_layer("stage4_block1_conv2").kernel)
    np.testing.assert_array_equal(same.get_layer("predictions").bias, state["fc.bias"])
    own = kr.create_model("resnet18", weights=path, **{key: SMALL[key] for key in ("depths", "widths", "input_shape")})
    np.testing.assert_array_equal(own(images(64, 0)), same(images(64, 0)))


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
    _, state = small_state("resnet20", akamaster.FORMAT, **CIFAR)
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
        lambda state: state.update({"layer1.0.bn1.bias": np.zeros(17, "float32")}),
        "1 of another shape: layer1.0.bn1.bias (17,) for stage1_block1_norm1/beta (16,)",
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


def test_half_a_classifier_is_missed_and_none_is_started_again(tmp_path):
    _, state = small_state("resnet18", torchvision.RESNET)
    kernel = state.pop("fc.weight")
    for part, message in ((state, "fc.weight"), ({**state, "fc.weight": kernel}, "fc.bias")):
        half = {name: array for name, array in part.items() if name != message}
        with pytest.raises(ValueError, match=f"1 missing: {message}"):
            kr.create_model("resnet18", weights=written(tmp_path, half), **SMALL)
    none = {name: array for name, array in state.items() if not name.startswith("fc.")}
    kr.create_model("resnet18", weights=written(tmp_path, none), **SMALL)
    with pytest.raises(ValueError, match="2 missing"):
        kr.create_model("resnet18", weights=written(tmp_path, none), depths=(1, 1, 1, 1), widths=SMALL["widths"])


def test_a_missing_mean_is_not_made_up_from_a_bias(tmp_path):
    model, state = small_state("resnet50_v1", keras_applications.RESNET)
    state["conv1_conv/bias"] = np.ones(64, "float32")
    del state["conv1_bn/moving_mean"]
    with pytest.raises(ValueError, match="1 missing: conv1_bn/moving_mean"):
        kr.load_weights(model, written(tmp_path, state))


WRONG_VARIANTS = [
    ("resnet50", torchvision.RESNET, "resnet50_v1", "stride in the 3×3"),
    ("resnet50_v1", keras_applications.RESNET, "resnet50", "stride in the 1×1"),
    ("resnetv2_50", timm.RESNETV2, "resnetv2_50_keras", "stride in the first block"),
    ("resnetv2_50_keras", keras_applications.RESNETV2, "resnetv2_50", "stride in the last block"),
]


@pytest.mark.parametrize(
    ("name", "checkpoint_format", "wrong", "message"), WRONG_VARIANTS, ids=[row[2] for row in WRONG_VARIANTS]
)
def test_weights_that_would_fit_the_wrong_variant_are_refused(name, checkpoint_format, wrong, message, tmp_path):
    _, state = small_state(name, checkpoint_format)
    path = written(tmp_path, state)
    kr.create_model(name, weights=path, **SMALL)
    with pytest.raises(ValueError, match=f"{message}.*; it fits '{name}'$"):
        kr.create_model(wrong, weights=path, **SMALL)


FORMATS = {
    "torchvision.npz": ("resnet18", torchvision.RESNET),
    "applications.npz": ("resnet50_v1", keras_applications.RESNET),
    "timm.npz": ("resnetv2_50", timm.RESNETV2),
    "vgg.npz": ("vgg11", torchvision.VGG),
    "own.safetensors": ("resnet18", None),
    "own.weights.h5": ("resnet18", None),
    "own.keras": ("resnet18", None),
    "legacy.h5": ("resnet18", None),
}


@pytest.mark.parametrize("case", FORMATS)
def test_the_number_of_classes_is_that_of_the_file(case, tmp_path):
    name, checkpoint_format = FORMATS[case]
    changes = (
        {"width": 3, "input_shape": (32, 32, 3)} if name == "vgg11" else {k: v for k, v in SMALL.items() if k != "num_classes"}
    )
    model = randomise(kr.create_model(name, num_classes=13, **changes))
    path = tmp_path / case
    if checkpoint_format is None:
        saved_as(model, path) if case != "legacy.h5" else model.save(path)
    else:
        np.savez(path, **state_for(model, config_behind(model), checkpoint_format, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = kr.create_model(name, weights=path, **changes)
        fewer = kr.create_model(name, weights=path, num_classes=5, **changes)
    assert loaded.output_shape == (None, 13) and fewer.output_shape == (None, 5)
    assert kr.card(loaded).config["num_classes"] == 13
    first = next(layer.name for layer in model.layers if hasattr(layer, "kernel_size"))
    np.testing.assert_array_equal(fewer.get_layer(first).kernel, loaded.get_layer(first).kernel)
    if checkpoint_format is None:
        x = np.random.default_rng(0).uniform(0, 255, (2, *changes["input_shape"])).astype("float32")
        np.testing.assert_array_equal(loaded(x), model(x))


def test_classes_of_one_name_keep_their_weights(tmp_path):
    names = list("abcdefghij")
    model = randomise(kr.create_model("resnet20", labels=names, **SHALLOW))
    kr.save_weights(model, tmp_path / "w.safetensors")
    x = 255 * np.random.default_rng(0).random((3, 32, 32, 3)).astype("float32")
    expected = np.asarray(model(x))

    def created(labels):
        return kr.create_model("resnet20", weights=tmp_path / "w.safetensors", num_classes=len(labels), labels=labels, **SHALLOW)

    for labels in (["j", "b", "new"], names[::-1]):  # Other classes, and the same in another order.
        found = np.asarray(created(labels)(x))
        for index, label in enumerate(labels):
            if label in names:
                np.testing.assert_allclose(found[:, index], expected[:, names.index(label)], rtol=1e-5, atol=1e-5)
    renamed = [*names[:5], "fish", *names[6:]]
    np.testing.assert_array_equal(created(renamed)(x), expected)


def test_a_model_that_exists_says_which_number_of_classes_the_file_has(tmp_path):
    kr.save_weights(kr.create_model("resnet20", num_classes=7, **SHALLOW), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="build the model with `num_classes=7`"):
        kr.load_weights(kr.create_model("resnet20", **SHALLOW), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "checkpoint_format", "wrong"),
    [
        ("resnet34", torchvision.RESNET, "resnet18"),
        pytest.param("resnet50_v1", keras_applications.RESNET, "resnet101_v1", marks=pytest.mark.slow),
        pytest.param("vgg13_bn", torchvision.VGG, "vgg16", marks=pytest.mark.slow),
    ],
)
def test_a_file_of_another_depth_names_the_variant_it_fits(name, checkpoint_format, wrong, tmp_path):
    model = kr.create_model(name, num_classes=3)
    np.savez(tmp_path / "w.npz", **state_for(model, config_behind(model), checkpoint_format, 0))
    with pytest.raises(ValueError, match=f"; it fits '{name}'$"):
        kr.create_model(wrong, weights=tmp_path / "w.npz", preprocessing="torch")


OTHER_FAMILIES = [
    ("resnet20", akamaster.FORMAT, {**SHALLOW, "num_classes": 10}, "vgg16"),
    ("vgg11", torchvision.VGG, {"width": 3, "input_shape": (32, 32, 3)}, "resnet18"),
]


@pytest.mark.parametrize(
    ("name", "checkpoint_format", "changes", "wrong"), OTHER_FAMILIES, ids=[row[3] for row in OTHER_FAMILIES]
)
def test_files_of_the_other_family_are_refused(name, checkpoint_format, changes, wrong, tmp_path):
    model = kr.create_model(name, **changes)
    path = written(tmp_path, state_for(model, config_behind(model), checkpoint_format, 0))
    with pytest.raises(ValueError, match="holds a (resnet|vgg) network, the model is a (vgg|resnet)"):
        kr.create_model(wrong, weights=path, input_shape=(64, 64, 3))


# Names as the repositories' own definitions have them, one block per stage.
NORM = ("weight", "bias", "running_mean", "running_var")
TINY = {"depths": (1, 1, 1), "num_classes": 10, "input_shape": (32, 32, 3)}


def spelled(*layers):
    """All array names of layers written as `name`, `name:norm` or `name:bias` (a kernel with bias)."""
    kinds = {"": ("weight",), "norm": NORM, "bias": ("weight", "bias")}
    return {f"{name}.{part}" for name, _, kind in (layer.partition(":") for layer in layers) for part in kinds[kind]}


def basic(stage, *shortcut):
    block = f"layer{stage}.0"
    return [
        f"{block}.conv1",
        f"{block}.bn1:norm",
        f"{block}.conv2",
        f"{block}.bn2:norm",
        *(f"{block}.{part}" for part in shortcut),
    ]


LAYOUTS = {
    "akamaster": (
        *("resnet20", TINY, akamaster.FORMAT),
        spelled("conv1", "bn1:norm", *basic(1), *basic(2), *basic(3), "linear:bias"),
    ),
    "kuangliu": (
        *("resnet18", {**TINY, "depths": (1, 1, 1, 1), "stem_kernel": 3, "stem_stride": 1, "stem_pool": None}, small.KUANGLIU),
        spelled(
            *("conv1", "bn1:norm", "linear:bias", *basic(1)),
            *(part for stage in (2, 3, 4) for part in basic(stage, "shortcut.0", "shortcut.1:norm")),
        ),
    ),
    "chenyaofo": (
        *("resnet20_b", TINY, small.RESNET),
        spelled(
            *("conv1", "bn1:norm", "fc:bias", *basic(1)),
            *(part for stage in (2, 3) for part in basic(stage, "downsample.0", "downsample.1:norm")),
        ),
    ),
    "bearpaw": (
        *("preresnet164", {**TINY, "stride_in": "3x3"}, small.RESNET),
        spelled(
            *("conv1", "bn:norm", "fc:bias"),
            *(f"layer{stage}.0.conv{k}" for stage in (1, 2, 3) for k in (1, 2, 3)),
            *(f"layer{stage}.0.bn{k}:norm" for stage in (1, 2, 3) for k in (1, 2, 3)),
            *(f"layer{stage}.0.downsample.0" for stage in (1, 2, 3)),
        ),
    ),
    "xternalz": (
        *("wrn16_2", TINY, small.WIDE_RESNET),
        spelled(
            *("conv1", "bn1:norm", "fc:bias"),
            *(f"block{stage}.layer.0.conv{k}" for stage in (1, 2, 3) for k in (1, 2)),
            *(f"block{stage}.layer.0.bn{k}:norm" for stage in (1, 2, 3) for k in (1, 2)),
            *(f"block{stage}.layer.0.convShortcut" for stage in (1, 2, 3)),
        ),
    ),
    "weiaicunzai": (
        *("resnet18", {**TINY, "depths": (1, 1), "widths": (64, 128), "stem_kernel": 3, "stem_stride": 1, "stem_pool": None}),
        small.CIFAR100,
        spelled(
            *("conv1.0", "conv1.1:norm", "fc:bias"),
            *(f"conv{stage}_x.0.residual_function.{place}" for stage in (2, 3) for place in (0, "1:norm", 3, "4:norm")),
            *("conv3_x.0.shortcut.0", "conv3_x.0.shortcut.1:norm"),
        ),
    ),
    "kuangliu's VGG": (
        *("vgg11_bn_w100", {"stages": (1, 1), "widths": (64, 128)}, small.VGG),
        spelled("features.0:bias", "features.1:norm", "features.4:bias", "features.5:norm", "classifier:bias"),
    ),
    "chenyaofo's VGG": (
        "vgg11_bn",
        {"stages": (1, 1), "widths": (64, 128), "head_size": 1, "head_widths": (512, 512), "num_classes": 10, "input_size": 32},
        small.VGG,
        spelled(
            *("features.0:bias", "features.1:norm", "features.4:bias", "features.5:norm"),
            *("classifier.0:bias", "classifier.3:bias", "classifier.6:bias"),
        ),
    ),
}


@pytest.mark.parametrize(
    ("layout", "wrapper"), [*((layout, "") for layout in LAYOUTS), ("kuangliu", "module."), ("xternalz", "net.module.")]
)
def test_layouts_of_cifar_files(layout, wrapper, tmp_path):
    name, changes, checkpoint_format, names = LAYOUTS[layout]
    model = kr.create_model(name, **changes)
    state = state_for(model, config_behind(model), checkpoint_format, 3)
    assert set(state) == names
    counters = {f"{key[:-6]}num_batches_tracked": np.array(5) for key in names if key.endswith("running_var")}
    counters = {key.replace("running_var", ""): value for key, value in counters.items()}
    path = written(tmp_path, {wrapper + key: array for key, array in {**state, **counters}.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = kr.create_model(name, weights=path, **changes)
    assert open_weights(path).checkpoint_format is checkpoint_format
    for key, variable in variables_of(loaded).items():
        array = state[checkpoint_format.translate(config_behind(model), *key)]
        array = np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array
        np.testing.assert_array_equal(variable, array)


@pytest.mark.parametrize("wrong", ["resnet20_a_fixup", "resnet20_a_avg", "resnet20_b"])
def test_the_three_option_a_are_not_mixed_up(wrong, tmp_path):
    _, state = small_state("resnet20", akamaster.FORMAT, **CIFAR)
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
