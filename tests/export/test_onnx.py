"""ONNX export: names, graph, numbers, metadata, bytes, and what it refuses."""

import hashlib
import json
import os
import subprocess
import sys
import time

import keras
import numpy as np
import onnx
import onnx.reference
import pytest
from keras import layers

import resnet_export as rx
from resnet_export import artifact
from resnet_export.conversion import rebuild
from resnet_export.conversion.convert import convert
from resnet_export.conversion.prepare import prepare
from resnet_export.metadata import model_digest
from tests.helpers import images, randomise

from .conftest import build_mixed, noise, op_counts, relative, run_onnx


def test_file_has_the_promised_names_and_versions(mixed_export):
    _, path = mixed_export
    model = onnx.load(path)
    dims = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert [value.name for value in model.graph.input] == ["images"] and dims == ["batch", 32, 32, 3]
    assert [value.name for value in model.graph.output] == ["logits", "probabilities"]
    assert [dim.dim_param or dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim] == ["batch", 7]
    assert model.ir_version == 8 and [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]


def test_graph_is_clean(mixed_export):
    counts = op_counts(mixed_export[1])
    assert counts["Conv"] == 5 and counts["GlobalAveragePool"] == 2 and counts["Gemm"] == 1
    assert counts["Transpose"] == 1
    assert counts["BatchNormalization"] == 1, "only the pre-activation, which no convolution precedes"
    assert counts["Pad"] == 1, "the pool's pad must stay: its input may be negative"
    assert not {"Mul", "Sub", "Identity", "Cast", "Reshape", "Squeeze"} & set(counts) - {"Mul"}
    assert counts["Mul"] == 2, "squeeze-and-excite, and SiLU"


@pytest.mark.parametrize("optimise", [True, False])
def test_numbers_are_keras_numbers(mixed, mixed_export, optimise):
    x = noise(5)
    logits, probabilities = run_onnx(mixed_export[1], x, optimise=optimise)
    expected = np.asarray(mixed(x, training=False))
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    exp = np.exp(logits.astype("float64") - logits.max(1, keepdims=True))
    np.testing.assert_allclose(exp / exp.sum(1, keepdims=True), expected, atol=1e-5)


def test_third_judge_agrees(mixed, mixed_export):
    x = noise(2, seed=3)
    got = onnx.reference.ReferenceEvaluator(str(mixed_export[1])).run(["probabilities"], {"images": x})[0]
    np.testing.assert_allclose(got, np.asarray(mixed(x, training=False)), atol=1e-5)


def test_weights_bear_keras_names(mixed, mixed_export):
    names = {tensor.name for tensor in onnx.load(mixed_export[1]).graph.initializer}
    assert {"stem_conv/kernel", "stem_conv/bias", "grouped_conv/kernel", "grouped_conv/bias", "head/kernel", "head/bias"} <= names
    nodes = {node.name for node in onnx.load(mixed_export[1]).graph.node}
    assert {"grouped_relu", "add", "preact_bn"} <= nodes


def test_metadata_round_trip(mixed, mixed_export):
    result, path = mixed_export
    metadata = artifact.read_metadata(path)
    assert metadata["card"]["labels"][3] == "class 3" and metadata["card"]["name"] == "mixed"
    assert metadata["card"]["preprocessing"]["size"] == [32, 32]
    assert metadata["tolerances"] == {"precision": "float32", "relative": 1e-5}
    assert metadata["versions"]["keras"] == keras.__version__ and len(metadata["sha256"]) == 64
    assert metadata["options"] == {"outputs": ["logits", "probabilities"]}
    assert metadata["outputs"] == {"logits": "logits", "probabilities": "probabilities"}
    assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and result.size == path.stat().st_size
    assert json.loads(json.dumps(result.to_json()))["report"]["passed"] is True


def test_same_model_same_bytes(mixed, mixed_export, tmp_path):
    """Twice in one process, with other exports in between, and from the file that Keras saved."""
    rx.to_onnx(keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(2, 3)]), tmp_path / "other.onnx")
    mixed.save(tmp_path / "m.keras")
    options = {"outputs": ["logits", "probabilities"], "labels": [f"class {index}" for index in range(7)]}
    for model in (mixed, keras.saving.load_model(tmp_path / "m.keras")):
        assert rx.to_onnx(model, tmp_path / "again.onnx", **options).sha256 == mixed_export[0].sha256


def test_other_weights_other_digest(mixed_export):
    other = build_mixed()
    known = artifact.read_metadata(mixed_export[1])["sha256"]
    assert model_digest(other) == known
    kernel = other.get_layer("head").kernel
    kernel.assign(np.asarray(kernel) * 1.001)
    assert model_digest(other) != known


def test_model_is_left_as_it_was(mixed, mixed_export):
    fresh, x = build_mixed(), noise(2)
    assert mixed.get_layer("head").activation is keras.activations.softmax
    assert all(np.array_equal(np.array(a), np.array(b)) for a, b in zip(fresh.variables, mixed.variables, strict=True))
    assert np.array_equal(np.array(fresh(x, training=False)), np.array(mixed(x, training=False)))


MODELS = {
    "sequential": lambda: keras.Sequential(
        [keras.Input((20, 20, 3)), layers.Conv2D(4, 3, activation="relu"), layers.Flatten(), layers.Dense(3)]
    ),
    "nested": lambda: _nested(),
    "shared layer": lambda: _shared(),
    "transposed convolution": lambda: keras.Sequential(
        [keras.Input((9, 9, 4)), layers.Conv2DTranspose(6, 3, 2, padding="same"), layers.BatchNormalization(), layers.ReLU()]
    ),
    "one dimension": lambda: keras.Sequential(
        [
            keras.Input((30, 4)),
            layers.Conv1D(6, 5, strides=2),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3),
        ]
    ),
    "three dimensions": lambda: keras.Sequential(
        [
            keras.Input((8, 10, 12, 2)),
            layers.Conv3D(6, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling3D(),
            layers.GlobalAveragePooling3D(),
            layers.Dense(3),
        ]
    ),
    "exact gelu and layer norm": lambda: keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3),
            layers.LayerNormalization(),
            layers.Activation("gelu"),
            layers.GlobalMaxPooling2D(),
            layers.Dense(4, activation="sigmoid"),
        ]
    ),
    "normalization layer": lambda: keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Normalization(mean=[100.0, 110.0, 120.0], variance=[50.0, 60.0, 70.0]),
            layers.Conv2D(8, 3, padding="same"),
            layers.GlobalAveragePooling2D(),
        ]
    ),
    "concatenation and crop": lambda: _concatenation(),
    "lambda": lambda: keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.Lambda(lambda x: x * 2 + 1), layers.Flatten()]
    ),
    "upsampling and group norm": lambda: keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            layers.UpSampling2D(2),
            layers.Conv2D(8, 3),
            layers.GroupNormalization(4),
            layers.PReLU(shared_axes=[1, 2]),
        ]
    ),
    "augmentation, nested V2 and dropout": lambda: _augmented(),
    "attention": lambda: _attention(),
    "recurrent": lambda: keras.Sequential([keras.Input((6, 5)), layers.LSTM(4), layers.Dense(2)]),
}


def _augmented():
    trunk = keras.Sequential([keras.Input((16, 16, 3)), layers.BatchNormalization(), layers.ReLU(), layers.Conv2D(4, 3, 2)])
    parts = [layers.RandomFlip(), layers.Rescaling(1 / 127.5, -1), trunk, layers.GlobalAveragePooling2D(), layers.Dropout(0.5)]
    return keras.Sequential([keras.Input((16, 16, 3)), *parts, layers.Dense(3)])


def _attention():
    x = keras.Input((8, 8, 4))
    y = layers.Reshape((16, 8))(layers.Conv2D(8, 3, 2, padding="same")(x))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(layers.MultiHeadAttention(2, 4)(y, y))))


def _nested():
    inner = keras.Sequential(
        [keras.Input((16, 16, 3)), layers.Conv2D(6, 3, padding="same"), layers.BatchNormalization(), layers.ReLU()], name="trunk"
    )
    x = keras.Input((16, 16, 3))
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(inner(layers.Rescaling(1 / 255)(x)))))


def _shared():
    x = keras.Input((16, 16, 3))
    conv, first, second = layers.Conv2D(3, 3, padding="same"), layers.BatchNormalization(), layers.BatchNormalization()
    return keras.Model(x, layers.GlobalAveragePooling2D()(second(conv(first(conv(x))))))


def _concatenation():
    x = keras.Input((16, 16, 3))
    a = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    b = layers.Conv2D(5, 1, activation="tanh")(x)
    y = layers.Concatenate()([a, b])
    return keras.Model(
        x, layers.Softmax()(layers.Dense(6)(layers.GlobalAveragePooling2D()(layers.Cropping2D(((1, 2), (3, 0)))(y))))
    )


@pytest.mark.parametrize("kind", MODELS)
def test_kinds_of_models(kind, tmp_path):
    model = randomise(MODELS[kind]())
    result = rx.to_onnx(model, tmp_path / "m.onnx")
    assert result.method == ("stock" if kind == "recurrent" else "weightless")
    assert (kind == "recurrent") == any("fallback converter" in note for note in result.notes)
    x = np.random.default_rng(1).normal(size=(2, *model.inputs[0].shape[1:])).astype("float32")
    got = run_onnx(tmp_path / "m.onnx", x)[0]
    expected = np.asarray(model(x, training=False))
    assert relative(got, expected) < 1e-5
    assert op_counts(tmp_path / "m.onnx").get("BatchNormalization", 0) == 0


def test_several_inputs_and_outputs_keep_their_names(tmp_path):
    a, b = keras.Input((8, 8, 3), name="left"), keras.Input((5,), name="right")
    flat = layers.Concatenate()([layers.Flatten()(a), b])
    model = keras.Model({"left": a, "right": b}, {"small": layers.Dense(2)(flat), "large": layers.Dense(9)(flat)})
    rx.to_onnx(model, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [value.name for value in graph.input] == ["left", "right"]
    assert [value.name for value in graph.output] == ["large", "small"]
    rng = np.random.default_rng(0)
    x = {"left": rng.normal(size=(2, 8, 8, 3)).astype("float32"), "right": rng.normal(size=(2, 5)).astype("float32")}
    expected = model(x)
    large, small = run_onnx(tmp_path / "m.onnx", x["left"], x["right"])
    assert relative(large, expected["large"]) < 1e-5 and relative(small, expected["small"]) < 1e-5


def test_inputs_and_outputs_of_one_name_stay_apart(tmp_path):
    a, b = keras.Input((4,), name="logits"), keras.Input((4,), name="logits_input")
    two = keras.Model([a, b], layers.Dense(3, activation="softmax")(layers.Subtract()([a, b])))
    c = keras.Input((4,))
    one = keras.Model(c, {"images": layers.Dense(2)(c), "other": layers.Dense(5)(c)})
    rng = np.random.default_rng(0)
    for model, options, names in (
        (two, {"outputs": ["logits", "probabilities"]}, ["logits_input_input", "logits_input"]),
        (one, {}, ["images_input"]),
    ):
        rx.to_onnx(model, tmp_path / "m.onnx", **options)
        assert [value.name for value in onnx.load(tmp_path / "m.onnx").graph.input] == names
        feeds = [rng.normal(size=(2, 4)).astype("float32") for _ in names]
        expected = keras.tree.flatten(model(feeds if len(feeds) > 1 else feeds[0]))
        for got, want in zip(run_onnx(tmp_path / "m.onnx", *feeds)[-len(expected) :], expected, strict=True):
            assert relative(got, want) < 1e-5


@pytest.mark.parametrize("opset", [13, *(pytest.param(opset, marks=pytest.mark.slow) for opset in (15, 18, 20)), 23])
def test_opsets(mixed, tmp_path, opset):
    rx.to_onnx(mixed, tmp_path / "m.onnx", opset=opset, outputs=["probabilities"])
    model = onnx.load(tmp_path / "m.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert model.ir_version == (8 if opset <= 18 else 10)
    counts = op_counts(tmp_path / "m.onnx")
    assert counts["GlobalAveragePool"] == 2 and counts["Transpose"] == 1
    x = noise(2, seed=opset)
    for optimise in (True, False):
        np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", x, optimise=optimise)[0], np.asarray(mixed(x)), atol=1e-5)
    third = onnx.reference.ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"images": x})[0]
    np.testing.assert_allclose(third, np.asarray(mixed(x)), atol=1e-5)


def test_layout_and_pixels(mixed, tmp_path):
    rx.to_onnx(mixed, tmp_path / "m.onnx", layout="nchw", input_dtype="uint8", outputs=["probabilities"])
    value = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type
    assert value.elem_type == onnx.TensorProto.UINT8 and [dim.dim_value for dim in value.shape.dim][1:] == [3, 32, 32]
    assert "Transpose" not in op_counts(tmp_path / "m.onnx")
    x = images(2, 32).astype("uint8")
    got = run_onnx(tmp_path / "m.onnx", np.ascontiguousarray(x.transpose(0, 3, 1, 2)))[0]
    np.testing.assert_allclose(got, np.asarray(mixed(x.astype("float32"))), atol=1e-5)
    assert rx.verify(tmp_path / "m.onnx", mixed).passed


def test_features_and_top_k(mixed, tmp_path):
    outputs = ["probabilities", "features", "features_grouped_conv"]
    assert rx.to_onnx(mixed, tmp_path / "m.onnx", outputs=outputs, top_k=3).report.passed
    assert [value.name for value in onnx.load(tmp_path / "m.onnx").graph.output] == [*outputs, "top_classes", "top_probabilities"]
    x = noise(4, seed=8)
    probabilities, features, inner, classes, best = run_onnx(tmp_path / "m.onnx", x)
    expected = np.asarray(mixed(x))
    assert np.array_equal(classes, np.argsort(-expected, axis=1)[:, :3])
    np.testing.assert_allclose(best, -np.sort(-expected, axis=1)[:, :3], atol=1e-5)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    taps = keras.Model(mixed.inputs, [mixed.get_layer("last_conv").output, mixed.get_layer("grouped_conv").output])(x)
    assert relative(features, taps[0]) < 1e-5 and relative(inner, taps[1]) < 1e-5
    assert rx.verify(tmp_path / "m.onnx", mixed).passed


def test_open_size(open_export):
    result, path = open_export
    dims = [dim.dim_param or dim.dim_value for dim in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "height", "width", 3]
    assert any(size % 2 for comparison in result.report.comparisons for size in comparison.shape[1:3]), "an odd size was tried"


class Backbone(keras.Model):
    """A Functional model that builds its layers itself, as KerasHub's backbones do: its config names none of them."""

    def __init__(self, width, size=32, **kwargs):
        x = keras.Input((size, size, 3))
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(x)))
        super().__init__(x, y, **kwargs)
        self.width, self.size = width, size

    def get_config(self):
        return {"name": self.name, "width": self.width, "size": self.size}


def test_open_size_reaches_into_nested_models(tmp_path):
    x = keras.Input((32, 32, 3))
    backbone = Backbone(5, name="backbone")
    model = randomise(keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(backbone(x)))))
    rx.to_onnx(model, tmp_path / "m.onnx", dynamic_size=True)
    odd, opened = noise(2, 41, 19, 3), keras.Input((None, None, 3))
    y = opened
    for layer in (*backbone.layers[1:], *model.layers[2:]):
        y = layer(y)
    assert relative(run_onnx(tmp_path / "m.onnx", odd)[0], keras.Model(opened, y)(odd)) < 1e-5
    flat = keras.Sequential([keras.Input((16, 16, 3)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3)], name="flat")
    with pytest.raises(rx.UsageError, match="'flat' needs a fixed image size") as caught:
        rx.to_onnx(flat, tmp_path / "n.onnx", dynamic_size=True)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_builds_its_own_layers_is_rebuilt_in_the_wanted_precision():
    model = randomise(Backbone(5))
    exact = rebuild.in_float64(model)
    assert {layer.compute_dtype for layer in exact.layers[1:]} == {"float64"}
    x = noise(2)
    assert 0 < relative(model(x), exact(x.astype("float64"))) < 1e-5
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("asked", [True, None], ids=["on request", "beyond 2 GB"])
def test_external_data(mixed, tmp_path, monkeypatch, asked):
    if asked is None:
        monkeypatch.setattr(artifact, "LARGEST_FILE", 10_000)
    result = rx.to_onnx(mixed, tmp_path / "m.onnx", external_data=asked, outputs=["probabilities"])
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert result.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    x = noise(2)
    np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", x)[0], np.asarray(mixed(x)), atol=1e-5)
    assert rx.verify(tmp_path / "m.onnx", mixed).passed


def test_data_of_the_old_file_go_with_it(mixed, tmp_path):
    model, _ = convert(prepare(mixed).signature)

    def publish(external_data):
        with artifact.publishing(tmp_path / "m.onnx") as work:
            artifact.write_onnx(model, work, external_data)

    publish(True)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    publish(False)
    assert os.listdir(tmp_path) == ["m.onnx"]
    (tmp_path / "m.onnx.data").write_text("somebody's")
    assert artifact.disk_size(tmp_path / "m.onnx") == (tmp_path / "m.onnx").stat().st_size
    publish(False)
    assert (tmp_path / "m.onnx.data").read_text() == "somebody's", "not a file of the old model"


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_rebuilt_in_float32(policy, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = build_mixed()
    finally:
        keras.config.set_dtype_policy(before)
    result = rx.to_onnx(model, tmp_path / "m.onnx", outputs=["probabilities"])
    assert policy in result.notes[0]
    assert "Cast" not in op_counts(tmp_path / "m.onnx")
    x = noise(2)
    np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", x)[0], np.asarray(build_mixed()(x)), atol=1e-5)


REFUSED = {
    "opset": ({"opset": 24}, "`opset` must be a number from 13 to 23, got 24"),
    "layout": ({"layout": "chwn"}, "`layout` must be one of nhwc, nchw"),
    "outputs": ({"outputs": ["logit"]}, "offers the outputs probabilities, logits, features and features_LAYER, not 'logit'"),
    "no outputs": ({"outputs": []}, "at least one"),
    "labels": ({"labels": ["a"]}, "must name the 7 classes of the output `probabilities`, got 1"),
    "layer": ({"outputs": ["features_add_1"]}, "no layer 'add_1' for the output 'features_add_1'; did you mean 'add'"),
    "top-k": ({"top_k": 8}, "`top_k` must be from 1 to the model's 7 classes, got 8"),
    "input": ({"input_dtype": "int4"}, "`input_dtype` must be one of"),
    "samples": ({"samples": np.zeros((2, 31, 32, 3))}, "samples must have the shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_old_file_alone(mixed, tmp_path, case):
    options, message = REFUSED[case]
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(rx.UsageError, match=message.replace("(", r"\(")):
        rx.to_onnx(mixed, tmp_path / "m.onnx", **options)
    assert os.listdir(tmp_path) == ["m.onnx"] and (tmp_path / "m.onnx").read_bytes() == b"old"


def test_existing_and_unwritable_targets(mixed, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(rx.UsageError, match="exists already"):
        rx.to_onnx(mixed, tmp_path / "m.onnx", overwrite=False)
    with pytest.raises(rx.UsageError, match="does not exist"):
        rx.to_onnx(mixed, tmp_path / "no" / "m.onnx")
    (tmp_path / "folder").mkdir()
    with pytest.raises(rx.UsageError, match="it is a folder"):
        rx.to_onnx(mixed, tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "m.onnx"]


def test_disk_full_leaves_nothing(mixed, tmp_path, monkeypatch):
    (tmp_path / "m.onnx").write_bytes(b"old")

    def full(model, path, external_data):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "write_onnx", full)
    with pytest.raises(rx.UsageError, match="No space left"):
        rx.to_onnx(mixed, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"] and (tmp_path / "m.onnx").read_bytes() == b"old"


def test_unconvertible_op_is_named_with_its_layer(tmp_path):
    class Sorted(layers.Layer):
        def call(self, x):
            import tensorflow as tf

            return tf.raw_ops.Betainc(a=x * x + 1, b=x * x + 1, x=x * 0 + 0.5)

    model = keras.Sequential([keras.Input((4,)), layers.Dense(4), Sorted(name="odd_one")])
    with pytest.raises(rx.UsageError, match="Betainc.*odd_one"):
        rx.to_onnx(model, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_a_layer_that_keras_itself_cannot_trace_is_named(tmp_path):
    equalize = layers.ContrastLimitedAdaptiveHistogramEqualization()
    model = keras.Sequential([keras.Input((None, None, 3)), equalize, layers.Conv2D(4, 3)])
    with pytest.raises(rx.UsageError, match="contrast_limited_adaptive_histogram_equalization.* fixed input size"):
        rx.to_onnx(model, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_subclassed_model_is_refused_with_the_way_to_fix_it(tmp_path):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    model = Own()
    model(np.zeros((1, 3), "float32"))
    with pytest.raises(rx.UsageError, match=r"keras\.Model\(x, model\(x\)\)"):
        rx.to_onnx(model, tmp_path / "m.onnx")


def test_reading_a_file_imports_no_framework(mixed_export, tmp_path):
    from PIL import Image

    Image.fromarray(images(1, 40)[0].astype("uint8")).save(tmp_path / "a.png")
    code = (
        "import sys, resnet_export as rx\n"
        f"found = rx.predict({str(mixed_export[1])!r}, [{str(tmp_path / 'a.png')!r}], top=2)\n"
        f"rx.artifact.read_metadata({str(mixed_export[1])!r})\n"
        "print(found[0].labels[0], sorted({'keras', 'tensorflow', 'keras_resnet', 'tf2onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("class ") and done.stdout.strip().endswith("[]")


def test_names_that_tensorflow_refuses_as_scopes_export(tmp_path):
    parts = [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, name="_my conv"), keras.layers.Flatten(), keras.layers.Dense(3)]
    result = rx.to_onnx(keras.Sequential(parts, name="seq model"), tmp_path / "m.onnx")
    assert result.report.passed and result.method == "weightless"


@pytest.mark.parametrize("end", ["os.abort()", "os.kill(os.getpid(), 9)"])
def test_a_process_that_is_gone_leaves_nothing(end, tmp_path):
    """A native library crashes it, or somebody kills it, in the middle of an export, without a chance to clean up."""
    code = (
        "import os, pathlib, sys\n"
        "from resnet_export.artifact import publishing, temporary_folder\n"
        "with publishing(sys.argv[1]) as work, temporary_folder('other', os.path.dirname(sys.argv[1])) as folder:\n"
        "    pathlib.Path(work).write_text('half')\n"
        "    (folder / 'weights').write_text('half')\n"
        "    assert len(os.listdir(os.path.dirname(sys.argv[1]))) == 3\n"
        f"    {end}\n"
    )
    (tmp_path / "old.onnx").write_text("old")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "old.onnx")], capture_output=True, text=True)
    assert done.returncode in (-6, -9), done.stderr
    for _ in range(100):
        if os.listdir(tmp_path) == ["old.onnx"]:
            break
        time.sleep(0.05)
    assert os.listdir(tmp_path) == ["old.onnx"] and (tmp_path / "old.onnx").read_text() == "old"


def test_messages_have_no_colours_frames_or_temporary_paths(tmp_path):
    frame = "Exception encountered when calling Conv2D.call()."
    error = ValueError(f"{frame}\n\n\x1b[1m{{{{function_node __wrapped__Conv2D}}}} the size is wrong\x1b[0m\n\nmore")
    assert artifact.first_line(error) == "the size is wrong"
    assert artifact.first_line(ValueError("x" * 13_000)).endswith("…") and len(artifact.first_line(ValueError("x" * 999))) == 300


@pytest.mark.slow
def test_an_export_leaves_no_trace_in_the_model(tmp_path):
    """States of recurrent layers, seeds and statistics are bit for bit what they were, whatever the export has to try."""
    keras.utils.set_random_seed(0)
    x = entry = keras.Input(batch_shape=(2, 4, 6, 6, 3))
    x = keras.layers.TimeDistributed(keras.layers.Conv2D(4, 3))(x)
    x = keras.layers.BatchNormalization()(x)  # untrained, so that it is verified again with other statistics
    x = keras.layers.TimeDistributed(keras.layers.GlobalAveragePooling2D())(keras.layers.GaussianDropout(0.2, seed=3)(x))
    x = keras.layers.GRU(3, stateful=True)(keras.layers.LSTM(4, stateful=True, return_sequences=True, dropout=0.1)(x))
    model = keras.Model(entry, keras.layers.Dense(3, "softmax")(x))
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 6, 3)).astype("float32")
    model(images, training=True)
    before = [np.array(variable) for variable in model.variables]
    assert sum("seed" in variable.path for variable in model.variables) >= 2
    activations = [getattr(layer, "activation", None) for layer in model._flatten_layers()]
    result = rx.to_onnx(model, tmp_path / "m.onnx")
    rx.to_savedmodel(model, tmp_path / "saved")
    assert rx.verify(tmp_path / "m.onnx", model).passed and rx.verify(tmp_path / "saved", model).passed
    rx.to_onnx(model, tmp_path / "half.onnx", precision="float16")
    assert any("verified again" in note for note in result.report.notes)
    for variable, value in zip(model.variables, before, strict=True):
        assert np.array_equal(np.array(variable), value), variable.path
    assert [getattr(layer, "activation", None) for layer in model._flatten_layers()] == activations
    want = model(images, training=False)
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    np.testing.assert_allclose(run_onnx(tmp_path / "m.onnx", images)[0], want, atol=1e-6)
