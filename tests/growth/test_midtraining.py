"""Growing in the middle of a training, compared with a loop by hand that uses neither the trainer nor a Keras optimiser."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_resnet as kr
from keras_resnet import data as datasets
from keras_resnet.training import DriftLogger, drift_figure, fit

RATE, MOMENTUM, DECAY, BATCH, SEED = 0.05, 0.9, 0.02, 8, 5


def trunk():
    keras.utils.set_random_seed(1)
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Rescaling(1 / 128, -1)(x)
    for index in (1, 2):
        x = layers.Conv2D(6, 3, padding="same", name=f"conv{index}")(x)
        x = layers.BatchNormalization(momentum=0.8, name=f"norm{index}")(x)
        x = layers.ReLU(name=f"relu{index}")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


def arrays(count=32):
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8), np.arange(count) % 4


def named(model):
    return {f"{layer.name}/{v.name}": v for layer in model.layers for v in layer.variables if v.dtype == "float32"}


def by_hand(gate, grow_at, epochs):
    """SGD with momentum and L2 on kernels that are not gates, as in the papers."""
    x, y = arrays()
    steps = len(x) // BATCH
    batches = datasets.training_batches(datasets.Images(x, y), batch=BATCH, size=(8, 8), num_classes=4, seed=SEED)
    model, velocity, stream = trunk(), {}, iter(batches)
    for step in range(epochs * steps):
        if step == grow_at * steps:
            model = kr.grow(model, "relu*", blocks=1, gate=gate, seed=SEED + 1 + grow_at)
        images, labels = next(stream)
        variables = {name: v for name, v in named(model).items() if v.trainable}
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels, logits))
        for (name, variable), gradient in zip(variables.items(), tape.gradient(loss, list(variables.values())), strict=True):
            is_gate = gate == "zero_conv" and "grow" in name and "conv2" in name
            if name.endswith("kernel") and not is_gate:
                gradient += DECAY * variable
            velocity[name] = MOMENTUM * velocity.get(name, 0) - RATE * gradient
            variable.assign_add(velocity[name])
    return model


@pytest.mark.parametrize("gate", ["zero_conv", pytest.param("rezero", marks=pytest.mark.slow)])
def test_growing_in_the_middle_is_what_one_does_by_hand(gate):
    result = fit(
        trunk(), arrays(), epochs=3, batch_size=BATCH, base_batch=BATCH, learning_rate=RATE, momentum=MOMENTUM,
        schedule="constant", weight_decay=DECAY, seed=SEED, growth=[(1, "relu*", 1)], growth_gate=gate, quiet=True,
    )  # fmt: skip
    ours, theirs = named(result.model), named(by_hand(gate, 1, 3))
    assert set(ours) == set(theirs) and any("grow1" in name for name in ours)
    for name in ours:
        np.testing.assert_allclose(np.array(ours[name]), np.array(theirs[name]), rtol=1e-3, atol=1e-5, err_msg=name)
    start = named(kr.grow(trunk(), "relu*", blocks=1, gate=gate, seed=SEED + 2))
    moved = [name for name in ours if "grow1" in name and np.abs(np.array(ours[name]) - np.array(start[name])).max() > 1e-4]
    assert any("conv2" in name or "scale" in name for name in moved), "the new blocks have learned something"


def test_drift_of_a_model_that_grows_while_it_is_watched(tmp_path):
    x, y = arrays()
    log = DriftLogger(x[:8].astype("float32"), tmp_path / "drift.csv")
    common = {"batch_size": BATCH, "learning_rate": 0.3, "seed": SEED, "quiet": True, "callbacks": [log]}
    result = fit(trunk(), (x, y), epochs=3, growth=[(0, "relu2", 1), (2, "relu1", 1)], **common)
    assert [[block.block for block in report] for _, report in log.history[-2:]] == [
        ["relu2_grow1"], ["relu1_grow1", "relu2_grow1"]
    ]  # fmt: skip
    axis = drift_figure(tmp_path / "drift.csv").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["relu1_grow1", "relu2_grow1"], "from input to output"
    values = np.ma.masked_invalid(np.asarray(axis.images[0].get_array()))
    assert values.mask.tolist() == [[True, True, True, False], [False] * 4]
    np.testing.assert_allclose(
        values[:, -1], [block.mean for block in kr.drift(result.model, x[:8].astype("float32"))], rtol=1e-5
    )
