"""A model as a list of calls that can be run without some of its residual blocks, and resumed in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops, tree

from ..blocks.finding import Block
from ..blocks.identity import ResidualBlock
from ..graphs import call_inputs, flat_inputs, graph_of, layers_in, nodes, pack_outputs, require_graph
from ..zoo.counting import layer_macs
from .prune import block_ends

Values = dict[int, Any]
Left = frozenset[int]


@dataclass(frozen=True)
class _Step:
    """One call: what it computes, and the ids of the symbolic tensors that it reads and makes, the first read one first."""

    run: Callable[[Values, bool], Sequence[Any]]
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    operation: Any = None


class Program:
    """The calls of a model in order of execution. The call of a nested model is replaced by its own calls.

    A network without some blocks costs only what remains, because branches that nothing reads are not computed. Everything before
    the first block that is left out is the same as in the whole network, so that many candidates share it.

    Args:
        model: Functional or Sequential model. Its batch norms may be run on batch statistics, which moves their moving statistics
            unless their momentum is 1.
        blocks: The blocks that may be left out; other methods refer to them by their position.
    """

    def __init__(self, model: keras.Model, blocks: Sequence[Block]) -> None:
        self.graph, self.blocks = require_graph(model), list(blocks)
        self.steps = list(_unrolled(self.graph))
        ends = [block_ends(model, [block]) for block in self.blocks]
        self._ends = [{index for index, step in enumerate(self.steps) if id(step.operation) in owned} for owned in ends]
        everything = self._needed(frozenset())
        # The first call that is not needed any longer without a block.
        self.starts = [min((everything - self._needed(frozenset([i]))) | self._ends[i]) for i in range(len(self.blocks))]
        self.macs: dict[int, int] = {}

    def first(self, left: Left) -> int:
        """Return the position from which a network without some blocks differs from the whole one."""
        return min((self.starts[block] for block in left), default=len(self.steps))

    def norms(self, left: Left) -> list[keras.layers.BatchNormalization]:
        """Return the batch norms whose inputs change where some blocks are left out; those inside wrappers are not found."""
        found = {}
        for index in sorted(self._needed(left)):
            operation = self.steps[index].operation
            inner = layers_in(operation) if isinstance(operation, ResidualBlock) else [operation]
            if index > self.first(left):
                found |= {id(part): part for part in inner if isinstance(part, keras.layers.BatchNormalization)}
        return list(found.values())

    def cost(self, left: Left) -> int:
        """Return the multiply-adds for one input, once `count` has been called."""
        return sum(self.macs.get(index, 0) for index in self._needed(left) if not self._is_passed(index, left))

    def count(self, x: Any) -> None:
        """Run one input through the whole network, to know the multiply-adds of every call."""
        one = tree.map_structure(lambda array: array[:1], x)

        def observe(index: int, values: Values) -> None:
            step = self.steps[index]
            if step.operation is not None and step.reads:
                self.macs[index] = layer_macs(step.operation, [values[step.reads[0]]], values[step.makes[0]])

        self._run(self._start(one), frozenset(), range(len(self.steps)), len(self.steps), observe)

    def outputs(self, x: Any, left: Left = frozenset(), batch_statistics: bool = False) -> Any:
        """Return the outputs for one batch, in the structure of the model's.

        Args:
            x: One batch of inputs.
            left: Positions of the blocks that are left out.
            batch_statistics: Whether batch norms whose inputs change use the statistics of the batch.
        """
        first = self.first(left) if batch_statistics else len(self.steps)
        values = self._start(x)
        self._run(values, left, range(len(self.steps)), first)
        return self._packed(values)

    def branching(self, x: Any, base: Left, candidates: Sequence[Left]) -> Iterator[tuple[int, Any]]:
        """Run several networks on one batch, each from where it differs from a common base, on batch statistics.

        Args:
            x: One batch of inputs.
            base: What the candidates have in common: each leaves out these blocks and others.
            candidates: The networks.

        Yields:
            `(position of the candidate, outputs)`, in another order than that of the candidates.
        """
        needed = self._needed(base)
        starts: dict[int, list[int]] = {}
        for number, left in enumerate(candidates):
            changed = needed - self._needed(left) | {i for block in left - base for i in self._ends[block]}
            starts.setdefault(min(changed, default=len(self.steps) - 1), []).append(number)
        values, done = self._start(x), 0
        for start in sorted(starts):
            self._run(values, base, range(done, start), self.first(base))
            done = start
            for number in starts[start]:
                own, left = dict(values), candidates[number]
                self._run(own, left, range(start, len(self.steps)), self.first(left))
                yield number, self._packed(own)

    def _start(self, x: Any) -> Values:
        inputs = flat_inputs(self.graph, tree.map_structure(ops.convert_to_tensor, x))
        return dict(zip(map(id, self.graph.inputs), inputs, strict=True))

    def _run(
        self, values: Values, left: Left, part: range, first: int, observe: Callable[[int, Values], object] | None = None
    ) -> None:
        """Run some calls, and drop what nothing reads later.

        Args:
            values: Tensors by the ids of the symbolic ones; changed.
            left: Blocks that are left out.
            part: Positions of the calls.
            first: Call after which batch norms use batch statistics.
            observe: Called with the position of each call and the values, which then hold what it took and gave.
        """
        needed = sorted(self._needed(left))
        last = {key: index for index in needed for key in self._reads(index, left)}
        kept = {id(output) for output in self.graph.outputs}
        for index in needed:
            if index not in part:
                continue
            step, passed = self.steps[index], self._is_passed(index, left)
            made = [values[step.reads[0]]] if passed else step.run(values, index > first)
            values.update(zip(step.makes, made, strict=True))
            if observe is not None:
                observe(index, values)
            for key in self._reads(index, left):
                if last[key] == index and key not in kept:
                    values.pop(key, None)

    def _is_passed(self, index: int, left: Left) -> bool:
        """Whether a call gives back its first input."""
        return any(index in self._ends[block] for block in left)

    def _reads(self, index: int, left: Left) -> tuple[int, ...]:
        return self.steps[index].reads[: 1 if self._is_passed(index, left) else None]

    def _needed(self, left: Left) -> set[int]:
        """The calls that the outputs depend on."""
        passed = {index for block in left for index in self._ends[block]}
        wanted, needed = {id(output) for output in self.graph.outputs}, set()
        for index in range(len(self.steps) - 1, -1, -1):
            step = self.steps[index]
            if not wanted.isdisjoint(step.makes):
                needed.add(index)
                wanted.update(step.reads[:1] if index in passed else step.reads)
        return needed

    def _packed(self, values: Values) -> Any:
        return pack_outputs(self.graph, [values[id(output)] for output in self.graph.outputs])


def _unrolled(graph: Any) -> Iterator[_Step]:
    for node in nodes(graph):
        reads, makes = (tuple(map(id, tensors)) for tensors in (node.arguments.keras_tensors, node.outputs))
        inner = graph_of(node.operation) if isinstance(node.operation, keras.Model) else None
        if inner is None:
            yield _Step(_call(node), reads, makes, node.operation)
            continue
        yield _Step(_enter(node, inner), reads, tuple(map(id, inner.inputs)))
        yield from _unrolled(inner)
        ends = tuple(map(id, inner.outputs))
        yield _Step(_leave(ends), ends, makes)


def _call(node: Any) -> Callable:
    operation = node.operation

    def run(values: Values, batch_statistics: bool) -> list:
        args, kwargs = node.arguments.fill_in(values)
        if batch_statistics and isinstance(operation, ResidualBlock):
            return [operation.run(call_inputs(args, kwargs), training=True)]
        if batch_statistics and isinstance(operation, keras.layers.BatchNormalization):
            kwargs = {**kwargs, "training": True}
        return tree.flatten(operation(*args, **kwargs))

    return run


def _leave(ends: tuple[int, ...]) -> Callable:
    return lambda values, batch_statistics: [values[key] for key in ends]


def _enter(node: Any, inner: Any) -> Callable:
    def run(values: Values, batch_statistics: bool) -> list:
        return flat_inputs(inner, call_inputs(*node.arguments.fill_in(values)))

    return run
