"""What a file returns is what the untouched model returns, and everything that ranks classes reads its kind from the file."""

import json
import zipfile
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf
from keras import layers, ops
from PIL import Image

import resnet_export as rx
from resnet_export import artifact
from resnet_export.cli import main
from tests.helpers import randomise

from .conftest import noise, run_onnx


@keras.saving.register_keras_serializable("tests_outputs")
class Scaled(layers.Layer):
    """Has an `activation` that is not its last operation."""

    def __init__(self, **options):
        super().__init__(**options)
        self.activation = keras.activations.sigmoid

    def call(self, inputs):
        return 90 * self.activation(inputs)


def gate_and_head(x):
    shared = layers.Activation("sigmoid")
    return shared(layers.Dense(3)(layers.Multiply()([x, shared(x)])))


def second_output(x):
    inner = keras.Input((6,))
    return keras.Model(inner, [layers.Dense(3, "softmax")(inner), layers.Dense(3)(inner)])(x)[1]


# Head: what makes the output, the output's name in the file, its kind.
HEADS = {
    "one sigmoid": (lambda x: layers.Dense(1, "sigmoid")(x), "probabilities", "binary"),
    "three sigmoids": (lambda x: layers.Dense(3, "sigmoid")(x), "probabilities", "multilabel"),
    "softmax": (lambda x: layers.Dense(3, "softmax")(x), "probabilities", "probabilities"),
    "tf.nn.softmax": (lambda x: layers.Dense(3, tf.nn.softmax)(x), "probabilities", "probabilities"),
    "ops.softmax": (lambda x: ops.softmax(layers.Dense(3)(x)), "probabilities", "probabilities"),
    "reshape after softmax": (
        lambda x: layers.Reshape((3,))(layers.Softmax()(layers.Reshape((1, 3))(layers.Dense(3)(x)))),
        "probabilities",
        "probabilities",
    ),
    "dropout after softmax": (lambda x: layers.Dropout(0.5)(layers.Dense(3, "softmax")(x)), "probabilities", "probabilities"),
    "average of softmaxes": (
        lambda x: layers.Average()([layers.Dense(3, "softmax")(x), layers.Dense(3, "softmax")(x)]),
        "probabilities",
        "probabilities",
    ),
    "gate and head share an activation": (gate_and_head, "probabilities", "multilabel"),
    "activation is not the last operation": (lambda x: Scaled()(layers.Dense(3)(x)), "output", "other"),
    "second output of a nested model": (second_output, "output", "other"),
    "linear": (lambda x: layers.Dense(3)(x), "output", "other"),
    "hard sigmoid": (lambda x: layers.Dense(3, "hard_sigmoid")(x), "output", "other"),
}


def build(head, size=16):
    x = keras.Input((size, size, 3))
    y = layers.BatchNormalization()(layers.Conv2D(6, 3, activation="relu")(layers.Rescaling(1 / 255)(x)))
    return randomise(keras.Model(x, HEADS[head][0](layers.GlobalAveragePooling2D()(y)), name="m"))


@pytest.mark.parametrize("head", HEADS)
def test_outputs_are_the_models_own(head, tmp_path):
    _, name, kind = HEADS[head]
    model, x = build(head), np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3)).astype("float32")
    expected, before = np.asarray(model(x, training=False)), [np.array(variable) for variable in model.variables]
    activations = [getattr(layer, "activation", None) for layer in model._flatten_layers()]
    result = rx.to_onnx(model, tmp_path / "m.onnx")
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, model.variables, strict=True))
    assert [getattr(layer, "activation", None) for layer in model._flatten_layers()] == activations
    assert np.array_equal(np.asarray(model(x, training=False)), expected)
    np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", x)[0], expected, rtol=1e-5, atol=1e-6)
    assert [value.name for value in onnx.load(tmp_path / "m.onnx").graph.output] == [name]
    assert artifact.read_metadata(tmp_path / "m.onnx")["outputs"] == {name: kind} and result.report.passed
    assert rx.verify(tmp_path / "m.onnx", model).passed
    folder = rx.to_savedmodel(model, tmp_path / "saved")
    assert folder.report.passed
    got = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"](images=tf.constant(x))
    np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "head", ["softmax", "tf.nn.softmax", "ops.softmax", "reshape after softmax", "one sigmoid", "three sigmoids"]
)
def test_logits_are_what_goes_into_the_activation(head, tmp_path):
    model, x = build(head), noise(5, 16, 16, 3, seed=4) * 50 + 100
    expected = np.asarray(model(x, training=False), "float64")
    report = rx.to_onnx(model, tmp_path / "m.onnx", outputs=["logits", "probabilities"]).report
    logits, probabilities = run_onnx(tmp_path / "m.onnx", x)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5, atol=1e-6)
    if "sigmoid" in head:
        np.testing.assert_allclose(logits, np.log(expected) - np.log1p(-expected), rtol=1e-4, atol=1e-5)
    else:
        logits = logits - logits.mean(-1, keepdims=True)
        centred = np.log(expected) - np.log(expected).mean(-1, keepdims=True)
        np.testing.assert_allclose(logits, centred, rtol=1e-4, atol=1e-5)
    assert any(comparison.output == "logits" for comparison in report.comparisons)
    assert rx.to_savedmodel(model, tmp_path / "saved", outputs=["logits"]).report.passed


def test_saturated_logits_are_compared_on_smaller_inputs(tmp_path):
    """With pixels 0–255 every row of this model is 0 or 1 to the last bit; a wrong bias would not show."""
    x = keras.Input((16, 16, 3))
    y = layers.Dense(4, "softmax", kernel_initializer=keras.initializers.RandomNormal(0, 9000, seed=1), name="head")
    model = keras.Model(x, y(layers.GlobalAveragePooling2D()(x)))
    report = rx.to_onnx(model, tmp_path / "m.onnx", outputs=["logits"]).report
    assert any("×" in comparison.data for comparison in report.comparisons)
    proto = onnx.load(tmp_path / "m.onnx")
    tensor = next(tensor for tensor in proto.graph.initializer if "bias" in tensor.name or len(tensor.dims) == 1)
    content = onnx.numpy_helper.to_array(tensor).copy()
    content[2] += 0.05
    tensor.CopyFrom(onnx.numpy_helper.from_array(content, tensor.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    problems = rx.verify(tmp_path / "wrong.onnx", model).problems
    assert any("output `logits`" in problem and "×" in problem for problem in problems), problems


def test_logits_that_the_graph_does_not_show_are_refused(tmp_path):
    model = build("average of softmaxes")
    with pytest.raises(rx.UsageError, match="offers the outputs probabilities, features"):
        rx.to_onnx(model, tmp_path / "m.onnx", outputs=["logits"])
    assert list(tmp_path.iterdir()) == []


def test_several_outputs_have_their_kinds(tmp_path):
    x = keras.Input((16, 16, 3))
    y = layers.GlobalAveragePooling2D()(layers.Conv2D(5, 3)(x))
    outputs = {"which": layers.Dense(4, "softmax")(y), "is_it": layers.Dense(1, "sigmoid")(y), "where": layers.Dense(4)(y)}
    model = randomise(keras.Model(x, outputs))
    rx.to_onnx(model, tmp_path / "m.onnx")
    metadata = artifact.read_metadata(tmp_path / "m.onnx")
    assert metadata["outputs"] == {"is_it": "binary", "where": "other", "which": "probabilities"}
    x = noise(3, 16, 16, 3)
    expected = model(x)
    for name, got in zip(sorted(outputs), run_onnx(tmp_path / "m.onnx", x), strict=True):
        np.testing.assert_allclose(got, expected[name], rtol=1e-5, atol=1e-5)


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 3)).astype("uint8")
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png", pixels[None].astype("float32")


def predicted(capsys, *arguments):
    code = main(["predict", *map(str, arguments), "--json"])
    said = capsys.readouterr()
    return code, (json.loads(said.out) if said.out else None), said.err


def test_predict_reads_the_kind(photo, tmp_path, capsys):
    """One sigmoid unit is two classes, several are independent, a softmax is not applied twice."""
    file, pixels = photo
    for head in ("one sigmoid", "three sigmoids", "softmax", "average of softmaxes", "dropout after softmax"):
        model = build(head)
        labels = ["no", "yes"] if head == "one sigmoid" else ["a", "b", "c"]
        rx.to_onnx(model, tmp_path / "m.onnx", labels=labels)
        p = np.asarray(model(pixels), "float64")[0]
        p = np.array([1 - p[0], p[0]]) if head == "one sigmoid" else p
        code, (found,), _ = predicted(capsys, tmp_path / "m.onnx", file)
        order = np.argsort(-p, kind="stable")
        assert code == 0 and found["classes"] == order.tolist() and found["labels"] == [labels[index] for index in order]
        np.testing.assert_allclose(found["probabilities"], p[order], rtol=1e-5)


def test_outputs_that_are_not_ranked_are_printed(photo, tmp_path, capsys):
    file, pixels = photo
    model = build("linear")
    rx.to_onnx(model, tmp_path / "m.onnx")
    assert main(["predict", str(tmp_path / "m.onnx"), str(file)]) == 0
    said = capsys.readouterr().out
    assert "--scores NAME --output-kind KIND" in said and "output" in said
    code, (found,), _ = predicted(capsys, tmp_path / "m.onnx", file)
    np.testing.assert_allclose(found["values"]["output"], np.asarray(model(pixels))[0], rtol=1e-5)
    assert code == 0 and found["classes"] == []
    # Declared, it is ranked: at export, or at prediction.
    logits = np.asarray(model(pixels), "float64")[0]
    p = np.sort(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())[::-1]
    _, (found,), _ = predicted(capsys, tmp_path / "m.onnx", file, "--scores", "output", "--output-kind", "logits")
    np.testing.assert_allclose(found["probabilities"], p, rtol=1e-5)
    rx.to_onnx(model, tmp_path / "n.onnx", output_kind="logits")
    np.testing.assert_allclose(rx.predict(tmp_path / "n.onnx", [file])[0].probabilities, p, rtol=1e-5)


def test_files_from_elsewhere_are_declared(photo, tmp_path, capsys):
    file, _ = photo
    model = build("softmax")
    rx.to_onnx(model, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "elsewhere.onnx")
    _, (plain,), _ = predicted(capsys, tmp_path / "m.onnx", file)
    _, (found,), _ = predicted(capsys, tmp_path / "elsewhere.onnx", file)
    assert found["classes"] == [] and list(found["values"]) == ["probabilities"]
    options = ("--scores", "probabilities", "--output-kind", "probabilities")
    _, (found,), _ = predicted(capsys, tmp_path / "elsewhere.onnx", file, *options)
    assert found == plain
    for options, message in {
        ("--scores", "logits", "--output-kind", "logits"): "has no output 'logits'",
        ("--scores", "probabilities"): "declare it with --scores NAME --output-kind KIND",
    }.items():
        code, _, err = predicted(capsys, tmp_path / "elsewhere.onnx", file, *options)
        assert code == 2 and message in err


@pytest.fixture(scope="module")
def old_files(tmp_path_factory):
    """What version 0.1.0 wrote for `softmax.keras`: ONNX files of every precision, one with top-k, a SavedModel folder."""
    folder = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(Path(__file__).with_name("files_0_1.zip")) as archive:
        archive.extractall(folder)
    return folder


OLD_FILES = [
    "softmax.onnx",
    "softmax-int8.onnx",
    "softmax-sm",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("softmax-top.onnx", "softmax-half.onnx")),
]


@pytest.mark.parametrize("name", OLD_FILES)
def test_files_of_version_0_1_keep_working(name, old_files, tmp_path, capsys):
    """They have no kinds; their `logits` and `probabilities` belong to a softmax classifier."""
    model = keras.saving.load_model(old_files / "softmax.keras")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype("float32")
    samples = pixels if name.endswith("int8.onnx") else None
    assert rx.verify(old_files / name, model, samples=samples).passed
    wrong = keras.saving.load_model(old_files / "softmax.keras")
    wrong.layers[-1].set_weights([-array for array in wrong.layers[-1].get_weights()])
    assert not rx.verify(old_files / name, wrong, samples=samples).passed
    if name.endswith("-sm"):
        return
    Image.fromarray(pixels[0].astype("uint8")).save(tmp_path / "i.png")
    (found,) = rx.predict(old_files / name, [tmp_path / "i.png"], top=4)
    want = np.asarray(model(pixels[:1], training=False))[0]
    assert list(found.classes) == list(np.argsort(-want)) and found.labels[0] == "abcd"[want.argmax()]
    np.testing.assert_allclose(found.probabilities, np.sort(want)[::-1], atol=2e-3 if "-" in name else 1e-6)
    assert main(["inspect", str(old_files / name)]) == 0
    if name == "softmax.onnx":
        assert main(["quantize", str(old_files / name), str(tmp_path / "h.onnx"), "--fp16"]) == 0
        assert rx.to_int8(old_files / name, tmp_path / "q.onnx", calibration=pixels).report.comparisons[0].top1 >= 0.99


REFUSED = {
    "kind": ({"output_kind": "softmax"}, "must be one of logits, probabilities, multilabel, binary, other, got 'softmax'"),
    "name": ({"output_kind": {"logits": "logits"}}, "has the outputs output, not 'logits'"),
    "labels": ({"output_kind": "binary", "labels": ["a", "b", "c"]}, "must name the 2 classes"),
    "top_k": ({"top_k": 2}, "`top_k` needs one output of logits or probabilities"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_declarations_that_do_not_fit_are_refused(case, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(rx.UsageError) as caught:
        rx.to_onnx(build("linear"), tmp_path / "m.onnx", **options)
    assert message in str(caught.value) and list(tmp_path.iterdir()) == []


def test_options_are_declared_once():
    """The signatures of the exporters, the flags and the metadata all come from `ExportOptions`."""
    import dataclasses
    import inspect

    from resnet_export.cli import cli
    from resnet_export.options import ExportOptions

    declared = {field.name: field.default for field in dataclasses.fields(ExportOptions)}
    written = {name: p.default for name, p in inspect.signature(rx.to_onnx).parameters.items()}
    assert {name: written[name] for name in declared} == declared
    saved = inspect.signature(rx.to_savedmodel).parameters
    assert {name: saved[name].default for name in ("outputs", "output_kind", "layout")} == {
        name: declared[name] for name in ("outputs", "output_kind", "layout")
    }
    flags = {option.name: option.default for option in cli.commands["onnx"].params}
    assert set(declared) <= set(flags)
    assert {name: flags[name] for name in ("opset", "layout", "input_dtype")} == {
        name: declared[name] for name in ("opset", "layout", "input_dtype")
    }
