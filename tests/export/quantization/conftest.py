"""A small trained network: quantisation is judged by decisions, which random weights do not make."""

import keras
import numpy as np
import pytest
from keras import layers

import resnet_export as rx


@pytest.fixture(scope="session")
def trained_model():
    """A small net trained on stripes of four directions, and images to calibrate and to test on."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)

    def stripes(count):
        labels = rng.integers(0, 4, count)
        along = np.arange(24)
        waves = [along[:, None] + 0 * along, along + 0 * along[:, None], along[:, None] + along, along[:, None] - along]
        pictures = np.stack([np.sin(waves[label] * 0.9 + rng.uniform(0, 6)) for label in labels])[..., None]
        return (128 + 90 * pictures + rng.normal(0, 20, (count, 24, 24, 3))).clip(0, 255).astype("float32"), labels

    x = keras.Input((24, 24, 3))
    y = layers.Rescaling(1 / 127.5, -1)(x)
    for width in (8, 16):
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", name=f"conv_{width}")(y)))
        y = layers.Add()([y, layers.Conv2D(width, 3, padding="same", activation="relu")(y)])
        y = layers.MaxPooling2D()(y)
    model = keras.Model(x, layers.Dense(4)(layers.GlobalAveragePooling2D()(y)))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*stripes(400), epochs=6, batch_size=32, verbose=0)
    return model, stripes(64)[0], stripes(200)[0]


@pytest.fixture(scope="session")
def trained(trained_model, tmp_path_factory):
    """`(float32 file, images to calibrate on, images to test on)`."""
    model, *images = trained_model
    path = tmp_path_factory.mktemp("trained") / "m.onnx"
    rx.to_onnx(model, path, output_kind="logits")
    return path, *images
