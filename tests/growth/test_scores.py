"""`growth_scores`: the scores are the gradients' inner products, find the better point, and `grow` takes them."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import keras_resnet as kr
from tests.growth.test_grow import nested, noise, small
from tests.helpers import assert_unchanged, randomise, weights_of


def labels(count, classes=5, seed=2):
    return np.random.default_rng(seed).integers(0, classes, count)


def test_scores_are_inner_products_of_two_halves():
    """With one draw, the gain is what a plain GradientTape on a frozen backbone gives."""
    import tensorflow as tf

    model = small(activation="tanh")
    x, y = noise(model, 8), labels(8)
    scores = kr.growth_scores(model, (x, y), after="act_*", draws=1, batch_size=2, seed=4)
    assert [p.after for p in scores] == ["act_a", "act_b"] and scores.batches == 4
    probed = kr.grow(model, "act_*", scale="match", data=x, seed=4)
    numbers = iter(np.random.SeedSequence([4, 0]).generate_state(8))
    for block in kr.find_blocks(probed):
        for layer in block.branch[:-1]:
            number = int(next(numbers))
            if hasattr(layer, "kernel"):
                layer.kernel.assign(keras.initializers.VarianceScaling(2.0, "fan_in", seed=number)(layer.kernel.shape))
    new = {id(layer) for block in kr.find_blocks(probed) for layer in block.branch}
    for layer in probed.layers:
        layer.trainable = id(layer) in new  # Frozen batch norms run in inference mode.
    halves = []
    for half in ((0, 2), (4, 6)), ((2, 4), (6, 8)):
        half = [slice(0, 2), slice(4, 6)] if half[0] == (0, 2) else [slice(2, 4), slice(6, 8)]
        total = None
        for part in half:
            gates = [probed.get_layer(f"{p.after}_grow1_conv2").trainable_variables for p in scores]
            with tf.GradientTape() as tape:
                outputs = probed(x[part], training=True)
                loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y[part], outputs))
            flat = [np.concatenate([np.asarray(g).ravel() for g in group]) for group in tape.gradient(loss, gates)]
            total = flat if total is None else [a + b for a, b in zip(total, flat, strict=True)]
        halves.append([t / 2 for t in total])
    for point, a, b in zip(scores, *halves, strict=True):
        assert point.gain == pytest.approx(float(a @ b), rel=2e-2, abs=1e-9)
        assert point.score == pytest.approx(point.gain / point.macs)
    # Two 3 × 3 convolutions of 8 channels on 16 × 16, and of 16 channels on 8 × 8.
    assert [p.macs for p in scores] == [2 * 9 * 64 * 256, 2 * 9 * 256 * 64]


def test_the_better_point_has_the_higher_score():
    """A branch that the head ignores cannot help: its gradient is zero, so the other point must win."""
    x = inputs = keras.Input((8, 8, 3))
    used = layers.Conv2D(4, 3, padding="same", activation="relu", name="used")(x)
    idle = layers.Conv2D(4, 3, padding="same", activation="relu", name="idle")(x)
    x = layers.Concatenate()([used, layers.Rescaling(1e-3)(idle)])
    x = layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, layers.Softmax()(x))
    images = np.random.default_rng(0).standard_normal((256, 8, 8, 3)).astype("float32")
    images[:128] *= 3
    target = np.repeat([0, 1], 128)
    order = np.random.default_rng(1).permutation(256)
    images, target = images[order], target[order]
    scores = kr.growth_scores(model, (images, target), draws=2, batch_size=64)
    gains = {p.after: p for p in scores}
    assert scores.best(1) == ["used"] and scores.best(3) == ["used", "idle", "used"]
    assert gains["used"].gain > 100 * abs(gains["idle"].gain) and gains["used"].spread > 0
    deep = kr.grow(model, scores.best(3), scale="match", data=images)
    assert sorted(b.path for b in kr.find_blocks(deep)) == ["idle_grow1", "used_grow1", "used_grow2"]
    np.testing.assert_array_equal(np.asarray(deep(images)), np.asarray(model(images)))


def test_scores_touch_nothing_and_print(tmp_path):
    model = randomise(kr.grow(nested(), "act_b", gate="rezero"))
    before = weights_of(model)
    x = noise(model, 8)
    data = [(x[:3], labels(3)), (x[3:], labels(5))]
    options = {"after": ["trunk/act_b", "act_b"], "loss": lambda y, outputs: keras.ops.square(outputs - 1.0)}
    scores = kr.growth_scores(model, data, **options)
    assert_unchanged(model, before)
    assert [p.after for p in scores] == ["trunk/act_b", "act_b"] and len(scores) == 2
    assert "trunk/act_b" in str(scores) and json.loads(json.dumps(scores.to_json()))["draws"] == 3
    pytest.importorskip("matplotlib")
    scores.figure().savefig(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 1000
    again = kr.growth_scores(model, data, **options)
    assert [p.gain for p in again] == [p.gain for p in scores], "the seed makes scores reproducible"


def test_losses_by_the_kind_of_output():
    model = small()
    x = noise(model, 8)
    one_hot = np.eye(5, dtype="float32")[labels(8)]
    by_index, by_vector = (kr.growth_scores(model, (x, y), after="act_b", draws=1).points[0].gain for y in (labels(8), one_hot))
    assert by_index == pytest.approx(by_vector, rel=1e-4)
    logits = keras.Model(model.inputs, layers.Dense(2, name="out")(model.get_layer("act_b").output[:, 0, 0]))
    with pytest.raises(ValueError, match='`loss` must be given.*loss="mse"'):
        kr.growth_scores(logits, (x, labels(8, 2)), after="act_a")
    scores = kr.growth_scores(logits, (x, np.ones((8, 2), "float32")), after="act_a", loss="mse", block="bottleneck")
    assert scores.block == "bottleneck" and scores.points[0].gain != 0


def test_data_that_cannot_be_scored():
    model = small()
    with pytest.raises(ValueError, match="must contain labels"):
        kr.growth_scores(model, noise(model, 4), after="act_a")
    with pytest.raises(ValueError, match="at least two batches"):
        kr.growth_scores(model, (noise(model, 1), labels(1)), after="act_a")
    with pytest.raises(ValueError, match="`n` must be a whole number"):
        kr.growth_scores(model, (noise(model, 4), labels(4)), after="act_a", draws=1).best(0)
