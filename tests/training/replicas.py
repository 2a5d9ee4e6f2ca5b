"""Train a small network in one of several placements and write losses and weights; run in a process of its own.

python replicas.py OUT '[{"epochs": 2, "precision": "float64", …}, …]' ['{"cluster": …}']; writes OUT-PRECISION.npz
"""

import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
if len(sys.argv) > 3:
    os.environ["TF_CONFIG"] = sys.argv[3]

import keras
import numpy as np

import keras_resnet as kr
from keras_resnet import training


class Losses(keras.callbacks.Callback):
    """The loss over all replicas after every step, and the weights after the third."""

    def __init__(self):
        super().__init__()
        self.values, self.early = [], {}

    def on_train_batch_end(self, batch, logs=None):
        # Read outside of the replicas, so that their sums are added; every process has to.
        self.values.append(float(self.model.get_metrics_result()["loss"]))
        if len(self.values) == 3:
            self.early = {f"e{i}": keras.ops.convert_to_numpy(v) for i, v in enumerate(self.model.weights)}


def network():
    """A residual network in the global dtype throughout; the zoo's has a float32 head."""
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Rescaling(1 / 100, offset=-0.7)(inputs)
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))
    x = kr.residual_stack(x, blocks=2, gate="zero_gamma", seed=3)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


def main(out, options):
    runs = [training.Run.of(**changes) for changes in options]
    placement = training.place(runs[0])
    for run in runs:
        keras.utils.set_random_seed(5)
        keras.config.set_dtype_policy(run.precision)
        losses = Losses()
        result = training.fit(network(), "digits", run=run, placement=placement, callbacks=[losses], quiet=True)
        if placement.chief:
            arrays = {f"w{i}": keras.ops.convert_to_numpy(v) for i, v in enumerate(result.model.weights)}
            figures = {key: result.summary[key] for key in ("test_accuracy", "test_loss")}
            scales = [block.add.scale for block in kr.find_blocks(result.model) if block.add.grown]
            np.savez(f"{out}-{run.precision}.npz", losses=losses.values, scales=scales, **figures, **arrays, **losses.early)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
