"""Training on folders of photos: which split is measured when, heads of models from files, grayscale."""

import json

import keras
import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet import data, training
from keras_resnet.training.zoo import train
from tests.helpers import randomise

CLASSES = ["bird", "cat"]


@pytest.fixture(autouse=True)
def keras_home(tmp_path, monkeypatch):
    monkeypatch.setattr(keras.config, "keras_home", lambda: str(tmp_path / "home"), raising=False)


@pytest.fixture
def photos(tmp_path):
    """Two classes of noise in `train`, `val` and `test`; validation and test hold other shares of the classes."""
    rng = np.random.default_rng(0)
    for part, counts in {"train": (12, 12), "val": (9, 1), "test": (1, 7)}.items():
        for name, count in zip(CLASSES, counts, strict=True):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype("uint8")).save(folder / f"{index}.png")
    return tmp_path / "photos"


def network(channels=3, classes=2):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((16, 16, channels))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(4, 3, strides=2, activation="relu")(x)
    return randomise(keras.Model(inputs, keras.layers.Dense(classes)(keras.layers.GlobalAveragePooling2D()(x))))


def measured(model, source, split):
    """Accuracy by plain Keras on the batches of an evaluation."""
    right = total = 0
    batches = data.evaluation_batches(split, batch=8, size=(16, 16), num_classes=2, crop=source.crop)
    for images, labels, weights in batches:
        hits = np.asarray(model(images)).argmax(1) == labels.numpy().argmax(1)
        right, total = right + (hits * weights.numpy()).sum(), total + weights.numpy().sum()
    return right / total


def test_val_is_measured_every_epoch_and_the_test_once(photos, tmp_path, capsys):
    source = data.load(str(photos))
    seen = []
    watch = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["val_accuracy"]))
    out = tmp_path / "run"
    result = training.fit(network(), str(photos), epochs=2, batch_size=8, learning_rate=0.01, callbacks=[watch], out=out)
    assert source.describe() in capsys.readouterr().err.replace("\n", " ")
    summary = json.loads((out / "summary.json").read_text())
    assert seen[-1] == pytest.approx(measured(result.model, source, source.validation), abs=1e-6)
    assert summary["val_accuracy"] == pytest.approx(seen[-1], abs=1e-6)
    assert summary["test_accuracy"] == pytest.approx(measured(result.model, source, source.test), abs=1e-6)
    assert summary["val_accuracy"] != summary["test_accuracy"]
    assert kr.card(kr.load_model_file(out / "model.keras")).labels == CLASSES


def test_grayscale_models_train_on_photos(photos):
    result = training.fit(network(channels=1), str(photos), epochs=1, batch_size=8, learning_rate=0.01, quiet=True)
    source = data.load(str(photos)).with_channels(1)
    assert result.summary["val_accuracy"] == pytest.approx(measured(result.model, source, source.validation), abs=1e-6)


def test_a_model_of_any_size_takes_images_of_the_size_that_is_given(photos, tmp_path):
    inputs = keras.Input((None, None, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(keras.layers.Rescaling(1 / 255)(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    model.save(tmp_path / "any.keras")
    options = dict(data=str(photos), epochs=1, batch_size=8, learning_rate=0.01, validate="none")
    with pytest.raises(training.TrainingError, match="the model takes any; set `image_size`"):
        train(training.Run.of(model=str(tmp_path / "any.keras"), **options), quiet=True)
    result = train(training.Run.of(model=str(tmp_path / "any.keras"), image_size=16, **options), quiet=True)
    source = data.load(str(photos))
    assert result.summary["test_accuracy"] == pytest.approx(measured(result.model, source, source.test), abs=1e-6)
    assert kr.card(result.model).preprocessing["size"] == [16, 16]
    network().save(tmp_path / "fixed.keras")
    with pytest.raises(training.TrainingError, match="`image_size` is for models that take any size; .* takes images of 16×16"):
        train(training.Run.of(model=str(tmp_path / "fixed.keras"), image_size=8, **options), quiet=True)
    with pytest.raises(training.TrainingError, match="`image_size` is an option of"):
        training.fit(network(), str(photos), image_size=8, quiet=True)


# Class names of the model in the file, or None; whether its classifier is replaced.
HEADS = {
    "same": (CLASSES, False),
    "no names": (None, False),
    "renamed": (["bird", "kitten"], False),
    "other order": (CLASSES[::-1], True),
    "more classes": (["ape", "bird", "cat"], True),
    "other count, no names": ([None] * 5, True),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_model_from_a_file_gets_the_classes_of_the_photos(photos, tmp_path, case):
    labels, replaced = HEADS[case]
    model = network(classes=len(labels or CLASSES))
    if labels and labels[0]:
        model = kr.with_card(model, labels=labels)
    model.save(tmp_path / "old.h5")
    lines = []
    run = training.Run.of(
        model=str(tmp_path / "old.h5"), data=str(photos), epochs=1, batch_size=8, learning_rate=1e-12, validate="none"
    )
    result = train(run, quiet=True, report=lines.append)
    assert any("new classifier for 2 classes" in line for line in lines) == replaced, lines
    x = np.random.default_rng(0).uniform(0, 255, (4, 16, 16, 3)).astype("float32")
    old, new = np.asarray(model(x)), np.asarray(result.model(x))
    assert new.shape == (4, 2) and kr.card(result.model).labels == CLASSES
    if case == "other count, no names":
        return
    # At a learning rate of almost nothing, a class that is known by name keeps its logit, wherever it was.
    places = [labels.index(name) for name in CLASSES] if replaced else [0, 1]
    np.testing.assert_allclose(new, old[:, places], rtol=1e-4, atol=1e-4)


def test_the_card_says_how_images_were_evaluated(photos):
    model = kr.add_preprocessing(network(), {"mean": 0.0, "std": 1 / 255})
    result = training.fit(model, str(photos), epochs=1, batch_size=8, learning_rate=0.01, quiet=True)
    treatment = kr.card(result.model).preprocessing
    assert (treatment["size"], treatment["resize"], treatment["mean"]) == ([16, 16], 18, 0.0)
