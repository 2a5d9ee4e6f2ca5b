"""Planted faults that verification must catch, and that it names the place."""

import json
import os

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from PIL import Image

import resnet_export as rx
from resnet_export import artifact, exporters
from resnet_export.conversion import passes
from resnet_export.conversion.convert import convert
from resnet_export.conversion.passes import affine
from resnet_export.conversion.prepare import prepare
from resnet_export.metadata import metadata_of
from resnet_export.options import ExportOptions
from resnet_export.verification import metrics, onnx_file, randomization, refolding
from resnet_export.verification.cards import check_metadata
from resnet_export.verification.inputs import Case
from resnet_export.verification.outputs import OutputComparison
from resnet_export.verification.reference import Reference
from tests.helpers import randomise

from .conftest import build_mixed, noise


def changed_weight(proto, name, change):
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    content = onnx.numpy_helper.to_array(tensor).copy()
    change(content)
    tensor.CopyFrom(onnx.numpy_helper.from_array(content, name))


def one_number(content):
    content.flat[5] *= 1.001


def first_number(content):
    content.flat[0] += 0.5


def shift(content):
    content += 0.01


def flipped_pads(proto):
    node = next(node for node in proto.graph.node if node.name == "depthwise_bn")
    pads = next(attribute for attribute in node.attribute if attribute.name == "pads")
    assert list(pads.ints) == [1, 1, 1, 1]
    pads.ints[:] = [0, 1, 2, 1]


def no_relu(proto):
    node = next(node for node in proto.graph.node if node.name == "preact_relu")
    node.op_type = "Identity"


def other_clip(proto):
    node = next(node for node in proto.graph.node if node.name == "grouped_relu")
    changed_weight(proto, node.input[2], lambda content: np.copyto(content, np.float32(5.5)))


FAULTS = {
    "one wrong number": (lambda proto: changed_weight(proto, "grouped_conv/kernel", one_number), "grouped_conv/kernel", None),
    "wrong bias": (lambda proto: changed_weight(proto, "stem_conv/bias", shift), "stem_conv/bias", "stem_conv"),
    "wrong bias of the last layer": (lambda proto: changed_weight(proto, "head/bias", first_number), "head/bias", "head"),
    "batch norm shift": (lambda proto: changed_weight(proto, "preact_bn.2", shift), "preact_bn.2", "preact_bn"),
    "flipped pads": (flipped_pads, "max error", "depthwise_bn"),
    "no ReLU": (no_relu, "max error", "preact_relu"),
    "ReLU6 that ends at 5.5": (other_clip, "differs", "grouped_relu"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught_and_placed(mixed, mixed_export, tmp_path, fault):
    plant, message, layer = FAULTS[fault]
    proto = onnx.load(mixed_export[1])
    plant(proto)
    onnx.save(proto, tmp_path / "m.onnx")
    report = rx.verify(tmp_path / "m.onnx", mixed)
    assert not report.passed and any(message in problem for problem in report.problems)
    assert report.diverges == layer
    with pytest.raises(rx.MismatchError):
        exporters.require(report)


def test_the_untouched_file_passes(mixed, mixed_export):
    report = rx.verify(mixed_export[1], mixed)
    assert report.passed and report.diverges is None and report.problems == ()
    assert any("labels were not compared" in note for note in report.notes), "the model has none"
    assert report.weights["compared"] == len(onnx.load(mixed_export[1]).graph.initializer)
    assert report.weights["refolded"] == 14, "kernel and bias of five convolutions and the head, scale and shift of a free norm"
    runs = {(comparison.batch, comparison.runtime) for comparison in report.comparisons}
    assert runs == {(batch, runtime) for batch in (1, 3) for runtime in onnx_file.RUNTIMES}


def test_refolding_agrees_with_a_hand_made_fold():
    model = build_mixed()
    found = refolding.refold(model)
    conv, norm = model.get_layer("grouped_conv"), model.get_layer("grouped_bn")
    scale = np.asarray(norm.gamma) / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon)
    kernel = np.transpose(np.asarray(conv.kernel), (3, 2, 0, 1)) * scale[:, None, None, None]
    np.testing.assert_allclose(found["grouped_conv/kernel"][0].forms[-1], kernel, rtol=1e-5)
    np.testing.assert_allclose(
        found["grouped_conv/bias"][0].forms[-1],
        np.asarray(norm.beta) - np.asarray(norm.moving_mean) * scale,
        rtol=1e-4,
        atol=1e-6,
    )


def changed_card(proto, change):
    entry = next(entry for entry in proto.metadata_props if entry.key == "keras_resnet.card")
    card = json.loads(entry.value)
    change(card)
    entry.value = json.dumps(card)


CARDS = {
    "labels in another order": (lambda card: card["labels"].reverse(), "labels"),
    "no labels": (lambda card: card.update(labels=None), "labels"),
    "another interpolation": (lambda card: card["preprocessing"].update(interpolation="nearest"), "preprocessing"),
    "another mode": (lambda card: card["preprocessing"].update(mode="tf"), "preprocessing"),
    "another architecture": (lambda card: card.update(config={"depth": 50}), "config"),
}


LABELS = [f"class {index}" for index in range(7)]


@pytest.mark.parametrize("fault", CARDS)
def test_a_card_that_is_not_the_models_is_found(mixed, mixed_export, tmp_path, fault):
    change, key = CARDS[fault]
    proto = onnx.load(mixed_export[1])
    changed_card(proto, change)
    onnx.save(proto, tmp_path / "m.onnx")
    options = ExportOptions(outputs=("logits", "probabilities"))
    expected = metadata_of(prepare(mixed, options, LABELS), options, LABELS)
    assert check_metadata(mixed_export[1], expected) == ([], [])
    problems, _ = check_metadata(tmp_path / "m.onnx", expected)
    assert len(problems) == 1 and f"its card differs in {key}" in problems[0]


def test_a_wrong_card_fails_verification(mixed, mixed_export, tmp_path):
    proto = onnx.load(mixed_export[1])
    changed_card(proto, lambda card: card["labels"].reverse())
    onnx.save(proto, tmp_path / "m.onnx")
    report = rx.verify(tmp_path / "m.onnx", mixed, labels=LABELS)
    assert not report.passed and [problem for problem in report.problems if "its card differs in labels" in problem]
    with pytest.raises(rx.UsageError, match="must name the 7 classes"):
        rx.verify(tmp_path / "m.onnx", mixed, labels=LABELS[:6])


def test_a_card_that_gets_lost_on_the_way_is_caught(mixed, tmp_path, monkeypatch):
    real = artifact.encode_metadata
    monkeypatch.setattr(artifact, "encode_metadata", lambda metadata: real({**metadata, "card": {}}))
    with pytest.raises(rx.MismatchError, match="its card differs in preprocessing"):
        rx.to_onnx(mixed, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def wrong_fold(monkeypatch):
    real = affine._batch_norm

    def forgets_mean(node):
        step = real(node)
        return None if step is None else (step[0], step[1] + 0.01)

    monkeypatch.setattr(affine, "_batch_norm", forgets_mean)
    shifted = affine._Affine.then
    monkeypatch.setattr(affine._Affine, "then", lambda self, scale, shift: shifted(self, scale, shift * 1.001))


def test_a_pass_that_folds_wrongly_is_caught(mixed, tmp_path, monkeypatch):
    wrong_fold(monkeypatch)
    with pytest.raises(rx.MismatchError) as caught:
        rx.to_onnx(mixed, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == [] and caught.value.exit_code == 3
    problems = caught.value.report.problems
    assert any("is not the Keras weight" in problem for problem in problems), problems


def fresh():
    x = keras.Input((16, 16, 3))
    y = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, use_bias=False, name="conv")(x))
    return keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.ReLU()(y))))


def test_untrained_model_is_verified_with_random_statistics(tmp_path, monkeypatch):
    model = fresh()
    before = [np.array(variable) for variable in model.variables]
    result = rx.to_onnx(model, tmp_path / "m.onnx")
    assert "verified again with random values for 5 variables that were constant" in result.report.notes[0]
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, model.variables, strict=True))
    assert os.listdir(tmp_path) == ["m.onnx"]
    # Without shifts this fault changes nothing: only random statistics show it.
    wrong_fold(monkeypatch)
    with pytest.raises(rx.MismatchError, match="with random values for 5 variables that were constant"):
        rx.to_onnx(model, tmp_path / "n.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, model.variables, strict=True))


def test_a_fault_that_zeros_hide_is_caught_in_a_file_that_is_there(tmp_path):
    """A new residual block ends in a convolution of zeros: whatever its branch computes is not seen."""
    x = keras.Input((12, 12, 3))
    trunk = layers.Conv2D(4, 3, padding="same", name="trunk")(x)
    branch = layers.Conv2D(4, 3, padding="same", activation="relu", name="inner")(trunk)
    branch = layers.Conv2D(4, 3, padding="same", kernel_initializer="zeros", name="last")(branch)
    model = keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.Add()([trunk, branch]))))
    rx.to_onnx(model, tmp_path / "m.onnx")
    report = rx.verify(tmp_path / "m.onnx", model)
    assert report.passed and [note for note in report.notes if "verified again with random values" in note]
    proto = onnx.load(tmp_path / "m.onnx")
    node = next(node for node in proto.graph.node if "inner/kernel" in node.input)
    next(attribute for attribute in node.attribute if attribute.name == "pads").ints[:] = [0, 1, 2, 1]
    onnx.save(proto, tmp_path / "flipped.onnx")
    report = rx.verify(tmp_path / "flipped.onnx", model)
    assert not report.passed and "with random values for 5 variables that were constant" in report.problems[0]
    assert report.diverges == "inner"


def test_trained_model_is_verified_once(mixed_export):
    assert mixed_export[0].report.notes == ()


def test_keep_failed_keeps_the_file_under_another_name(mixed, tmp_path, monkeypatch):
    wrong_fold(monkeypatch)
    with pytest.raises(rx.MismatchError):
        rx.to_onnx(mixed, tmp_path / "m.onnx", keep_failed=True)
    assert os.listdir(tmp_path) == ["m.onnx.failed"]


@pytest.mark.parametrize("opset", [pytest.param(13, marks=pytest.mark.slow), 17, pytest.param(18, marks=pytest.mark.slow), 23])
def test_onnxruntime_would_fuse_the_pad_wrongly(tmp_path, monkeypatch, opset):
    """Its Pad_Fusion puts zeros' place into a max pool, which pads with -inf: caught, and avoided by `guard_pads`."""
    x = keras.Input((12, 12, 3))
    y = layers.Conv2D(4, 3, name="conv")(x)
    y = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(y))
    model = randomise(keras.Model(x, y))
    model.get_layer("conv").bias.assign([-5.0] * 4)
    assert rx.to_onnx(model, tmp_path / "m.onnx", opset=opset).report.passed
    monkeypatch.setattr(passes, "ORDER", tuple(step for step in passes.ORDER if step is not passes.guard_pads))
    with pytest.raises(rx.MismatchError, match="onnxruntime, default"):
        rx.to_onnx(model, tmp_path / "n.onnx", opset=opset)


def test_samples_give_agreement(mixed, tmp_path):
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (40 + index, 50, 3)).astype("uint8")
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    (tmp_path / "out").mkdir()
    result = rx.to_onnx(mixed, tmp_path / "out" / "m.onnx", samples=str(tmp_path))
    rows = [comparison for comparison in result.report.comparisons if comparison.data == "samples"]
    assert len(rows) == 2 and all(row.batch == 4 and row.top1 == 1.0 and row.top5 == 1.0 for row in rows)


def test_damaged_file_of_another_model(mixed, mixed_export, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(mixed_export[1].read_bytes()[:5000])
    with pytest.raises(rx.UsageError, match="not a readable ONNX file"):
        rx.verify(tmp_path / "cut.onnx", mixed)


def test_file_from_elsewhere_is_refused_with_the_reason(mixed, mixed_export, tmp_path):
    proto = onnx.load(mixed_export[1])
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(rx.UsageError, match="not written by resnet-export"):
        rx.verify(tmp_path / "m.onnx", mixed)


MEASURES = {
    "equal": ([1.0, -2.0], [1.0, -2.0], 0.0),
    "tenth": ([1.0, -2.0], [1.2, -2.0], 0.1),
    "not a number": ([1.0, 2.0], [np.nan, 2.0], np.inf),
    "shape": ([1.0, 2.0], [[1.0, 2.0]], np.inf),
    "both zero": ([0.0], [0.0], 0.0),
    "should be zero": ([0.0], [1e-9], np.inf),
}


@pytest.mark.parametrize("case", MEASURES)
def test_measure(case):
    reference, got, expected = MEASURES[case]
    assert metrics.measure(reference, got)["relative"] == pytest.approx(expected)


def test_agreement():
    reference = np.array([[1.0, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1.0]])
    assert metrics.agreement(reference, reference + noise(2, 6) * 1e-3, 1) == 1.0
    assert metrics.agreement(reference, reference[::-1], 1) == 0.0
    assert metrics.agreement(reference, reference[:, [1, 0, 2, 3, 4, 5]], 5) == 0.5
    assert metrics.agreement(reference[:, :1], reference[:, :1], 1) is None


def test_convert_leaves_no_float64_behind(mixed):
    model, _ = convert(prepare(mixed).signature)
    assert {str(value.const_value.dtype) for value in model.graph.initializers.values()} <= {"FLOAT", "INT64"}


WHOLE_INPUTS = {
    "cast": lambda x: keras.ops.cast(x, "int32"),
    "comparison": lambda x: x >= 5.0,
    "floor": lambda x: keras.ops.cast(keras.ops.floor(x), "int32"),
}


@pytest.mark.parametrize("decide", WHOLE_INPUTS.values(), ids=WHOLE_INPUTS)
def test_whole_numbers_in_float_inputs_are_not_rounded(decide):
    """Pixels and indices are exact: a file that takes 4 for 5 is wrong, however near 4.9999995 is."""
    x = keras.Input((6,))
    reference = Reference(prepare(keras.Model(x, decide(x))).signature)
    feeds = {reference.signature.inputs[0].name: np.arange(18, dtype="float32").reshape(3, 6)}
    case = Case("pixels", feeds, reference.values(feeds))
    (name,) = [output.name for output in reference.signature.outputs]
    below = reference.values({key: value - 1 for key, value in feeds.items()}).own[0]
    comparison = OutputComparison(reference)
    comparison.compare(case, "planted", lambda feeds: {name: below})
    assert comparison.failed


def steep(scale):
    """A sigmoid of large numbers: a thousandth part of rounding decides between 0 and 1 where `scale` is large."""
    x = keras.Input((64,))
    y = layers.Dense(64, kernel_initializer=keras.initializers.RandomNormal(0, scale, seed=1))(x)
    y = layers.Dense(64, kernel_initializer=keras.initializers.RandomNormal(0, scale, seed=2), activation="tanh")(y)
    return keras.Model(x, layers.Dense(4, kernel_initializer=keras.initializers.RandomNormal(0, 1, seed=3), name="last")(y))


def test_ill_conditioned_model_is_judged_in_float64(tmp_path):
    model = steep(300.0)
    result = rx.to_onnx(model, tmp_path / "m.onnx")
    worst = result.report.worst()
    assert (worst > 1e-5) == any("Keras in float64" in note for note in result.report.notes)
    kernel = model.get_layer("last").kernel
    kernel.assign(np.asarray(kernel) * 1.01)
    assert not rx.verify(tmp_path / "m.onnx", model).passed


DECISIONS = {
    "argmax": lambda first, second: keras.ops.argmax(keras.ops.concatenate([first, second], axis=-1), axis=-1),
    "argsort": lambda first, second: keras.ops.argsort(keras.ops.concatenate([first, second], axis=-1), axis=-1),
    "comparison": lambda first, second: first > second,
    "floor": lambda first, second: keras.ops.cast(keras.ops.floor(first - second), "int32"),
}


@pytest.mark.parametrize("decide", DECISIONS.values(), ids=DECISIONS)
def test_a_whole_number_may_differ_only_where_rounding_decides_it(decide):
    rng = np.random.default_rng(5)
    x = keras.Input((64,))
    first, second = (layers.Dense(1, use_bias=False, name=name) for name in ("first", "second"))
    model = keras.Model(x, decide(first(x), second(x)))
    weights = rng.normal(size=(64, 1)).astype("float32")

    def answers(first_weights, second_weights, rows):
        first.kernel.assign(first_weights)
        second.kernel.assign(second_weights)
        return np.asarray(model(rows))

    for _ in range(100):  # a palindrome has the same sum in both orders, but for rounding
        half = rng.normal(size=32)
        rows = np.stack([np.concatenate([half, half[::-1]]), rng.normal(size=64)]).astype("float32")
        other, ours = answers(weights[::-1], weights, rows), answers(weights, weights[::-1], rows)
        if (other != ours).reshape(2, -1).any(1).all():
            break
    reference = Reference(prepare(model).signature)
    feeds = {reference.signature.inputs[0].name: rows}
    case = Case("noise", feeds, reference.values(feeds))
    (name,) = [output.name for output in reference.signature.outputs]
    for row, decided in ((0, True), (1, False)):
        comparison = OutputComparison(reference)
        got = case.values.own[0].copy()
        got[row] = other[row]
        comparison.compare(case, "planted", lambda feeds, got=got: {name: got})
        assert (not comparison.failed) == decided
        assert any("the rounding of float32 decides" in note for note in comparison.conditioning_notes()) == decided
    assert np.array_equal(first.kernel, weights)


def test_what_bfloat16_rounds_in_weights_is_no_difference_of_the_copy(tmp_path):
    """The mean of many pixels does not show what noise in them does; weights and logits are rounded all the same."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        x = keras.Input((12, 14, 4))
        y = layers.Conv2D(3, 1, kernel_initializer=keras.initializers.Constant(0.2))(
            layers.GlobalAveragePooling2D(keepdims=True)(x)
        )
        y = layers.Conv2D(1, 1, kernel_initializer=keras.initializers.Constant(-0.123), bias_initializer="ones", name="last")(y)
        model = keras.Model(x, layers.Activation("sigmoid")(y))
    finally:
        keras.config.set_dtype_policy("float32")
    assert rx.to_onnx(model, tmp_path / "m.onnx").report.passed


def chaotic(depth=16, width=8):
    """Saturating layers one after the other: rounding grows from layer to layer until the output is nothing else."""
    keras.utils.set_random_seed(4)
    x = y = keras.Input((6, 6, 3))
    for index in range(depth):
        start = keras.initializers.RandomNormal(0, 1.5, seed=index)
        y = layers.Conv2D(width, 3, padding="same", kernel_initializer=start, name=f"conv_{index}")(y)
        y = layers.Activation("tanh")(layers.BatchNormalization(name=f"norm_{index}")(y))
    return randomise(keras.Model(x, layers.Dense(5, name="head")(layers.GlobalAveragePooling2D()(y))))


def test_a_model_that_is_all_rounding_is_judged_with_tame_statistics(tmp_path):
    model = chaotic()
    before = [np.array(variable) for variable in model.variables]
    report = rx.to_onnx(model, tmp_path / "m.onnx").report
    assert report.worst() > 1e-2, "nothing that its own output shows would prove anything"
    assert any(note.startswith("ill-conditioned") for note in report.notes)
    (note,) = [note for note in report.notes if "batch-norm statistics that fit the data" in note]
    assert float(note.rsplit(" ", 1)[1]) < 1e-5
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, model.variables, strict=True))
    proto = onnx.load(tmp_path / "m.onnx")
    node = next(node for node in proto.graph.node if node.name == "norm_12")
    next(attribute for attribute in node.attribute if attribute.name == "pads").ints[:] = [0, 1, 2, 1]
    onnx.save(proto, tmp_path / "pads.onnx")
    report = rx.verify(tmp_path / "pads.onnx", model)
    assert any("max error" in problem for problem in report.problems), report
    assert report.diverges == "norm_12"
    proto = onnx.load(tmp_path / "m.onnx")
    changed_weight(proto, "conv_12/kernel", one_number)
    onnx.save(proto, tmp_path / "weight.onnx")
    assert any("conv_12/kernel" in problem for problem in rx.verify(tmp_path / "weight.onnx", model).problems)


@pytest.mark.slow
def test_the_same_for_a_savedmodel(tmp_path):
    model = chaotic()
    report = rx.to_savedmodel(model, tmp_path / "m").report
    assert report.passed and (report.worst() < 1e-5 or any("that fit the data" in note for note in report.notes))


def test_random_values_follow_the_data_and_leave(mixed):
    norms, pixels = randomization.statistics(mixed), noise(3) * 100
    before = [np.array(variable) for variable in norms]
    with randomization.randomised(norms, lambda: mixed(pixels)):
        assert not any(np.array_equal(a, np.array(b)) for a, b in zip(before, norms, strict=True))
        inner = keras.Model(mixed.inputs, mixed.get_layer("grouped_conv").output)
        power = np.square(np.asarray(inner(pixels))).mean()
        variance = np.asarray(mixed.get_layer("grouped_bn").moving_variance)
        assert 1.9 < (variance / power).min() and (variance / power).max() < 6.1 and variance.std() > 0
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, norms, strict=True))


def test_random_values_respect_the_sign_of_what_they_replace():
    model = fresh()
    model.layers[-1].bias.assign([-2.0] * 3)
    variables = randomization.constant_variables(model)
    before = [np.array(variable) for variable in variables]
    with randomization.randomised(variables, lambda: model(noise(2, 16, 16, 3))):
        for old, variable in zip(before, variables, strict=True):
            if old.all() and "moving" not in variable.path:
                assert (np.sign(np.asarray(variable)) == np.sign(old)).all(), variable.path
            assert np.asarray(variable).std() > 0 or old.size == 1
