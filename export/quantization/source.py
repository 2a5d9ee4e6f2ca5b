"""The float32 file that a conversion starts from: opened as it is, and as a graph in the form that conversions work on."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from .. import artifact
from ..conversion.passes.opset import ir_version
from ..errors import UsageError
from ..runtime.sessions import Session, session

LOWEST_OPSET = 13  # the first one with a scale per channel, and with float16 in every operator that a CNN needs
LOW_PRECISION = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
QUANTISED_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger", "QLinearConv")


@dataclass(frozen=True)
class Source:
    """A float32 ONNX file.

    Attributes:
        path: The file.
        name: How messages name it.
        session: A session of the file as it is, the reference for everything that is made from it.
        model: Its graph with opset 13 or later, without functions, with constants as initialisers and a name on every node.
        metadata: What the file says about itself.
        notes: Messages on what had to be changed in the graph.
    """

    path: Path
    name: str
    session: Session
    model: ir.Model
    metadata: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def opset(self) -> int:
        """The opset of `model`."""
        return self.model.opset_imports[""]


def open_source(path: str | os.PathLike[str] | Source, name: str | None = None) -> Source:
    """Open a float32 file of any exporter.

    Args:
        path: ONNX file; an opened one is returned as it is.
        name: How messages name it; by default by its path.

    Raises:
        UsageError: The file cannot be read, is in a lower precision already, or its opset cannot be raised.
    """
    if isinstance(path, Source):
        return path
    name, opened = name or str(path), session(path, "cpu")
    model = ir.from_proto(artifact.read_proto(path))
    for change in (
        common.InlinePass(),
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    ):
        model = change(model).model
    _refuse_lower_precision(name, model)
    model, notes = _with_opset(name, model)
    common.NameFixPass()(model)
    return Source(Path(path), name, opened, model, artifact.read_metadata(path), notes)


def _refuse_lower_precision(name: str, model: ir.Model) -> None:
    if any(node.op_type in QUANTISED_OPS for node in model.graph.all_nodes()):
        raise UsageError(f"{name} is quantised already; give the float32 file that it was made from")
    constants = [value.const_value for value in model.graph.initializers.values()]
    if any(constant is not None and constant.dtype in LOW_PRECISION for constant in constants):
        raise UsageError(f"{name} is in float16 already; give the float32 file that it was made from")


def _with_opset(name: str, model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """The model with opset 13 at least, raised by onnx's version converter, and a note if it was raised."""
    opset = model.opset_imports.get("", 1)
    if opset >= LOWEST_OPSET:
        model.ir_version = max(model.ir_version, ir_version(opset))
        return model, ()
    large = {key: value.const_value for key, value in model.graph.initializers.items() if value.const_value.size > 64}
    try:
        raised = onnx.version_converter.convert_version(_with_inputs_for(model, large), LOWEST_OPSET)
    except Exception as error:  # the converter has no class of its own for what it does not know
        raise UsageError(
            f"{name} has opset {opset}, float16 and int8 need {LOWEST_OPSET}, and onnx cannot raise it "
            f"({artifact.first_line(error)}); export the model again with opset {LOWEST_OPSET} or later"
        ) from error
    result = ir.from_proto(raised)
    inputs = {value.name: value for value in result.graph.inputs}
    for key, tensor in large.items():
        value = inputs[key]
        value.const_value = tensor
        result.graph.inputs.remove(value)
        result.graph.register_initializer(value)
    result = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(result).model
    result.ir_version = ir_version(LOWEST_OPSET)
    return result, (f"the opset was raised from {opset} to {LOWEST_OPSET}",)


def _with_inputs_for(model: ir.Model, large: Mapping[str, ir.TensorProtocol]) -> onnx.ModelProto:
    """The model without its large weights, which the version converter would copy; they are inputs for it."""
    proto = ir.to_proto(model)
    proto.ir_version = ir_version(LOWEST_OPSET)  # below 4, weights would have to be inputs too
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in large]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name, tensor in large.items():
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), tensor.shape.numpy()))
    return proto


def inner_values(
    model: ir.Model | onnx.ModelProto, feeds: Mapping[str, np.ndarray], wanted: Collection[str]
) -> dict[str, np.ndarray]:
    """Tensors inside a graph, computed by onnxruntime without optimisation.

    Args:
        model: The graph.
        feeds: `{input name: array}`.
        wanted: Names of the tensors; names that no node computes are left out.

    Returns:
        `{name: array}`, in the order of the graph.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(ir.to_proto(model) if isinstance(model, ir.Model) else model)
    names = [name for node in proto.graph.node for name in node.output if name and name in wanted]
    outputs = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    return dict(zip(names, _run(proto, names, feeds), strict=True)) if names else {}


def largest_values(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return `{tensor name: max |value|}` of all float32 tensors that the main graph computes; nan where one is not a number.

    The maxima are computed inside the graph, so that the tensors themselves need not be kept.

    Args:
        model: A graph whose values have dtypes.
        feeds: `{input name: array}`.
    """
    names = [value.name for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    for index, name in enumerate(names):
        proto.graph.node.append(onnx.helper.make_node("Abs", [name], [f"{name}//abs"]))
        proto.graph.node.append(onnx.helper.make_node("ReduceMax", [f"{name}//abs"], [f"largest//{index}"], keepdims=0))
        proto.graph.output.append(onnx.helper.make_tensor_value_info(f"largest//{index}", onnx.TensorProto.FLOAT, []))
    found = _run(proto, [value.name for value in proto.graph.output], feeds)
    return {name: float(value) for name, value in zip(names, found, strict=True)}


def _run(proto: onnx.ModelProto, names: list[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not is_large(proto):
        opened = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return opened.run(names, dict(feeds))
    with artifact.temporary_folder("resnet-export-") as folder:
        path = str(folder / "m.onnx")
        onnx.save(proto, path, save_as_external_data=True, location="m.onnx.data", size_threshold=artifact.EXTERNAL_FROM)
        opened = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return opened.run(names, dict(feeds))


def is_large(proto: onnx.ModelProto) -> bool:
    """Return whether a graph is too large for one protobuf message, so that its weights need a file of their own."""
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > artifact.LARGEST_FILE


def save(model: ir.Model, path: Path, source: Source, precision: str, tolerance: float | None) -> None:
    """Write a converted graph with the metadata of its source.

    Args:
        model: The graph.
        path: File to write.
        source: What it was made from.
        precision: `"float16"` or `"int8"`.
        tolerance: Relative bound that the file is verified with, or None.
    """
    metadata = source.metadata | {"tolerances": {"relative": tolerance, "precision": precision}}
    model.metadata_props.clear()
    model.metadata_props.update(artifact.encode_metadata(metadata))
    common.RemoveUnusedOpsetsPass()(model)
    model.producer_name, model.producer_version, model.doc_string = "resnet_export", None, None
    artifact.write_onnx(model, path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what onnxruntime's tools log while they work; what matters is verified afterwards."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
