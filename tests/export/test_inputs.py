"""The sizes that models without a fixed size are verified on."""

import keras
import pytest
from keras import layers, ops

import resnet_export as rx
from resnet_export.quantization import samples
from resnet_export.quantization.source import open_source
from resnet_export.verification.inputs import full_shape

MOST_PIXELS = 48 * 37


@keras.saving.register_keras_serializable("test_inputs")
class NonLocal(layers.Layer):
    """Every pixel is compared with every other, in code that is no layer of Keras'."""

    def call(self, x):
        flat = ops.reshape(x, (ops.shape(x)[0], -1, 3))
        return ops.mean(ops.matmul(ops.matmul(flat, ops.transpose(flat, (0, 2, 1))), flat) / 1e6, 1)


def non_local(x):
    flat = layers.Reshape((-1, 3))(x)
    return ops.mean(ops.einsum("bqk,bkc->bqc", ops.einsum("bqc,bkc->bqk", flat, flat), flat), 1)


def attention(layer, copies=2):
    def head(x):
        flat = layers.Reshape((-1, 3))(x)
        return layers.GlobalAveragePooling1D()(layer(*[flat] * copies) if copies else layer([flat, flat]))

    return head


COMPARING = {
    "GroupQueryAttention": attention(layers.GroupQueryAttention(4, 4, 2)),
    "MultiHeadAttention": attention(layers.MultiHeadAttention(2, 3)),
    "Attention": attention(layers.Attention(), 0),
    "AdditiveAttention": attention(layers.AdditiveAttention(), 0),
    "GRU": lambda x: layers.GRU(3)(layers.Reshape((-1, 3))(x)),
    "ops.einsum": non_local,
    "ops.dot_product_attention": lambda x: ops.mean(ops.dot_product_attention(*[layers.Reshape((-1, 1, 3))(x)] * 3), axis=(1, 2)),
    "layer of the user's": NonLocal(),
    "nested": lambda x: keras.Sequential([keras.Input((None, None, 3)), NonLocal()])(x),
}


SLOW = ("GRU",)  # a thousand steps, called by Keras one by one


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMPARING])
def test_models_that_compare_pixels_are_verified_on_small_images(name, tmp_path):
    """On 107×131 pixels, one tensor of these has 200 million numbers per row and head: the export took 20 GB."""
    x = keras.Input((None, None, 2))
    y = COMPARING[name](layers.Conv2D(3, 1)(x))
    model = keras.Model(x, layers.Dense(2)(y))
    path = tmp_path / "m.onnx"
    report = rx.to_onnx(model, path).report
    cases = samples.find_cases(open_source(path))
    shapes = [comparison.shape for comparison in report.comparisons] + [next(iter(case.feeds.values())).shape for case in cases]
    assert len({tuple(shape[1:3]) for shape in shapes}) == 2
    assert max(shape[1] * shape[2] for shape in shapes) <= MOST_PIXELS


@keras.saving.register_keras_serializable("test_inputs")
class Harmless(layers.Layer):
    """Code of the user's that does not compare pixels."""

    def call(self, x):
        return x * 2


@pytest.mark.parametrize("layer", [layers.ReLU(), Harmless(), layers.Lambda(lambda x: x + 1)])
def test_models_that_do_not_are_verified_on_larger_ones(layer, tmp_path):
    x = keras.Input((None, None, 3))
    model = keras.Model(x, layers.Dense(2)(layers.GlobalAveragePooling2D()(layer(layers.Conv2D(4, 3)(x)))))
    report = rx.to_onnx(model, tmp_path / "m.onnx").report
    assert {tuple(comparison.shape[1:3]) for comparison in report.comparisons} == {(96, 96), (107, 131)}


@pytest.mark.parametrize(
    ("shape", "full"),
    [
        ((None, None, None, 3), [2, 5, 7, 3]),
        (("N", 3, "H", "W"), [2, 3, 5, 7]),
        ((4, None, None, 3), [4, 5, 7, 3]),
        ((None, 6, None, 3), [2, 6, 5, 3]),
        ((None, None, None, None, 1), [2, 5, 7, 7, 1]),
        ((None, 8), [2, 8]),
    ],
)
def test_sizes_of_dynamic_axes(shape, full):
    assert full_shape(shape, 2, (5, 7)) == full
