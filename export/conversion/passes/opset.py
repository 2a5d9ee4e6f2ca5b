"""Raise the opset: tf2onnx stops at 18, and what it emits there is worse than at 17."""

from __future__ import annotations

import onnx
import onnx_ir as ir

HANDLERS = 17  # what tf2onnx is asked for


def ir_version(opset: int) -> int:
    """8 is read by everything since 2021; opsets above 18 need 10. onnx's own default is newer than onnxruntime reads."""
    return 8 if opset <= 18 else 10


def raise_opset(model: ir.Model, opset: int) -> ir.Model:
    """Convert from `HANDLERS` to a later opset with onnx's version converter, weights left out.

    Args:
        model: The onnx-ir model, at opset 17.
        opset: 18 to 23.

    Returns:
        The new onnx-ir model.
    """
    weights = {name: value for name, value in model.graph.initializers.items() if value.const_value.size > 64}
    meta = {value.name: dict(value.meta) for value in _values(model.graph)}
    for name, value in weights.items():
        del model.graph.initializers[name]
        model.graph.inputs.append(value)
    kept = {name: (value.const_value, value.dtype) for name, value in weights.items()}
    for value in weights.values():
        value.const_value = None
    converted = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(model), opset))
    inputs = {value.name: value for value in converted.graph.inputs}
    for name, (content, dtype) in kept.items():
        value = inputs[name]
        converted.graph.inputs.remove(value)
        value.const_value, value.dtype = content, dtype
        converted.graph.initializers[name] = value
    for value in _values(converted.graph):
        value.meta.update(meta.get(value.name, {}))
    return converted


def _values(graph):
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
