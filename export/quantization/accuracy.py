"""How far a file in lower precision may be from its float32 file: by the kind of each output, and which node adds the error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from .. import artifact
from ..errors import MismatchError, UsageError
from ..results import VerificationReport
from ..runtime.sessions import Session, session
from ..verification.agreement import Budget, QuantisedOutput, quantised_outputs
from .samples import Feeds
from .source import Source, inner_values

DEQUANTISED = "_DequantizeLinear_Output"  # what onnxruntime's quantiser appends to a tensor's name


def open_converted(work: Path, source: Source) -> Session:
    """Return a session of a converted file that is not yet at its final path.

    Raises:
        MismatchError: The file is invalid, or onnxruntime does not load it.
    """
    try:
        onnx.checker.check_model(str(work), full_check=True)
        return session(work, "cpu")
    except Exception as error:  # the checker's and onnxruntime's errors have no common class
        reason = artifact.first_line(error).replace(str(work), "the file")
        raise MismatchError(f"what was made from {source.name} is not a valid file: {reason}") from error


def require(report: VerificationReport) -> None:
    """Raise for a report that did not pass.

    Raises:
        MismatchError: Carries the report.
    """
    if not report.passed:
        raise MismatchError(report.summary(), report)


@dataclass(frozen=True)
class LayerError:
    """The error of a node of a converted file, as shares ‖Δ‖ / ‖float32‖.

    Attributes:
        total: The error of its output.
        added: The part of it that the node itself added.
    """

    total: float
    added: float


SUMMING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")


def layer_errors(model: ir.Model, converted: onnx.ModelProto, feeds: Feeds, *, every_node: bool = False) -> dict[str, LayerError]:
    """Return `{node name: LayerError}` of every node that multiplies or adds, in the order of the graph.

    Args:
        model: The float32 graph.
        converted: The graph that was made from it; its tensors keep their names.
        feeds: One batch.
        every_node: Take all other nodes as well.
    """
    names = {value.name for node in model.graph for value in node.outputs}
    want = inner_values(model, feeds, names)
    have = inner_values(converted, feeds, names | {name + DEQUANTISED for name in names})
    # A ReLU may have become the range of the quantised tensor; the plain name then holds what goes into it.
    have = {name: have.get(name + DEQUANTISED, have.get(name)) for name in want}
    error = {
        name: _share(have[name], value) for name, value in want.items() if have[name] is not None and value.dtype.kind == "f"
    }
    return _added(model, error, every_node)


def _added(model: ir.Model, error: Mapping[str, float], every_node: bool) -> dict[str, LayerError]:
    clipped = {node.inputs[0].name: node.outputs[0].name for node in model.graph if node.op_type in ("Relu", "Clip")}
    found = {}
    for node in model.graph:
        output = node.outputs[0].name
        output = output if output in error else clipped.get(output)
        if output in error and (every_node or node.op_type in SUMMING):
            before = max((error.get(value.name, 0.0) for value in node.inputs if value is not None), default=0.0)
            found[node.name] = LayerError(error[output], error[output] - before)
    return found


def _share(have: np.ndarray, want: np.ndarray) -> float:
    if have.shape != want.shape:
        return float("inf")
    return float(np.linalg.norm(have.astype("float64") - want) / max(float(np.linalg.norm(want.astype("float64"))), 1e-30))


def worst_layers(errors: Mapping[str, LayerError]) -> list[str]:
    """Node names, those that add most error first."""
    return sorted(errors, key=lambda name: -errors[name].added)


# ---------------------------------------------------------------- outputs


def outputs_to_compare(model: Session, scores: str | None, output_kind: str | None, budget: Budget) -> list[QuantisedOutput]:
    """Return the outputs that decide whether the quantised form of a file is accepted; see `quantised_outputs`.

    Args:
        model: The float32 file.
        scores: Name of the only output to compare, or None.
        output_kind: Its kind, or None to take what the file states.
        budget: How much they may differ.

    Raises:
        UsageError: There is no such output, its kind is unknown, or it cannot have that kind.
    """
    shapes = {value.name: list(value.shape) for value in model.outputs if value.dtype.startswith("float")}
    if scores is not None and scores not in shapes:
        raise UsageError(f"{model.path.name} has no output {scores!r} of floats; it has {', '.join(shapes)}")
    kinds = artifact.output_kinds(model.metadata, shapes)
    if output_kind is not None and shapes:
        kinds |= {_declared(model, shapes, scores, output_kind): output_kind}
    return quantised_outputs(shapes, kinds, budget, scores)


def _declared(model: Session, shapes: Mapping[str, list], scores: str | None, kind: str) -> str:
    """The output whose kind the user declares, checked."""
    if kind not in artifact.KINDS:
        raise UsageError(f"the output kind must be one of {', '.join(artifact.KINDS)}, got {kind!r}")
    if scores is None and len(shapes) > 1:
        raise UsageError(f"{model.path.name} has several outputs ({', '.join(shapes)}); name one with --scores NAME")
    name = scores or next(iter(shapes))
    if kind != "other" and len(shapes[name]) != 2:
        raise UsageError(
            f"output {name!r} of {model.path.name} has the shape {shapes[name]}; only [batch, classes] can be {kind}"
        )
    return name
