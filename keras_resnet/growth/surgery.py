"""The only code that rewrites a model's graph: copy it, and on the way put blocks in or take blocks out."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops, tree

from ..blocks.finding import find_blocks
from ..blocks.identity import BlockSpec, append_block, check_fits, check_post_activation
from ..blocks.signs import callers
from ..checks import first_line, nearest, whole_number
from ..graphs import (
    data_format_at,
    graph_of,
    is_weighted,
    lambda_output_shape,
    layers_in,
    nodes,
    pack_inputs,
    producer,
    replay,
    require_graph,
    state_variables,
    walk,
)
from .points import find_points
from .scale import MATCH, check_scale, measure_rms


def copy_model(model: keras.Model, rewrite: Callable[..., Any] | None = None, name: str | None = None) -> keras.Model:
    """Copy a model with its weights. `rewrite` may replace the output of any call.

    Differs from `keras.models.clone_model`: weights are copied, by position in the model's tree, since paths repeat between
    nested models. Layers that nested models share stay shared, inputs keep their names, Sequential and nested models are copied
    as well, and the seeds of random layers have the same state.

    Args:
        model: Functional or Sequential model, which is not changed.
        rewrite: Called as `rewrite(graph, node, inputs, outputs) -> outputs`. `graph` and `node` are the original's; `inputs` (a
            flat list) and `outputs` are tensors of the copy. None copies everything as it is.
        name: Name of the copy. None keeps the model's name.

    Returns:
        An uncompiled Functional model.

    Raises:
        ValueError: A layer cannot be made from its config; the message names it.
    """
    twins, keep = {}, lambda graph, node, inputs, outputs: outputs
    copied = _copy_graph(require_graph(model), rewrite or keep, twins, name or model.name)
    leaves = [(old, new) for old, new in twins.values() if isinstance(old, keras.layers.Layer) and not _is_container(old)]
    _check_sharing(leaves)
    for old, new in leaves:
        _copy_state(old, new)
    _copy_trainable([(model, copied)] + [pair for pair in twins.values() if _is_container(pair[0])], leaves)
    return copied


def _is_container(operation):
    return isinstance(operation, keras.Model) and graph_of(operation) is not None


def _check_sharing(leaves):
    """A layer shared by way of a wrapper (`TimeDistributed(conv)` and `conv`) would come apart."""
    owners = {}
    for old, _ in leaves:
        for part in layers_in(old):
            if (owner := owners.setdefault(id(part), old)) is not old:
                raise ValueError(
                    f'layer "{part.name}" is shared by "{owner.name}" and "{old.name}" in a way that a copy cannot keep; '
                    "call the layer itself in both places, without the wrapper"
                )


def _copy_graph(graph, rewrite, twins, name):
    inputs = [_copy_input(tensor) for tensor in graph.inputs]

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        outputs = _twin(node.operation, rewrite, twins)(*args, **kwargs)
        flat = [x for x in tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
        return rewrite(graph, node, flat, outputs)

    outputs = replay(graph, inputs, call)
    return keras.Model(pack_inputs(graph, inputs), outputs, name=name)


def _copy_input(tensor):
    layer = producer(tensor).operation
    copied = type(layer).from_config(layer.get_config()).output
    # An auto-named input has two names, the layer's and the tensor's; inputs may be fed by either.
    copied.name = tensor.name
    return copied


def _twin(operation, rewrite, twins):
    if id(operation) not in twins:
        if _is_container(operation):
            new = _copy_graph(graph_of(operation), rewrite, twins, operation.name)
        else:
            new = _copy_operation(operation)
        # Keeping the original in the dict keeps its id from being used again.
        twins[id(operation)] = (operation, new)
    return twins[id(operation)][1]


def _copy_operation(operation):
    try:
        config = operation.get_config()
        if isinstance(operation, keras.layers.Lambda):
            # A lambda's code does not survive its config; the function itself can be shared, having no weights.
            config |= {"function": operation.function, "output_shape": lambda_output_shape(operation), "mask": operation.mask}
            return type(operation)(**config)
        return type(operation).from_config(config)
    except Exception as error:
        raise ValueError(
            f'layer "{operation.name}" ({type(operation).__name__}) cannot be made again from its config ({first_line(error)}); '
            "give its class a `get_config` that returns all arguments of its constructor"
        ) from error


def _copy_state(old, new):
    """Copy variables by position, and what layers keep in addition: adapted statistics, vocabularies, recurrent states."""
    if len(old.variables) != len(new.variables) or any(
        a.shape != b.shape for a, b in zip(old.variables, new.variables, strict=True)
    ):
        raise ValueError(
            f'layer "{old.name}" ({type(old).__name__}) builds other variables when made from its config; '
            "its `get_config` is incomplete"
        )
    parts = list(zip(layers_in(old), layers_in(new), strict=True))
    states = [pair for a, b in parts for pair in zip(state_variables(a), state_variables(b), strict=True)]
    for source, target in [*zip(old.variables, new.variables, strict=True), *states]:
        target.assign(ops.convert_to_numpy(source))
    for source, target in parts:
        if type(source).load_own_variables is not keras.layers.Layer.load_own_variables:
            store = {}
            source.save_own_variables(store)
            target.load_own_variables(store)
        if isinstance(source, keras.layers.Normalization):
            # It computes with constants that `adapt` and loading derive from its variables, but `set_weights` does not.
            target.mean, target.variance = source.mean, source.variance
        if hasattr(source, "save_assets"):
            with tempfile.TemporaryDirectory() as folder:
                source.save_assets(folder)
                target.load_assets(folder)


def _copy_trainable(containers, leaves):
    """Freeze what was frozen, layer by layer and variable by variable; what is new can learn, wherever it stands."""
    copied = {id(part) for _, new in leaves for part in layers_in(new)}
    for old, new in containers:
        parts = layers_in(new, include_self=False)
        if not old.trainable and all(id(part) in copied for part in parts if not isinstance(part, keras.Model) and part.weights):
            new.trainable = False
    for old, new in leaves:
        for source, target in zip(layers_in(old), layers_in(new), strict=True):
            if source.trainable != target.trainable:
                target.trainable = source.trainable
        for source, target in zip(old.variables, new.variables, strict=True):
            if source.trainable != target.trainable:
                target.trainable = source.trainable


# ---------------------------------------------------------------- growing


def grow(
    model: keras.Model, after: object = None, *, blocks: int | None = None, total_blocks: int | None = None,
    total_layers: int | None = None, every: int | None = None, node: int | None = None, block: str = "preact",
    gate: str | None = None, scale: str | float | Mapping[str, float] | None = None, data: object = None,
    seed: int | None = None, name: str | None = None,
) -> keras.Model:  # fmt: skip
    """Make a deeper copy of any model with residual blocks that do nothing at first: its output is `==` the original's.

    Net2Net (arXiv 1511.05641) deepens only before ReLUs and not across batch norm. This function needs neither, since a
    block's identity is its skip connection. The copy is exact on the CPU when called eagerly. In graph mode TensorFlow may fuse
    other operations than before, which changes the backbone's last bits (at most 1e-6 relative), see `identity_report`. In
    float16 the identity ends where a branch overflows (activations of about 10⁴ before fresh norms), because 0 · ∞ is not 0.

    Args:
        model: Functional or Sequential model, nested or not, with any number of inputs and outputs. It is not changed.
        after: Where blocks are inserted: a layer's name, a path into a nested model (`"backbone/block5_pool"`), a pattern
            (`"block*_pool"`), a list of those, a layer, or a predicate of a layer. A name that a list repeats gets as many
            times the blocks. None means every convolution. Patterns, predicates and None match the backbone only, not the
            parts of blocks that were grown before.
        blocks: Number of blocks per insertion point. Default 1.
        total_blocks: Instead of `blocks`, a number for all insertion points, spread in proportion to the weighted layers
            before each of them.
        total_layers: Instead of `blocks`, a number of weighted layers (a `"preact"` block has two).
        every: Use each `every`-th insertion point only.
        node: Index of the call, for a layer that is called more than once.
        block: `"preact"` (default), `"bottleneck"`, `"depthwise"`, `"postact"`, or the control `"plain"`. On vectors
            `[batch, features]` a block has dense layers instead of convolutions.
        gate: What holds a block at zero; None means the block's default, and `"none"` is the control.
        scale: Constant factor of each branch, applied after its gate. `"match"` uses the RMS of the tensor that the branch is
            added to, measured on `data` (one number per block): in networks without norms, whose features are in the
            hundreds, the new layers then learn as fast as their neighbours. Otherwise a positive number, or a mapping of block
            names to numbers as `block_scales` returns it. The factors are stored in the model. Default None: 1.
        data: Inputs that `scale="match"` is measured on, as `drift` takes them; a few hundred are enough.
        seed: Integer for reproducible new weights.
        name: Name of the new model. Default: the name of `model`.

    Returns:
        An uncompiled Functional model (also for a subclass with its own `train_step`). What was frozen stays frozen,
        layer by layer; new layers are trainable. They are called `{layer}_grow{k}_…`. When a model is grown again, `k` is
        counted on, and the new blocks follow the earlier ones.

    Raises:
        ValueError: An insertion point does not exist or fits no block, the pair of block and gate is refused, a total does not
            divide, or the scale cannot be measured.

    Source: He et al. 2016 (arXiv 1603.05027); Chen et al. 2016 (arXiv 1511.05641).
    """
    template = BlockSpec(block, gate, seed)
    check_scale(scale, data)
    points = _insertion_points(model, after, every, node)
    counts = _counts(model, points, template.kind.weighted_layers, blocks, total_blocks, total_layers)
    counts = _repeated(after, points, counts, total_blocks is None and total_layers is None)
    stacks = _stacks(model, points, counts, template)
    if scale is not None:
        stacks = _scaled(model, stacks, scale, data)

    def rewrite(graph: Any, call: Any, inputs: Any, outputs: Any) -> Any:
        if id(call) in stacks:
            stack = stacks[id(call)]
            x = tree.flatten(outputs)[0]
            for block_name, spec in stack.blocks:
                x = append_block(x, spec, block_name, stack.data_format, stack.policy)
            outputs = tree.pack_sequence_as(outputs, [x])
        return outputs

    return copy_model(model, rewrite, name)


def _insertion_points(model, after, every, node):
    """The insertion points of `grow`, checked."""
    if after is None and every is None:
        raise ValueError('say where blocks go: `after="block*_pool"` (a name, pattern, list or predicate), or `every=n`')
    if not (points := find_points(model, after, node)):
        raise ValueError("`after` names no insertion point; give a layer's name, a pattern, a list of those or a predicate")
    if every is None:
        return points
    every = whole_number("every", every, 1)
    if not (kept := points[every - 1 :: every]):
        raise ValueError(f"`every` must be at most the number of insertion points ({len(points)}), got {every}")
    return kept


def _repeated(after, points, counts, per_point):
    """The blocks per insertion point, where a list may repeat a name."""
    times = Counter(after) if isinstance(after, (list, tuple)) else {}
    if max(times.values(), default=1) > 1 and not per_point:
        raise ValueError("a name that `after` repeats cannot be combined with `total_blocks` or `total_layers`; use `blocks`")
    return [count * times.get(point.path, 1) for point, count in zip(points, counts, strict=True)]


@dataclass(frozen=True)
class _Stack:
    """The blocks that are inserted after one call: `(name, spec)` of each, the data format and the dtype policy."""

    path: str
    blocks: list
    data_format: str
    policy: object

    def block_path(self, block_name: str) -> str:
        """Return the path that `find_blocks` gives a block of the stack."""
        return "/".join(filter(None, (self.path.rpartition("/")[0], block_name)))


def _stacks(model, points, counts, template):
    """`{id of a call: the stack that follows it}`."""
    outer, stacks = callers(model), {}
    taken = {id(point.graph): {call.operation.name for call in nodes(point.graph)} for point in points}
    depth = max(1, sum(counts))
    for index, (point, count) in enumerate(zip(points, counts, strict=True)):
        data_format = data_format_at(point.tensor, point.graph)
        check_fits(point.tensor.shape, point.tensor.dtype, data_format, point.path)
        check_post_activation(point.tensor, template, point.path, outer)
        siblings = taken[id(point.graph)]
        first = 1 + max(_number(point.name, sibling) for sibling in siblings)
        numbers = range(first, first + count)
        siblings.update(f"{point.name}_grow{number}_" for number in numbers)
        blocks = [
            (f"{point.name}_grow{number}", dataclasses.replace(template, depth=depth, seed=_seed(template, index, number)))
            for number in numbers
        ]
        end = id(_end_of_stack(point))
        if end in stacks:
            raise ValueError(
                f'insertion points "{stacks[end].path}" and "{point.path}" are one point of the model, after the same blocks; '
                "name only one of them"
            )
        stacks[end] = _Stack(point.path, blocks, data_format, _policy(point))
    return stacks


def _seed(template, index, number):
    return None if template.seed is None else template.seed + 1000 * index + number


def _scaled(model, stacks, scale, data):
    """The stacks with the scale of every block."""
    if scale == MATCH:
        measured = measure_rms(model, {call: stack.path for call, stack in stacks.items()}, data)
        scales = {stack.block_path(name): measured[call] for call, stack in stacks.items() for name, _ in stack.blocks}
    elif isinstance(scale, Mapping):
        scales = scale
    else:
        scales = {stack.block_path(name): scale for stack in stacks.values() for name, _ in stack.blocks}
    if missing := [
        path for stack in stacks.values() for name, _ in stack.blocks if (path := stack.block_path(name)) not in scales
    ]:
        raise ValueError(f'`scale` has no number for block "{missing[0]}"{nearest(missing[0], scales)}')

    def with_scale(stack: Any) -> Any:
        return [(name, dataclasses.replace(spec, scale=scales[stack.block_path(name)])) for name, spec in stack.blocks]

    return {call: dataclasses.replace(stack, blocks=with_scale(stack)) for call, stack in stacks.items()}


def _number(point, layer_name):
    match = re.match(re.escape(point) + r"_grow(\d+)_", layer_name)
    return int(match.group(1)) if match else 0


def _end_of_stack(point):
    """The call that new blocks follow: that of the point, or the last call of the blocks grown there before."""
    tail, calls = point.node, nodes(point.graph)
    while following := next((call for call in calls if _continues(call, tail.outputs[0], f"{point.name}_grow")), None):
        tail = following
    return tail


def _continues(call, tensor, prefix):
    """Whether a call adds a branch grown at this point to `tensor`, or is the ReLU that closes such a block."""
    name, inputs = call.operation.name, call.arguments.keras_tensors
    return name.startswith(prefix) and name.endswith(("_add", "_out")) and bool(inputs) and inputs[0] is tensor


def _policy(point):
    """Dtype policy for a branch: that of the layer before it where it computes in the tensor's dtype."""
    policy = getattr(point.node.operation, "dtype_policy", None)
    if (
        policy is not None
        and policy.compute_dtype == point.tensor.dtype
        and not isinstance(policy, keras.dtype_policies.QuantizedDTypePolicy)
    ):
        return policy
    dtype = point.tensor.dtype
    return f"mixed_{dtype}" if dtype in ("float16", "bfloat16") else dtype


def _counts(model, points, layers_per_block, blocks, total_blocks, total_layers):
    """The number of blocks for each insertion point."""
    given = [value for value in (blocks, total_blocks, total_layers) if value is not None]
    if len(given) > 1:
        raise ValueError("give one of `blocks` (per insertion point), `total_blocks` and `total_layers`, not several")
    named = {"blocks": blocks, "total_blocks": total_blocks, "total_layers": total_layers}
    blocks, total_blocks, total_layers = (None if v is None else whole_number(k, v, 0) for k, v in named.items())
    if total_layers is not None:
        if total_layers % layers_per_block:
            low = total_layers - total_layers % layers_per_block
            raise ValueError(
                f"`total_layers` must divide by the {layers_per_block} weighted layers of a block, got {total_layers}; "
                f"nearest are {low} and {low + layers_per_block}"
            )
        total_blocks = total_layers // layers_per_block
    if total_blocks is None:
        return [1 if blocks is None else blocks] * len(points)
    return spread(total_blocks, _backbone_layers_before(model, points))


def _backbone_layers_before(model, points):
    """For each point, the weighted layers of the backbone since the point before it, in order of execution."""
    grown = {id(layer) for block in find_blocks(model) if block.add.grown for layer in block.branch}
    ends = {id(point.node) for point in points}
    counts, count = [], 0
    for _, _, node in walk(model):
        count += is_weighted(node.operation) and id(node.operation) not in grown
        if id(node) in ends:
            counts.append(count)
            count = 0
    return counts


def spread(total: int, weights: Sequence[int]) -> list[int]:
    """Share `total` out in proportion to `weights`: largest remainder, ties to the deeper (later) point.

    Args:
        total: Whole number to share out.
        weights: Non-negative numbers; all zero counts as all equal.

    Returns:
        List of whole numbers that add up to `total`.
    """
    weights = weights if sum(weights) else [1] * len(weights)
    whole = sum(weights)
    counts = [total * weight // whole for weight in weights]
    remainders = [total * weight % whole for weight in weights]
    for index in sorted(range(len(weights)), key=lambda i: (remainders[i], i), reverse=True)[: total - sum(counts)]:
        counts[index] += 1
    return counts
