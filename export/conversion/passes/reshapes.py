"""Chains of Reshape, Squeeze, Unsqueeze and Flatten: only the last shape counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .common import array, is_constant, remove_unused, replace, shape

if TYPE_CHECKING:
    import onnx_ir as ir


RESHAPING = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}


def merge_reshapes(graph: ir.Graph) -> None:
    """Let a Reshape to a constant shape read from the start of its chain, and drop it where that has the shape already."""
    for node in list(graph):
        if node.op_type != "Reshape" or not is_constant(node.inputs[1]):
            continue
        target = [int(size) for size in array(node.inputs[1])]
        if 0 in target:
            continue
        source = node.inputs[0]
        while source.producer() is not None and source.producer().op_type in RESHAPING:
            source = source.producer().inputs[0]
        if source is not node.inputs[0]:
            node.replace_input_with(0, source)
        if shape(source) == target and not (node.outputs[0].is_graph_output() and source.is_graph_input()):
            replace(graph, node.outputs[0], source)
    remove_unused(graph)
