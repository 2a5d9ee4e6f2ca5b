"""Float16 and int8: what they change, what they keep, and when they refuse."""

import dataclasses
import functools
import json
import os
import re

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
from resnet_export.quantization import int8
from resnet_export.quantization.accuracy import layer_errors, worst_layers
from resnet_export.quantization.source import open_source
from resnet_export.verification.agreement import Budget, quantised_outputs
from tests.export.conftest import noise, op_counts, run_onnx
from tests.helpers import randomise

from .graphs import normal, write_graph


def test_int8(trained, tmp_path):
    source, calibration, tests = trained
    mine = source.with_name("m-inferred.onnx")
    mine.write_text("mine")
    result = rx.to_int8(source, tmp_path / "q.onnx", calibration=calibration, samples=tests)
    assert mine.read_text() == "mine", "onnxruntime's quantiser would put a file of that name next to its source"
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
    rx.to_int8(source, tmp_path / "q.onnx", calibration=calibration, target="gpu")
    points = [t for t in onnx.load(tmp_path / "q.onnx").graph.initializer if t.name.endswith("zero_point")]
    assert points and all(t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.INT32) for t in points)
    assert all(not onnx.numpy_helper.to_array(t).any() for t in points)


def test_layers_go_back_to_float32_until_the_budget_holds(trained, tmp_path, monkeypatch):
    source, calibration, tests = trained
    real, seen = int8._attempt, []

    def twice_too_bad(source, path, *rest):
        report = real(source, path, *rest)
        seen.append(op_counts(path)["DequantizeLinear"])
        return report if len(seen) == 2 else dataclasses.replace(report, passed=False)

    monkeypatch.setattr(int8, "_attempt", twice_too_bad)
    result = rx.to_int8(source, tmp_path / "q.onnx", calibration=calibration, samples=tests)
    assert len(seen) == 2 and seen[0] > seen[1]
    (note,) = [note for note in result.notes if note.startswith("left in float32: ")]
    assert len(note.split(", ")) == 2 and note.split(", ")[1] in ("logits", "output"), "first the first and the last"


# Two numbers that decide, next to two that are a million times larger: no single scale holds both.
DECIDES = """g (float[N,4] x) => (float[N,3] y) {
    a = MatMul(x, spread)  b = Relu(a)  c = MatMul(b, narrow)  y = Add(c, bias) }"""
SPREAD = {
    "spread": np.diag([1e6, 1e6, 1, 1]).astype("float32"),
    "narrow": np.array([[0, 0, 0], [0, 0, 0], [9, 0, -9], [0, 9, -9]], "float32"),
    "bias": np.zeros(3, "float32"),
}


def test_a_budget_that_does_not_hold_says_what_is_reachable(tmp_path):
    """With every layer back in float32 the budget would hold, but that is no int8 file."""
    source = write_graph(tmp_path / "m.onnx", DECIDES, SPREAD, kinds={"y": "logits"})
    images = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    with pytest.raises(rx.MismatchError) as caught:
        rx.to_int8(source, tmp_path / "q.onnx", calibration=images)
    message = str(caught.value)
    share, option = re.search(
        r"top-1 agreement of `y` with float32 is ([\d.]+)% on 64 images at best; `--max-drop ([\d.]+)`", message
    ).groups()
    assert (
        0 < float(share) < 99
        and 100 - float(share) <= float(option) <= 1.1 * (100 - float(share))
        and str(tmp_path / "q.onnx") in message
    )
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert rx.to_int8(source, tmp_path / "q.onnx", calibration=images, max_drop=float(option)).report.passed
    assert op_counts(tmp_path / "q.onnx")["QuantizeLinear"]


def test_one_layer_stays_in_int8_to_the_last():
    errors = {name: int8.LayerError(added, added) for name, added in zip("abcde", (1, 3, 2, 5, 4), strict=True)}
    assert int8._next_in_float32(errors, [], list("abcde"), 2) == ["a", "e"]
    assert int8._next_in_float32(errors, ["a", "e"], list("bcd"), 4) == ["d", "b"], "all but the one with the smallest error"
    assert int8._next_in_float32(errors, ["a", "e"], list("bc"), 2) == ["d", "b"]


def test_a_budget_that_does_not_hold_has_exit_code_3(tmp_path, capsys):
    source = write_graph(tmp_path / "m.onnx", DECIDES, SPREAD, kinds={"y": "logits"})
    np.save(tmp_path / "c.npy", np.random.default_rng(0).normal(size=(64, 4)).astype("float32"))
    assert main(["quantize", str(source), str(tmp_path / "q.onnx"), "--int8", "--calibration", str(tmp_path / "c.npy")]) == 3
    assert "would pass" in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ["c.npy", "m.onnx"]


def classifier(path, last, **options):
    return write_graph(
        path,
        f"""g (float[N,3,H,W] images) => (float[N,4] y) {{ a = Conv<pads=[1,1,1,1]>(images, w)  r = Relu(a)
        g = GlobalAveragePool(r)  f = Flatten(g)  d = MatMul(f, v)  y = {last}(d) }}""",
        {"w": normal(8, 3, 3, 3), "v": normal(8, 4)},
        **options,
    )


KINDS = {
    "logits": ("Identity", lambda a, b: (a.argmax(1) == b.argmax(1)).mean()),
    "probabilities": ("Softmax", lambda a, b: (a.argmax(1) == b.argmax(1)).mean()),
    "multilabel": ("Sigmoid", lambda a, b: ((a >= 0.5) == (b >= 0.5)).mean()),
    "binary": ("Sigmoid", lambda a, b: ((a >= 0.5) == (b >= 0.5)).mean()),
    "other": ("Identity", lambda a, b: None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("declared", [False, True])
def test_each_kind_of_output_is_judged_by_its_decisions(tmp_path, kind, declared):
    last, share = KINDS[kind]
    source = classifier(tmp_path / "m.onnx", last, kinds=None if declared else {"y": kind})
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 8, 8)).astype("float32")
    options = {"scores": "y", "output_kind": kind} if declared else {}
    result = rx.to_int8(source, tmp_path / "q.onnx", calibration=images, max_drop=20, max_error=0.2, **options)
    a, b = run_onnx(source, images)[0], run_onnx(tmp_path / "q.onnx", images)[0]
    (comparison,) = result.report.comparisons
    assert comparison.top1 == share(a, b) and comparison.batch == 64
    assert comparison.relative == pytest.approx(np.abs(a - b).max() / np.abs(a).max())
    assert ("of the images" in result.report.summary()) == (kind != "other")
    if kind == "other":
        with pytest.raises(
            rx.MismatchError, match=r"`y` is off by .*% of its largest value, .*at best; `--max-error 0\.\d+` would"
        ):
            rx.to_int8(source, tmp_path / "q.onnx", calibration=images, max_error=1e-6, **options)


def int8_models():
    """`{name: (model, names of the outputs that are compared)}`"""
    x = inputs = keras.Input((12, 12, 3), name="photo")
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, activation="relu")(x))
    other = keras.Input((4,), name="age")
    both = layers.Dense(3)(layers.Concatenate()([x, layers.Dense(4)(other)]))
    return {
        "regression": (keras.Model(inputs, layers.Dense(2)(x)), ["output"]),
        "several": (keras.Model(inputs, {"a": layers.Dense(2)(x), "b": x}), ["a", "b"]),
        "classes and a box": (keras.Model(inputs, {"k": layers.Dense(3, "softmax")(x), "box": layers.Dense(4)(x)}), ["box", "k"]),
        "two inputs": (keras.Model([inputs, other], both), ["output"]),
    }


@pytest.mark.parametrize("name", int8_models())
def test_verify_compares_what_quantize_compared(name, tmp_path, capsys):
    keras.utils.set_random_seed(1)
    model, outputs = int8_models()[name]
    random = np.random.default_rng(0)
    samples = {"photo": random.normal(size=(64, 12, 12, 3)), "age": random.normal(size=(64, 4))}
    samples = {tensor.name: samples[tensor.name].astype("float32") for tensor in model.inputs}
    np.savez(tmp_path / "s.npz", **samples)
    model.save(tmp_path / "m.keras")
    if name != "two inputs":
        samples = samples["photo"]  # the file's only input may have another name
        np.savez(tmp_path / "s.npz", x=samples)
    result = rx.to_onnx(model, tmp_path / "q.onnx", precision="int8", calibration=samples, max_drop=20, max_error=0.5)
    command = ["verify", str(tmp_path / "q.onnx"), str(tmp_path / "m.keras"), "--samples", str(tmp_path / "s.npz"), "--json"]
    assert main([*command, "--max-drop", "20", "--max-error", "0.5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["output"] for row in report["comparisons"]] == outputs
    assert [row["output"] for row in report["comparisons"]] == [row.output for row in result.report.comparisons]
    model.load_weights(tmp_path / "m.keras")
    for variable in model.weights:
        variable.assign(variable + random.normal(size=variable.shape))
    model.save(tmp_path / "m.keras")
    assert main(command) == 3
    assert re.search(r"`--max-(drop|error) [\d.]+` would pass", capsys.readouterr().err)


def test_photos_of_any_size(tmp_path):
    """A model of dynamic size that needs multiples of 4 gets the centre of each image."""
    source = write_graph(
        tmp_path / "m.onnx",
        """g (float[N,3,H,W] images) => (float[N,2,A,B] y) { a = Conv<pads=[1,1,1,1]>(images, w)
        p = MaxPool<kernel_shape=[4,4], strides=[4,4]>(a)  u = Resize<mode="nearest">(p, , s)  c = Concat<axis=1>(a, u)
        y = Conv(c, v) }""",
        {"w": normal(4, 3, 3, 3), "v": normal(2, 8, 1, 1), "s": np.array([1, 1, 4, 4], "float32")},
    )
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, size in enumerate([(40, 30), (33, 35), (64, 48), (33, 35)]):
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3)).astype("uint8")
        Image.fromarray(pixels).save(photos / f"{index}.png")
    result = rx.to_int8(source, tmp_path / "q.onnx", calibration=photos)
    assert result.report.comparisons[0].batch == 4 and result.report.passed


@pytest.mark.parametrize(("rows", "tested"), [(4, 16), (10, 20)])
def test_fixed_batches_and_several_inputs(tmp_path, rows, tested):
    """13 rows for batches of a fixed size; inputs by name, from an .npz file."""
    source = write_graph(
        tmp_path / "m.onnx",
        f"""g (float[{rows},3,8,8] left, float[{rows},3,8,8] right) => (float[{rows},4] y) {{
        a = Conv(left, w)  b = Conv(right, w)  c = Sub(a, b)  g = GlobalMaxPool(c)  y = Flatten(g) }}""",
        {"w": normal(4, 3, 3, 3)},
        kinds={"y": "logits"},
    )
    np.savez(tmp_path / "pairs.npz", left=noise(13, 3, 8, 8), right=noise(13, 3, 8, 8, seed=1))
    result = rx.to_int8(source, tmp_path / "q.onnx", calibration=str(tmp_path / "pairs.npz"), max_drop=30)
    assert result.report.comparisons[0].batch == tested and "DequantizeLinear" in op_counts(tmp_path / "q.onnx")
    with pytest.raises(rx.UsageError, match="has 2 inputs; give samples as an array for each of left, right"):
        rx.to_int8(source, tmp_path / "q.onnx", calibration=noise(13, 3, 8, 8))


def test_a_model_without_layers_is_refused(tmp_path):
    source = write_graph(tmp_path / "m.onnx", "g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }", {})
    with pytest.raises(rx.UsageError, match="has no convolution or dense layer"):
        rx.to_int8(source, tmp_path / "q.onnx", calibration=noise(4, 4))


def test_layer_errors_find_the_layer(trained, tmp_path):
    source, calibration, tests = trained
    proto = onnx.load(source)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("conv_16/kernel"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.3), tensor.name))
    node = next(node for node in proto.graph.node if tensor.name in node.input)
    onnx.save(proto, tmp_path / "wrong.onnx")
    errors = layer_errors(open_source(source).model, proto, {"images": tests[:4]})
    assert worst_layers(errors)[0] == node.name and errors[node.name].added > 0.1


def test_vnni_is_read_from_the_cpu(tmp_path):
    (tmp_path / "with").write_text("flags : avx512f avx512_vnni")
    (tmp_path / "without").write_text("flags : avx2")
    assert int8.has_vnni(tmp_path / "with") and not int8.has_vnni(tmp_path / "without")
    assert not int8.has_vnni(tmp_path / "nothing")


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


def test_export_straight_to_int8(trained_model, tmp_path):
    model, calibration, tests = trained_model
    result = rx.to_onnx(
        model, tmp_path / "q.onnx", precision="int8", calibration=calibration, samples=tests, output_kind="logits"
    )
    assert result.method == "int8" and os.listdir(tmp_path) == ["q.onnx"]
    assert result.table[1]["top1"] == result.report.comparisons[0].top1 >= 0.99
    layers = result.report.layers
    assert len(layers) == 7 and all(row["added"] <= row["error"] < 0.2 for row in layers.values()), "4 Conv, 2 Add, 1 Gemm"
    with pytest.raises(rx.UsageError, match=r"is int8; give images on which to compare it"):
        rx.verify(tmp_path / "q.onnx", model)
    report = rx.verify(tmp_path / "q.onnx", model, samples=tests)
    assert report.passed and report.comparisons[0].batch == 200 and "agrees with float32 on" in report.summary()

    def other_order(weights):
        (name,) = [name for name, content in weights.items() if content.shape == (16, 4) and content.dtype == np.int8]
        return name, weights[name][:, ::-1].copy()

    changed(tmp_path / "q.onnx", tmp_path / "wrong.onnx", other_order)
    report = rx.verify(tmp_path / "wrong.onnx", model, samples=tests)
    assert not report.passed and "with the model is" in report.problems[0]


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
        ({"precision": "float16", "external_data": True}, "needs float32"),
    ):
        with pytest.raises(rx.UsageError, match=message):
            rx.to_onnx(mixed, tmp_path / "z.onnx", **options)
    assert os.listdir(tmp_path) == ["empty"]


def test_a_file_in_lower_precision_is_refused(trained, tmp_path):
    source, calibration, _ = trained
    result = rx.to_int8(source, tmp_path / "q.onnx", calibration=calibration)
    assert rx.to_int8(source, tmp_path / "again.onnx", calibration=calibration).sha256 == result.sha256
    rx.to_float16(source, tmp_path / "h.onnx")
    for name, message in (("q.onnx", "is quantised already"), ("h.onnx", "is in float16 already")):
        with pytest.raises(rx.UsageError, match=message):
            rx.to_float16(tmp_path / name, tmp_path / "z.onnx")
        with pytest.raises(rx.UsageError, match=message):
            rx.to_int8(tmp_path / name, tmp_path / "z.onnx", calibration=calibration)


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


@pytest.mark.parametrize("to", ["float16", "int8"])
def test_files_that_are_too_large_for_one_message(to, tmp_path, monkeypatch):
    """The same with a limit of 10 kB as with protobuf's 2 GB: weights go through files of their own."""
    source = classifier(tmp_path / "m.onnx", "Identity", kinds={"y": "logits"})
    images = np.random.default_rng(0).integers(0, 256, (32, 3, 8, 8)).astype("float32")
    convert = rx.to_float16 if to == "float16" else functools.partial(rx.to_int8, calibration=images, max_drop=100)
    convert(source, tmp_path / "small.onnx")
    monkeypatch.setattr(artifact, "LARGEST_FILE", 700)
    monkeypatch.setattr(artifact, "EXTERNAL_FROM", 0)
    onnx.save(onnx.load(source), tmp_path / "e.onnx", save_as_external_data=True, location="e.onnx.data", size_threshold=0)
    convert(tmp_path / "e.onnx", tmp_path / "large.onnx")
    np.testing.assert_array_equal(run_onnx(tmp_path / "large.onnx", images)[0], run_onnx(tmp_path / "small.onnx", images)[0])
    assert sorted(os.listdir(tmp_path)) == ["e.onnx", "e.onnx.data", "large.onnx", "m.onnx", "small.onnx"]


@pytest.mark.parametrize(("right", "images", "drop"), [(99, 100, 1.0), (198, 200, 1.0), (495, 500, 1.0), (97, 100, 3.0)])
def test_a_budget_is_met_by_exactly_what_it_allows(right, images, drop):
    reference = np.eye(2)[np.zeros(images, int)]
    for have, passes in ((right, True), (right - 1, False)):
        got = np.eye(2)[(np.arange(images) >= have).astype(int)]
        (output,) = quantised_outputs({"logits": [None, 2]}, {"logits": "logits"}, Budget(max_drop=drop))
        assert output.compare([images, 2], [reference], [got]).passed == passes


def test_every_output_that_the_model_returns_counts(tmp_path):
    """Boxes are judged next to classes; features and best classes, which come on top, are not."""
    inputs = keras.Input((12, 12, 3))
    x = keras.layers.Conv2D(8, 3, activation="relu")(inputs)
    classes = keras.layers.Dense(2, activation="softmax", name="class")(keras.layers.GlobalAveragePooling2D()(x))
    model = randomise(keras.Model(inputs, [classes, keras.layers.Conv2D(4, 1, name="box")(x)]))
    images = np.random.default_rng(0).uniform(0, 255, (32, 12, 12, 3)).astype("float32")
    rx.to_onnx(model, tmp_path / "m.onnx")
    to_int8 = functools.partial(rx.to_int8, tmp_path / "m.onnx", calibration=images, max_drop=50)
    report = to_int8(tmp_path / "i8.onnx").report
    assert [comparison.output for comparison in report.comparisons] == ["class", "box"]
    with pytest.raises(rx.MismatchError, match="output `box` is off by .*; `--max-error .*` would pass"):
        to_int8(tmp_path / "strict.onnx", max_error=1e-4)
    verdict = rx.verify(tmp_path / "i8.onnx", model, samples=images, max_drop=50, max_error=1e-4)
    assert not verdict.passed and "`box`" in verdict.problems[0] and not (tmp_path / "strict.onnx").exists()
    shapes = {"logits": [None, 3], "features": [None, 8], "features_pool": [None, 8], "top_probabilities": [None, 2]}
    assert [output.output for output in quantised_outputs(shapes, {"logits": "logits"}, Budget())] == ["logits"]
    assert [output.output for output in quantised_outputs(shapes, {}, Budget(), "features")] == ["features"]
    assert [output.output for output in quantised_outputs({"features": [None, 8]}, {}, Budget())] == ["features"]


def test_a_model_without_outputs_of_floats_is_refused(tmp_path):
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.ops.argmax(keras.layers.Dense(4)(inputs), -1))
    rx.to_onnx(model, tmp_path / "m.onnx")
    data = np.random.default_rng(0).normal(size=(8, 8)).astype("float32")
    for options in ({}, {"output_kind": "logits"}):
        with pytest.raises(rx.UsageError, match="no output of floats"):
            rx.to_int8(tmp_path / "m.onnx", tmp_path / "q.onnx", calibration=data, **options)
    assert os.listdir(tmp_path) == ["m.onnx"]
