"""Residual blocks that start as the identity: a Keras layer and functional builders."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from ..checks import sides_and_channels, whole_number
from ..graphs import ancestors, data_format_at, mask_of, producer, producer_name
from ..layers import IgnoreMask, ResidualAdd, register
from .gates import BlockSpec
from .kit import LayerKit, branch_layers
from .signs import is_non_negative
from .style import BlockStyle


def addition(spec: BlockSpec, name: str, dtype: Any = None) -> ResidualAdd:
    """Return the `ResidualAdd` that closes a block of this spec."""
    kind = "preact" if spec.kind.preact else "postact"
    return ResidualAdd(name, spec.gate, kind, grown=True, scale=spec.scale, name=f"{name}_add", dtype=dtype)


def _branch(spec: BlockSpec, channels: int, rank: int, data_format: str, name: str, dtype: object) -> list[keras.layers.Layer]:
    """The layers of a block's branch, not yet built. Their norms have momentum 0.9, the default of the style, so that the
    statistics of a new branch catch up within a short fine-tuning."""
    return branch_layers(spec.steps(channels), channels, LayerKit(BlockStyle(rank=rank), data_format, dtype), name)


def closing_relu(name: str, dtype: Any) -> keras.Layer:
    """Return the ReLU after a post-activation block, in the backbone's own dtype, so that it rounds nothing."""
    return keras.layers.Activation("relu", name=f"{name}_out", dtype=dtype)


def append_block(
    x: keras.KerasTensor, spec: BlockSpec, name: str, data_format: str | None = None, dtype: object = None
) -> keras.KerasTensor:
    """Append one residual block to a symbolic tensor; `grow` and `residual_stack` do this at each insertion point.

    Args:
        x: Tensor `(batch, *space, channels)` (or channels first) with up to 3 spatial axes, of a float dtype.
        spec: What the block is made of.
        name: Prefix of the new layers' names.
        data_format: `"channels_last"` or `"channels_first"`. Default: that of the layers before `x`.
        dtype: Dtype policy of the branch. Default: the global policy.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: No block fits there; the message says why.
    """
    data_format = data_format or data_format_at(x)
    rank, channels = check_fits(x.shape, x.dtype, data_format, name)
    y = x
    for layer in _branch(spec, channels, rank, data_format, name, dtype):
        if mask_of(y) is not None and not layer.supports_masking:
            y = IgnoreMask(name=f"{name}_unmask", dtype=dtype)(y)
        y = layer(y)
    if not spec.kind.residual:
        return y
    y = addition(spec, name, dtype)([x, y])
    return closing_relu(name, x.dtype)(y) if spec.kind.closes_with_relu else y


def check_fits(shape: tuple, dtype: object, data_format: str, where: str) -> tuple[int, int]:
    """Return the number of spatial axes and of channels of a tensor that a block can follow.

    Raises:
        ValueError: No block can follow it; the message says why.
    """
    if len(shape) not in (2, 3, 4, 5):
        raise ValueError(
            f'no block fits at "{where}": its tensor has shape {tuple(shape)}, a block needs channels and at most 3 spatial axes'
        )
    sides, channels = sides_and_channels(shape, data_format)
    if channels is None:
        raise ValueError(f'no block fits at "{where}": the number of channels of its tensor {tuple(shape)} is not known')
    if "float" not in str(dtype):
        raise ValueError(f'no block fits at "{where}": its tensor is {dtype}, a block needs floats')
    return len(sides), channels


def check_post_activation(x: keras.KerasTensor, spec: BlockSpec, where: str, outer: Any = None) -> None:
    """Refuse a post-activation block on a tensor that may be negative: its closing ReLU would cut that off."""
    if spec.kind.closes_with_relu and not is_non_negative(x, outer):
        raise ValueError(
            f'a post-activation block cannot be the identity at "{where}": nothing there keeps the tensor from being negative, '
            'and its closing ReLU would cut that off; use block="preact", or an insertion point after a ReLU or a pooling of one'
        )


def residual_stack(
    x: keras.KerasTensor,
    blocks: int,
    block: str = "preact",
    gate: str | None = None,
    *,
    scale: float = 1.0,
    seed: int | None = None,
    name: str = "residual",
    data_format: str | None = None,
    dtype: object = None,
) -> keras.KerasTensor:
    """Append a stack of residual blocks that start as the identity, in the style of Keras' functional API.

    Differs from He et al.: no block changes the shape, so that each can be the identity, and the default is the
    pre-activation form with a zero last convolution, which needs no non-negative input.

    Args:
        x: Symbolic tensor, e.g. `VGG16(include_top=False).output`, with up to 3 spatial axes and a known number of channels.
        blocks: Number of blocks.
        block: A key of `KINDS`: `"preact"`, `"bottleneck"`, `"depthwise"`, `"postact"`, or the control `"plain"`.
        gate: A key of `GATES`. Default: the block's own.
        scale: Constant factor of the branches, applied after the gates; see `grow`. Default 1.
        seed: Integer for reproducible weights.
        name: Prefix of the layers' names: `{name}1_…`, `{name}2_…`. Numbers are counted on where `x` already follows a stack of
            that name.
        data_format: `"channels_last"` or `"channels_first"`. Default: that of the layers before `x`.
        dtype: Dtype policy of the branches. Default: the global policy. The skip keeps the dtype of `x`.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: The pair of block and gate is refused, or no block fits the tensor.

    Source: He et al. 2016 (arXiv 1603.05027), figure 4e.
    """
    if not isinstance(x, keras.KerasTensor):
        raise TypeError(f"`x` must be a symbolic Keras tensor, such as `model.output`, got {type(x).__name__}")
    blocks = whole_number("blocks", blocks, 0)
    BlockSpec(block, gate, seed, scale=scale)
    first = 1 + _last_number(x, name)
    for index in range(blocks):
        spec = BlockSpec(block, gate, None if seed is None else seed + index, max(1, blocks), scale)
        check_post_activation(x, spec, name)
        x = append_block(x, spec, f"{name}{first + index}", data_format, dtype)
    return x


def _last_number(tensor, name):
    """The highest number of a block called `{name}{number}` before a tensor, 0 if there is none."""
    pattern = re.compile(re.escape(name) + r"(\d+)_(conv1|dense1|norm1|shift1)$")
    names = (producer_name(t) for t in ancestors(tensor).values())
    return max((int(match.group(1)) for found in names if (match := pattern.match(found))), default=0)


@register
class ResidualBlock(keras.layers.Layer):
    """One residual block that starts as the identity, as a layer for Sequential and subclassed models.

    Args:
        filters: Number of channels of the input, checked when the layer is built. Default: whatever the input has.
        kind: A key of `KINDS`: `"preact"` (default), `"bottleneck"`, `"depthwise"`, `"postact"`, `"plain"`.
        gate: A key of `GATES`. Default: the kind's own.
        seed: Integer for reproducible weights.
        depth: Number of blocks in the stack that this one is part of; only gate `"fixup"` uses it.
        data_format: `"channels_last"` or `"channels_first"`. Default: Keras' setting.
        scale: Constant factor of the branch, applied after the gate; see `grow`. Default 1.

    Input shape: `(batch, *space, channels)` with up to 3 spatial axes. Output shape: the same, same dtype.

    A `"postact"` block is the identity only on non-negative inputs. In a Functional model the graph must prove that. Called
    eagerly or in a subclassed model there is no graph, and the caller has to know. `drift` and `prune` likewise see
    the blocks of Functional and Sequential models only.

    Raises:
        ValueError: The pair of kind and gate is refused, or `filters` differ from the input's channels, since a block that
            changes width cannot be the identity.
    """

    def __init__(
        self,
        filters: int | None = None,
        kind: str = "preact",
        gate: str | None = None,
        seed: int | None = None,
        depth: int = 1,
        data_format: str | None = None,
        scale: float = 1.0,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("autocast", False)
        super().__init__(**kwargs)
        self.filters, self.data_format = filters, data_format or keras.config.image_data_format()
        self.spec = BlockSpec(kind, gate, seed, depth, scale)
        self.supports_masking = True

    @property
    def non_negative_output(self) -> bool:
        return self.spec.kind.closes_with_relu or not self.spec.kind.residual

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        rank, channels = check_fits(input_shape, "float32", self.data_format, self.name)
        if self.filters not in (None, channels):
            raise ValueError(
                f"`filters` must equal the input's channels ({channels}), got {self.filters}: "
                "a block that changes width is not the identity"
            )
        self.branch = _branch(self.spec, channels, rank, self.data_format, self.name, self.dtype_policy)
        shape = tuple(input_shape)
        for layer in self.branch:
            layer.build(shape)
            shape = tuple(layer.compute_output_shape(shape))
        self.add = addition(self.spec, self.name, self.dtype_policy) if self.spec.kind.residual else None

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        check_fits(inputs.shape, keras.backend.standardize_dtype(inputs.dtype), self.data_format, self.name)
        return self.run(inputs)

    def run(self, inputs: keras.KerasTensor, training: bool | None = None, visit: Callable | None = None) -> keras.KerasTensor:
        """Return the block's output; `visit(layer, inputs, output)` is called after each of its layers."""
        shortcut, branch = self.parts(inputs, training, visit)
        if self.add is None:
            return branch
        total = self.add([shortcut, branch])
        if visit is not None:
            visit(self.add, [shortcut, branch], total)
        return ops.relu(total) if self.spec.kind.closes_with_relu else total

    def parts(self, inputs: keras.KerasTensor, training: bool | None = None, visit: Callable | None = None) -> tuple:
        """Return what `ResidualAdd` takes, `(x, F(x))`."""
        y = inputs
        for layer in self.branch:
            if mask_of(y) is not None and not layer.supports_masking:
                y = ops.copy(y)
            before, y = y, layer(y, training=training)
            if visit is not None:
                visit(layer, before, y)
        return inputs, y

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

    def compute_output_spec(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        check_fits(inputs.shape, inputs.dtype, self.data_format, self.name)
        if producer(inputs) is not None:
            check_post_activation(inputs, self.spec, self.name)
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        spec = self.spec
        own = {"filters": self.filters, "kind": spec.block, "gate": spec.gate, "seed": spec.seed, "depth": spec.depth}
        return {**super().get_config(), **own, "data_format": self.data_format, "scale": spec.scale}
