"""From a signature to an onnx-ir model: trace, translate, clean. Nothing is written or verified here."""

from __future__ import annotations

import onnx_ir as ir

from . import passes
from .fallback import stock_model
from .passes import opset as opsets
from .signature import Signature
from .trace import NotWeightless, trace
from .translate import to_ir

FAST, FALLBACK = "weightless", "stock"
FALLBACK_NOTE = "converted by the fallback converter (tf2onnx): this model reads variables inside a loop, as recurrent layers do"


def convert(signature: Signature, opset: int = 17) -> tuple[ir.Model, str]:
    """Convert a model; the same model gives the same result.

    Args:
        signature: The model and its inputs and outputs.
        opset: 13 to 23.

    Returns:
        `(model, method)`; the method is `"weightless"` (the fast path) or `"stock"` (the fallback).

    Raises:
        UsageError: An operation has no counterpart in ONNX.
    """
    low, method = min(opset, opsets.HANDLERS), FAST
    try:
        model = to_ir(trace(signature, signature.specs()), low)
    except NotWeightless:
        model, method = stock_model(signature, signature.specs(), low), FALLBACK
    for value, spec in zip(model.graph.inputs, signature.inputs, strict=True):
        value.shape = ir.Shape(spec.shape)
    model = passes.finished(
        model,
        inputs=[spec.name for spec in signature.inputs],
        outputs=signature.names,
        target=opset,
        channels_first=signature.layout == "nchw",
    )
    return model, method


def weights_of(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Return `{initialiser name: tensor}` of an onnx-ir model."""
    return {name: value.const_value for name, value in model.graph.initializers.items()}
