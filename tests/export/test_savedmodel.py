"""SavedModel export: names, numbers, and that nothing of this project is needed to load it."""

import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from PIL import Image

import resnet_export as rx
from resnet_export.conversion import savedmodel
from resnet_export.runtime import images
from tests.helpers import randomise

from .conftest import build_mixed, noise, relative


@pytest.fixture(scope="module")
def exported(mixed, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "mixed"
    return rx.to_savedmodel(mixed, path, outputs=["logits", "probabilities"], labels=list("abcdefg")), path


def test_names_and_numbers(mixed, exported):
    result, path = exported
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    x = noise(4)
    got = serve(images=tf.constant(x))
    assert set(got) == {"logits", "probabilities"} and result.report.passed
    np.testing.assert_allclose(got["probabilities"], np.asarray(mixed(x)), atol=1e-5)
    assert relative(tf.nn.softmax(got["logits"]), np.asarray(mixed(x))) < 1e-5


def test_features_signature(mixed, exported):
    x = noise(3, seed=2)
    got = tf.saved_model.load(str(exported[1])).signatures["features"](images=tf.constant(x))["features"]
    expected = keras.Model(mixed.inputs, mixed.get_layer("last_conv").output)(x)
    assert relative(got, expected) < 1e-5


def test_bytes_signature_takes_files_of_any_size(mixed, exported, tmp_path):
    serve = tf.saved_model.load(str(exported[1])).signatures["serving_bytes"]
    rng = np.random.default_rng(0)
    exact = rng.integers(0, 256, (32, 32, 3)).astype("uint8")
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 256, (6, 7, 3)).astype("uint8")).resize((90, 70), Image.Resampling.BICUBIC)
    )
    files = []
    for index, pixels in enumerate((exact, smooth)):
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        files.append((tmp_path / f"{index}.png").read_bytes())
    Image.fromarray(smooth).save(tmp_path / "2.jpg", quality=95)
    files.append((tmp_path / "2.jpg").read_bytes())
    got = serve(image_bytes=tf.constant(files))["logits"].numpy()
    pixels = np.stack([images.load(file, {"size": [32, 32]}) for file in files]).astype("float32")
    expected = tf.saved_model.load(str(exported[1])).signatures["serving_default"](images=tf.constant(pixels))["logits"].numpy()
    assert relative(got[0], expected[0]) < 1e-6
    assert relative(got[1], expected[1]) < 2e-2, "Pillow and TensorFlow round a resized pixel by one level differently"
    assert relative(got[2], expected[2]) < 2e-2, "and a JPEG's"


def test_missing_signature_is_noticed(mixed, exported):
    module = tf.Module()
    module.serve = tf.function(lambda images: {"logits": images}).get_concrete_function(
        tf.TensorSpec([None, 32, 32, 3], name="images")
    )
    tf.saved_model.save(module, str(exported[1].parent / "other"), signatures={"serving_default": module.serve})
    problems = rx.verify(exported[1].parent / "other", mixed).problems
    assert any("`features` is missing" in problem for problem in problems)


def test_card_is_in_the_folder(exported):
    card = json.loads((exported[1] / "keras_resnet.json").read_text())["card"]
    assert card["labels"] == list("abcdefg") and card["preprocessing"]["size"] == [32, 32]


def test_verify_reads_the_card_in_the_folder(mixed, exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "m")
    file = tmp_path / "m" / "keras_resnet.json"
    assert rx.verify(tmp_path / "m", mixed, labels=list("abcdefg")).passed
    file.write_text(file.read_text().replace('"c"', '"x"'))
    report = rx.verify(tmp_path / "m", mixed, labels=list("abcdefg"))
    assert [problem for problem in report.problems if "its card differs in labels" in problem]


def test_names_with_spaces(tmp_path):
    left, right = keras.Input((8, 8, 3), name="left eye"), keras.Input((5,), name="right eye")
    flat = layers.Concatenate()([layers.Flatten()(layers.Conv2D(2, 3, name="a conv")(left)), right])
    heads = [layers.Dense(3, name="the head")(flat), layers.Dense(2, name="head-2")(flat)]
    model = randomise(keras.Model([left, right], heads, name="my model"))
    before = [variable.value.name for variable in model.variables]
    assert rx.to_savedmodel(model, tmp_path / "m").report.passed
    assert [variable.value.name for variable in model.variables] == before
    feeds = {"left_eye": noise(2, 8, 8, 3), "right_eye": noise(2, 5)}
    got = tf.saved_model.load(str(tmp_path / "m")).signatures["serving_default"](**{k: tf.constant(v) for k, v in feeds.items()})
    for name, expected in zip(("the head", "head-2"), model(list(feeds.values())), strict=True):
        assert relative(got[name], expected) < 1e-5
    assert rx.verify(tmp_path / "m", model).passed


def test_loads_without_this_package(mixed, exported):
    x = noise(2, seed=5)
    np.save(exported[1].parent / "x.npy", x)
    code = (
        "import sys, numpy as np, tensorflow as tf\n"
        f"serve = tf.saved_model.load({str(exported[1])!r}).signatures['serving_default']\n"
        f"y = serve(images=tf.constant(np.load({str(exported[1].parent / 'x.npy')!r})))['probabilities'].numpy()\n"
        "print(sorted({'keras_resnet', 'resnet_export'} & set(sys.modules)), y.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded, _, numbers = done.stdout.strip().partition(" [[")
    assert loaded == "[]"
    np.testing.assert_allclose(json.loads("[[" + numbers), np.asarray(mixed(x)), atol=1e-5)


def test_old_folder_is_swapped_or_kept(mixed, tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(rx.UsageError, match="is not an earlier export"):
        rx.to_savedmodel(mixed, target)
    (target / "saved_model.pb").write_text("old")
    with pytest.raises(rx.UsageError, match="exists already"):
        rx.to_savedmodel(mixed, target, overwrite=False)
    with pytest.raises(rx.UsageError, match="offers the outputs"):
        rx.to_savedmodel(mixed, target, outputs=["nothing"])
    assert (target / "old").read_text() == "old" and os.listdir(tmp_path) == ["m"]
    rx.to_savedmodel(mixed, target)
    assert not (target / "old").exists() and (target / "saved_model.pb").is_file() and os.listdir(tmp_path) == ["m"]


def test_one_wrong_number_is_caught(mixed, exported):
    assert exported[0].report.weights["elements"] == sum(np.size(variable) for variable in mixed.weights)
    other = build_mixed()
    kernel = other.get_layer("grouped_conv").kernel
    wrong = np.array(kernel)
    wrong.flat[5] = np.nextafter(wrong.flat[5], 1)
    kernel.assign(wrong)
    report = rx.verify(exported[1], other)
    assert report.problems == ("weight 'grouped_conv/kernel' differs from the model's",)


def test_an_untrained_model_is_verified_with_other_variables(tmp_path, monkeypatch):
    """Its graph scales by gamma twice, which ones hide."""
    x = keras.Input((8, 8, 3))
    norm = layers.BatchNormalization(name="norm")
    model = keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling2D()(norm(layers.Conv2D(4, 3)(x)))))
    assert any("verified again with random values" in note for note in rx.to_savedmodel(model, tmp_path / "m").report.notes)
    real = savedmodel.concrete_function

    def twice(view, specs):
        call = keras.layers.BatchNormalization.call
        with monkeypatch.context() as patch:
            patch.setattr(keras.layers.BatchNormalization, "call", lambda self, *a, **k: call(self, *a, **k) * self.gamma.value)
            return real(view, specs)

    monkeypatch.setattr(savedmodel, "concrete_function", twice)
    with pytest.raises(rx.MismatchError, match="with random values for 6 variables that were constant"):
        rx.to_savedmodel(model, tmp_path / "n")
    assert os.listdir(tmp_path) == ["m"]


def test_damaged_folder(mixed, tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(rx.UsageError, match="not a readable SavedModel"):
        rx.verify(tmp_path / "m", mixed)


@keras.saving.register_keras_serializable("test_savedmodel")
class OtherInGraphs(layers.Layer):
    """A layer that asks how it is called."""

    def call(self, x):
        return x * (1.0 if tf.executing_eagerly() else 1.01)


def test_the_layer_that_differs_is_named(tmp_path):
    x = keras.Input((8, 8, 3))
    y = layers.Conv2D(4, 3, name="first")(x)
    y = layers.Conv2D(4, 3, name="last")(OtherInGraphs(name="asks")(y))
    with pytest.raises(rx.MismatchError, match="first layer that differs: asks$"):
        rx.to_savedmodel(keras.Model(x, y), tmp_path / "folder")
    assert not os.listdir(tmp_path)
