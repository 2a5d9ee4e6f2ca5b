"""Model files that Keras wrote: recognised by content, and refused with one line that says what to do.

The fixtures `keras2*` were written by tf_keras 2.21.0: a Sequential model with a depthwise convolution and batch norm, what it
predicts for `default_rng(0).uniform(0, 1, (2, 8, 8, 3))`, a functional model that calls `tf.nn.relu`, and one of layers whose
configs Keras 3 refuses or reads otherwise, with its two outputs for the same images.
"""

import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.models.legacy import as_keras_3
from keras_resnet.models.loading import ModelFileError, load_model_file, recognise_model_file

FIXTURES = Path(__file__).parent / "fixtures"


def build():
    layers = keras.layers
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(2)], name="small")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same model in both formats, under every ending, and what it computes."""
    folder, model = tmp_path_factory.mktemp("files"), build()
    model.save(folder / "m.keras")
    model.save(folder / "m.h5")
    for name, source in {"a.h5": "m.keras", "a.keras": "m.h5", "a.hdf5": "m.h5", "a.bin": "m.keras", "b.bin": "m.h5"}.items():
        shutil.copy(folder / source, folder / name)
    return folder, model


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "a.h5", "a.keras", "a.hdf5", "a.bin", "b.bin"])
def test_content_decides_whatever_the_name(files, name):
    folder, model = files
    before = sorted(folder.iterdir())
    loaded = load_model_file(folder / name)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(loaded(x), model(x))
    assert loaded.name == "small" and not loaded.compiled and sorted(folder.iterdir()) == before


def test_a_file_of_keras_2_computes_what_keras_2_computed():
    loaded = load_model_file(FIXTURES / "keras2.h5")
    x = np.random.default_rng(0).uniform(0, 1, (2, 8, 8, 3))
    np.testing.assert_allclose(loaded(x), np.load(FIXTURES / "keras2_outputs.npy"), atol=1e-6)
    assert all(type(layer).__module__.startswith("keras.") for layer in loaded.layers)
    assert recognise_model_file(FIXTURES / "keras2.h5").is_keras_2


@keras.saving.register_keras_serializable("odd")
class Odd(keras.layers.Layer):
    def call(self, x):
        return x


def with_lambda(path):
    keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda t: t / 255.0), keras.layers.Dense(2)]).save(path)


def with_stranger(path):
    keras.Sequential([keras.Input((4,)), Odd(), keras.layers.Dense(2)]).save(path)


def with_long_config(path):
    """Fails in Keras with an error that prints the config of the whole model."""
    keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(3) for _ in range(40))]).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = members["config.json"].replace(b'"units": 3', b'"units": "\\u001b[31mmany"')
    members["metadata.json"] = json.dumps({"keras_version": "3.99.0"}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def old_weights(path):
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = ["a"]


def cut(path):
    with_long_config(path.with_suffix(".keras"))
    content = path.with_suffix(".keras").read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_hdf5(path):
    path.write_bytes((FIXTURES / "keras2.h5").read_bytes()[:9000])


def folder(path):
    path.mkdir()
    (path / "saved_model.pb").write_bytes(b"")


def pickled(path):
    """A pickle in place of the weights, which numpy would read by running its code."""
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if not name.startswith("model.weights")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members, "model.weights.npz": pickle.dumps({"a": 1})}.items():
            archive.writestr(name, content)


def without_input_layer(sequential, as_list):
    """The config of a Sequential model as Keras 2 wrote it before it knew input layers: the first layer holds the shape."""
    entry, first, *others = sequential["config"]["layers"]
    first = {**first, "config": {**first["config"], "batch_input_shape": entry["config"]["batch_shape"]}}
    layers = [first, *others]
    return {**sequential, "config": layers if as_list else {**sequential["config"], "layers": layers}}


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_sequential_models_without_an_input_layer(tmp_path, nested, as_list):
    model = keras.Sequential([
        keras.Input((6, 7, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.Flatten(),
        keras.layers.Dense(2),
    ])  # fmt: skip
    if nested:
        x = keras.Input((6, 7, 3))
        model = keras.Model(x, keras.layers.Activation("tanh")(model(x)))
    model.save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        if nested:
            layers = config["config"]["layers"]
            layers[1] = {**layers[1], **without_input_layer(layers[1], as_list)}
            name = layers[1]["name"]
            for inner in layers:  # Keras 2 counted the calls of inner models from 1
                calls = json.dumps(inner["inbound_nodes"]).replace(f'"{name}", 0', f'"{name}", 1')
                inner["inbound_nodes"] = json.loads(calls)
            file.attrs["keras_version"] = "2.1.0"
        else:
            config = without_input_layer(config, as_list)
        file.attrs["model_config"] = json.dumps(config)
    before = (tmp_path / "m.h5").read_bytes()
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype("float32")
    with warnings.catch_warnings(action="error"):
        np.testing.assert_array_equal(load_model_file(tmp_path / "m.h5")(x), model(x))
    assert (tmp_path / "m.h5").read_bytes() == before


def without_modules(node):
    """A config as versions before Keras 2.13 wrote it."""
    if isinstance(node, list):
        return [without_modules(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    return {
        key: without_modules(value) for key, value in node.items() if key not in ("module", "registered_name", "build_config")
    }


@pytest.mark.parametrize("version", ["2.21.0", "2.9.0"])
def test_layers_of_keras_2_whose_configs_keras_3_refuses_or_reads_otherwise(tmp_path, version):
    path = shutil.copy(FIXTURES / "keras2_layers.h5", tmp_path)
    if version == "2.9.0":
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = json.dumps(without_modules(json.loads(file.attrs["model_config"])))
            file.attrs["keras_version"] = version
    loaded = load_model_file(path)
    x = np.random.default_rng(0).uniform(0, 1, (2, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(np.stack(loaded(x, training=False)), np.load(FIXTURES / "keras2_layers.npy"), atol=1e-6)
    assert "keras_2_hard_sigmoid" in json.dumps(keras.saving.serialize_keras_object(loaded))
    with pytest.raises((TypeError, ValueError), match="Unrecognized keyword"):
        keras.saving.load_model(path, compile=False)


def test_the_hard_sigmoid_of_keras_2_survives_saving(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="hard_sigmoid")])
    model.save(tmp_path / "m.h5")
    x = np.linspace(-4, 4, 8, dtype="float32").reshape(2, 4)
    np.testing.assert_array_equal(load_model_file(tmp_path / "m.h5")(x), model(x))
    with h5py.File(tmp_path / "m.h5", "r+") as file:
        del file.attrs["keras_version"]  # as the oldest versions wrote it
    old = load_model_file(tmp_path / "m.h5")
    want = np.clip(0.2 * (x @ np.asarray(model.layers[0].kernel)) + 0.5, 0, 1)
    np.testing.assert_allclose(old(x), want, atol=1e-6)
    for name in ("again.keras", "again.h5"):
        old.save(tmp_path / name)
        np.testing.assert_array_equal(load_model_file(tmp_path / name)(x), old(x))


def test_only_entries_that_say_nothing_are_left_out():
    def config(**entries):
        return {"class_name": "LSTM", "config": entries}

    assert as_keras_3(config(time_major=False, units=2), keras_2=True) == config(units=2)
    assert as_keras_3(config(time_major=True), keras_2=True) == config(time_major=True)
    gru = {"class_name": "GRU", "config": {"units": 2}}
    assert as_keras_3(gru, keras_2=True)["config"]["reset_after"] is False and as_keras_3(gru, keras_2=False) == gru
    assert as_keras_3(config(recurrent_activation="hard_sigmoid"), keras_2=False) == config(recurrent_activation="hard_sigmoid")


# name -> (writer, what the message says)
REFUSED = {
    "p.keras": (pickled, "holds pickled Python objects where weights belong"),
    "k2.keras": (
        lambda path: shutil.copy(FIXTURES / "keras2.keras", path),
        "saved by Keras 2.21.0, whose .keras files .* save it as .h5",
    ),
    "f.h5": (
        lambda path: shutil.copy(FIXTURES / "keras2_functions.h5", path),
        r"calls TensorFlow functions as layers \(TFOpLambda\)",
    ),
    "l.keras": (with_lambda, "Lambda layer, which is Python code .*unsafe_lambda=True"),
    "l.h5": (with_lambda, "Lambda layer, which is Python code .*unsafe_lambda=True"),
    "o.keras": (with_stranger, "uses Odd, which is not known here; import the module"),
    "o.h5": (with_stranger, "uses Odd, which is not known here; import the module"),
    "long.keras": (with_long_config, r"cannot be loaded \(saved by Keras 3.99.0; .* is installed\): "),
    "w.h5": (old_weights, "holds weights without a model"),
    "v.weights.h5": (lambda path: build().save_weights(path), "holds weights without a model"),
    "cut.keras": (cut, "is not a valid .keras file"),
    "cut.h5": (cut_hdf5, "damaged or cut off"),
    "text.keras": (lambda path: path.write_text("no model"), "is not a valid .keras file"),
    "lfs.keras": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "empty.h5": (lambda path: path.write_bytes(b""), "is not a valid .h5 file"),
    "zip.keras": (lambda path: zipfile.ZipFile(path, "w").close(), "an archive without a Keras model"),
    "saved": (folder, "is a SavedModel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_without_a_model_are_refused_in_one_line(tmp_path, name, monkeypatch):
    write, message = REFUSED[name]
    write(tmp_path / name)
    for key in [key for key in keras.saving.get_custom_objects() if "odd" in key]:
        monkeypatch.delitem(keras.saving.get_custom_objects(), key)
    with pytest.raises(ModelFileError, match=message) as raised:
        load_model_file(tmp_path / name)
    text = str(raised.value)
    assert text.startswith(str(tmp_path / name)) and len(text) < 500 + len(str(tmp_path)) and "\n" not in text
    assert "--" not in text and "\x1b" not in text and "safe_mode" not in text and "config=" not in text


def test_lambda_layers_run_where_they_are_allowed(tmp_path):
    for name in ("l.keras", "l.h5"):
        with_lambda(tmp_path / name)
        model = load_model_file(tmp_path / name, unsafe_lambda=True)
        dense = model.layers[-1]
        x = np.full((1, 4), 255.0, "float32")
        np.testing.assert_allclose(model(x), np.ones((1, 4)) @ np.array(dense.kernel), rtol=1e-6)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.keras does not exist"):
        kr.load_model_file(tmp_path / "nothing.keras")
