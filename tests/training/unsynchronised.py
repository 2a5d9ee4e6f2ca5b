"""Train on two logical devices without synchronised batch norm, and measure the saved model; run in a process of its own.

python unsynchronised.py FOLDER; prints one line of JSON: figures of the summary and of the file, for arrays and for tf.data.
"""

import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import keras
import numpy as np

from keras_resnet import training


def several_outputs(x, y, run, placement, folder):
    """The last batch has no examples for the second replica, which Keras would count as a loss of 0."""
    inputs = keras.Input((6,))
    normal = keras.layers.BatchNormalization(momentum=0.5)(inputs)
    outputs = {"kind": keras.layers.Dense(3, name="kind")(normal), "size": keras.layers.Dense(6, name="size")(inputs)}
    compiled = {
        "loss": {"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "size": "mae"},
        "loss_weights": {"kind": 0.5, "size": 2.0},
    }
    both, names = {"kind": y, "size": x}, ("loss", "kind_loss", "size_loss")
    result = training.fit(
        keras.Model(inputs, outputs), x, both, run=run, placement=placement, out=f"{folder}/several", ema=0.5,
        validation_data=(x, both), quiet=True, **compiled,
    )  # fmt: skip
    saved = keras.saving.load_model(f"{folder}/several/model.keras")
    saved.compile(**compiled)
    measured = saved.evaluate(x, both, batch_size=8, verbose=0, return_dict=True)
    return [
        [result.summary[f"val_{name}"] for name in names], [result.history[-1][f"val_{name}"] for name in names],
        [measured[name] for name in names],
    ]  # fmt: skip


def main(folder):
    run = training.Run.of(devices=("CPU:0", "CPU:1"), sync_batch_norm=False, epochs=2, batch_size=8, learning_rate=0.5)
    placement = training.place(run)
    import tensorflow as tf

    rng = np.random.default_rng(0)
    # Each half of a batch has statistics of its own, so that replicas' moving means differ.
    x = rng.normal(size=(43, 6)).astype("float32") * np.repeat([1.0, 9.0], 4)[np.arange(43) % 8, None]
    y = rng.integers(0, 3, 43)
    data = {"arrays": (x, y), "tf.data": (tf.data.Dataset.from_tensor_slices((x[:40], y[:40])).batch(8),)}
    found = {}
    for name, given in data.items():
        inputs = keras.Input((6,))
        model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.BatchNormalization(momentum=0.5)(inputs)))
        out = f"{folder}/{name}"
        result = training.fit(
            model, *given, run=run, placement=placement, out=out, validation_data=(x, y), quiet=True, shuffle=False,
            class_weight={0: 2.0},
        )  # fmt: skip
        saved = keras.saving.load_model(f"{folder}/{name}/model.keras")
        saved.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        loss, accuracy = saved.evaluate(x, y, verbose=0)
        found[name] = [
            [result.summary["val_loss"], result.summary["val_accuracy"]],
            [result.history[-1]["val_loss"], result.history[-1]["val_accuracy"]],
            [loss, accuracy],
        ]
    found["several outputs"] = several_outputs(x, y, run, placement, folder)
    try:
        own = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        training.fit(model, x, y, run=run, optimizer=own, placement=placement, quiet=True)
    except training.TrainingError as error:
        assert "accumulate gradients on one device only" in str(error)
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
