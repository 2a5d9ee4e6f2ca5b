"""Resizing in the graph: the numbers of Pillow, in every runtime, from uint8 images of any size."""

import keras
import numpy as np
import onnx
import onnx.reference
import pytest
import tensorflow as tf

import keras_resnet as kr
import resnet_export as rx
from resnet_export import artifact, source
from resnet_export.cli import main
from resnet_export.conversion import resizing
from resnet_export.runtime import images

from .conftest import build_mixed, op_counts, relative, run_onnx

SIZES = [(32, 40), (97, 131), (20, 200), (17, 33), (300, 61), (401, 399)]


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype("uint8")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("resize", [None, 48])
def test_numbers_are_pillows(interpolation, resize):
    preprocessing = {"size": [32, 40], "resize": resize, "interpolation": interpolation}
    for height, width in SIZES:
        pixels = picture(height, width) // 2 + 64
        if interpolation == "nearest" and resize and (height, width) == (32, 40):
            continue  # every other pixel's centre lies on a border, where rounding decides
        got = resizing.fitted(tf.constant(pixels.transpose(2, 0, 1)[None], "float32"), preprocessing).numpy()[0]
        want = images.fit(pixels, preprocessing).astype("float32")
        error = np.abs(got.transpose(1, 2, 0) - want).max()
        assert got.shape == (3, 32, 40) and error <= resizing.LEVELS, (height, width)
        assert interpolation != "nearest" or error == 0
    same = picture(32, 40)
    if resize is None:
        kept = resizing.fitted(tf.constant(same.transpose(2, 0, 1)[None], "float32"), preprocessing).numpy()[0]
        np.testing.assert_allclose(kept.transpose(1, 2, 0), same, atol=0 if interpolation != "lanczos" else 1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_number_of_channels(channels, batch):
    """oneDNN's batched product crashes on some products with one broadcast operand."""
    preprocessing = {"size": [32, 40], "resize": 48, "interpolation": "bicubic"}
    pixels = np.random.default_rng(0).integers(64, 192, (batch, 61, 97, channels)).astype("uint8")
    call = tf.function(lambda x: resizing.fitted(x, preprocessing))
    for traced in (call, call.get_concrete_function(tf.TensorSpec([None, channels, None, None], "float32"))):
        got = traced(tf.constant(pixels.transpose(0, 3, 1, 2), "float32")).numpy()
        for image in range(batch):
            for channel in range(channels):
                three = np.repeat(pixels[image, :, :, channel, None], 3, axis=2)
                want = images.fit(three, preprocessing)[:, :, 0].astype("float32")
                assert np.abs(got[image, channel] - want).max() <= resizing.LEVELS


def test_long_and_narrow_images_are_not_made_whole():
    """Resized as a whole it would have 48 × 2.9 million pixels; what is kept has 32 × 40."""
    traced = tf.function(lambda pixels: resizing.fitted(pixels, {"size": [32, 40], "resize": 48}))
    concrete = traced.get_concrete_function(tf.TensorSpec([None, 3, None, None], "float32"))
    assert concrete.output_shapes.as_list() == [None, 3, 32, 40]
    pixels = np.broadcast_to(np.arange(60_000, dtype="float32") % 256, (1, 3, 1, 60_000))
    middle = concrete(tf.constant(pixels)).numpy()[0, 0]
    # 48 new pixels for each old one: the 40 in the middle lie between the two old ones there.
    places = (np.arange(1_439_980, 1_440_020) + 0.5) / 48 - 0.5
    np.testing.assert_allclose(middle, np.broadcast_to(29_999 % 256 + places - 29_999, (32, 40)), atol=0.01)


@pytest.fixture(scope="module")
def model():
    """A model whose card wants a crop out of a larger size, with pixel statistics in the graph."""
    found = source.with_preprocessing(build_mixed(activation=None), "cifar10")
    kr.modelcard.set_card(found, preprocessing={**kr.card(found).preprocessing, "resize": 40, "interpolation": "bicubic"})
    return found


@pytest.mark.parametrize(("layout", "opset"), [("nhwc", 17), ("nchw", 13), ("nhwc", 23)])
def test_images_of_any_size_go_in(model, tmp_path, layout, opset):
    path = tmp_path / "m.onnx"
    result = rx.to_onnx(model, path, input_dtype="uint8", resize=True, layout=layout, opset=opset)
    assert result.method == "weightless" and any("levels of Pillow's" in note for note in result.report.notes)
    shapes = [comparison.shape for comparison in result.report.comparisons]
    sizes = {(shape[2], shape[3]) if layout == "nchw" else (shape[1], shape[2]) for shape in shapes}
    assert any(max(size) < 32 for size in sizes) and any(min(size) > 40 for size in sizes), "made smaller, and larger"
    assert op_counts(path).get("Transpose", 0) <= 1
    value = onnx.load(path).graph.input[0].type.tensor_type
    names = [dim.dim_param or dim.dim_value for dim in value.shape.dim]
    assert names == (["batch", 3, "height", "width"] if layout == "nchw" else ["batch", "height", "width", 3])
    assert value.elem_type == onnx.TensorProto.UINT8
    for height, width in SIZES:
        pixels = picture(height, width, seed=height)
        expected = model(images.fit(pixels, kr.card(model).preprocessing)[None].astype("float32"))
        feed = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]) if layout == "nchw" else pixels[None]
        for optimise in (True, False):
            assert relative(run_onnx(path, feed, optimise=optimise)[0], expected) < 2e-2, "a level is 1/255 of the range"
        third = onnx.reference.ReferenceEvaluator(str(path)).run(None, {"images": feed})[0]
        assert relative(third, run_onnx(path, feed)[0]) < 1e-4
    assert rx.verify(path, model).passed


def test_a_model_without_a_card_is_stretched_to_its_input(tmp_path):
    model = build_mixed()
    rx.to_onnx(model, tmp_path / "m.onnx", input_dtype="uint8", resize=True, outputs=["logits", "probabilities"])
    pixels = picture(50, 90)
    expected = model(images.fit(pixels, {"size": [32, 32]})[None].astype("float32"))
    assert relative(run_onnx(tmp_path / "m.onnx", pixels[None])[1], expected) < 2e-2
    exact = picture(32, 32)
    assert relative(run_onnx(tmp_path / "m.onnx", exact[None])[1], model(exact[None].astype("float32"))) < 1e-5
    assert artifact.read_metadata(tmp_path / "m.onnx")["options"]["resize"] is True


def test_predict_gives_the_same_answer(model, tmp_path):
    from PIL import Image

    rx.to_onnx(model, tmp_path / "plain.onnx", output_kind="logits")
    rx.to_onnx(model, tmp_path / "any.onnx", input_dtype="uint8", resize=True, output_kind="logits")
    Image.fromarray(picture(70, 55)).save(tmp_path / "a.png")
    plain, any_size = (rx.predict(tmp_path / name, [tmp_path / "a.png"])[0] for name in ("plain.onnx", "any.onnx"))
    assert plain.classes == any_size.classes
    # Pillow rounds to whole levels, the graph does not; which of the two was at work is told by the graph itself.
    np.testing.assert_allclose(plain.probabilities, any_size.probabilities, atol=2e-2)
    shares = np.exp(run_onnx(tmp_path / "any.onnx", picture(70, 55)[None])[0][0].astype("float64"))
    np.testing.assert_allclose(any_size.probabilities, np.sort(shares / shares.sum())[:-6:-1], rtol=1e-5)


def test_int8_leaves_the_resizing_alone(model, tmp_path):
    rx.to_onnx(model, tmp_path / "m.onnx", input_dtype="uint8", resize=True, output_kind="logits")
    calibration = np.stack([picture(45, 60, seed=index) for index in range(24)])
    rx.to_int8(tmp_path / "m.onnx", tmp_path / "q.onnx", calibration=calibration, max_drop=100.0)
    graph = onnx.load(tmp_path / "q.onnx").graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert len(products) == 2 and not any(made.get(name) == "DequantizeLinear" for node in products for name in node.input)


REFUSED = {
    "float32": (["--resize"], "`resize` needs uint8 images"),
    "dynamic size": (["--resize", "--input", "uint8", "--dynamic-size"], "cannot be combined"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, capsys, case):
    options, message = REFUSED[case]
    assert main(["onnx", "resnet20", str(tmp_path / "m.onnx"), *options]) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_resizing_that_is_not_pillows_is_caught(model, tmp_path, monkeypatch):
    monkeypatch.setitem(resizing.FILTERS, "bicubic", resizing.FILTERS["lanczos"])
    with pytest.raises(rx.MismatchError, match="levels of Pillow's, at most"):
        rx.to_onnx(model, tmp_path / "m.onnx", input_dtype="uint8", resize=True)


def test_open_models_need_a_size(tmp_path):
    x = keras.Input((None, None, 3))
    model = keras.Model(x, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(x))))
    with pytest.raises(rx.UsageError, match="`resize` needs a size"):
        rx.to_onnx(model, tmp_path / "m.onnx", input_dtype="uint8", resize=True)
