"""Each graph pass alone: what it computes stays, and what it is for happens."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from resnet_export.conversion import passes
from resnet_export.conversion.passes import finish, opset
from resnet_export.conversion.passes.constants import drop_identities, fold_constants

RNG = np.random.default_rng(0)


def graph(body, inputs="float[N, 3, 8, 8] x", outputs="float[] y", **constants):
    """An onnx-ir model from ONNX text; float32 constants by name, shapes inferred."""
    text = f'<ir_version: 8, opset_import: ["" : 17]> net ({inputs}) => ({outputs}) {{ {body} }}'
    proto = parser.parse_model(text)
    for name, content in constants.items():
        content = np.asarray(content)
        content = content.astype("float32") if content.dtype == np.float64 else content
        proto.graph.initializer.append(onnx.numpy_helper.from_array(content, name))
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def numbers(model, feeds):
    finish.round_weights(model.graph)
    model.ir_version = 8
    return ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)


def check(model, step, feeds, exact=False):
    """Run a pass; outputs must stay. Returns the ops that are left, in order."""
    before = numbers(model, feeds)
    step(model.graph)
    after = numbers(model, feeds)
    for a, b in zip(before, after, strict=True):
        if exact:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return [node.op_type for node in model.graph]


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


X = {"x": normal(2, 3, 8, 8)}


def test_fold_constants_computes_what_is_constant():
    model = graph(
        "a = Transpose <perm = [1, 0]> (w) b = Mul(a, s) c = Gather(b, i) y = MatMul(x, c)",
        inputs="float[N, 4] x",
        w=normal(5, 4),
        s=normal(1, 5),
        i=np.arange(4),
    )
    assert check(model, fold_constants, {"x": normal(2, 4)}) == ["MatMul"]
    assert len(model.graph.initializers) == 1


def test_fold_constants_leaves_random_numbers_and_outputs():
    model = graph(
        "r = RandomNormal <shape = [2]> () k = Identity(w) y = Add(x, r)",
        inputs="float[2] x",
        outputs="float[] y, float[] k",
        w=normal(2),
    )
    fold_constants(model.graph)
    assert sorted(node.op_type for node in model.graph) == ["Add", "Identity", "RandomNormal"]


def test_folding_rounds_once():
    """Three float32 multiplications would round three times; the folded constant is the float64 product."""
    factors = [np.float32(1 + 2**-12), np.float32(1 - 2**-13), np.float32(1 + 2**-11)]
    model = graph(
        "p = Mul(a, b) q = Mul(p, c) y = Mul(x, q)", inputs="float[N] x", a=[factors[0]], b=[factors[1]], c=[factors[2]]
    )
    fold_constants(model.graph)
    finish.round_weights(model.graph)
    (value,) = model.graph.initializers.values()
    assert value.const_value.numpy()[0] == np.float32(np.prod([np.float64(factor) for factor in factors]))


def test_drop_identities():
    model = graph("a = Identity(x) b = Relu(a) y = Identity(b)")
    assert check(model, drop_identities, X, exact=True) == ["Relu"]
    copy = graph("y = Identity(x)")
    assert check(copy, drop_identities, X, exact=True) == ["Identity"], "an input cannot be an output"


def test_spell_out_erfc():
    model = graph("y = Neg(x)", inputs="float[N, 4] x")
    next(iter(model.graph)).op_type = "Erfc"
    passes.spell_out_erfc(model.graph)
    from scipy.special import erfc

    x = normal(3, 4)
    np.testing.assert_allclose(numbers(model, {"x": x})[0], erfc(x), atol=1e-6)


def test_drop_neutral():
    model = graph("a = Mul(one, x) b = Sigmoid(a) c = Add(b, zero) y = Mul(c, x)", one=np.float32(1), zero=np.float32(0))
    assert check(model, passes.drop_neutral, X, exact=True) == ["Sigmoid", "Mul"]
    kept = graph("a = Mul(two, x) y = Add(a, one)", two=np.float32(2), one=np.float32(1))
    assert check(kept, passes.drop_neutral, X) == ["Mul", "Add"]
    broadcast = graph("y = Mul(x, one)", inputs="float[] x", one=np.ones(1))
    assert check(broadcast, passes.drop_neutral, {"x": np.float32(3)}) == ["Mul"], "it turns a scalar into a vector"


def test_fix_reshapes():
    body = "s = Shape(x) n = Gather <axis = 0> (s, zero) r = Concat <axis = 0> (n, rest) z = Reshape(x, r) y = Relu(z)"
    model = graph(body, zero=np.array([0]), rest=np.array([3, 64]))
    shape_of = next(node for node in model.graph if node.op_type == "Reshape").outputs[0]
    shape_of.shape = ir.Shape([None, 3, 64])
    assert check(model, passes.fix_reshapes, X, exact=True) == ["Reshape", "Relu"]


def test_splits_into_different_numbers_of_parts():
    body = "a, b = Split <axis = 1> (x) c, d, e, f = Split <axis = 1> (x) g = Concat <axis = 1> (c, d) h = Add(g, a) y = Neg(h)"
    model = graph(body, inputs="float[N, 4, 2] x")
    feed = {"x": normal(2, 4, 2)}
    check(model, passes.write_split_sizes, feed, exact=True)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, feed)[0], -2 * feed["x"][:, :2])


TO_LAST, TO_FIRST = "<perm = [0, 2, 3, 1]>", "<perm = [0, 3, 1, 2]>"
SINKING = {
    "elementwise": (f"a = Transpose {TO_LAST} (x) b = Relu(a) y = Transpose {TO_FIRST} (b)", {}, ["Relu"]),
    "constants follow": (
        f"a = Transpose {TO_LAST} (x) b = Mul(a, s) c = Add(b, t) y = Transpose {TO_FIRST} (c)",
        {"s": normal(3), "t": normal(1, 1, 1, 3)},
        ["Mul", "Add"],
    ),
    "two branches": (
        f"a = Transpose {TO_LAST} (x) b = Relu(a) c = Neg(a) d = Add(b, c) y = Transpose {TO_FIRST} (d)",
        {},
        ["Relu", "Neg", "Add"],
    ),
    "concat": (
        f"a = Transpose {TO_LAST} (x) b = Neg(a) c = Concat <axis = 3> (a, b) y = Transpose {TO_FIRST} (c)",
        {},
        ["Neg", "Concat"],
    ),
    "pad": (
        f"a = Transpose {TO_LAST} (x) b = Pad(a, p) y = Transpose {TO_FIRST} (b)",
        {"p": np.array([0, 1, 2, 0, 0, 3, 4, 1])},
        ["Pad"],
    ),
    "mean": (f"a = Transpose {TO_LAST} (x) y = ReduceMean <axes = [1, 2], keepdims = 0> (a)", {}, ["ReduceMean"]),
    "mean over channels": (f"a = Transpose {TO_LAST} (x) y = ReduceMean <axes = [-1], keepdims = 0> (a)", {}, ["ReduceMean"]),
    "softmax": (f"a = Transpose {TO_LAST} (x) b = Softmax <axis = -1> (a) y = Transpose {TO_FIRST} (b)", {}, ["Softmax"]),
    "slice": (
        f"a = Transpose {TO_LAST} (x) b = Slice(a, f, t, i) y = Transpose {TO_FIRST} (b)",
        {"f": np.array([1, 0]), "t": np.array([5, 2]), "i": np.array([1, 3])},
        ["Slice"],
    ),
    "split": (
        f"a = Transpose {TO_LAST} (x) b, c = Split <axis = 1> (a, k) d = Add(b, c) y = Transpose {TO_FIRST} (d)",
        {"k": np.array([4, 4])},
        ["Split", "Add"],
    ),
    "squeeze": (
        f"a = Transpose {TO_LAST} (x) b = ReduceMax <axes = [1, 2]> (a) y = Squeeze(b, i)",
        {"i": np.array([1, 2])},
        ["ReduceMax", "Squeeze"],
    ),
    "output stays transposed": (f"a = Transpose {TO_LAST} (x) y = Relu(a)", {}, ["Relu", "Transpose"]),
    "op that needs the layout": (
        f"a = Transpose {TO_LAST} (x) b = Relu(a) y = Reshape(b, s)",
        {"s": np.array([0, -1])},
        ["Relu", "Transpose", "Reshape"],
    ),
    "other operand": (
        f"a = Transpose {TO_LAST} (x) b = Relu(a) c = Reshape(x, s) d = Add(b, c) y = Transpose {TO_FIRST} (d)",
        {"s": np.array([-1, 8, 8, 3])},
        ["Relu", "Reshape", "Transpose", "Add"],
    ),
}


@pytest.mark.parametrize("case", SINKING)
def test_sink_transposes(case):
    body, constants, left = SINKING[case]
    assert check(graph(body, **constants), lambda g: (passes.sink_transposes(g), drop_identities(g)), X) == left


UNARY = ("Relu", "Neg", "Sigmoid", "Abs")


def random_graph(rng):
    """`(body, outputs, constants)` of a graph of random nodes on tensors of different layouts."""
    known, lines, constants = [("x", (2, 3, 4, 5))], [], {}
    for index in range(rng.integers(4, 12)):
        name, (source, sizes) = f"v{index}", known[rng.integers(len(known))]
        rank, kind = len(sizes), rng.integers(9)
        if kind <= 2:
            perm = [int(axis) for axis in rng.permutation(rank)]
            lines.append(f"{name} = Transpose <perm = {perm}> ({source})")
            sizes = tuple(sizes[axis] for axis in perm)
        elif kind == 3:
            others = [other for other, shape in known if shape == sizes]
            lines.append(f"{name} = Add({source}, {others[rng.integers(len(others))]})")
        elif kind == 4:
            constants[f"c{index}"] = rng.normal(size=sizes[-1:]).astype("float32")
            lines.append(f"{name} = Mul({source}, c{index})")
        elif kind == 5 and rank > 2:
            axis, keep = int(rng.integers(rank)), int(rng.integers(2))
            lines.append(f"{name} = ReduceMean <axes = [{axis}], keepdims = {keep}> ({source})")
            sizes = (*sizes[:axis], *[1] * keep, *sizes[axis + 1 :])
        elif kind == 6:
            axis = int(rng.integers(rank))
            lines.append(f"{name} = Concat <axis = {axis}> ({source}, {source})")
            sizes = (*sizes[:axis], 2 * sizes[axis], *sizes[axis + 1 :])
        elif kind == 7:
            lines.append(f"{name} = Softmax <axis = {int(rng.integers(rank)) - rank}> ({source})")
        else:
            lines.append(f"{name} = {UNARY[rng.integers(len(UNARY))]}({source})")
        known.append((name, sizes))
    outputs = [name for name, _ in known[-3:] if name != "x"]
    return "\n".join(lines), ", ".join(f"float[] {name}" for name in outputs), constants


@pytest.mark.parametrize("seed", range(8))
def test_sink_transposes_of_random_graphs(seed):
    """onnxruntime computes the same before and after, and onnx agrees with the shapes that are recorded."""
    rng = np.random.default_rng(seed)
    feed = {"x": rng.normal(size=(2, 3, 4, 5)).astype("float32")}
    for _ in range(25):
        body, outputs, constants = random_graph(rng)
        results = []
        for sunk in (False, True):
            model = graph(body, inputs="float[2, 3, 4, 5] x", outputs=outputs, **constants)
            if sunk:
                passes.sink_transposes(model.graph)
                drop_identities(model.graph)
            proto = ir.to_proto(model)
            onnx.checker.check_model(proto, full_check=True)
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
            results.append(session.run(None, feed))
        for before, after in zip(*results, strict=True):
            np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6, err_msg=body)


def test_transpose_of_ones_is_a_reshape():
    model = graph(f"y = Transpose {TO_FIRST} (x)", inputs="float[N, 1, 1, 5] x")
    assert check(model, passes.sink_transposes, {"x": normal(2, 1, 1, 5)}, exact=True) == ["Reshape"]


def test_transposes_used_by_a_subgraph_stay():
    body = (
        f"a = Transpose {TO_LAST} (x) c = ReduceMax <keepdims = 0> (x) d = Greater(c, zero) "
        "y = If (d) <then_branch = t () => (float[] p) { p = Relu(a) }, else_branch = e () => (float[] q) { q = Neg(a) }>"
    )
    model = graph(body, zero=np.float32(0))
    assert "Transpose" in check(model, passes.sink_transposes, X, exact=True)


FOLDING = {
    "batch norm after a convolution with bias": (
        "c = Conv(x, w, b) y = BatchNormalization <epsilon = 0.001> (c, g, h, m, v)",
        {"w": normal(4, 3, 3, 3), "b": normal(4), "g": normal(4), "h": normal(4), "m": normal(4), "v": abs(normal(4)) + 0.5},
        ["Conv"],
    ),
    "multiply, add, subtract, divide": (
        "c = Conv(x, w) d = Mul(s, c) e = Add(d, t) f = Sub(u, e) y = Div(f, s)",
        {"w": normal(4, 3, 1, 1), "s": abs(normal(4, 1, 1)) + 0.5, "t": normal(1, 4, 1, 1), "u": np.float32(2)},
        ["Conv"],
    ),
    "grouped": (
        "c = Conv <group = 3> (x, w) y = Mul(c, s)",
        {"w": normal(6, 1, 3, 3), "s": normal(1, 6, 1, 1)},
        ["Conv"],
    ),
    "transposed": (
        "c = ConvTranspose <strides = [2, 2]> (x, w) d = Mul(c, s) y = Add(d, s)",
        {"w": normal(3, 5, 3, 3), "s": normal(5, 1, 1)},
        ["ConvTranspose"],
    ),
    "not per channel": ("c = Conv(x, w) y = Mul(c, s)", {"w": normal(4, 3, 1, 1), "s": normal(8)}, ["Conv", "Mul"]),
    "divided by it": (
        "c = Conv(x, w, b) y = Div(s, c)",
        {"w": normal(4, 3, 1, 1), "b": normal(4) + 20, "s": normal(4, 1, 1)},
        ["Conv", "Div"],
    ),
    "used twice": (
        "c = Conv(x, w) d = Mul(c, s) y = Add(c, d)",
        {"w": normal(4, 3, 1, 1), "s": normal(4, 1, 1)},
        ["Conv", "Mul", "Add"],
    ),
}


@pytest.mark.parametrize("case", FOLDING)
def test_fold_affine(case):
    body, constants, left = FOLDING[case]
    assert check(graph(body, **constants), passes.fold_affine, X) == left


def test_fold_affine_leaves_a_shared_weight_alone():
    model = graph(
        "a = Conv(x, w) b = Mul(a, s) c = Conv(b, w) y = Mul(c, t)", w=normal(3, 3, 1, 1), s=normal(3, 1, 1), t=normal(3, 1, 1)
    )
    assert check(model, passes.fold_affine, X) == ["Conv", "Conv"]


def test_fold_affine_turns_matmul_and_bias_into_gemm():
    model = graph(
        "a = MatMul(x, w) b = Add(a, c) y = Mul(b, s)", inputs="float[N, 6] x", w=normal(6, 5), c=normal(5), s=normal(5)
    )
    assert check(model, passes.fold_affine, {"x": normal(3, 6)}) == ["Gemm"]


def test_write_batch_norm():
    model = graph("a = Mul(x, s) b = Add(a, t) y = Relu(b)", s=normal(1, 3, 1, 1), t=normal(3, 1, 1))
    assert check(model, passes.write_batch_norm, X) == ["BatchNormalization", "Relu"]
    scalar = graph("a = Mul(x, s) y = Add(a, t)", s=np.float32(2), t=normal(3, 1, 1))
    assert check(scalar, passes.write_batch_norm, X) == ["Mul", "Add"]


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize(("op", "pool"), [("ReduceMean", "GlobalAveragePool"), ("ReduceMax", "GlobalMaxPool")])
def test_write_global_pools(op, pool, keep):
    model = graph(f"y = {op} <axes = [-1, 2], keepdims = {keep}> (x)")
    assert check(model, passes.write_global_pools, X) == [pool] + ["Flatten"] * (1 - keep)
    partly = graph(f"y = {op} <axes = [2], keepdims = {keep}> (x)")
    assert check(partly, passes.write_global_pools, X) == [op]


PADS = {"p": np.array([0, 0, 1, 2, 0, 0, 3, 1])}
PADDING = {
    "convolution": ("a = Pad(x, p) y = Conv(a, w)", {"w": normal(4, 3, 3, 3)}, ["Conv"]),
    "convolution with pads": ("a = Pad(x, p) y = Conv <pads = [1, 1, 1, 1]> (a, w)", {"w": normal(4, 3, 3, 3)}, ["Conv"]),
    "pool behind ReLU": (
        "r = Relu(x) a = Pad(r, q) y = MaxPool <kernel_shape = [3, 3]> (a)",
        {"q": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        ["Relu", "MaxPool"],
    ),
    "pool of anything": (
        "a = Pad(x, q) y = MaxPool <kernel_shape = [3, 3]> (a)",
        {"q": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        ["Pad", "MaxPool"],
    ),
    "pool behind ReLU6 from below zero": (
        "r = Clip(x, low, high) a = Pad(r, q) y = MaxPool <kernel_shape = [3, 3]> (a)",
        {"q": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "low": np.float32(-1), "high": np.float32(6)},
        ["Clip", "Pad", "MaxPool"],
    ),
    "other value": ("a = Pad(x, p, one) y = Conv(a, w)", {"w": normal(4, 3, 3, 3), "one": np.float32(1)}, ["Pad", "Conv"]),
    "reflected": ('a = Pad <mode = "reflect"> (x, p) y = Conv(a, w)', {"w": normal(4, 3, 3, 3)}, ["Pad", "Conv"]),
    "channels too": (
        "a = Pad(x, q) y = Conv(a, w)",
        {"w": normal(4, 4, 1, 1), "q": np.array([0, 1, 1, 1, 0, 0, 1, 1])},
        ["Pad", "Conv"],
    ),
}


@pytest.mark.parametrize("case", PADDING)
def test_merge_pads(case):
    body, constants, left = PADDING[case]
    used = {key: value for key, value in PADS.items() if f", {key}" in body}
    assert check(graph(body, **used, **constants), passes.merge_pads, X) == left


def test_settle_same_padding():
    """onnxruntime refuses such a node where height and width are open."""
    model = graph('y = MaxPool <kernel_shape = [1, 1], strides = [2, 2], auto_pad = "SAME_UPPER"> (x)')
    passes.settle_same_padding(model.graph)
    np.testing.assert_array_equal(numbers(model, X)[0], X["x"][:, :, ::2, ::2])
    assert "auto_pad" not in next(iter(model.graph)).attributes
    narrow = graph('y = MaxPool <kernel_shape = [2, 1], strides = [3, 2], auto_pad = "SAME_UPPER"> (x)')
    passes.settle_same_padding(narrow.graph)
    assert list(next(iter(narrow.graph)).attributes["pads"].value) == [0, 0, 1, 0]
    wide = graph('y = MaxPool <kernel_shape = [3, 1], strides = [2, 2], auto_pad = "SAME_UPPER"> (x)')
    passes.settle_same_padding(wide.graph)
    assert "auto_pad" in next(iter(wide.graph)).attributes


def test_guard_pads_writes_minus_zero():
    model = graph("a = Pad(x, p) y = MaxPool <kernel_shape = [3, 3]> (a)", p=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    assert check(model, passes.guard_pads, X, exact=True) == ["Pad", "MaxPool"]
    filler = next(iter(model.graph)).inputs[2].const_value.numpy()
    assert filler == 0 and np.signbit(filler)


def test_merge_reshapes():
    model = graph(
        "a = Flatten(x) b = Reshape(a, s) c = Unsqueeze(b, i) y = Reshape(c, t)",
        s=np.array([-1, 4, 48]),
        i=np.array([1]),
        t=np.array([-1, 96, 2]),
    )
    assert check(model, passes.merge_reshapes, X, exact=True) == ["Reshape"]
    same = graph("a = Flatten(x) b = Reshape(a, s) y = Relu(b)", s=np.array([-1, 3, 8, 8]))
    same.graph.inputs[0].shape = ir.Shape([None, 3, 8, 8])
    assert check(same, passes.merge_reshapes, X, exact=True) == ["Relu"]


def test_permute_flattened():
    model = graph(f"a = Transpose {TO_LAST} (x) b = Reshape(a, s) y = MatMul(b, w)", s=np.array([-1, 192]), w=normal(192, 4))
    assert check(model, passes.permute_flattened, X) == ["Flatten", "MatMul"]


@pytest.mark.parametrize("version", [18, 21, 23])
def test_raise_opset(version):
    body = "a = Pad(x, p) b = MaxPool <kernel_shape = [3, 3]> (a) c = Conv(b, w) y = ReduceMean <axes = [1], keepdims = 0> (c)"
    model = graph(body, p=np.array([0, 0, 1, 1, 0, 0, 1, 1]), w=normal(40, 3, 3, 3))
    before = numbers(model, X)[0]
    raised = opset.raise_opset(model, version)
    assert raised.opset_imports == {"": version}
    np.testing.assert_allclose(numbers(raised, X)[0], before, rtol=1e-5, atol=1e-6)
    pad = next(node for node in raised.graph if node.op_type == "Pad")
    assert len(pad.inputs) == 2 and len(pad.inputs[1].const_value.numpy()) == 8, "OpenVINO reads no Pad with `axes`"


def test_canonical_names_do_not_depend_on_old_names():
    texts = []
    for names in (("q", "r"), ("zz", "aa")):
        model = graph(f"{names[0]} = Relu(x) {names[1]} = Neg({names[0]}) y = Relu({names[1]})")
        finish.canonical_names(model.graph, ["images"], ["logits"])
        finish.strip(model)
        texts.append(ir.to_proto(model).SerializeToString(deterministic=True))
    assert texts[0] == texts[1]
    assert [node.name for node in model.graph] == ["relu", "neg", "logits"]


def test_canonical_names_are_unique_whatever_layers_are_called():
    model = graph("a = Relu(x) b = Neg(a) c = Relu(b) d = Neg(c) y = Relu(d)")
    for node, layer in zip(model.graph, ("act", "act", "act__1", "act", "y"), strict=True):
        node.outputs[0].meta["layer"] = layer
    finish.canonical_names(model.graph, ["images"], ["logits"])
    assert [node.outputs[0].name for node in model.graph] == ["act", "act__1", "act__1__1", "act__2", "logits"]


def test_unused_domains_are_dropped():
    model = graph("y = Relu(x)")
    model.opset_imports["com.microsoft"] = 1
    model = passes.finished(model, inputs=["images"], outputs=["output"], target=17)
    assert model.opset_imports == {"": 17}
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["images", "output"]
