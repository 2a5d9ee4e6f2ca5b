"""float16: what becomes float16 and what does not, file by file and on random graphs, and faults that verification must catch."""

import os

import keras
import numpy as np
import onnx
import pytest
from keras import layers

import resnet_export as rx
from resnet_export import artifact
from resnet_export.verification.half_weights import compare_half_weights
from tests.export.conftest import noise, op_counts, run_onnx

from .graphs import normal, random_graph, write_graph

FLOAT16 = onnx.TensorProto.FLOAT16
KERNEL = {"w": normal(4, 4, 3, 3)}

# name: (graph, weights, ops that must still read float32, largest relative error)
GRAPHS = {
    "square of what stays float32": (
        """(float[N,3,16,16] x) => (float[N,4] y) {
        a = Conv(x, w)  b = Mul(a, k)  c = Mul(b, b)  d = Mul(c, i)  e = GlobalAveragePool(d)  y = Flatten(e) }""",
        {"w": normal(4, 3, 3, 3), "k": np.float32(1000), "i": np.float32(1e-10)},
        {"Mul"},
    ),
    "kernel of 1e-8 on a branch": (
        """(float[N,4,16,16] x) => (float[N,4,16,16] y) {
        a = Conv<pads=[1,1,1,1]>(x, t)  b = Add(a, x)  y = Conv<pads=[1,1,1,1]>(b, w) }""",
        KERNEL | {"t": normal(4, 4, 3, 3, scale=1e-8)},
        set(),
    ),
    "kernel of 1e-8, scaled up": (
        """(float[N,4,16,16] x) => (float[N,4,14,14] y) {
        a = Conv(x, t)  b = Mul(a, k)  y = Conv<pads=[1,1,1,1]>(b, w) }""",
        KERNEL | {"t": normal(4, 4, 3, 3, scale=1e-8), "k": np.float32(1e7)},
        {"Conv", "Mul"},
    ),
    "mean of 1e-7": (
        """(float[N,4,16,16] x) => (float[N,4,16,16] y) {
        a = BatchNormalization(x, s, b, m, v)  y = Conv<pads=[1,1,1,1]>(a, w) }""",
        KERNEL | {"s": normal(4), "b": normal(4), "m": normal(4, scale=1e-7), "v": np.abs(normal(4)) + 0.1},
        set(),
    ),
    "epsilon of 1e-12": (
        """(float[N,4,16,16] x) => (float[N,4,14,14] y) {
        c = Conv(x, w)  r = Relu(c)  q = Mul(r, r)  m = ReduceMean<axes=[1]>(q)  e = Add(m, eps)  s = Sqrt(e)
        y = Div(r, s) }""",
        KERNEL | {"eps": np.float32(1e-12)},
        {"Add", "Sqrt", "Div", "Mul", "ReduceMean"},
    ),
    "mask of booleans": (
        """(float[N,4,16,16] x) => (float[N,4,14,14] y) {
        a = Conv(x, w)  b = Greater(a, z)  c = Cast<to=1>(b)  y = Mul(a, c) }""",
        KERNEL | {"z": np.float32(0.1)},
        set(),
    ),
    "indices as floats": (
        """(float[N,7] x) => (float[N,5] y) {
        i = Cast<to=7>(x)  a = Gather(t, i)  m = ReduceMean<axes=[1], keepdims=0>(a)  y = MatMul(m, w) }""",
        {"t": normal(5000, 8), "w": normal(8, 5)},
        {"Cast"},
    ),
    "indices": (
        """(int64[N,7] x) => (float[N,5] y) {
        a = Gather(t, x)  m = ReduceMean<axes=[1], keepdims=0>(a)  y = MatMul(m, w) }""",
        {"t": normal(50, 8), "w": normal(8, 5)},
        set(),
    ),
    "sizes that can be halved twice": (
        """(float[N,3,H,W] x) => (float[N,4,H,W] y) {
        a = Conv<pads=[1,1,1,1]>(x, w)  p = MaxPool<kernel_shape=[4,4], strides=[4,4]>(a)
        u = Resize<mode="nearest">(p, , scales)  q = Concat<axis=1>(a, u)  y = Conv<pads=[1,1,1,1]>(q, v) }""",
        {"w": normal(4, 3, 3, 3), "v": normal(4, 8, 3, 3), "scales": np.array([1, 1, 4, 4], "float32")},
        set(),
    ),
    "sizes of 200 at least": (
        """(float[N,3,H,W] x) => (float[N,4,A,B] y) {
        a = Conv(x, w)  y = MaxPool<kernel_shape=[199,199], strides=[99,99]>(a) }""",
        {"w": normal(4, 3, 3, 3)},
        set(),
    ),
    "a head of exp": (
        "(float[N,4,16,16] x) => (float[N,4,14,14] y) { a = Conv(x, w)  y = Exp(a) }",
        KERNEL,
        {"Exp"},
    ),
    "positions of the largest": (
        """(uint8[N,4,16,16] x) => (float[N,4,14,14] y, int64[N,14,14] best) {
        c = Cast<to=1>(x)  y = Conv(c, w)  best = ArgMax<axis=1, keepdims=0>(y) }""",
        KERNEL,
        {"ArgMax"},
    ),
    "input, weight and inner value as outputs": (
        """(float[N,4] x) => (float[N,4] same, float[N,3] y, float[N,3] z, float[4,3] w) {
        same = Identity(x)  y = MatMul(x, w)  z = Relu(y) }""",
        {"w": normal(4, 3)},
        set(),
    ),
    "a condition": (
        """(float[N,4,16,16] x) => (float[N,4,14,14] y) {
        a = Conv(x, w)  m = ReduceMax<keepdims=0>(a)  c = Greater(m, z)
        b = If(c) <then_branch = t () => (float[N,4,14,14] r) { r = Mul(a, k) },
                   else_branch = e () => (float[N,4,14,14] r) { r = Identity(a) }>
        y = Relu(b) }""",
        KERNEL | {"z": np.float32(0.1), "k": np.float32(0.5)},
        {"If"},
    ),
    "a condition on the size": (
        """(float[N,4,16,W] x) => (float[N,4,14,V] y) {
        s = Shape(x)  w = Gather<axis=0>(s, axis)  c = Greater(w, limit)
        b = If(c) <then_branch = t () => (float[N,4,16,W] r) { r = Mul(x, k) },
                   else_branch = e () => (float[N,4,16,W] r) { r = Identity(x) }>
        y = Conv(b, w0) }""",
        {"w0": normal(4, 4, 3, 3), "axis": np.int64(3), "limit": np.int64(100), "k": np.float32(0.5)},
        {"If", "Shape"},
    ),
    "an output that is tiny throughout": (
        "(float[N,4,16,16] x) => (float[N,4,14,14] y) { a = Conv(x, w)  y = Mul(a, k) }",
        KERNEL | {"k": np.float32(1e-9)},
        {"Mul"},
    ),
}


def random_feeds(path, seed=1):
    """A batch of two that the graph takes: images 0–1, or whole numbers below 50."""
    feeds = []
    for value in onnx.load(path).graph.input:
        dims = value.type.tensor_type.shape.dim
        shape = [dim.dim_value or (2 if axis == 0 else 208) for axis, dim in enumerate(dims)]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        random = np.random.default_rng(seed)
        is_image = dtype == np.float32 and len(shape) == 4
        feeds.append((random.random(shape) if is_image else random.integers(0, 50, shape)).astype(dtype))
    return feeds


def read_in_float32(path):
    """The ops of a float16 file that compute in float32: all but casts whose inputs are float32 tensors."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    fixed = {"Resize": 1}  # its scales are float32 in any case
    return {
        node.op_type
        for node in inferred.node
        if (node.op_type != "Cast" or node.attribute[0].i not in (1, 10))
        and any(kinds.get(name) == onnx.TensorProto.FLOAT for name in node.input[: fixed.get(node.op_type)])
        or any(attribute.HasField("g") for attribute in node.attribute)
    }


@pytest.mark.parametrize("case", GRAPHS)
def test_each_kind_of_graph_has_a_float16_form(tmp_path, case):
    text, weights, float32_ops = GRAPHS[case]
    source = write_graph(tmp_path / "m.onnx", f"g {text}", weights)
    result = rx.to_float16(source, tmp_path / "h.onnx")
    assert read_in_float32(tmp_path / "h.onnx") == float32_ops
    feeds = random_feeds(source)
    for optimise in (True, False):
        for want, got in zip(run_onnx(source, *feeds), run_onnx(tmp_path / "h.onnx", *feeds, optimise=optimise), strict=True):
            if want.dtype == np.float32:
                assert np.abs(want - got).max() <= 5e-3 * np.abs(want).max()
    initializers = onnx.load(tmp_path / "h.onnx").graph.initializer
    assert any(tensor.data_type == FLOAT16 for tensor in initializers) and result.report.weights["compared"] >= 1
    assert os.listdir(tmp_path) == ["m.onnx", "h.onnx"] or sorted(os.listdir(tmp_path)) == ["h.onnx", "m.onnx"]


SEEDS = 25


def test_random_graphs(tmp_path):
    """A file is right, or refused with a reason; nearly all are right. Judged by plain onnxruntime on other numbers."""
    refused = []
    for seed in range(SEEDS):
        source = random_graph(tmp_path / "m.onnx", seed)
        try:
            rx.to_float16(source, tmp_path / "h.onnx")
        except rx.MismatchError as error:
            refused.append((seed, str(error)))
            continue
        onnx.checker.check_model(tmp_path / "h.onnx", full_check=True)
        feeds = np.random.default_rng(seed).integers(0, 256, (4, 3, 8, 8)).astype("float32")
        (want,), (got,) = run_onnx(source, feeds), run_onnx(tmp_path / "h.onnx", feeds)
        assert np.isfinite(got).all() and np.abs(want - got).max() <= 2e-2 * np.abs(want).max(), seed
    assert len(refused) <= SEEDS // 10, refused
    assert all("float16" in message or "float32" in message for _, message in refused)


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 12, 13, 17, 21])
@pytest.mark.parametrize("weights_are_inputs", [False, True])
def test_files_of_other_exporters(tmp_path, opset, weights_are_inputs):
    pad, clip, squeeze = "Pad(x, pads)", "Clip(b, low, high)", "Squeeze(g, axes)"
    weights = {"w": normal(4, 3, 3, 3), "d": normal(4, 5), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "axes": np.array([2, 3])}
    weights |= {
        "low": np.float32(0),
        "high": np.float32(6),
        "s": normal(4),
        "t": normal(4),
        "m": normal(4),
        "v": np.ones(4, "float32"),
    }
    if opset < 13:
        squeeze = "Squeeze<axes=[2,3]>(g)"
        del weights["axes"]
    if opset < 11:
        pad, clip = "Pad<pads=[0,0,1,1,0,0,1,1]>(x)", "Clip<min=0.0, max=6.0>(b)"
        for name in ("pads", "low", "high"):
            del weights[name]
    text = f"""g (float[N,3,8,8] x) => (float[N,5] y) {{ p = {pad}  a = Conv(p, w)  b = BatchNormalization(a, s, t, m, v)
        c = {clip}  g = GlobalAveragePool(c)  f = {squeeze}  y = MatMul(f, d) }}"""
    old = {"ir_version": 3 if opset < 9 else 4, "weights_are_inputs": weights_are_inputs or opset < 9}
    source = write_graph(tmp_path / "m.onnx", text, weights, opset=opset, **(old if opset < 14 else {"ir_version": 10}))
    result = rx.to_float16(source, tmp_path / "h.onnx")
    raised = f"the opset was raised from {opset} to 13"
    assert (raised in result.notes) == (opset < 13) and [value.name for value in onnx.load(tmp_path / "h.onnx").graph.input] == [
        "x"
    ]
    feeds = noise(3, 3, 8, 8)
    assert np.abs(run_onnx(source, feeds)[0] - run_onnx(tmp_path / "h.onnx", feeds)[0]).max() < 1e-2
    quantised = rx.to_int8(
        source, tmp_path / "q.onnx", calibration=noise(32, 3, 8, 8), scores="y", output_kind="logits", max_drop=25
    )
    assert op_counts(tmp_path / "q.onnx")["QuantizeLinear"] and (raised in quantised.notes) == (opset < 13)


def test_an_opset_that_cannot_be_raised(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("No adapter for Upsample\nat line 7")

    graph, weights = "g (float[N,3,8,8] x) => (float[N,4,6,6] y) { y = Conv(x, w) }", {"w": normal(4, 3, 3, 3)}
    source = write_graph(tmp_path / "m.onnx", graph, weights, opset=9)
    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    with pytest.raises(rx.UsageError) as caught:
        rx.to_float16(source, tmp_path / "h.onnx")
    assert str(caught.value) == (
        f"{source} has opset 9, float16 and int8 need 13, and onnx cannot raise it (No adapter for Upsample); "
        "export the model again with opset 13 or later"
    )
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_what_float16_cannot_hold_at_all_is_refused(tmp_path):
    source = write_graph(
        tmp_path / "m.onnx", "g (float[N,4,8,8] x) => (float[N,4,6,6] y) { y = Conv(x, w) }", {"w": normal(4, 4, 3, 3, scale=1e6)}
    )
    with pytest.raises(rx.MismatchError, match="every weight of .*m.onnx would stay float32: 1 nodes .* numbers beyond 32752"):
        rx.to_float16(source, tmp_path / "h.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_file_without_weights_is_refused_for_that(tmp_path):
    source = write_graph(tmp_path / "m.onnx", "g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }", {})
    with pytest.raises(rx.UsageError, match="m.onnx has no weights, which float16 would make smaller"):
        rx.to_float16(source, tmp_path / "h.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_case_of_the_users_shows_what_overflows(tmp_path):
    """The model takes 0–1 and overflows on pixels. With samples, random numbers are from their range."""
    source = write_graph(
        tmp_path / "m.onnx", "g (float[N,4,8,8] x) => (float[N,4,6,6] y) { y = Conv(x, w) }", {"w": normal(4, 4, 3, 3, scale=200)}
    )
    result = rx.to_float16(source, tmp_path / "h.onnx", samples=np.random.default_rng(0).random((20, 4, 8, 8), "float32"))
    assert [comparison.data for comparison in result.report.comparisons] == ["samples", "samples", "pixels", "noise"]
    assert result.notes == ()


# ---------------------------------------------------------------- faults


def halved(weights):
    return {name: np.asarray(value, "float32").astype("float16") for name, value in weights.items()}


FAULTS = {
    "two steps": (1.0, lambda w: np.nextafter(np.nextafter(w, np.float16(9)), np.float16(9)), [3]),
    "two steps of a tiny tensor": (1e-6, lambda w: w + np.float16(1.2e-7), [3]),
    "a tiny tensor lost": (1e-6, lambda w: np.zeros_like(w), ...),
    "another order": (1.0, lambda w: w[::-1], ...),
    "a sign": (1.0, lambda w: -w, [0]),
    "not a number": (1.0, lambda w: w * np.float16("nan"), [5]),
    "infinite": (1.0, lambda w: w * np.float16("inf"), [5]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_weight_is_found(tmp_path, fault):
    scale, change, where = FAULTS[fault]
    expected = {"w": normal(4, 4, 3, 3, scale=scale)}
    graph = "g (float16[N,4,8,8] x) => (float16[N,4,6,6] y) { y = Conv(x, w) }"
    right = write_graph(tmp_path / "right.onnx", graph, halved(expected))
    assert compare_half_weights(right, expected) == ({"compared": 1, "elements": 144}, [])
    wrong = halved(expected)["w"].copy().ravel()
    wrong[where] = change(wrong[where])
    write_graph(tmp_path / "wrong.onnx", graph, {"w": wrong.reshape(4, 4, 3, 3)})
    (problem,) = compare_half_weights(tmp_path / "wrong.onnx", expected)[1]
    assert problem.startswith("weight 'w' differs in ")


def test_one_step_of_rounding_is_no_fault(tmp_path):
    """The same weights folded on another machine may round to the neighbour."""
    expected = {"w": normal(4, 4, 3, 3)}
    near = np.nextafter(halved(expected)["w"], np.float16(9))
    path = write_graph(tmp_path / "m.onnx", "g (float16[N,4,8,8] x) => (float16[N,4,6,6] y) { y = Conv(x, w) }", {"w": near})
    assert compare_half_weights(path, expected)[1] == []


# ---------------------------------------------------------------- Keras models


def test_a_trained_model(trained, tmp_path):
    source, _, tests = trained
    result = rx.to_float16(source, tmp_path / "half.onnx", samples=tests)
    assert result.report.passed and result.report.precision == "float16" and result.size < 0.7 * source.stat().st_size
    assert onnx.load(tmp_path / "half.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    a, b = run_onnx(source, tests)[0], run_onnx(tmp_path / "half.onnx", tests)[0]
    assert 0 < np.abs(a - b).max() < 1e-2 * np.abs(a).max()
    metadata = artifact.read_metadata(tmp_path / "half.onnx")
    assert metadata == artifact.read_metadata(source) | {"tolerances": {"precision": "float16", "relative": 0.01}}
    assert rx.to_float16(source, tmp_path / "again.onnx", samples=tests).sha256 == result.sha256


def test_what_would_overflow_stays_float32(tmp_path):
    x = keras.Input((16, 16, 3))
    y = layers.Conv2D(4, 3, name="huge")(x)
    y = layers.Rescaling(1e-6)(layers.ReLU()(y))
    model = keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(y)))
    kernel = model.get_layer("huge").kernel
    kernel.assign(np.asarray(kernel) * 1e4)
    rx.to_onnx(model, tmp_path / "m.onnx")
    result = rx.to_float16(tmp_path / "m.onnx", tmp_path / "half.onnx")
    assert "stay float32" in result.notes[0]
    feeds = noise(2, 16, 16, 3) * 100
    a, b = run_onnx(tmp_path / "m.onnx", feeds)[0], run_onnx(tmp_path / "half.onnx", feeds)[0]
    assert np.isfinite(b).all() and np.abs(a - b).max() < 1e-2 * np.abs(a).max()


def test_a_dynamic_size_model_with_multiples(tmp_path):
    x = keras.Input((None, None, 3))
    first = layers.Conv2D(8, 3, padding="same", activation="relu")(layers.Rescaling(1 / 255)(x))
    deep = layers.Conv2D(8, 3, padding="same", activation="relu")(layers.MaxPooling2D(4)(first))
    y = layers.Concatenate()([first, layers.UpSampling2D(4)(deep)])
    model = keras.Model(x, layers.Conv2D(2, 1, activation="sigmoid")(y))
    result = rx.to_onnx(model, tmp_path / "h.onnx", precision="float16")
    assert {tuple(comparison.shape) for comparison in result.report.comparisons} == {(1, 96, 96, 3), (3, 64, 96, 3)}
    assert rx.verify(tmp_path / "h.onnx", model).passed


def test_export_straight_to_float16(mixed, tmp_path):
    result = rx.to_onnx(mixed, tmp_path / "h.onnx", precision="float16")
    assert result.report.precision == "float16" and os.listdir(tmp_path) == ["h.onnx"]
    assert [row["precision"] for row in result.table] == ["float32", "float16"]
    assert result.table[1]["size"] == result.size < 0.7 * result.table[0]["size"] and result.table[0]["milliseconds"] > 0
    report = rx.verify(tmp_path / "h.onnx", mixed)
    assert report.passed and report.weights["compared"] >= 14 and report.diverges is None
    proto = onnx.load(tmp_path / "h.onnx")
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "grouped_conv/kernel")
    wrong = onnx.numpy_helper.to_array(tensor).copy()
    wrong.flat[5] += 0.01 * np.abs(wrong).max()
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    report = rx.verify(tmp_path / "wrong.onnx", mixed)
    assert [problem for problem in report.problems if "grouped_conv/kernel" in problem], "too little to show in the output"
    wrong[:, 0] = -wrong[:, 0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(wrong, tensor.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    assert rx.verify(tmp_path / "wrong.onnx", mixed).diverges == "grouped_bn", "which the convolution absorbed"
