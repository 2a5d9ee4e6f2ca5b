"""The judge of random models is judged: it sees faults planted in files, and takes a refusal for true only where it is."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import resnet_export as rx

from . import generator, judging

RECIPE = generator.Recipe(
    lines=(
        "x = inputs = keras.Input((9, 11, 3))",
        "x = layers.Conv2D(4, 3, padding='same', activation='relu')(x)",
        "x = layers.Conv2D(5, 3, strides=2, padding='same')(x)",
        "outputs = [layers.Dense(3, activation='softmax')(layers.Flatten()(x)), layers.Conv2D(1, 1)(x)]",
        "model = keras.Model(inputs, outputs)",
    )
)


def _node(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def _wrong_weight(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[7] += 0.05
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _wrong_axis(model: onnx.ModelProto) -> None:
    del _node(model, "Softmax").attribute[:]
    _node(model, "Softmax").attribute.append(onnx.helper.make_attribute("axis", 0))


def _missing_activation(model: onnx.ModelProto) -> None:
    _node(model, "Relu").op_type = "Identity"


def _flipped_pads(model: onnx.ModelProto) -> None:
    conv = [node for node in model.graph.node if node.op_type == "Conv"][1]
    attributes = [attribute for attribute in conv.attribute if attribute.name not in ("pads", "auto_pad")]
    del conv.attribute[:]
    conv.attribute.extend([*attributes, onnx.helper.make_attribute("pads", [0, 0, 2, 2])])


def _swapped_outputs(model: onnx.ModelProto) -> None:
    outputs = [onnx.ValueInfoProto.FromString(output.SerializeToString()) for output in model.graph.output]
    del model.graph.output[:]
    model.graph.output.extend(reversed(outputs))


FAULTS = (_wrong_weight, _wrong_axis, _missing_activation, _flipped_pads, _swapped_outputs)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    model, path = RECIPE.model(), tmp_path_factory.mktemp("judged") / "model.onnx"
    rx.to_onnx(model, path)
    batches = generator.feeds_of(RECIPE, model)
    return model, path, batches, [generator.outputs_of(model, feeds) for feeds in batches]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_wrong(fault: Callable[[onnx.ModelProto], None], exported: tuple, tmp_path: Path) -> None:
    model, path, batches, expected = exported
    assert judging.compare(RECIPE, path, batches, expected, model) == ""
    proto = onnx.load(path)
    fault(proto)
    onnx.save(proto, tmp_path / "spoiled.onnx")
    assert judging.compare(RECIPE, tmp_path / "spoiled.onnx", batches, expected, model)


def test_a_file_that_does_not_run_is_named_so(exported: tuple, tmp_path: Path) -> None:
    model, _, batches, expected = exported
    (tmp_path / "empty.onnx").write_bytes(b"nothing")
    assert judging.compare(RECIPE, tmp_path / "empty.onnx", batches, expected, model).startswith("onnxruntime:")


def test_a_changed_model_is_noticed() -> None:
    model = RECIPE.model()
    before = judging.state(model)
    assert judging.state(model) == before
    kernel = model.layers[1].kernel
    kernel.assign(np.nextafter(np.array(kernel), np.float32(np.inf)))
    assert judging.state(model) != before


def _with(*lines: str, shape: str = "(12, 14, 3)", **options: object) -> generator.Recipe:
    lines = (f"x = inputs = keras.Input({shape})", *lines, "model = keras.Model(inputs, x)")
    return dataclasses.replace(RECIPE, lines=lines, options=options)


TRUE_REFUSALS = {
    "has no weights, which float16 would make smaller": _with("x = layers.ReLU()(x)", precision="float16"),
    "they see numbers beyond 32752": _with("x = layers.Dense(4, kernel_initializer='ones')(1e5 * x)", precision="float16"),
    "contrast_limited_adaptive_histogram_equalization' cannot be traced as a TensorFlow graph of these sizes": _with(
        "x = layers.ContrastLimitedAdaptiveHistogramEqualization()(x)", shape="(None, None, 3)"
    ),
    "ConvLSTM layers only support static input shapes": _with(
        "x = layers.ConvLSTM1D(2, 3)(x)", "x = layers.GlobalAveragePooling1D()(x)", dynamic_size=True
    ),
    "'Erfinv'": _with("x = ops.erfinv(ops.tanh(x))"),
}


@pytest.mark.parametrize("reason", judging.UNEXPORTABLE)
def test_true_refusals(reason: str) -> None:
    found = judging.judge(TRUE_REFUSALS[reason], twice=False)
    assert found.kind == judging.REFUSED and reason in found.detail
    if not TRUE_REFUSALS[reason].options:
        assert judging.judge_stock(TRUE_REFUSALS[reason]).kind != judging.RIGHT


def test_a_false_refusal_is_no_true_one() -> None:
    found = judging.judge(_with("x = layers.Conv2D(2, 3)(x)", top_k=3), twice=False)
    assert found.kind == judging.FALSE_REFUSAL


SMALL_GATE = generator.Recipe(
    lines=(
        "x = inputs = keras.Input((4,))",
        "outputs = layers.Dense(3, activation='sigmoid', bias_initializer=keras.initializers.Constant(-9))(x)",
        "model = keras.Model(inputs, outputs)",
    ),
    trained=False,
)


def test_the_error_of_onnxruntimes_sigmoid_is_no_fault_of_a_file(tmp_path: Path) -> None:
    model = SMALL_GATE.model()
    model.layers[-1].kernel.assign(np.zeros((4, 3)))
    batches = generator.feeds_of(SMALL_GATE, model)
    want = [generator.outputs_of(model, feeds) for feeds in batches]
    path = tmp_path / "gate.onnx"
    rx.to_onnx(model, path)
    assert "is off by" in judging._wrong(SMALL_GATE, path, batches, want, model)
    assert not judging.compare(SMALL_GATE, path, batches, want, model)
    model.layers[-1].bias.assign(np.full(3, -9.001))
    want = [generator.outputs_of(model, feeds) for feeds in batches]
    assert "is off by" in judging.compare(SMALL_GATE, path, batches, want, model)
