"""Float16 and int8: what they change, what they keep, and when they refuse."""

import dataclasses
import os

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from PIL import Image

import keras_resnet as kr
import resnet_export as rx
from resnet_export import artifact
from resnet_export.cli import main
from resnet_export.quantization import precision

from .conftest import noise, op_counts, run_onnx


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def trained(trained_model, tmp_path_factory):
    """`(float32 file, images to calibrate on, images to test on)`."""
    model, *images = trained_model
    path = tmp_path_factory.mktemp("trained") / "m.onnx"
    rx.to_onnx(model, path)
    return path, *images


def test_float16(trained, tmp_path):
    source, _, tests = trained
    result = precision.to_float16(source, tmp_path / "half.onnx", samples=tests)
    assert result.report.passed and result.report.precision == "float16" and result.size < 0.7 * source.stat().st_size
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.load(tmp_path / "half.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    a, b = run_onnx(source, tests)[0], run_onnx(tmp_path / "half.onnx", tests)[0]
    assert 0 < np.abs(a - b).max() < 1e-2 * np.abs(a).max()
    assert artifact.read_metadata(tmp_path / "half.onnx")["tolerances"]["precision"] == "float16"
    assert precision.to_float16(source, tmp_path / "again.onnx", samples=tests).sha256 == result.sha256


def test_float16_keeps_what_would_overflow(tmp_path):
    x = keras.Input((16, 16, 3))
    y = layers.Conv2D(4, 3, name="huge")(x)
    y = layers.Rescaling(1e-6)(layers.ReLU()(y))
    model = keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(y)))
    kernel = model.get_layer("huge").kernel
    kernel.assign(np.asarray(kernel) * 1e4)
    rx.to_onnx(model, tmp_path / "m.onnx")
    result = precision.to_float16(tmp_path / "m.onnx", tmp_path / "half.onnx")
    assert "stay float32" in result.notes[0]
    feeds = noise(2, 16, 16, 3) * 100
    a, b = run_onnx(tmp_path / "m.onnx", feeds)[0], run_onnx(tmp_path / "half.onnx", feeds)[0]
    assert np.isfinite(b).all() and np.abs(a - b).max() < 1e-2 * np.abs(a).max()


def test_int8(trained, tmp_path):
    source, calibration, tests = trained
    mine = source.with_name("m-inferred.onnx")
    mine.write_text("mine")
    result = precision.to_int8(source, tmp_path / "q.onnx", calibration=calibration, samples=tests)
    assert mine.read_text() == "mine", "onnxruntime's quantiser would put a file of that name beside its source"
    counts = op_counts(tmp_path / "q.onnx")
    assert counts["QuantizeLinear"] > 5 and counts["Conv"] == 4
    a, b = run_onnx(source, tests)[0], run_onnx(tmp_path / "q.onnx", tests)[0]
    agreement = (a.argmax(1) == b.argmax(1)).mean()
    assert agreement >= 0.99 and result.report.comparisons[0].top1 == pytest.approx(agreement)
    assert not np.array_equal(a, b)
    weights = {tensor.name: tensor for tensor in onnx.load(tmp_path / "q.onnx").graph.initializer}
    kernel = next(tensor for name, tensor in weights.items() if name.endswith("kernel_quantized"))
    assert kernel.data_type == onnx.TensorProto.INT8
    scale = next(tensor for name, tensor in weights.items() if name.endswith("kernel_scale"))
    assert list(scale.dims) == [8], "one scale per channel"


def test_gpu_target_is_symmetric(trained, tmp_path):
    source, calibration, _ = trained
    precision.to_int8(source, tmp_path / "q.onnx", calibration=calibration, target="gpu")
    points = [t for t in onnx.load(tmp_path / "q.onnx").graph.initializer if t.name.endswith("zero_point")]
    assert points and all(t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.INT32) for t in points)
    assert all(not onnx.numpy_helper.to_array(t).any() for t in points)


def test_layers_go_back_to_float32_until_the_budget_holds(trained, tmp_path, monkeypatch):
    source, calibration, tests = trained
    real, seen = precision._compare_scores, []

    def twice_too_bad(path, *rest):
        seen.append(op_counts(path)["DequantizeLinear"])
        report = real(path, *rest)
        return report if len(seen) == 3 else dataclasses.replace(report, passed=False)

    monkeypatch.setattr(precision, "_compare_scores", twice_too_bad)
    result = precision.to_int8(source, tmp_path / "q.onnx", calibration=calibration, samples=tests)
    assert len(seen) == 3 and seen[0] > seen[1] > seen[2]
    (note,) = [note for note in result.notes if note.startswith("left in float32: ")]
    assert len(note.split(", ")) == 6 and note.split(", ")[1] == "logits", "two, then four; the head among the first"


def test_a_budget_that_does_not_hold_is_an_error(trained, tmp_path, monkeypatch):
    """Calibrated on a single grey image, the activations of real ones are clipped."""
    monkeypatch.setattr(precision, "ROUNDS", 1)
    source, _, tests = trained
    grey = np.full((1, 24, 24, 3), 120, "float32")
    with pytest.raises(rx.MismatchError, match="top-1 agreement with float32 is"):
        precision.to_int8(source, tmp_path / "q.onnx", calibration=grey, samples=tests)
    assert os.listdir(tmp_path) == []


def test_layer_errors_find_the_layer(trained, tmp_path):
    source, calibration, tests = trained
    proto = onnx.load(source)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("conv_16/kernel"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.3), tensor.name))
    node = next(node for node in proto.graph.node if tensor.name in node.input)
    onnx.save(proto, tmp_path / "wrong.onnx")
    errors = precision.layer_errors(source, tmp_path / "wrong.onnx", {"images": tests[:4]})
    assert precision.worst_layers(errors)[0] == node.name and errors[node.name][1] > 0.1


def test_vnni_is_read_from_the_cpu(tmp_path):
    (tmp_path / "with").write_text("flags : avx512f avx512_vnni")
    (tmp_path / "without").write_text("flags : avx2")
    assert precision.has_vnni(tmp_path / "with") and not precision.has_vnni(tmp_path / "without")
    assert not precision.has_vnni(tmp_path / "nothing")


def test_commands(trained, tmp_path, capsys):
    source, calibration, tests = trained
    np.savez(tmp_path / "c.npz", calibration)
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(tests[:6]):
        Image.fromarray(image.astype("uint8")).save(tmp_path / "photos" / f"{index}.png")
    code = main(
        [
            "quantize",
            str(source),
            str(tmp_path / "q.onnx"),
            "--int8",
            "--calibration",
            str(tmp_path / "c.npz"),
            "--samples",
            str(tmp_path / "photos"),
        ]
    )
    out = capsys.readouterr().out
    assert code == 0 and [line.split()[0] for line in out.splitlines()[-3:]] == ["precision", "float32", "int8"]
    assert main(["quantize", str(source), str(tmp_path / "h.onnx"), "--fp16"]) == 0
    assert main(["quantize", str(source), str(tmp_path / "h.onnx"), "--fp16"]) == 2


def changed(path, target, change):
    """A copy of a file with one weight changed: `change` returns `(name, array)` for `{name: array}`."""
    proto = onnx.load(path)
    name, content = change({tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer})
    next(t for t in proto.graph.initializer if t.name == name).CopyFrom(onnx.numpy_helper.from_array(content, name))
    onnx.save(proto, target)


def test_export_straight_to_float16(mixed, tmp_path):
    result = rx.to_onnx(mixed, tmp_path / "h.onnx", precision="float16")
    assert result.report.precision == "float16" and os.listdir(tmp_path) == ["h.onnx"]
    assert [row["precision"] for row in result.table] == ["float32", "float16"]
    assert result.table[1]["size"] == result.size < 0.7 * result.table[0]["size"] and result.table[0]["milliseconds"] > 0
    report = rx.verify(tmp_path / "h.onnx", mixed)
    assert report.passed and report.weights["compared"] >= 14

    def one_number(weights):
        wrong = weights["grouped_conv/kernel"].copy()
        wrong.flat[5] += 0.01 * np.abs(wrong).max()
        return "grouped_conv/kernel", wrong

    changed(tmp_path / "h.onnx", tmp_path / "wrong.onnx", one_number)
    report = rx.verify(tmp_path / "wrong.onnx", mixed)
    assert [problem for problem in report.problems if "grouped_conv/kernel" in problem], "too little to show in the output"


def test_export_straight_to_int8(trained_model, tmp_path):
    model, calibration, tests = trained_model
    result = rx.to_onnx(model, tmp_path / "q.onnx", precision="int8", calibration=calibration, samples=tests)
    assert result.method == "int8" and os.listdir(tmp_path) == ["q.onnx"]
    assert result.table[1]["top1"] == result.report.comparisons[0].top1 >= 0.99
    layers = result.report.layers
    assert len(layers) == 7 and all(row["added"] <= row["error"] < 0.2 for row in layers.values()), "4 Conv, 2 Add, 1 Gemm"
    with pytest.raises(rx.UsageError, match=r"is int8: give images \(--samples\)"):
        rx.verify(tmp_path / "q.onnx", model)
    report = rx.verify(tmp_path / "q.onnx", model, samples=tests)
    assert report.passed and report.comparisons[0].batch == 200 and "agrees with float32 on" in report.summary()

    def other_order(weights):
        (name,) = [name for name, content in weights.items() if content.shape == (16, 4) and content.dtype == np.int8]
        return name, weights[name][:, ::-1].copy()

    changed(tmp_path / "q.onnx", tmp_path / "wrong.onnx", other_order)
    report = rx.verify(tmp_path / "wrong.onnx", model, samples=tests)
    assert not report.passed and "top-1 agreement with the model is" in report.problems[0]


def test_what_export_to_lower_precision_refuses(mixed, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("resnet_export.exporters.convert", None)  # refused before the work
    for options, message in (
        ({"precision": "int8"}, "needs `calibration`"),
        ({"precision": "int8", "calibration": str(tmp_path / "empty")}, "holds no images"),
        ({"precision": "int8", "calibration": str(tmp_path / "no.npz")}, "does not exist"),
        ({"precision": "int8", "calibration": noise(4), "max_drop": 101}, "from 0 to 100 percent, got 101"),
        ({"precision": "int8", "calibration": noise(4), "target": "tpu"}, "one of cpu, gpu, got 'tpu'"),
        ({"precision": "int4"}, "`precision` must be one of"),
        ({"precision": "float16", "external_data": True}, "goes with float32"),
    ):
        with pytest.raises(rx.UsageError, match=message):
            rx.to_onnx(mixed, tmp_path / "z.onnx", **options)
    assert os.listdir(tmp_path) == ["empty"]


def test_a_file_in_lower_precision_is_refused(trained, tmp_path):
    source, calibration, _ = trained
    result = precision.to_int8(source, tmp_path / "q.onnx", calibration=calibration)
    assert precision.to_int8(source, tmp_path / "again.onnx", calibration=calibration).sha256 == result.sha256
    precision.to_float16(source, tmp_path / "h.onnx")
    for name, message in (("q.onnx", "is quantised already"), ("h.onnx", "is in float16 already")):
        with pytest.raises(rx.UsageError, match=message):
            precision.to_float16(tmp_path / name, tmp_path / "z.onnx")
        with pytest.raises(rx.UsageError, match=message):
            precision.to_int8(tmp_path / name, tmp_path / "z.onnx", calibration=calibration)


@pytest.mark.slow
def test_int8_keeps_what_a_trained_network_says_of_real_images(shared_data, cifar_test, tmp_path):
    model = kr.create_model("resnet20", weights=shared_data / "weights" / "resnet20-12fca82f.th")
    images, _ = cifar_test
    calibration, tests = images[:256], images[256:1256]
    result = rx.to_onnx(model, tmp_path / "q.onnx", precision="int8", calibration=calibration, samples=tests)
    assert result.report.comparisons[0].top1 >= 0.99 and result.report.comparisons[0].batch == 1000
    assert rx.verify(tmp_path / "q.onnx", model, samples=tests).passed


BAD = {
    "neither": ([], "one of --fp16 and --int8"),
    "no calibration": (["--int8"], "--calibration"),
    "empty folder": (["--int8", "--calibration", "{tmp}/empty"], "holds no images"),
    "other size": (["--int8", "--calibration", "{tmp}/small.npz"], "must have the shape"),
    "no array": (["--int8", "--calibration", "{tmp}/text.npz"], "neither a folder"),
    "no numbers": (["--int8", "--calibration", "{tmp}/nan.npy"], "not finite"),
    "words": (["--int8", "--calibration", "{tmp}/words.npy"], "must have the shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(trained, tmp_path, capsys, case):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "small.npz", noise(4, 12, 12, 3))
    (tmp_path / "text.npz").write_text("nothing")
    np.save(tmp_path / "nan.npy", np.full((4, 24, 24, 3), np.nan, "float32"))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    before = sorted(os.listdir(tmp_path))
    arguments, message = BAD[case]
    code = main(
        ["quantize", str(trained[0]), str(tmp_path / "q.onnx"), *(argument.format(tmp=tmp_path) for argument in arguments)]
    )
    err = capsys.readouterr().err
    assert code == 2 and message in err and "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == before
