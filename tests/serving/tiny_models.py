"""Tiny ONNX models with a card, and requests for them."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from resnet_export.artifact import digest, encode_metadata
from resnet_export.family import Family, Member

LABELS = ["red", "green", "blue", "dark: night", "grün"]
WEIGHTS = np.random.default_rng(7).normal(size=(3, 5)).astype("f4")
TABLE = np.arange(30, dtype="f4").reshape(10, 3)
BIAS = np.array([0.1, -0.2, 0.3, 1.5, -1.0], "f4")


def classifier_logits(pixels):
    """What `classifier` computes, in float64."""
    return pixels.astype("f8").mean((1, 2)) / 255 @ WEIGHTS.astype("f8") + BIAS


def save(path, nodes, inputs, outputs, initialisers=(), metadata=None):
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(a, n) for n, a in initialisers])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, encode_metadata(metadata or {}))
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def classifier(path, dtype="float32", size=8, batch="batch", bias=BIAS, labels=LABELS, resize=None):
    """Mean colour, times `WEIGHTS`, plus a bias: an image classifier that plain numpy can check."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    spatial = [size, size] if size else ["height", "width"]
    card = {
        "name": "tiny",
        "config": None,
        "preprocessing": {"mode": "none", "size": [size, size] if size else None, "resize": resize, "interpolation": "bilinear"},
        "labels": labels,
        "weights": {"source": "made up"},
    }
    return save(
        path,
        [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float"], ["mean"], axes=[1, 2], keepdims=0),
            helper.make_node("Div", ["mean", "scale"], ["unit"]),
            helper.make_node("Gemm", ["unit", "weights", "bias"], ["logits"]),
        ],
        [helper.make_tensor_value_info("images", kind, [batch, *spatial, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [("scale", np.float32(255)), ("weights", WEIGHTS), ("bias", np.asarray(bias, "f4"))],
        {"card": card, "tolerances": {"relative": 1e-5, "precision": "float32"}, "sha256": "ab" * 32},
    )


def scorer(path, kind, ending=None, units=5, labels=None, rows=()):
    """As `classifier`, with what `ending` (an ONNX operator) makes of the numbers as the output `scores` of a kind."""
    card = {"name": kind, "config": None, "preprocessing": {"mode": "none", "size": [8, 8]}, "labels": labels, "weights": {}}
    return save(
        path,
        [
            helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2], keepdims=0),
            helper.make_node("Div", ["mean", "scale"], ["unit"]),
            helper.make_node("Gemm", ["unit", "weights", "bias"], ["sums"]),
            helper.make_node(ending or "Identity", ["sums"], ["scores"]),
            *[helper.make_node("Identity", ["sums"], [name]) for name in rows],
        ],
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 8, 8, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", units]) for name in ("scores", *rows)],
        [("scale", np.float32(255)), ("weights", WEIGHTS[:, :units]), ("bias", BIAS[:units])],
        {"card": card, "outputs": {"scores": kind} | dict.fromkeys(rows, "other")},
    )


def doubler(path, dtype="float16"):
    """`y = x + x` for one datatype, and `n`, the row sums, as a second output."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return save(
        path,
        [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("ReduceSum", ["x", "axis"], ["n"], keepdims=1)],
        [helper.make_tensor_value_info("x", kind, ["batch", 4])],
        [helper.make_tensor_value_info("y", kind, ["batch", 4]), helper.make_tensor_value_info("n", kind, ["batch", 1])],
        [("axis", np.array([1]))],
    )


def gatherer(path):
    """`y = TABLE[ids]`, row by row; ids beyond the table make the run fail."""
    return save(
        path,
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1, 3])],
        [("table", TABLE)],
    )


def identity(path, dtype):
    """`y = x` for one datatype, and `n`, the first column, as a second output."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return save(
        path,
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Slice", ["x", "from", "to", "axis"], ["n"])],
        [helper.make_tensor_value_info("x", kind, ["batch", 4])],
        [helper.make_tensor_value_info("y", kind, ["batch", 4]), helper.make_tensor_value_info("n", kind, ["batch", 1])],
        [("from", np.array([0])), ("to", np.array([1])), ("axis", np.array([1]))],
    )


def echo(path, kind=TensorProto.STRING, shape=("batch", 2)):
    """Two inputs given back as two outputs."""
    return save(
        path,
        [helper.make_node("Identity", ["a"], ["c"]), helper.make_node("Identity", ["b"], ["d"])],
        [helper.make_tensor_value_info("a", kind, shape), helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", "k"])],
        [helper.make_tensor_value_info("c", kind, shape), helper.make_tensor_value_info("d", TensorProto.FLOAT, ["batch", "k"])],
    )


def infer_json(inputs, **more):
    """An inference request's JSON body from `{name: (datatype, array)}`."""
    entries = [{"name": n, "datatype": t, "shape": list(a.shape), "data": a.tolist()} for n, (t, a) in inputs.items()]
    return json.dumps({"inputs": entries, **more}).encode()


# Biases of the members of `family`, deepest first: they tell which one has answered.
MEMBERS = {"1": BIAS, "0.75": BIAS + 10, "0.5": BIAS - 10}


def family(folder, members=MEMBERS, name="net", **options):
    """A family of classifiers, whose answers differ by their biases; the path of its `family.json`."""
    written = []
    for number, (depth, bias) in enumerate(members.items()):
        path = classifier(folder / f"{name}-{depth}.onnx", bias=bias, **options)
        share = float(depth)
        written.append(
            Member(
                depth,
                path.name,
                digest(path),
                path.stat().st_size,
                "float32",
                share,
                share,
                int(1000 * share),
                ("b",) * number,
                8 * share,
            )
        )
    whole = Family(name, tuple(written), "loss", 10, 5, {"device": "cpu", "batch": 1, "threads": 1})
    (folder / "family.json").write_text(json.dumps(whole.to_json()))
    return folder / "family.json"
