"""What is in an ONNX file: nodes, parameters, multiply-adds, ports, metadata, parts, and what onnxruntime makes of it."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import artifact
from .sessions import session

if TYPE_CHECKING:
    import onnx

    from .sessions import TensorInfo


MULTIPLYING = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# How many numbers a constant must have to count as a parameter of an op; those of other ops (bounds, sizes, scales) never do.
LEAST = dict.fromkeys((*MULTIPLYING, "BatchNormalization", "InstanceNormalization", "LayerNormalization", "PRelu"), 1)
LEAST |= dict.fromkeys(("Add", "Sub", "Mul", "Div"), 2)
PASSING_ON = ("DequantizeLinear", "Cast")


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        path: The file.
        files: `{file name: bytes}`; external data is a second file.
        ir_version, opsets: Version of the ONNX format, and the opsets that the file uses.
        inputs, outputs: `[{"name", "shape", "dtype"}]`.
        nodes: `{op: number}`, most frequent first.
        parameters: Numbers in weights, biases and per-channel factors, quantised or not; bounds and other scalars are none.
        macs: Multiply-adds of one row, or None where sizes are dynamic.
        metadata: See `artifact`; labels as their number.
        runtime_nodes: `{op: number}` after onnxruntime's default optimisation on the CPU.
        blocks: `[{"name", "ops", "nodes", "parameters", "sources", "skips"}]`: runs of nodes whose names share their first part,
            in order; `sources` are the positions of the blocks that it reads from, `skips` whether it reads one of them twice, as
            the two branches of a residual block do.
    """

    path: str
    files: dict[str, int]
    ir_version: int
    opsets: dict[str, int]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    nodes: dict[str, int]
    parameters: int
    macs: int | None
    metadata: dict[str, Any]
    runtime_nodes: dict[str, int]
    blocks: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Look into an ONNX file.

    Args:
        path: ONNX file.

    Returns:
        Inspection

    Raises:
        UsageError: The file is missing, damaged, or one that onnxruntime cannot run.
    """
    opened = session(path, "cpu")
    proto = artifact.read_proto(path, external_data=False)
    sizes = parameters(proto)
    metadata = dict(opened.metadata)
    card = dict(metadata.get("card") or {})
    if card.get("labels"):
        card["labels"] = len(card["labels"])
    return Inspection(
        path=str(path),
        files={file.name: file.stat().st_size for file in artifact.companions(Path(path))},
        ir_version=proto.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        inputs=[asdict(value) for value in opened.inputs],
        outputs=[asdict(value) for value in opened.outputs],
        nodes=_counted(proto),
        parameters=sum(sizes.values()),
        macs=multiply_adds(proto, opened.inputs),
        metadata=metadata | ({"card": card} if card else {}),
        runtime_nodes=_after_onnxruntime(path),
        blocks=blocks(proto, sizes),
    )


def parameters(proto: onnx.ModelProto) -> dict[str, int]:
    """Return `{name: numbers}` of the constants that are weights of an op, see `LEAST`, or become some through `PASSING_ON`."""
    constants, found = {name: int(np.prod(dims)) for name, dims in _constants(proto).items()}, {}
    passed = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type in PASSING_ON}
    for node in proto.graph.node:
        for name in (passed.get(name, name) for name in node.input):
            if constants.get(name, 0) >= LEAST.get(node.op_type, np.inf):
                found[name] = constants[name]
    return found


def _counted(proto):
    return dict(Counter(node.op_type for node in proto.graph.node).most_common())


def _after_onnxruntime(path):
    """Node counts of the graph that onnxruntime really runs."""
    import onnxruntime as ort

    from .sessions import session_options

    with artifact.temporary_folder("resnet-export-") as folder:
        options = session_options()
        options.log_severity_level = 4  # it warns that such a file is for this machine only, which is what is wanted
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return _counted(artifact.read_proto(options.optimized_model_filepath))


def multiply_adds(proto: onnx.ModelProto, inputs: Sequence[TensorInfo]) -> int | None:
    """Count the multiply-adds of one row in convolutions and matrix products; None if another size than the batch is dynamic.

    Args:
        proto: `ModelProto`; external data is not needed.
        inputs: `runtime.TensorInfo` of every input.
    """
    import onnx

    if any(isinstance(size, str) for value in inputs for size in value.shape[1:]):
        return None
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    names = {value.name for value in inputs}
    # Up to IR version 3 the weights are among the graph's inputs too.
    for value in fixed.graph.input:
        if value.name in names and value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(fixed).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (*graph.value_info, *graph.output)
    }
    weights = _weight_shapes(proto)
    total = 0
    for node in graph.node:
        if node.op_type not in MULTIPLYING or node.input[1] not in weights:
            continue
        weight, output = weights[node.input[1]], shapes.get(node.output[0]) or []
        if not output or 0 in output:
            return None
        if node.op_type == "ConvTranspose":
            output = [*output[:1], 1, *shapes.get(node.input[0], output)[2:]]
            total += int(np.prod(output)) * int(np.prod(weight))
        else:
            total += int(np.prod(output)) * (int(np.prod(weight[1:])) if node.op_type == "Conv" else weight[0])
    return total


def _constants(proto):
    """`{name: shape}` of the initializers, and of the tensors in Constant nodes, which older exporters write."""
    shapes = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":
                shapes[node.output[0]] = list(attribute.t.dims)
    return shapes


def _weight_shapes(proto):
    """Shapes of the constants by name, and of those before a DequantizeLinear by its output."""
    shapes = _constants(proto)
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    return shapes


def blocks(proto: onnx.ModelProto, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Return runs of nodes whose names share what comes before the last underscore-separated part, in the file's order."""
    found, maker, read = [], {}, Counter()
    for node in proto.graph.node:
        name = node.name.rsplit("/", 1)[-1].rsplit("__", 1)[0]
        name = "_".join(name.split("_")[:2]) if "_" in name else name
        if not found or found[-1]["name"] != name:
            found.append({"name": name, "ops": {}, "nodes": 0, "parameters": 0, "sources": [], "skips": False})
            read.clear()
        block, position = found[-1], len(found) - 1
        block["ops"][node.op_type] = block["ops"].get(node.op_type, 0) + 1
        block["nodes"] += 1
        block["parameters"] += sum(sizes.get(name, 0) for name in node.input)
        outer = {name for name in node.input if maker.get(name, position) != position}
        read.update(outer)
        block["sources"] = sorted({*block["sources"], *(maker[name] for name in outer)})
        block["skips"] = any(count > 1 for count in read.values())
        maker.update(dict.fromkeys(node.output, position))
    return found


ROW = 26
STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2em auto;max-width:70em;color:#222}main{display:flex}"
    f"table{{border-collapse:collapse}}td,th{{height:{ROW}px;padding:0 .8em;text-align:left;white-space:nowrap;"
    "box-shadow:inset 0 -1px #ddd}.bar{background:#4a7ab5;height:.8em;display:inline-block}"
    "svg{flex:none}path{fill:none;stroke:#b5594a;stroke-width:1.5}rect{fill:#4a7ab5}line{stroke:#4a7ab5;stroke-width:2}"
)


def picture(inspection: Inspection) -> str:
    """Draw the graph as an HTML page without scripts: its blocks, their connections, ops and parameters.

    A curve on the left goes from a block to a later one than the next; one on the right marks a block with two branches.
    """
    most = max((block["parameters"] for block in inspection.blocks), default=0) or 1
    rows = []
    for block in inspection.blocks:
        ops = ", ".join(f"{op} ×{count}" if count > 1 else op for op, count in block["ops"].items())
        bar = f'<span class="bar" style="width:{12 * block["parameters"] / most:.2f}em"></span>'
        cells = (html.escape(block["name"]), html.escape(ops), f"{bar} {block['parameters']:,}")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    title = html.escape(Path(inspection.path).name)
    ports = "; ".join(
        f"{kind} {_port(value)}" for kind, values in (("in", inspection.inputs), ("out", inspection.outputs)) for value in values
    )
    macs = "dynamic size" if inspection.macs is None else f"{inspection.macs / 1e9:.3f} GMACs"
    facts = f"{inspection.parameters:,} parameters, {macs}, {sum(inspection.nodes.values())} nodes; {ports}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>'
        f"<p>{html.escape(facts)}</p><main>{_joints(inspection.blocks)}"
        f"<table><tr><th>block</th><th>ops</th><th>parameters</th></tr>{''.join(rows)}</table></main></html>"
    )


def _joints(found, width=140, x=110):
    """The picture next to the table: a box per row, and what joins them."""
    middle = [ROW * (position + 1.5) for position in range(len(found))]
    parts = []
    for position, block in enumerate(found):
        y = middle[position]
        for source in block["sources"]:
            if source == position - 1:
                parts.append(f'<line x1="{x}" y1="{middle[source]}" x2="{x}" y2="{y}"/>')
            else:
                bulge = min(x - 10, 12 * (position - source))
                parts.append(f'<path d="M{x} {middle[source]}C{x - bulge} {middle[source]} {x - bulge} {y} {x} {y}"/>')
        if block["skips"]:
            parts.append(f'<path d="M{x} {y - 9}C{x + 24} {y - 9} {x + 24} {y + 9} {x} {y + 9}"/>')
        parts.append(f'<rect x="{x - 9}" y="{y - 6}" width="18" height="12" rx="3"/>')
    height = ROW * (len(found) + 1)
    return f'<svg width="{width}" height="{height}" role="img" aria-label="how the blocks read each other">{"".join(parts)}</svg>'


def _port(value):
    return f"{value['name']} {value['dtype']} [{', '.join(map(str, value['shape']))}]"
