"""Residual blocks that start as the identity: a Keras layer, functional builders, and how to find them again."""

import re
from dataclasses import dataclass, field

import keras
from keras import ops

from ..graphs import producer, walk
from ..layers import ResidualAdd, register
from .gates import BlockSpec, branch_layers, whole_number
from .places import data_format_at
from .signs import is_non_negative


def addition(spec, name, dtype=None):
    """The `ResidualAdd` that closes a block of this spec."""
    return ResidualAdd(name, spec.gate, spec.kind.kind, grown=True, name=f"{name}_add", dtype=dtype)


def closing_relu(name, dtype):
    """The ReLU behind a post-activation block, in the trunk's own dtype, so that it rounds nothing."""
    return keras.layers.Activation("relu", name=f"{name}_out", dtype=dtype)


def append_block(x, spec, name, data_format=None, dtype=None):
    """Put one residual block behind a symbolic tensor; what `grow` and `residual_stack` do at each place.

    Args:
        x: KerasTensor `(batch, *space, channels)` (or channels first) with 1 to 3 spatial axes, of a float dtype.
        spec: `BlockSpec`.
        name: prefix of the new layers' names.
        data_format: None for that of the layers before `x`.
        dtype: dtype policy of the branch; None for the global policy.

    Returns:
        KerasTensor of the shape and dtype of `x`.

    Raises:
        ValueError: no block fits there; says why.
    """
    data_format = data_format or data_format_at(x)
    rank, channels = check_fits(x.shape, x.dtype, data_format, name)
    y = x
    for layer in branch_layers(spec, channels, rank, data_format, name, dtype):
        y = layer(y)
    if not spec.kind.residual:
        return y
    y = addition(spec, name, dtype)([x, y])
    return closing_relu(name, x.dtype)(y) if spec.kind.kind == "postact" else y


def check_fits(shape, dtype, data_format, where):
    """Spatial rank and channels of a tensor that a block can follow, or a sentence why none can."""
    if len(shape) not in (3, 4, 5):
        raise ValueError(
            f'no block fits at "{where}": its tensor has shape {tuple(shape)}, a block needs 1 to 3 spatial axes and channels'
        )
    channels = shape[1 if data_format == "channels_first" else -1]
    if channels is None:
        raise ValueError(f'no block fits at "{where}": the number of channels of its tensor {tuple(shape)} is not known')
    if "float" not in str(dtype):
        raise ValueError(f'no block fits at "{where}": its tensor is {dtype}, a block needs floats')
    return len(shape) - 2, channels


def check_post_activation(x, spec, where, outer=None):
    """Refuse a post-activation block on a tensor that may be negative: its closing ReLU would cut that off."""
    if spec.kind.kind == "postact" and not is_non_negative(x, outer):
        raise ValueError(
            f'a post-activation block cannot be the identity at "{where}": nothing there keeps the tensor from being negative, '
            'and its closing ReLU would cut that off; use block="preact", or a place behind a ReLU or a pooling of one'
        )


def residual_stack(x, blocks, block="preact", gate=None, *, seed=None, name="residual", data_format=None, dtype=None):
    """A stack of residual blocks that start as the identity, as a functional builder.

    Differs from He et al.: no block changes shape, so that each can be the identity, and the default is the
    pre-activation form with a zero last convolution, which needs no non-negative input.

    Args:
        x: KerasTensor, e.g. `VGG16(include_top=False).output`; 1 to 3 spatial axes, known number of channels.
        blocks: number of blocks.
        block: a key of `KINDS`: `"preact"`, `"bottleneck"`, `"depthwise"`, `"postact"`, or the control `"plain"`.
        gate: a key of `GATES`, or None for the block's default.
        seed: integer for reproducible weights.
        name: prefix of the layers' names: `{name}1_…`, `{name}2_…`; numbers go on where a stack of that name is before `x`.
        data_format: `"channels_last"` or `"channels_first"`; None for that of the layers before `x`.
        dtype: dtype policy of the branches; None for the global policy. The skip keeps the dtype of `x`.

    Returns:
        KerasTensor of the shape and dtype of `x`.

    Raises:
        ValueError: a refused pair of block and gate, or a tensor that no block fits.

    Source: He et al. 2016 (arXiv 1603.05027), figure 4e.
    """
    if not isinstance(x, keras.KerasTensor):
        raise TypeError(f"`x` must be a symbolic Keras tensor, such as `model.output`, got {type(x).__name__}")
    blocks = whole_number("blocks", blocks, 0)
    BlockSpec(block, gate, seed)
    first = 1 + _last_number(x, name)
    for index in range(blocks):
        spec = BlockSpec(block, gate, None if seed is None else seed + index, blocks)
        check_post_activation(x, spec, name)
        x = append_block(x, spec, f"{name}{first + index}", data_format, dtype)
    return x


def _last_number(tensor, name):
    """The highest number of a block called `{name}{number}` before a tensor, 0 if there is none."""
    pattern = re.compile(re.escape(name) + r"(\d+)_(conv1|norm1|shift1)$")
    names = (producer_name(t) for t in _ancestors(tensor).values())
    return max((int(match.group(1)) for found in names if (match := pattern.match(found))), default=0)


def producer_name(tensor):
    """Name of the operation that made a symbolic tensor, "" if there is none."""
    node = producer(tensor)
    return "" if node is None else node.operation.name


@register
class ResidualBlock(keras.layers.Layer):
    """One residual block that starts as the identity, as a layer for Sequential and subclassed models.

    Args:
        filters: number of channels of the input, checked when the layer is built; None takes what comes.
        kind: a key of `KINDS`: `"preact"` (default), `"bottleneck"`, `"depthwise"`, `"postact"`, `"plain"`.
        gate: a key of `GATES`, or None for the kind's default.
        seed: integer for reproducible weights.
        depth: number of blocks in the stack that this one is part of; only gate `"fixup"` uses it.
        data_format: None for Keras' default.

    Input shape: `(batch, *space, channels)` with 1 to 3 spatial axes. Output shape: the same, same dtype.

    A `"postact"` block is the identity only on non-negative inputs. In a Functional model the graph must prove that; called
    eagerly or in a subclassed model there is no graph, and it is the caller's to know. `drift` and `prune` likewise see
    the blocks of Functional and Sequential models only.

    Raises:
        ValueError: a refused pair of kind and gate; `filters` that differ from the input's channels, since a block that
            changes width cannot be the identity.
    """

    def __init__(self, filters=None, kind="preact", gate=None, seed=None, depth=1, data_format=None, **kwargs):
        kwargs.setdefault("autocast", False)
        super().__init__(**kwargs)
        self.filters, self.data_format = filters, data_format or keras.config.image_data_format()
        self.spec = BlockSpec(kind, gate, seed, depth)
        self.supports_masking = True

    @property
    def non_negative_output(self):
        return self.spec.kind.kind == "postact" or not self.spec.kind.residual

    def build(self, input_shape):
        rank, channels = check_fits(input_shape, "float32", self.data_format, self.name)
        if self.filters not in (None, channels):
            raise ValueError(
                f"`filters` must equal the input's channels ({channels}), got {self.filters}: "
                "a block that changes width is not the identity"
            )
        self.branch = branch_layers(self.spec, channels, rank, self.data_format, self.name, self.dtype_policy)
        shape = tuple(input_shape)
        for layer in self.branch:
            layer.build(shape)
            shape = tuple(layer.compute_output_shape(shape))
        self.add = addition(self.spec, self.name, self.dtype_policy) if self.spec.kind.residual else None

    def call(self, inputs):
        check_fits(inputs.shape, keras.backend.standardize_dtype(inputs.dtype), self.data_format, self.name)
        shortcut, branch = self.parts(inputs)
        if self.add is None:
            return branch
        total = self.add([shortcut, branch])
        return ops.relu(total) if self.spec.kind.kind == "postact" else total

    def parts(self, inputs):
        """The two summands, `(x, F(x))`."""
        y = inputs
        for layer in self.branch:
            y = layer(y)
        return inputs, y

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(self, inputs):
        check_fits(inputs.shape, inputs.dtype, self.data_format, self.name)
        if producer(inputs) is not None:
            check_post_activation(inputs, self.spec, self.name)
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def get_config(self):
        spec = self.spec
        own = {"filters": self.filters, "kind": spec.block, "gate": spec.gate, "seed": spec.seed, "depth": spec.depth}
        return {**super().get_config(), **own, "data_format": self.data_format}


# ---------------------------------------------------------------- finding blocks


@dataclass(frozen=True)
class Block:
    """A residual block found in a model.

    `path` names it, `add` is its `ResidualAdd`, `branch` its layers that have weights, in order; `same_shape` tells
    whether it could be the identity: the shortcut is the very tensor that the branch starts from.
    """

    path: str
    add: ResidualAdd
    branch: list = field(repr=False)
    same_shape: bool = False

    @property
    def gate(self):
        return self.add.gate

    @property
    def removable(self):
        """Whether `prune` may take it out: grown or pre-activation, and of one shape."""
        return self.same_shape and (self.add.grown or self.add.kind == "preact")


def find_blocks(model):
    """All residual blocks of a model, found by their `ResidualAdd`, through nested models and `ResidualBlock` layers.

    Args:
        model: Functional or Sequential model.

    Returns:
        List of `Block` in order of execution; a block that is called more than once appears once.
    """
    found, seen = [], set()
    for path, _, node in walk(model):
        operation = node.operation
        if id(operation) in seen:
            continue
        seen.add(id(operation))
        if isinstance(operation, ResidualBlock) and operation.add is not None:
            found.append(Block(path, operation.add, [layer for layer in operation.branch if layer.weights], True))
        elif isinstance(operation, ResidualAdd):
            layers, same_shape = _branch(*node.arguments.keras_tensors)
            prefix, _, own = path.rpartition("/")
            found.append(Block("/".join(filter(None, (prefix, operation.block or own))), operation, layers, same_shape))
    return found


def _branch(shortcut, branch):
    """Layers with weights of the branch alone, in order; whether the branch starts at the shortcut and nowhere else."""
    trunk = _ancestors(shortcut)
    layers, seen, starts = [], set(), set()

    def visit(tensor):
        if id(tensor) in trunk or (node := producer(tensor)) is None or node.is_input:
            starts.add(id(tensor))
        elif id(tensor) not in seen:
            seen.add(id(tensor))
            for parent in node.arguments.keras_tensors:
                visit(parent)
            if getattr(node.operation, "weights", None):
                layers.append(node.operation)

    visit(branch)
    return layers, starts == {id(shortcut)}


def _ancestors(tensor):
    """The tensor and all that it is made from, by id."""
    found, queue = {id(tensor): tensor}, [tensor]
    while queue:
        node = producer(queue.pop())
        for parent in node.arguments.keras_tensors if node is not None else ():
            if id(parent) not in found:
                found[id(parent)] = parent
                queue.append(parent)
    return found
