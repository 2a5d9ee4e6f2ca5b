"""Resuming: what may differ when a run resumes, what a finished run does, and data whose order is not ours."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_resnet as kr
from keras_resnet import training
from keras_resnet.training import checkpoint
from keras_resnet.training.feeds import with_labels

from .models import At
from .test_like_keras import CLASSES, SPARSE, Batches, X, same, vector

COMMON = dict(batch_size=8, learning_rate=0.3, base_batch=8, schedule="constant", quiet=True)


class Broken(Exception):
    pass


def broken_at(step):
    def stop(model):
        raise Broken

    return At(step, stop)


def test_a_finished_run_may_get_more_epochs(tmp_path):
    training.fit(vector(), X, CLASSES, epochs=2, out=tmp_path, **COMMON)
    longer = training.fit(vector(), X, CLASSES, epochs=4, out=tmp_path, **COMMON)
    at_once = training.fit(vector(), X, CLASSES, epochs=4, **COMMON)
    same(longer.model, at_once.model)
    assert [row["epoch"] for row in longer.history] == [1, 2, 3, 4] and longer.summary["steps"] == 12
    with pytest.raises(training.TrainingError, match="epochs 4 there, 3 here"):
        training.fit(vector(), X, CLASSES, epochs=3, out=tmp_path, **COMMON)


def test_a_run_that_starts_at_a_later_epoch_ends_as_the_whole_one(tmp_path):
    """With the learning rate, the order and the validation of that epoch; the optimiser has no state to carry here."""
    options = dict(epochs=4, batch_size=8, momentum=0.0, warmup_epochs=3.0, learning_rate=30.0, quiet=True, save_every=1)
    half = vector()
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: half.set_weights(keep.model.get_weights()) if epoch == 1 else None
    )
    whole = training.fit(vector(), X, CLASSES, callbacks=[keep], **options)
    seen = []
    told = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: seen.append((epoch, told.params["epochs"])))
    with pytest.raises(Broken):
        training.fit(half, X, CLASSES, initial_epoch=2, out=tmp_path, callbacks=[broken_at(5), told], **options)
    assert seen == [(2, 4), (3, 4)] and checkpoint.read(tmp_path)[1]["step"] == 10
    rest = training.fit(half, X, CLASSES, initial_epoch=2, out=tmp_path, **options)
    same(rest.model, whole.model)
    figures = [[(row["epoch"], row["step"], row["loss"], row["learning_rate"]) for row in r.history] for r in (whole, rest)]
    assert figures[1] == figures[0][2:] and rest.summary["epochs"] == 2 and rest.summary["steps"] == 12
    with pytest.raises(training.TrainingError, match="initial_epoch 2 there, 0 here"):
        training.fit(half, X, CLASSES, out=tmp_path, **options)


def test_a_run_that_a_callback_ended_may_get_more_epochs(tmp_path):
    enough = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: setattr(enough.model, "stop_training", True))
    first = training.fit(vector(), X, CLASSES, epochs=2, out=tmp_path, callbacks=[enough], **COMMON)
    assert first.summary["steps"] == 1 and len(first.history) == 1
    longer = training.fit(vector(), X, CLASSES, epochs=3, out=tmp_path, **COMMON)
    assert [row["epoch"] for row in longer.history] == [1, 2, 3]


def test_a_finished_run_is_neither_measured_nor_written_again(tmp_path):
    first = training.fit(vector(), X, CLASSES, epochs=2, out=tmp_path, validation_split=0.3, **COMMON)
    written = lambda: {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name != checkpoint.LOCK}  # noqa: E731
    files = written()
    again = training.fit(vector(), X, CLASSES, epochs=2, out=tmp_path, validation_split=0.3, **COMMON)
    assert files == written() and len(files) >= 5
    assert again.summary == first.summary and again.history == first.history
    same(again.model, first.model)


def test_a_new_head_without_a_seed_does_not_hinder_resuming(tmp_path):
    def model(seed):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((6,))
        return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Dense(4, activation="relu")(inputs)))

    whole = training.fit(model(1), X, CLASSES, epochs=3, **COMMON)
    with pytest.raises(Broken):
        training.fit(model(1), X, CLASSES, epochs=3, out=tmp_path, save_every=1, callbacks=[broken_at(5)], **COMMON)
    assert checkpoint.read(tmp_path)[1]["step"] == 4
    same(training.fit(model(2), X, CLASSES, epochs=3, out=tmp_path, save_every=1, **COMMON).model, whole.model)


def growing(**options):
    """A convolutional network that grows before its second epoch, in features of a size far from 1."""
    keras.utils.set_random_seed(2)
    inputs = keras.Input((4, 4, 1))
    x = keras.layers.Conv2D(4, 3, padding="same", name="body")(keras.layers.Rescaling(50.0)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x)))
    data = options.pop("data", (IMAGES, CLASSES))
    more = {"growth": [(1, "body", 2)], "growth_scale": "match", "epochs": 3, "learning_rate": 1e-4, "loss": SPARSE, **options}
    return training.fit(model, *data, **{**COMMON, **more})


IMAGES = np.random.default_rng(3).normal(size=(len(CLASSES), 4, 4, 1)).astype("float32")


@pytest.mark.slow
def test_scales_of_grown_blocks_are_measured_once(tmp_path, capsys):
    whole = growing(momentum=0.0)
    scales = {block.path: block.add.scale for block in kr.find_blocks(whole.model)}
    assert len(set(scales.values())) == 1 and 5 < scales["body_grow1"] != 50
    for step in (2, 5):  # Before growth, and after it: what was measured is in the checkpoint.
        with pytest.raises(Broken):
            growing(out=tmp_path, save_every=1, callbacks=[broken_at(step)], momentum=0.0)
    saved = checkpoint.read(tmp_path)[1]
    assert saved["step"] == 5 and saved["scales"] == scales
    again = growing(out=tmp_path, save_every=1, momentum=0.0, quiet=False)
    said = capsys.readouterr().err
    assert "resuming" in said and "scaled by" not in said
    same(again.model, whole.model)
    assert {block.path: block.add.scale for block in kr.find_blocks(again.model)} == scales
    with pytest.raises(training.TrainingError, match="growth_scale 'match' there, 2 here"):
        growing(out=tmp_path, save_every=1, momentum=0.0, growth_scale=2)


def test_scales_are_the_size_of_what_branches_are_added_to():
    batches = tf.data.Dataset.from_tensor_slices((IMAGES, CLASSES)).batch(8)
    for data in ((IMAGES, CLASSES), (batches,)):
        # Nothing is learned, so the model at growth is the model at first.
        result = growing(data=data, growth=[(0, "body", 1)], learning_rate=0.0, epochs=1)
        features = keras.Model(result.model.inputs[0], result.model.get_layer("body").output)(IMAGES).numpy()
        np.testing.assert_allclose(kr.find_blocks(result.model)[0].add.scale, np.sqrt(np.mean(features**2)), rtol=1e-5)
    with pytest.raises(training.TrainingError, match="reads some data twice, which a generator does not allow; give a number"):
        growing(data=(iter(batches),), steps_per_epoch=2)
    with pytest.raises(training.TrainingError, match='"body" has a root mean square of 0 on `data`'):
        growing(data=(0 * IMAGES, CLASSES), growth=[(0, "body", 1)])


def test_changed_examples_with_equal_labels_are_noticed(tmp_path):
    training.fit(vector(), X, CLASSES, epochs=1, out=tmp_path, **COMMON)
    for x, y in ((X + 1e-3, CLASSES), (X, CLASSES[::-1].copy())):
        with pytest.raises(training.TrainingError, match="holds another run.*content"):
            training.fit(vector(), x, y, epochs=1, out=tmp_path, **COMMON)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tf.data", "PyDataset"])
def test_data_in_an_order_of_their_own_resume_after_whole_epochs(tmp_path, kind):
    data = {"tf.data": lambda: tf.data.Dataset.from_tensor_slices((X, CLASSES)).batch(8), "PyDataset": Batches}[kind]
    options = dict(epochs=3, loss=SPARSE, shuffle=False, **{k: v for k, v in COMMON.items() if k != "batch_size"})
    whole = training.fit(vector(), data(), **options)
    with pytest.raises(Broken):
        training.fit(vector(), data(), out=tmp_path, save_every=1, callbacks=[broken_at(5)], **options)
    assert checkpoint.read(tmp_path)[1]["step"] == 3
    same(training.fit(vector(), data(), out=tmp_path, save_every=1, **options).model, whole.model)


def test_callbacks_whose_memory_keras_does_not_show_are_named(tmp_path, capsys):
    class Counting(keras.callbacks.Callback):
        pass

    options = {**COMMON, "quiet": False, "out": tmp_path, "epochs": 2}
    early = lambda: keras.callbacks.EarlyStopping("loss", patience=9)  # noqa: E731
    with pytest.raises(Broken):
        training.fit(vector(), X, CLASSES, callbacks=[early(), Counting(), broken_at(4)], **options)
    capsys.readouterr()
    training.fit(vector(), X, CLASSES, callbacks=[early(), Counting()], **options)
    said = capsys.readouterr().err
    assert "callback Counting restarts" in said and "EarlyStopping" not in said and "resuming from step 3 of 6" in said


def test_class_names_are_kept_without_a_card(tmp_path):
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(keras.layers.Rescaling(0.01)(inputs))), name="own")
    result = training.fit(model, "digits", out=tmp_path, epochs=1, batch_size=256, quiet=True)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert kr.card(loaded).labels == list("0123456789") == result.summary["classes"] and kr.card(model) is None
    x = np.random.default_rng(0).uniform(0, 255, (3, 8, 8, 1)).astype("float32")
    np.testing.assert_allclose(loaded(x), result.model(x), rtol=1e-6)
    named = training.fit(vector(), X, CLASSES, labels=np.array(["a", "b", "c"]), epochs=1, **COMMON)
    assert kr.card(named.model).labels == ["a", "b", "c"] == named.summary["classes"]
    for labels, says in (
        (["a", "b"], r"one name per value of .*output \(3\), got 2"),
        ("abc", "a list of class names"),
    ):
        with pytest.raises(training.TrainingError, match=says):
            training.fit(vector(), X, CLASSES, labels=labels, epochs=1, **COMMON)


def test_class_names_go_into_models_of_every_shape():
    a, b = keras.Input((6,), name="a"), keras.Input((2,), name="b")
    joined = keras.layers.Concatenate()([a, b])
    outputs = {"size": keras.layers.Dense(2)(joined), "kind": keras.layers.Dense(3)(joined)}
    binary = keras.layers.Dense(1, activation="sigmoid")
    for model, names in (
        (keras.Model({"a": a, "b": b}, outputs["kind"]), ["x", "y", "z"]),
        (keras.Model([a, b], outputs), ["x", "y", "z"]),
        (keras.Model({"a": a}, binary(a)), ["no", "yes"]),
        (kr.with_card(keras.Model(a, binary(a))), ["no", "yes"]),
        (keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)]), ["x", "y", "z"]),
    ):
        named = with_labels(model, names)
        assert kr.card(named).labels == names and named.name == model.name
        same(named, model)
        if not isinstance(model, keras.Sequential):
            keras.tree.assert_same_structure(named.input, model.input)
