"""Keras' own callbacks, one by one: they do in a run what they do in plain `fit`, and a run with segments is one training."""

import csv
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet import training

from .models import At
from .test_like_keras import CLASSES, SPARSE, N, X, same, vector

VALIDATION = (X[::2] + 0.3, CLASSES[::2])


def plain(callbacks, epochs=6):
    model = vector()
    model.compile(keras.optimizers.SGD(0.5), loss=SPARSE, metrics=["accuracy"], jit_compile=False)
    model.fit(X, CLASSES, epochs=epochs, batch_size=8, shuffle=False, validation_data=VALIDATION, callbacks=callbacks, verbose=0)
    return model


def ours(callbacks, epochs=6, **options):
    options = {"optimizer": keras.optimizers.SGD(0.5), "validation_data": VALIDATION, **options}
    return training.fit(
        vector(), X, CLASSES, epochs=epochs, batch_size=8, shuffle=False, callbacks=callbacks, quiet=True, **options
    )


class Everything(keras.callbacks.Callback):
    """Records every call with its numbers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def record(self, name, *args):
        logs = args[-1] or {}
        self.calls.append((name, *args[:-1], {key: round(float(value), 5) for key, value in logs.items()}))


for event in ("train_begin", "train_end", "test_begin", "test_end"):
    setattr(Everything, f"on_{event}", lambda self, logs=None, name=event: self.record(name, logs))
for event in ("epoch_begin", "epoch_end", "train_batch_begin", "train_batch_end", "test_batch_begin", "test_batch_end"):
    setattr(Everything, f"on_{event}", lambda self, number, logs=None, name=event: self.record(name, number, logs))


def test_every_event_comes_in_keras_order_with_keras_numbers():
    theirs, mine = Everything(), Everything()
    plain([theirs], 2), ours([mine], 2)
    assert mine.calls == theirs.calls and mine.params == theirs.params


CALLBACKS = {
    "EarlyStopping": lambda folder: keras.callbacks.EarlyStopping("val_accuracy", patience=1, restore_best_weights=True),
    "EarlyStopping on the loss": lambda folder: keras.callbacks.EarlyStopping(
        patience=1, min_delta=0.02, restore_best_weights=True
    ),
    "ModelCheckpoint": lambda folder: keras.callbacks.ModelCheckpoint(
        folder / "{epoch}.keras", "val_accuracy", save_best_only=True
    ),
    "ModelCheckpoint of weights": lambda folder: keras.callbacks.ModelCheckpoint(
        folder / "{epoch}.weights.h5", save_weights_only=True
    ),
    "ReduceLROnPlateau": lambda folder: keras.callbacks.ReduceLROnPlateau("val_loss", patience=0, min_delta=0.05),
    "LearningRateScheduler": lambda folder: keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.7),
    "CSVLogger": lambda folder: keras.callbacks.CSVLogger(folder / "log.csv"),
    "LambdaCallback": lambda folder: keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: (folder / f"{epoch}.txt").write_text(f"{logs['val_loss']:.5f}")
    ),
    "TensorBoard": lambda folder: keras.callbacks.TensorBoard(folder, histogram_freq=1, write_graph=False),
    "History": lambda folder: keras.callbacks.History(),
    "TerminateOnNaN": lambda folder: keras.callbacks.TerminateOnNaN(),
}


# Those that only watch; the tests of all events and of a kill cover what they hear and keep.
WATCHING = (
    "LambdaCallback",
    "History",
    "TerminateOnNaN",
    "TensorBoard",
    "ModelCheckpoint of weights",
    "ModelCheckpoint",
    "CSVLogger",
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in WATCHING else n for n in CALLBACKS])
def test_callback_of_keras_does_what_it_does_there(tmp_path, name):
    if name == "TensorBoard":
        pytest.importorskip("tensorboard")
    folders = [tmp_path / "theirs", tmp_path / "ours"]
    for folder in folders:
        folder.mkdir()
    first, second = (CALLBACKS[name](folder) for folder in folders)
    theirs, mine = plain([first]), ours([second])
    same(mine.model, theirs)
    names = [
        sorted(path.name for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name) for folder in folders
    ]
    assert names[0] == names[1]
    if name == "TensorBoard":
        assert len(list(folders[1].rglob("*tfevents*"))) == len(list(folders[0].rglob("*tfevents*"))) == 2
    for file in names[0]:
        one, other = (folder / file for folder in folders)
        if one.suffix == ".keras":
            same(keras.saving.load_model(other), keras.saving.load_model(one))
        elif one.suffix in (".txt", ".csv"):
            assert "".join(other.read_text().split()) == "".join(one.read_text().split())
    if name == "History":
        for key, values in first.history.items():
            np.testing.assert_allclose(second.history[key], values, atol=1e-7, err_msg=key)
    for attribute in ("best_epoch", "stopped_epoch", "wait", "epoch"):
        assert getattr(second, attribute, None) == getattr(first, attribute, None)


def test_a_model_that_a_callback_saves_loads_in_a_fresh_process_without_this_package(tmp_path):
    path = tmp_path / "best.keras"
    training.fit(
        vector(), X, CLASSES, epochs=2, batch_size=8, validation_split=0.2, weight_decay=0.1, warmup_epochs=1.0, quiet=True,
        callbacks=[keras.callbacks.ModelCheckpoint(path)],
    )  # fmt: skip
    code = (
        "import sys, keras, numpy as np; m = keras.saving.load_model(sys.argv[1]); "
        "print(type(m).__name__, type(m.optimizer).__name__, m.compiled, float(m(np.ones((1, 6))).numpy().sum())); "
        "m.evaluate(np.ones((4, 6)), np.zeros(4, int), verbose=0); assert 'keras_resnet' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Functional SGD True"), done.stderr[-800:]


def test_callbacks_may_evaluate_and_see_one_training_over_growth_and_unfreezing(tmp_path):
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, padding="same", name="body"),
                              keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])  # fmt: skip
    images = np.random.default_rng(1).normal(size=(20, 8, 8, 1)).astype("float32")
    labels = (images.mean((1, 2, 3)) > 0).astype(int)
    seen = []

    class Ask(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            loss, accuracy = self.model.evaluate(images, labels, verbose=0)
            seen.append((epoch, len(self.model.layers), loss, logs["val_loss"]))

    class Rising(keras.callbacks.Callback):
        """Makes every epoch worse than the first, so that its weights are the best."""

        def on_epoch_end(self, epoch, logs=None):
            logs["judged"] = epoch

    everything = Everything()
    early = keras.callbacks.EarlyStopping("judged", mode="min", patience=5, restore_best_weights=True)
    kept = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: first.append(kept.model.get_weights()) if not first else 0
    )
    first = []
    result = training.fit(
        model, images, labels, validation_data=(images, labels), epochs=4, batch_size=10, frozen_epochs=1, learning_rate=0.5,
        growth=[(2, "body", 1)], quiet=True,
        callbacks=[Rising(), early, kept, Ask(), everything, keras.callbacks.CSVLogger(tmp_path / "log.csv")],
    )  # fmt: skip
    assert [epoch for epoch, *_ in seen] == [0, 1, 2, 3] and seen[2][1] > seen[1][1]
    for _, _, loss, logged in seen:
        np.testing.assert_allclose(loss, logged, rtol=1e-5)
    names = [call[0] for call in everything.calls]
    assert names.count("train_begin") == names.count("train_end") == 1
    assert [call[1] for call in everything.calls if call[0] == "epoch_begin"] == [0, 1, 2, 3]
    with open(tmp_path / "log.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2", "3"]
    # The best weights are those before growth; the new block came with a closed gate, so the answers are the same.
    assert len(kr.find_blocks(result.model)) == 1
    model.set_weights(first[0])
    np.testing.assert_array_equal(result.model(images).numpy(), model(images).numpy())


def test_averages_are_what_is_validated_saved_and_restored(tmp_path):
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    early = keras.callbacks.EarlyStopping("val_loss", patience=0, restore_best_weights=True, min_delta=1e9)
    result = training.fit(
        vector(), X, CLASSES, validation_data=VALIDATION, epochs=4, batch_size=8, ema=0.9, learning_rate=3.0, schedule="constant",
        callbacks=[checkpoint, early], quiet=True,
    )  # fmt: skip
    assert len(result.history) == 2
    for epoch in (1, 2):
        saved = keras.saving.load_model(tmp_path / f"{epoch}.keras")
        loss, _ = saved.evaluate(*VALIDATION, verbose=0)
        np.testing.assert_allclose(loss, result.history[epoch - 1]["val_loss"], rtol=1e-5)
    same(result.model, keras.saving.load_model(tmp_path / "1.keras"))
    np.testing.assert_allclose(result.summary["val_loss"], result.history[0]["val_loss"], atol=2e-6)


class Broken(Exception):
    pass


def test_what_callbacks_remember_survives_a_kill(tmp_path):
    def callbacks(folder):
        return [
            keras.callbacks.EarlyStopping("val_accuracy", patience=3, restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau("val_accuracy", patience=2, factor=0.5),
            keras.callbacks.ModelCheckpoint(folder / "best.keras", "val_accuracy", save_best_only=True),
            keras.callbacks.CSVLogger(folder / "keras.csv"),
        ]

    def go(folder, *more):
        folder.mkdir(exist_ok=True)
        return ours([*callbacks(folder), *more], 8, out=folder / "run")

    def stop(model):
        raise Broken

    whole = go(tmp_path / "whole")
    for step in (7, 2):
        with pytest.raises(Broken):
            go(tmp_path / "broken", At(step, stop))
    again = go(tmp_path / "broken")
    same(again.model, whole.model)
    drop = lambda rows: [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]  # noqa: E731
    assert drop(again.history) == drop(whole.history)
    files = [(tmp_path / name / "keras.csv").read_text().splitlines() for name in ("whole", "broken")]
    assert len(files[0]) == len(files[1]) == 1 + len(whole.history)
    same(*(keras.saving.load_model(tmp_path / name / "best.keras") for name in ("whole", "broken")))


@pytest.mark.parametrize(
    ("callback", "options", "says"),
    [
        (keras.callbacks.ReduceLROnPlateau(), dict(schedule="cosine"), "ReduceLROnPlateau sets the learning rate.*'cosine'"),
        (keras.callbacks.LearningRateScheduler(lambda e, r: r), dict(schedule="constant", warmup_epochs=1.0), "no warm-up"),
        (keras.callbacks.BackupAndRestore("x"), {}, "`out` keeps a checkpoint"),
        (3, {}, "`callbacks` must be Keras callbacks"),
    ],
)
def test_callbacks_that_cannot_work_are_refused_before_anything_starts(callback, options, says):
    with pytest.raises(training.TrainingError, match=says):
        training.fit(vector(), X, CLASSES, epochs=2, batch_size=8, callbacks=[callback], quiet=True, **options)


def test_learning_rate_callbacks_work_with_the_runs_own_optimiser():
    result = training.fit(
        vector(), X, CLASSES, epochs=3, batch_size=N, learning_rate=0.4, base_batch=N, schedule="constant", quiet=True,
        callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)],
    )  # fmt: skip
    assert [row["learning_rate"] for row in result.history] == [0.2, 0.1, 0.05]
