"""`inspect`: figures that can be checked by hand."""

import json
from html.parser import HTMLParser

import keras
import numpy as np
import onnx
import pytest
from keras import layers

import keras_resnet as kr
import resnet_export as rx
from resnet_export.cli import main
from resnet_export.runtime import inspection

from .conftest import op_counts


def test_figures_of_a_file(mixed, mixed_export):
    found = inspection.inspect(mixed_export[1])
    assert found.nodes == op_counts(mixed_export[1]) and list(found.nodes.values()) == sorted(found.nodes.values(), reverse=True)
    assert found.opsets == {"ai.onnx": 17} and found.ir_version == 8
    assert found.inputs == [{"name": "images", "shape": ("batch", 32, 32, 3), "dtype": "float32"}]
    assert found.metadata["card"]["labels"] == 7
    assert found.files == {"mixed.onnx": mixed_export[0].size}
    assert sum(block["nodes"] for block in found.blocks) == sum(found.nodes.values())
    assert sum(block["parameters"] for block in found.blocks) == found.parameters
    assert sum(found.runtime_nodes.values()) != sum(found.nodes.values()), "onnxruntime fuses and reorders"
    assert json.loads(json.dumps(found.to_json()))["path"] == str(mixed_export[1])


def weights_in_the_file(model):
    """Kernels and biases; a folded norm gives its convolution a bias, a free one is four numbers per channel."""
    weighted = [layer for layer in model.layers if hasattr(layer, "kernel")]
    kernels = sum(int(np.prod(layer.kernel.shape)) for layer in weighted)
    return kernels + sum(int(layer.output.shape[-1]) for layer in weighted) + 4 * model.get_layer("preact_bn").gamma.shape[0]


def test_parameters_are_weights_and_nothing_else(mixed, mixed_export, tmp_path):
    """Bounds of a ReLU6, the filler of a pad, scales and zero points are constants too."""
    expected = weights_in_the_file(mixed)
    assert inspection.inspect(mixed_export[1]).parameters == expected
    calibration = np.random.default_rng(0).normal(size=(8, 32, 32, 3))
    rx.to_int8(mixed_export[1], tmp_path / "q.onnx", calibration=calibration, max_drop=100.0)
    quantised = inspection.inspect(tmp_path / "q.onnx")
    assert quantised.parameters == expected, "what was quantised counts once, without its scales"
    assert quantised.macs == inspection.inspect(mixed_export[1]).macs
    rx.to_float16(mixed_export[1], tmp_path / "half.onnx")
    assert inspection.inspect(tmp_path / "half.onnx").parameters == expected


def test_multiply_adds_by_hand(tmp_path):
    model = keras.Sequential([keras.Input((9, 9, 3)), layers.Conv2D(8, 3), layers.ReLU(), layers.Flatten(), layers.Dense(5)])
    rx.to_onnx(model, tmp_path / "m.onnx")
    assert inspection.inspect(tmp_path / "m.onnx").macs == 7 * 7 * 8 * 3 * 3 * 3 + 7 * 7 * 8 * 5
    grouped = keras.Sequential(
        [keras.Input((8, 8, 4)), layers.Conv2D(8, 3, groups=2, padding="same"), layers.Conv2DTranspose(6, 2, 2)]
    )
    rx.to_onnx(grouped, tmp_path / "g.onnx")
    assert inspection.inspect(tmp_path / "g.onnx").macs == 64 * 8 * 2 * 9 + 64 * 8 * 6 * 4


def test_multiply_adds_agree_with_the_model(mixed, mixed_export, open_export):
    assert inspection.inspect(mixed_export[1]).macs == kr.model_info(mixed).macs
    assert inspection.inspect(open_export[1]).macs is None


@pytest.mark.parametrize("ir_version", [3, 8])
def test_old_files_list_weights_among_the_inputs_or_in_constant_nodes(tmp_path, ir_version):
    """Up to IR version 3 every initializer is an input too; some exporters write Constant nodes."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    rng = np.random.default_rng(0)
    kernel = onnx.numpy_helper.from_array(rng.normal(size=(4, 3, 3, 3)).astype("float32"), "kernel")
    dense = onnx.numpy_helper.from_array(rng.normal(size=(4, 5)).astype("float32"), "dense")
    nodes = [
        helper.make_node("Constant", [], ["dense"], value=dense),
        helper.make_node("Conv", ["image", "kernel"], ["maps"], kernel_shape=[3, 3]),
        helper.make_node("GlobalAveragePool", ["maps"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("MatMul", ["flat", "dense"], ["logits"]),
    ]
    inputs = [helper.make_tensor_value_info("image", floats, ["n", 3, 8, 8])]
    inputs += [helper.make_tensor_value_info("kernel", floats, [4, 3, 3, 3])] if ir_version == 3 else []
    outputs = [helper.make_tensor_value_info("logits", floats, ["n", 5])]
    graph = helper.make_graph(nodes, "old", inputs, outputs, [kernel])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=ir_version)
    onnx.save(model, tmp_path / "old.onnx")
    found = inspection.inspect(tmp_path / "old.onnx")
    assert [value["name"] for value in found.inputs] == ["image"] and found.ir_version == ir_version
    assert found.macs == 6 * 6 * 4 * 3 * 9 + 4 * 5 and found.parameters == 4 * 3 * 9 + 4 * 5
    assert main(["inspect", str(tmp_path / "old.onnx"), "--html", str(tmp_path / "page.html")]) == 0


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows = 0

    def handle_starttag(self, tag, attributes):
        self.rows += tag == "tr"


def test_command_and_page(mixed_export, tmp_path, capsys):
    path = str(mixed_export[1])
    assert main(["inspect", path, "--html", str(tmp_path / "page.html")]) == 0
    assert "GlobalAveragePool" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    parser = Cells()
    parser.feed(page)
    assert parser.rows == 1 + len(inspection.inspect(path).blocks) and "<script" not in page
    assert main(["inspect", path, path, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert main(["inspect", path, path, "--html", str(tmp_path / "page.html")]) == 2
    (tmp_path / "cut.onnx").write_bytes(mixed_export[1].read_bytes()[:3000])
    assert main(["inspect", str(tmp_path / "cut.onnx")]) == 2


def test_blocks_are_joined_as_they_read_each_other(tmp_path):
    x = keras.Input((16, 16, 3))
    a = layers.Conv2D(4, 3, padding="same", name="first_conv")(x)
    b = layers.Conv2D(4, 3, padding="same", name="stage_second_conv1")(a)
    b = layers.Add(name="stage_second_add")([a, layers.Conv2D(4, 3, padding="same", name="stage_second_conv2")(b)])
    c = layers.Concatenate(name="third")([a, layers.ReLU(name="between_relu")(b)])
    rx.to_onnx(keras.Model(x, c), tmp_path / "m.onnx")
    found = inspection.inspect(tmp_path / "m.onnx")
    rows = {block["name"]: block for block in found.blocks}
    place = {block["name"]: index for index, block in enumerate(found.blocks)}
    second = [block for block in found.blocks if block["skips"]]
    assert len(second) == 1 and set(second[0]["ops"]) == {"Conv", "Add"}
    (last,) = [block for block in found.blocks if "Concat" in block["ops"]]
    assert place["first_conv"] in last["sources"] and len(last["sources"]) == 2, rows
    page = inspection.picture(found)
    assert page.count("<rect") == len(found.blocks) and page.count("<path") == 2, "one long curve, one block with two branches"


def test_names_in_the_page_are_escaped(mixed_export):
    found = inspection.inspect(mixed_export[1])
    block = {"name": "<script>alert(1)</script>", "ops": {"Conv": 2}, "nodes": 2, "parameters": 3, "sources": [], "skips": False}
    page = inspection.picture(type(found)(**{**found.to_json(), "blocks": [block]}))
    assert "<script>" not in page and "&lt;script&gt;" in page and "Conv ×2" in page


def test_text_has_outputs_kinds_and_the_card_without_its_curve(tmp_path, capsys):
    rx.to_onnx(kr.resnet20(weights="cifar10"), tmp_path / "r.onnx")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "r.onnx")]) == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    assert lines["outputs"] == "name logits, shape ('batch', 10), dtype float32" and lines["output_kinds"] == "logits logits"
    assert lines["card"] == "model resnet20, labels 10, preprocessing cifar10, weights keras_resnet/resnet20.cifar10"
    assert not {"metadata", "options", "blocks"} & set(lines)
