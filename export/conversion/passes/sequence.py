"""The one sequence in which a traced graph becomes the graph of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir
from onnx_ir.passes import common

from . import finish, opset


class GraphPass(ir.passes.InPlacePass):
    """A function that changes a graph in place, as an onnx-ir pass.

    Args:
        function: Takes an `onnx_ir.Graph`; its name names the pass in messages.
    """

    def __init__(self, function: Callable[[ir.Graph], object]) -> None:
        self.function = function

    def __str__(self) -> str:
        return self.function.__name__

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.function(model.graph)
        return ir.passes.PassResult(model, modified=True)


class RaiseOpset(ir.passes.PassBase):
    """Convert from the opset of the handlers to a later one; gives a new model and takes the old one apart.

    Args:
        target: 18 to 23.
    """

    in_place, changes_input = False, True

    def __init__(self, target: int) -> None:
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(opset.raise_opset(model, self.target), modified=True)


class FinishNames(ir.passes.InPlacePass):
    """Order and name everything after the model, so that the same model gives the same bytes.

    Args:
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order.
    """

    def __init__(self, inputs: list[str], outputs: list[str]) -> None:
        self.inputs, self.outputs = inputs, outputs

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        finish.canonical_names(model.graph, self.inputs, self.outputs)
        return ir.passes.PassResult(model, modified=True)


class FinishModel(ir.passes.InPlacePass):
    """Name the dynamic sizes, and remove what nobody needs: inner shapes, documentation, and the converter's name.

    Args:
        target: The opset, which decides the IR version.
        channels_first: Whether images come as `[batch, channels, height, width]`.
    """

    def __init__(self, target: int, channels_first: bool) -> None:
        self.target, self.channels_first = target, channels_first

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        finish.name_dimensions(model.graph, self.channels_first)
        finish.strip(model)
        model.ir_version = opset.ir_version(self.target)
        return ir.passes.PassResult(model, modified=True)


def sequence(
    order: Iterable[Callable[[ir.Graph], object]], *, inputs: list[str], outputs: list[str], target: int, channels_first: bool
) -> ir.passes.Sequential:
    """Return the passes of a conversion, in order.

    Graph passes run at the opset of the handlers. Only then are the weights, float64 while they are folded, rounded to the dtype
    of the file; the opset is raised; and names are given last, since every step before may add and remove values.

    Args:
        order: The graph passes, see `passes.ORDER`.
        inputs: Names of the inputs, in order.
        outputs: Names of the outputs, in order.
        target: Opset of the file.
        channels_first: Whether images come as `[batch, channels, height, width]`.
    """
    names = FinishNames(inputs, outputs)
    raising = [names, RaiseOpset(target)] if target > opset.HANDLERS else []
    return ir.passes.Sequential(
        *map(GraphPass, order),
        GraphPass(finish.round_weights),
        GraphPass(finish.separate_outputs),
        *raising,
        common.RemoveUnusedNodesPass(),
        names,
        FinishModel(target, channels_first),
        common.RemoveUnusedOpsetsPass(),
    )
