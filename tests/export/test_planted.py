"""Faults planted in correct files: whatever changes what a file computes, `verify` must refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from keras import layers

import resnet_export as rx
from tests.helpers import randomise

from .conftest import run_onnx

LABELS = ("cat", "dog", "fox", "owl", "bee")


def build() -> keras.Model:
    """Every construct that a fault below changes, and two outputs of one shape."""
    keras.utils.set_random_seed(3)
    entry = keras.Input((12, 12, 3))
    x = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="strided")(entry)
    x = layers.BatchNormalization(name="free_norm")(x)
    x = layers.LeakyReLU(0.2, name="leaky")(x)
    x = layers.Conv2D(6, 3, padding="same", dilation_rate=2, use_bias=False, name="dilated")(x)
    x = layers.BatchNormalization(name="folded_norm")(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation="tanh", name="depthwise")(x)
    x = layers.AveragePooling2D(3, 1, padding="same", name="mean_pool")(x)
    x = layers.Permute((2, 1, 3), name="turned")(x)
    side = layers.Conv2D(6, 1, activation="sigmoid", name="gate")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = layers.Subtract(name="difference")([layers.Multiply(name="gated")([x, side]), x])
    x = layers.Concatenate(name="both")([x, layers.Conv2DTranspose(6, 3, padding="same", name="transposed")(x)])
    x = layers.LayerNormalization(epsilon=1e-3, name="layer_norm")(x)
    x = layers.GlobalAveragePooling2D()(x)
    scores = layers.Dense(5, activation="softmax", name="scores")(x)
    return randomise(keras.Model(entry, [scores, layers.Dense(5, activation="softmax", name="others")(x)]), seed=4)


def build_classifier() -> keras.Model:
    keras.utils.set_random_seed(5)
    entry = keras.Input((8, 8, 3))
    x = layers.GlobalMaxPooling2D()(layers.Conv2D(4, 3, activation="relu")(entry))
    return randomise(keras.Model(entry, layers.Dense(5, activation="softmax")(x)), seed=6)


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return build()


@pytest.fixture(scope="module")
def file(model: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted") / "model.onnx"
    rx.to_onnx(model, path)
    return path


Fault = Callable[[onnx.ModelProto], None]
FAULTS: dict[str, Fault] = {}
# One of each sort; `--all` runs the rest too.
FAST = (
    "one weight is off by a thousandth",
    "kernel with height and width swapped",
    "one channel scaled as by another epsilon",
    "two biases exchanged",
    "no softmax",
    "pads on the other side",
    "another dilation with pads to match",
    "the parts of a concatenation exchanged",
    "outputs exchanged",
)


def fault(function: Fault) -> Fault:
    """Register a fault by the name of its function."""
    FAULTS[function.__name__.replace("_", " ")] = function
    return function


def nodes(proto: onnx.ModelProto, *ops: str) -> list[onnx.NodeProto]:
    found = [node for node in proto.graph.node if node.op_type in ops]
    assert found, f"the file has no {ops}, but {sorted({node.op_type for node in proto.graph.node})}"
    return found


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == name)


def initialiser(proto: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), name))


def kernel(proto: onnx.ModelProto, *shape: int) -> str:
    """The name of a float initialiser of this shape."""
    return next(tensor.name for tensor in proto.graph.initializer if tuple(tensor.dims) == shape and tensor.data_type == 1)


def become_identity(proto: onnx.ModelProto, *ops: str) -> None:
    node = nodes(proto, *ops)[-1]
    node.op_type = "Identity"
    del node.attribute[:]
    del node.input[1:]


@fault
def one_weight_is_off_by_a_thousandth(proto: onnx.ModelProto) -> None:
    def change(content: np.ndarray) -> np.ndarray:
        content.flat[np.abs(content).argmax()] *= 1.001
        return content

    initialiser(proto, kernel(proto, 6, 6, 3, 3), change)


@fault
def kernel_with_height_and_width_swapped(proto: onnx.ModelProto) -> None:
    initialiser(proto, kernel(proto, 6, 6, 3, 3), lambda content: np.ascontiguousarray(content.swapaxes(2, 3)))


@fault
def kernel_with_two_channels_swapped(proto: onnx.ModelProto) -> None:
    initialiser(proto, kernel(proto, 6, 3, 3, 3), lambda content: np.ascontiguousarray(content[:, [1, 0, 2]]))


@fault
def square_kernel_transposed(proto: onnx.ModelProto) -> None:
    initialiser(proto, kernel(proto, 6, 6, 1, 1), lambda content: np.ascontiguousarray(content.swapaxes(0, 1)))


@fault
def one_channel_scaled_as_by_another_epsilon(proto: onnx.ModelProto) -> None:
    def change(content: np.ndarray) -> np.ndarray:
        content[2] *= np.float32(np.sqrt(1 / (1 + 1e-3)))
        return content

    initialiser(proto, kernel(proto, 6, 6, 3, 3), change)


@fault
def another_bias(proto: onnx.ModelProto) -> None:
    bias = nodes(proto, "Conv")[0].input[2]
    initialiser(proto, bias, lambda content: content + np.float32(0.01))


@fault
def two_biases_exchanged(proto: onnx.ModelProto) -> None:
    with_bias = [node for node in nodes(proto, "Conv") if len(node.input) > 2]
    first, second = with_bias[0], with_bias[-1]
    first.input[2], second.input[2] = second.input[2], first.input[2]


@fault
def a_bias_left_out(proto: onnx.ModelProto) -> None:
    del next(node for node in nodes(proto, "Conv") if len(node.input) > 2).input[2:]


@fault
def no_relu(proto: onnx.ModelProto) -> None:
    become_identity(proto, "Relu")


@fault
def no_tanh(proto: onnx.ModelProto) -> None:
    become_identity(proto, "Tanh")


@fault
def no_softmax(proto: onnx.ModelProto) -> None:
    become_identity(proto, "Softmax")


@fault
def sigmoid_became_hard(proto: onnx.ModelProto) -> None:
    nodes(proto, "Sigmoid")[0].op_type = "HardSigmoid"


@fault
def another_slope(proto: onnx.ModelProto) -> None:
    attribute(nodes(proto, "LeakyRelu")[0], "alpha").f = 0.21


@fault
def pads_on_the_other_side(proto: onnx.ModelProto) -> None:
    node = next(node for node in nodes(proto, "Conv") if list(attribute(node, "pads").ints) == [0, 0, 1, 1])
    attribute(node, "pads").ints[:] = [1, 1, 0, 0]


@fault
def another_dilation_with_pads_to_match(proto: onnx.ModelProto) -> None:
    node = next(
        node for node in nodes(proto, "Conv") if [2, 2] in [list(a.ints) for a in node.attribute if a.name == "dilations"]
    )
    attribute(node, "dilations").ints[:] = [1, 1]
    attribute(node, "pads").ints[:] = [1, 1, 1, 1]


@fault
def another_group_order(proto: onnx.ModelProto) -> None:
    initialiser(proto, kernel(proto, 6, 1, 3, 3), lambda content: np.ascontiguousarray(content[::-1]))


@fault
def a_mean_that_counts_its_pads(proto: onnx.ModelProto) -> None:
    node = nodes(proto, "AveragePool")[0]
    kept = [entry for entry in node.attribute if entry.name != "count_include_pad"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("count_include_pad", 1)])


@fault
def maximum_for_mean(proto: onnx.ModelProto) -> None:
    node = nodes(proto, "AveragePool")[0]
    kept = [entry for entry in node.attribute if entry.name != "count_include_pad"]
    node.op_type = "MaxPool"
    del node.attribute[:]
    node.attribute.extend(kept)


@fault
def the_operands_of_a_difference_exchanged(proto: onnx.ModelProto) -> None:
    node = nodes(proto, "Sub")[0]
    node.input[0], node.input[1] = node.input[1], node.input[0]


@fault
def the_parts_of_a_concatenation_exchanged(proto: onnx.ModelProto) -> None:
    node = nodes(proto, "Concat")[0]
    node.input[0], node.input[1] = node.input[1], node.input[0]


@fault
def softmax_over_the_batch(proto: onnx.ModelProto) -> None:
    node = nodes(proto, "Softmax")[0]
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("axis", 0))


@fault
def height_and_width_of_the_map_exchanged(proto: onnx.ModelProto) -> None:
    node = next(node for node in nodes(proto, "Transpose") if len(attribute(node, "perm").ints) == 4)
    perm = attribute(node, "perm").ints
    perm[:] = [{1: 2, 2: 1}.get(axis, axis) for axis in perm]


@fault
def outputs_exchanged(proto: onnx.ModelProto) -> None:
    first, second = (output.name for output in proto.graph.output)
    for node in proto.graph.node:
        renamed = [{first: second, second: first}.get(name, name) for name in node.output]
        del node.output[:]
        node.output.extend(renamed)


@fault
def one_output_given_twice(proto: onnx.ModelProto) -> None:
    first, second = (output.name for output in proto.graph.output)
    for node in proto.graph.node:
        if second in node.output:
            node.op_type, node.input[:], node.output[:] = "Identity", [first], [second]
            del node.attribute[:]


def differs(one: Path, other: Path) -> bool:
    """Whether two files compute different numbers, by onnxruntime alone."""
    batch = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype("float32")
    pairs = zip(run_onnx(one, batch, optimise=False), run_onnx(other, batch, optimise=False), strict=True)
    return any(not np.array_equal(here, there) for here, there in pairs)


def test_the_correct_file_is_accepted(model: keras.Model, file: Path) -> None:
    assert rx.verify(file, model).passed


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS])
def test_a_planted_fault_is_refused(model: keras.Model, file: Path, tmp_path: Path, name: str) -> None:
    proto = onnx.load(file)
    FAULTS[name](proto)
    onnx.save(proto, tmp_path / "faulty.onnx")
    assert differs(file, tmp_path / "faulty.onnx"), "this fault changes nothing, so that there is nothing to find"
    report = rx.verify(tmp_path / "faulty.onnx", model)
    assert not report.passed and report.problems


def test_exchanged_labels_are_refused(tmp_path: Path) -> None:
    classifier, path = build_classifier(), tmp_path / "model.onnx"
    rx.to_onnx(classifier, path, labels=LABELS)
    assert rx.verify(path, classifier, labels=LABELS).passed
    proto = onnx.load(path)
    entry = next(entry for entry in proto.metadata_props if "dog" in entry.value)
    content = json.loads(entry.value)
    content["labels"][0], content["labels"][1] = content["labels"][1], content["labels"][0]
    entry.value = json.dumps(content)
    onnx.save(proto, path)
    report = rx.verify(path, classifier, labels=LABELS)
    assert not report.passed and any("labels" in problem for problem in report.problems)


@pytest.mark.slow
def test_every_weight_matters(model: keras.Model, file: Path, tmp_path: Path) -> None:
    """The largest number of every float initialiser changed by a hundredth, one file each."""
    names = [tensor.name for tensor in onnx.load(file).graph.initializer if tensor.data_type == 1]
    missed = []
    for name in names:
        proto = onnx.load(file)

        def change(content: np.ndarray) -> np.ndarray:
            content.flat[np.abs(content).argmax()] *= 1.01
            return content

        initialiser(proto, name, change)
        onnx.save(proto, tmp_path / "faulty.onnx")
        if differs(file, tmp_path / "faulty.onnx") and rx.verify(tmp_path / "faulty.onnx", model).passed:
            missed.append(name)
    assert missed == []
