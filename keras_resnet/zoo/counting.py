"""Parameters and multiply-adds, by walking a model's layers, or by arithmetic on a `ResNetConfig` alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
from keras import layers

from ..blocks.identity import ResidualBlock
from ..checks import sides_and_channels
from ..graphs import call_inputs, flat_inputs, graph_of, replay, require_graph
from .plan import block_plans

if TYPE_CHECKING:
    from .config import ResNetConfig


# Layers whose every kernel is applied at every position of the output.
CONVOLUTIONS = (
    *(getattr(layers, f"Conv{rank}D") for rank in (1, 2, 3)),
    *(getattr(layers, f"{kind}Conv{rank}D") for kind in ("Depthwise", "Separable") for rank in (1, 2)),
)
TRANSPOSED = tuple(getattr(layers, f"Conv{rank}DTranspose") for rank in (1, 2, 3))


@dataclass(frozen=True)
class Counts:
    """Sizes of a model.

    Args:
        trainable: Trainable parameters (what torch calls `numel` of the parameters).
        total: With moving statistics (Keras' `count_params()`).
        macs: Multiply-adds of convolutions and dense layers for one input; None where the input size is dynamic.
    """

    trainable: int
    total: int
    macs: int | None


def count(model: keras.Model, input_shape: Sequence[int | None] | None = None) -> Counts:
    """Parameters and multiply-adds of any Keras model, by a walk over its layers; Keras has no such counter.

    Args:
        model: A built Functional or Sequential model; nested models are walked too. It is only read.
        input_shape: Without batch; needed for the multiply-adds of a model of dynamic size.

    Returns:
        `Counts`. Convolutions (grouped and depthwise ones too) and dense layers count one multiply-add per weight and
        position; norms, activations and pooling count nothing.
    """
    trainable = sum(math.prod(weight.shape) for weight in model.trainable_weights)
    return Counts(trainable, model.count_params(), count_macs(model, input_shape))


def count_macs(model: keras.Model, input_shape: Sequence[int | None] | None = None) -> int | None:
    """Count the multiply-adds for one input; see `count`."""
    graph = require_graph(model)
    if input_shape is None:
        inputs = graph.inputs
    else:
        inputs = [keras.KerasTensor((None, *input_shape), dtype=tensor.dtype) for tensor in graph.inputs]
    if any(None in tensor.shape[1:] for tensor in inputs):
        return None
    return _walk(graph, inputs)[0]


def _walk(graph, inputs):
    """`(multiply-adds, outputs)` of a graph on symbolic inputs. Shapes are inferred without a call, which would add a node."""
    total = 0

    def infer(node: Any, args: Any, kwargs: Any) -> Any:
        nonlocal total
        operation = node.operation
        inner = graph_of(operation) if isinstance(operation, keras.Model) else None
        if inner is not None:
            macs, outputs = _walk(inner, flat_inputs(inner, call_inputs(args, kwargs)))
        else:
            outputs = operation.compute_output_spec(*args, **kwargs)
            macs = layer_macs(operation, args, outputs)
        total += macs
        return outputs

    outputs = replay(graph, inputs, infer)
    return total, outputs


def layer_macs(layer: Any, args: Sequence[Any], output: Any) -> int:
    """Return multiply-adds of one call of a layer for one input, from the shapes of what it takes and gives, symbolic or real."""
    if isinstance(layer, ResidualBlock):
        return sum(layer_macs(part, args, output) for part in layer.branch)
    if isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        # A transposed convolution applies its kernel at each position of the input, the others at each position of the output.
        sides, _ = sides_and_channels((args[0] if isinstance(layer, TRANSPOSED) else output).shape, layer.data_format)
        return math.prod(sides) * sum(math.prod(weight.shape) for weight in layer.weights if len(weight.shape) > 1)
    if isinstance(layer, layers.Dense):
        return math.prod(output.shape[1:-1]) * math.prod(layer.kernel.shape)
    return 0


def arithmetic(config: ResNetConfig) -> Counts:
    """Return the same figures for a `ResNetConfig` at its published input size, without building anything (0.1 s at depth 1202).

    Returns:
        `Counts`.

    Raises:
        ValueError: The config has `growth`, whose blocks only a layer walk knows.
    """
    if config.growth:
        raise ValueError("a config with `growth` is counted by a layer walk, see `count`")
    tally = _Tally(config)
    side = -(-config.input_size // config.stem_stride)
    filters = config.channels
    if config.stem_whitening:
        side -= config.stem_kernel - 1
    for number, width in enumerate(config.stem_widths, start=1):
        tally.conv(filters, width, config.stem_kernel, side, bias="stem" in config.conv_bias, is_fixed=config.stem_whitening)
        if not config.stem_whitening and (number < len(config.stem_widths) or not config.preact):
            tally.norm(width)
        filters = width
    if config.stem_pool:
        side = -(-side // 2)
    if config.stem_pool == "conv":
        tally.conv(filters, filters, 3, side * (2 if config.antialias else 1))
        tally.norm(filters)
    for plan in block_plans(config):
        side = _count_block(tally, config, plan, side)
        filters = plan.filters
    if config.preact:
        tally.norm(filters)
    tally.conv(filters, config.num_classes, 1, 1, bias=True)
    return Counts(tally.trainable, tally.trainable + tally.untrained, tally.macs)


def _count_block(tally, config, plan, side):
    """Adds one block; returns the side of what it puts out."""
    pools = config.subsampling == "max_pool"
    out_side = side // plan.stride if pools else -(-side // plan.stride)
    if plan.projects(config.shortcut):
        tally.conv(plan.in_filters, plan.filters, 1, out_side, bias="projection" in config.conv_bias)
        if config.shortcut_norm and not config.preact:
            tally.norm(plan.filters)
    filters = plan.in_filters
    for conv in plan.convs:
        if config.preact:
            tally.norm(filters)
        subsampled = side // conv.stride if pools else -(-side // conv.stride)
        here = side if config.antialias or pools else subsampled
        tally.conv(filters, conv.filters, conv.kernel, here, groups=conv.groups, bias=conv.bias)
        side = subsampled
        filters = conv.filters
        if not config.preact:
            tally.norm(filters)
    if plan.squeeze:
        tally.conv(filters, plan.squeeze, 1, 1, bias=True)
        tally.conv(plan.squeeze, filters, 1, 1, bias=True)
    return out_side


class _Tally:
    """Running sums for `arithmetic`."""

    def __init__(self, config: ResNetConfig) -> None:
        self.rank, self.has_statistics, self.has_scale = config.rank, config.norm == "batch", config.norm_scale
        self.trainable = self.untrained = self.macs = 0

    def conv(
        self, inputs: int, filters: int, kernel: int, side: int, groups: int = 1, bias: bool = False, is_fixed: bool = False
    ) -> None:
        weights = kernel**self.rank * inputs // groups * filters
        self.trainable += filters * bias + weights * (not is_fixed)
        self.untrained += weights * is_fixed
        self.macs += weights * side**self.rank

    def norm(self, filters: int) -> None:
        self.trainable += (1 + self.has_scale) * filters
        self.untrained += 2 * filters * self.has_statistics
