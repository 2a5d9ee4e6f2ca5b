"""An export leaves the model bit for bit as it was: weights, states of recurrent layers, seeds, statistics, activations."""

import keras
import numpy as np
import pytest

import resnet_export as rx

layers = keras.layers


def inputs(*shape, **options):
    return keras.Input(shape, **options)


def stateful(cell):
    x = keras.Input(batch_shape=(2, 5, 3))
    return keras.Model(x, layers.Dense(2)(cell(4, stateful=True)(x)))


def with_seeds():
    x = inputs(12, 12, 3)
    y = layers.Dropout(0.5)(layers.GaussianNoise(0.1)(layers.RandomFlip(seed=3)(x)))
    return keras.Model(x, layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(y)))


def with_statistics():
    x = inputs(12, 12, 3)
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3)(x)))
    return keras.Model(x, layers.Dense(3, "softmax")(layers.GlobalAveragePooling2D()(y)))


def mixed_precision():
    x = inputs(12, 12, 3)
    y = layers.BatchNormalization(dtype="mixed_float16")(layers.Conv2D(4, 3, dtype="mixed_float16")(x))
    return keras.Model(x, layers.Dense(3, "softmax", dtype="float32")(layers.GlobalAveragePooling2D()(y)))


def gate_and_head():
    activation, x = layers.Activation("sigmoid"), inputs(12, 12, 3)
    y = layers.Conv2D(4, 3)(x)
    return keras.Model(x, activation(layers.Dense(3)(layers.GlobalAveragePooling2D()(y * activation(y)))))


def with_spectral_norm():
    x = inputs(12, 12, 3)
    return keras.Model(x, layers.GlobalAveragePooling2D()(layers.SpectralNormalization(layers.Conv2D(4, 3))(x)))


MODELS = {
    "stateful LSTM": lambda: stateful(layers.LSTM),
    "stateful GRU": lambda: stateful(layers.GRU),
    "seeds": with_seeds,
    "batch norm": with_statistics,
    "mixed precision": mixed_precision,
    "gate and head": gate_and_head,
    "spectral norm": with_spectral_norm,
}


def moments(model):
    """Everything that an export could move: variables, seeds and states, their dtypes, and each layer's functions."""
    values = [(variable.path, str(variable.dtype), np.array(variable.value).tobytes()) for variable in model.variables]
    functions = [(layer.name, id(getattr(layer, "activation", None)), layer.call.__func__) for layer in model._flatten_layers()]
    return values, functions, model.get_config()


FAST = ("stateful LSTM", "batch norm")  # random models check the same in the fast suite


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_nothing_moves(name, tmp_path):
    keras.utils.set_random_seed(5)
    model = MODELS[name]()
    shape = [size or 2 for size in model.inputs[0].shape]
    model(np.random.default_rng(0).normal(size=shape).astype("float32"), training=name == "batch norm")  # states and statistics
    before = moments(model)
    result = rx.to_onnx(model, tmp_path / "m.onnx")
    assert moments(model) == before, "to_onnx"
    if name != "spectral norm":
        rx.to_savedmodel(model, tmp_path / "saved")
        assert moments(model) == before, "to_savedmodel"
    assert rx.verify(tmp_path / "m.onnx", model).passed
    assert moments(model) == before, "verify"
    assert rx.to_onnx(model, tmp_path / "again.onnx").sha256 == result.sha256
