"""float16 files: which nodes compute in float16, and the file verified against the float32 one that it is made from."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from .. import artifact
from ..conversion.passes.common import array, attribute
from ..errors import MismatchError, UsageError
from ..metadata import TOLERANCES
from ..results import Comparison, ExportResult, VerificationReport
from ..verification.agreement import RUNTIME
from ..verification.half_weights import COPY, compare_half_weights
from ..verification.metrics import measure
from .accuracy import layer_errors, open_converted, require, worst_layers
from .samples import Case, find_cases, read_samples
from .source import Source, largest_values, open_source, save

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
TOLERANCE, COSINE = TOLERANCES["float16"], 0.9999
# Numbers of which float16 keeps 2^-10 of the largest: its largest number with room for inputs that were not seen, and the
# number whose 2^-10th is half a step of float16's smallest numbers.
LARGEST, SMALLEST, PRECISION = 65504.0 / 2, 2.0**-15, 2.0**-10
# Shares of the nodes that go back to float32, the worst first, where the whole file misses the bound.
RETRIES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)

# As PyTorch's autocast: sums and powers, which leave float16's range, stay float32.
FLOAT32_OPS = frozenset(
    "CumSum Exp GroupNormalization InstanceNormalization LogSoftmax LpNormalization LRN MeanVarianceNormalization Pow "
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceProd ReduceSum ReduceSumSquare Softmax".split()
)
# Where a rounded input changes the result beyond measure, from a position on: near zero, at a step, or among equals.
EXACT_INPUTS = {name: 0 for name in "ArgMax ArgMin Ceil Cos Floor Log Mod Reciprocal Round Sin Sqrt Tan TopK".split()}
EXACT_INPUTS |= {"Div": 1, "Mod": 0}
# What rounds its inputs in any case; the chain of float32 nodes before an exact input ends there.
ROUNDING = frozenset(
    "AveragePool BatchNormalization Conv ConvTranspose Einsum Gemm GlobalAveragePool GlobalMaxPool GRU LayerNormalization LSTM "
    "MatMul MaxPool RNN".split()
)
LINEAR = frozenset("BatchNormalization Conv ConvTranspose Gemm MatMul".split())
MOVING = frozenset(
    "Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape Slice SpaceToDepth Split Squeeze "
    "Tile Transpose Unsqueeze Where".split()
)


def to_float16(
    source: str | os.PathLike[str] | Source,
    path: str | os.PathLike[str],
    *,
    samples: Any = None,
    overwrite: bool = True,
    keep_failed: bool = False,
) -> ExportResult:
    """Write a float16 file with float32 inputs and outputs; nodes whose numbers float16 cannot hold stay float32.

    Args:
        source: Float32 ONNX file, of any exporter; opsets below 13 are raised.
        path: File to write.
        samples: What to verify on, in addition to random batches: a folder of images, an `.npz` or `.npy` file, an array, or
            `{input name: array}`.
        overwrite: Whether `path` may exist.
        keep_failed: Keep a file that failed verification as `path + ".failed"`.

    Returns:
        The result; notes say how many nodes stayed float32, and why.

    Raises:
        UsageError: A file cannot be read or written.
        MismatchError: The outputs differ by more than 1e-2 of the largest value, or the cosine is below 0.9999.
    """
    artifact.check_target(path, overwrite)
    opened = open_source(source)
    cases = find_cases(opened, None if samples is None else read_samples(samples, opened.session))
    common.ShapeInferencePass(check_type=False, strict_mode=False)(opened.model)
    expected = {name: value.const_value for name, value in opened.model.graph.initializers.items()}
    reasons, tiny = float32_nodes(opened, cases)
    with artifact.publishing(path, overwrite, keep_failed) as work:
        report = _converted(opened, work, cases, expected, reasons)
        if not report.passed and tiny:
            reasons |= tiny
            report = _converted(opened, work, cases, expected, reasons)
        for share in RETRIES:
            if report.passed:
                break
            worst = _worst_nodes(opened, work, cases[0], reasons, share)
            more = reasons | dict.fromkeys(worst, "their rounding shows in the outputs")
            if not _has_weights(in_float16(opened, more)):
                break  # the report says by how much float16 is too coarse
            reasons = more
            report = _converted(opened, work, cases, expected, reasons)
        notes = (*opened.notes, *_notes(reasons))
        report = dataclasses.replace(report, path=str(path), notes=(*report.notes, *notes))
        require(report)
        return ExportResult(str(path), report, artifact.digest(work), "float16", artifact.disk_size(work), notes)


def _converted(
    source: Source, work: Path, cases: list[Case], expected: Mapping[str, Any], reasons: Mapping[str, str]
) -> VerificationReport:
    """Write the float16 file with some nodes in float32, and compare it.

    Raises:
        UsageError: There are no weights.
        MismatchError: No weight is left that could be float16.
    """
    if not any(_is_weight(value) for value in source.model.graph.initializers.values()):
        raise UsageError(f"{source.name} has no weights, which float16 would make smaller; keep the float32 file")
    converted = in_float16(source, reasons)
    if not _has_weights(converted):
        why = "; ".join(_notes(reasons)) or "no operator with weights has a float16 form"
        raise MismatchError(f"every weight of {source.name} would stay float32: {why}")
    save(converted, work, source, "float16", TOLERANCE)
    return verify_float16(work, source, cases, expected)


def _has_weights(model: ir.Model) -> bool:
    """Whether a graph has weights in float16."""
    return any(value.const_value.dtype == HALF for value in model.graph.initializers.values())


def _is_weight(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype == FLOAT


def _notes(reasons: Mapping[str, str]) -> list[str]:
    """How many nodes stay float32, by reason; those that do so in every model are not worth a note."""
    counts = Counter(reason for reason in reasons.values() if not reason.startswith("as "))
    return [f"{count} nodes stay float32: {reason}" for reason, count in counts.items()]


def _worst_nodes(source: Source, path: Path, case: Case, kept: Collection[str], share: float) -> list[str]:
    errors = layer_errors(source.model, artifact.read_proto(path), case.feeds, every_node=True)
    names = [name for name in worst_layers(errors) if name not in kept]
    return names[: max(1, round(share * len(names)))]


# ---------------------------------------------------------------- which nodes


TINY = f"they see only numbers below {SMALLEST:.0e}"


def float32_nodes(source: Source, cases: list[Case]) -> tuple[dict[str, str], dict[str, str]]:
    """Return `{node name: reason}` of the nodes that have to stay float32, and of those that see only tiny numbers.

    The latter matter only where something makes the numbers large again: float16 rounds them to steps of 6e-8, which does not
    show after an addition to ordinary numbers. So the outputs decide whether they stay float32.

    Args:
        source: The float32 file, with the dtypes of its values.
        cases: Batches that show which numbers there are.
    """
    largest: dict[str, float] = {}
    for case in cases:
        for name, value in largest_values(source.model, case.feeds).items():
            largest[name] = max(value, largest.get(name, 0.0))
    found: dict[str, str] = {}
    exact = _before_exact_inputs(source.model.graph)
    from_shapes: set[ir.Node] = set()
    for node in source.model.graph:
        if reason := _reason(node, source.opset, largest, exact, from_shapes, found):
            found[node.name] = reason
    tiny = [node.name for node in source.model.graph if node.name not in found and _is_tiny(node, largest)]
    return found, dict.fromkeys(tiny, TINY)


def _is_tiny(node: ir.Node, largest: Mapping[str, float]) -> bool:
    values = (*node.inputs, *node.outputs)
    return any(value is not None and 0 < largest.get(value.name, 0.0) < SMALLEST for value in values) or not all(
        _fits(value) for value in node.inputs
    )


def _reason(
    node: ir.Node,
    opset: int,
    largest: Mapping[str, float],
    exact: Collection[ir.Node],
    from_shapes: set[ir.Node],
    kept: Mapping[str, str],
) -> str | None:
    """Why a node stays float32, or None. Nodes that compute on shapes are added to `from_shapes`."""
    data = [value for value in (*node.inputs, *_captured(node)) if value is not None and value.const_value is None]
    if node.op_type in ("Shape", "Size") or data and all(value.producer() in from_shapes for value in data):
        from_shapes.add(node)
        return "because it computes on shapes"
    if float16_positions(node, opset) is None or node.op_type in FLOAT32_OPS:
        return "as its operator requires"
    if node in exact:
        return "because the following nodes need it exactly"
    moved = [value.producer() for value in data if value.dtype == FLOAT] if node.op_type in MOVING else []
    if moved and all(producer is not None and producer.name in kept for producer in moved):
        return "because it moves float32 values"
    values = [largest.get(value.name, 0.0) for value in (*node.inputs, *node.outputs) if value is not None]
    if any(not value <= LARGEST for value in values):
        return f"they see numbers beyond {LARGEST:.0f}, half of float16's largest"
    if node.op_type not in LINEAR and not all(_fits(value) for value in node.inputs):
        return "they have constants that float16 cannot hold, such as an epsilon of 1e-12"
    return None


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """What the subgraphs of a node (`If`, `Loop`) read from the graph around it, in addition to its inputs."""
    for attr in node.attributes.values():
        for graph in [attr.as_graph()] if attr.type == ir.AttributeType.GRAPH else ():
            within = [*graph.inputs, *(output for inner in graph.all_nodes() for output in inner.outputs)]
            inside = {id(value) for value in within}
            read = [*(value for inner in graph.all_nodes() for value in inner.inputs), *graph.outputs]
            yield from (value for value in read if value is not None and id(value) not in inside)


def _fits(value: ir.Value | None) -> bool:
    """Whether float16 holds a constant to 2^-10 of its largest number; true for what is computed."""
    content = None if value is None else array(value)
    if content is None or content.dtype != np.float32:
        return True
    content = content[np.isfinite(content)]
    with np.errstate(over="ignore"):
        error = np.abs(content - content.astype("float16").astype("float32")).max(initial=0)
    return bool(error <= PRECISION * np.abs(content).max(initial=0))


def _before_exact_inputs(graph: ir.Graph) -> set[ir.Node]:
    """The nodes whose inputs must not be rounded, and those that these inputs are computed from, up to the last rounding one."""
    found: set[ir.Node] = set()
    waiting = []
    for node in graph:
        first = EXACT_INPUTS.get(node.op_type)
        if node.op_type == "Cast" and _rounds_to_integer(node):
            first = 0
        if first is None or node.op_type == "Div" and node.inputs[1].const_value is not None:
            continue
        found.add(node)
        waiting += [value.producer() for value in node.inputs[first:] if value is not None]
    while waiting:
        node = waiting.pop()
        if node is None or node in found or node.op_type in ROUNDING:
            continue
        found.add(node)
        if not node.op_type.startswith("Reduce"):
            waiting += [value.producer() for value in node.inputs if value is not None]
    return found


def _rounds_to_integer(cast: ir.Node) -> bool:
    to = ir.DataType(attribute(cast, "to"))
    return cast.inputs[0].dtype == FLOAT and to.is_integer()


@dataclass(frozen=True)
class Positions:
    """Which inputs and outputs of a node are float32 in a float32 graph, and may be float16."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def float16_positions(node: ir.Node, opset: int) -> Positions | None:
    """Return which values of a node can be float16 by ONNX's schema of its operator, or None if it has no float16 form.

    None too for operators of other domains, those with subgraphs, and those whose output dtype is chosen by an attribute.
    """
    schema = _schema(node, opset)
    if schema is None or any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return None
    allowed = {c.type_param_str: "tensor(float16)" in c.allowed_type_strs for c in schema.type_constraints}
    inputs, variables = [], set()
    for index, value in enumerate(node.inputs):
        variable = _formal(schema.inputs, index)
        if value is None or not allowed.get(variable):
            if value is not None and value.dtype == FLOAT and variable in allowed:
                return None
            continue
        if value.dtype is None:
            return None
        if value.dtype == FLOAT:
            inputs.append(index)
            variables.add(variable)
    outputs = []
    for index, value in enumerate(node.outputs):
        variable = _formal(schema.outputs, index)
        if variable in variables:
            outputs.append(index)
        elif value.dtype == FLOAT or value.dtype is None and value.uses():
            return None
    return Positions(tuple(inputs), tuple(outputs)) if inputs else None


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        return onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return None


def _formal(parameters: Sequence[Any], index: int) -> str:
    """The type variable of an actual parameter; the last formal one may stand for any number of them."""
    return parameters[min(index, len(parameters) - 1)].type_str


# ---------------------------------------------------------------- the rewriting


def in_float16(source: Source, kept: Collection[str]) -> ir.Model:
    """Return a copy of a float32 graph in which all nodes but some compute in float16.

    A value has the dtype that its producer gives it; where a reader wants the other one, it reads the value's one cast. Inputs
    and outputs of the graph, and everything in subgraphs, stay float32.

    Args:
        source: The float32 file, with the dtypes of its values.
        kept: Names of the nodes that stay float32; others without a float16 form do so too.
    """
    model = source.model.clone()
    graph = model.graph
    halved = {
        node: positions
        for node in graph
        if node.name not in kept and (positions := float16_positions(node, source.opset)) is not None
    }
    for node, positions in halved.items():
        for index in positions.outputs:
            node.outputs[index].type = ir.TensorType(HALF)  # a clone shares its type with the original
    casts = _Casts(graph)
    for node in list(graph.all_nodes()):
        positions = halved.get(node)
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, HALF):
                continue
            wanted = HALF if positions is not None and index in positions.inputs else FLOAT
            if value.dtype != wanted:
                node.replace_input_with(index, casts.cast(value, wanted))
    _restore_outputs(graph, casts)
    common.RemoveUnusedNodesPass()(model)
    graph.sort()
    return model


class _Casts:
    """The casts that a graph needs: at most one per value and dtype; constants are converted instead."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the value in another dtype."""
        if (value, dtype) not in self.made:
            make = self._constant if value.is_initializer() and value.const_value is not None else self._cast
            self.made[value, dtype] = make(value, dtype)
        return self.made[value, dtype]

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}{COPY}"
        content = value.const_value.numpy().astype(dtype.numpy())
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype), const_value=ir.tensor(content, name=name))
        self.graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        producer, source = value.producer(), value
        if producer is not None and producer.op_type == "Cast" and producer.inputs[0].dtype not in (FLOAT, HALF, None):
            source = producer.inputs[0]  # pixels and masks become float16 in one step
        node = ir.node("Cast", [source], {"to": int(dtype)})
        node.outputs[0].name = node.name = f"{value.name}{COPY if dtype == HALF else '__float32'}"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
        if producer is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(producer, node)
        return node.outputs[0]


def _restore_outputs(graph: ir.Graph, casts: _Casts) -> None:
    """Let outputs be float32 under their own names, and weights whose float16 form alone is read keep their names."""
    for index, value in enumerate(graph.outputs):
        if value.dtype == HALF:
            name = value.name
            value.name = f"{name}{COPY}"
            cast = casts.cast(value, FLOAT)
            cast.name, cast.shape = name, value.shape
            graph.outputs[index] = cast
    for (value, _), made in casts.made.items():
        if made.is_initializer() and not value.uses() and not value.is_graph_output():
            name = value.name
            del graph.initializers[name]
            del graph.initializers[made.name]
            made.name = name
            graph.initializers[name] = made


# ---------------------------------------------------------------- verification


def verify_float16(path: Path, source: Source, cases: list[Case], expected: Mapping[str, Any]) -> VerificationReport:
    """Compare a float16 file with the float32 file that it was made from.

    Args:
        path: The float16 file.
        source: The float32 file.
        cases: Batches to compare on.
        expected: `{name: tensor}`: the float32 weights.
    """
    converted = open_converted(path, source)
    got = [converted.run(case.feeds) for case in cases]
    comparisons: list[Comparison] = []
    problems: list[str] = []
    notes: list[str] = []
    for name in cases[0].outputs:
        pairs = [(case.outputs[name], values[name]) for case, values in zip(cases, got, strict=True)]
        if pairs[0][0].dtype.kind != "f":
            notes.append(_decisions(name, pairs))
            continue
        found = list(_compared(name, cases, pairs))
        comparisons += found
        cosine = measure(*(np.concatenate([side.ravel() for side in sides]) for sides in zip(*pairs, strict=True)))["cosine"]  # type: ignore[arg-type]
        worst = max(comparison.relative for comparison in found)
        if not all(comparison.passed for comparison in found) or not cosine >= COSINE:
            problems.append(
                f"output `{name}` is off by {worst:.3g} of its largest value (bound {TOLERANCE:g}), with a cosine of "
                f"{cosine:.6f} (bound {COSINE}); float16 is too coarse for this model"
            )
    figures, wrong = compare_half_weights(path, expected)
    problems += wrong
    return VerificationReport(
        str(path),
        not problems,
        "float16",
        TOLERANCE,
        tuple(comparisons),
        figures,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _compared(name: str, cases: list[Case], pairs: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[Comparison]:
    """A comparison per batch, relative to the output's largest value on all of them: one batch may have a value near zero."""
    scale = max(float(np.abs(reference).max(initial=0)) for reference, _ in pairs)
    for case, (reference, got) in zip(cases, pairs, strict=True):
        figures = measure(reference, got, scale)
        shape = list(next(iter(case.feeds.values())).shape)
        passed = figures["relative"] <= TOLERANCE
        yield Comparison(name, shape[0], shape, case.data, RUNTIME, passed=passed, **figures)


def _decisions(name: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """A note on an output of whole numbers: which of two nearly equal scores is larger is not bounded."""
    same = [np.mean(reference == got) if reference.shape == got.shape else 0.0 for reference, got in pairs]
    return f"output `{name}` holds whole numbers, of which {float(np.mean(same)):.2%} are those of the float32 file"
