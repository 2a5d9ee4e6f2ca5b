"""The stride of 1×1 convolutions that read one tensor moves before them, without changing a bit."""

import keras
import numpy as np
import onnx_ir as ir
import pytest

import resnet_export as rx
from resnet_export.artifact import read_proto
from resnet_export.quantization.source import inner_values, open_source
from resnet_export.quantization.strides import subsample_once
from tests.export.conftest import op_counts


def block(x, *convolutions):
    """Convolutions given as (filters, window, stride, padding) that read one tensor, pooled."""
    outputs = [
        keras.layers.Conv2D(filters, window, stride, padding=padding, bias_initializer="normal")(x)
        for filters, window, stride, padding in convolutions
    ]
    return [keras.layers.GlobalAveragePooling2D()(output) for output in outputs]


CASES = {
    "two": ([(4, 1, 2, "valid"), (6, 1, 2, "valid")], 1),
    "same padding": ([(4, 1, 2, "same"), (6, 1, 2, "same")], 1),
    "three": ([(4, 1, 3, "same"), (6, 1, 3, "valid"), (2, 1, 3, "valid")], 1),
    "one": ([(4, 1, 2, "valid")], 0),
    "no stride": ([(4, 1, 1, "valid"), (6, 1, 1, "valid")], 0),
    "another stride": ([(4, 1, 2, "valid"), (6, 1, 3, "valid")], 0),
    "another window": ([(4, 1, 2, "valid"), (6, 3, 2, "same")], 0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [14, 15])
def test_results_are_equal_bit_for_bit(case, size, tmp_path):
    convolutions, pools = CASES[case]
    inputs = keras.Input((size, size, 3))
    x = keras.layers.Conv2D(5, 3, padding="same", activation="relu")(inputs)
    model = keras.Model(inputs, keras.layers.Concatenate()(block(x, *convolutions) * 2))
    rx.to_onnx(model, tmp_path / "m.onnx")
    source = open_source(tmp_path / "m.onnx")
    changed = subsample_once(source.model)
    assert [node.op_type for node in changed.graph].count("MaxPool") == pools
    assert [node.op_type for node in source.model.graph].count("MaxPool") == 0, "the source is not changed"
    name = source.model.graph.outputs[0].name
    feeds = {"images": np.random.default_rng(0).normal(size=(2, size, size, 3)).astype("float32")}
    before, after = (inner_values(graph, feeds, [name])[name] for graph in (source.model, changed))
    assert np.array_equal(before, after)


def test_int8_files_subsample_in_8_bits(tmp_path):
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    model = keras.Model(inputs, keras.layers.Add()(block(x, (8, 1, 2, "valid"), (8, 1, 2, "valid"))))
    images = np.random.default_rng(0).normal(size=(32, 16, 16, 3)).astype("float32")
    rx.to_onnx(model, tmp_path / "m.onnx")
    rx.to_int8(tmp_path / "m.onnx", tmp_path / "q.onnx", calibration=images, max_error=20)
    assert op_counts(tmp_path / "q.onnx")["MaxPool"] == 1
    graph = ir.from_proto(read_proto(tmp_path / "q.onnx")).graph
    pool = next(node for node in graph if node.op_type == "MaxPool")
    assert pool.inputs[0].producer().op_type == "DequantizeLinear"
    assert [user.op_type for user, _ in pool.outputs[0].uses()] == ["QuantizeLinear"]
