"""Residual branches and their gates as data: which layers a branch has, what holds it at zero, which pairs are refused.

A gate is what makes `F(x)` zero in the beginning while leaving something a gradient. Pairs that have no gradient
anywhere ("dead") or that lose the identity within one step ("explosive") are constructor errors of `BlockSpec`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import keras
import numpy as np

from ..checks import nearest, positive_number, whole_number
from ..layers import Affine


class Conv(NamedTuple):
    """A convolution of a branch: kernel `size`, its share `width` of the block's channels, depthwise or not.

    On vectors `[batch, features]`, which have no space, it is a dense layer.
    """

    size: int
    width: float = 1.0
    depthwise: bool = False


NORM, ACT, SHIFT = "norm", "relu", "shift"


@dataclass(frozen=True)
class Kind:
    """A row of `KINDS`: the branch's steps, the default gate, and why a gate is refused."""

    steps: tuple
    gate: str
    refused: dict
    kind: str = "preact"
    residual: bool = True

    @property
    def weighted_layers(self):
        """Number of convolutions: what `total_layers` counts."""
        return sum(isinstance(step, Conv) for step in self.steps)


@dataclass(frozen=True)
class Gate:
    """A row of `GATES`. `exact`: the output is `==` the input at first; otherwise |y - x| ≤ `bound` · scale · |F(x)|."""

    summary: str
    exact: bool = True
    bound: float = 0.0


LAYERSCALE_INITIAL = 1e-5

GATES = {
    "zero_conv": Gate("last convolution and its bias start at 0, no norm behind it"),
    "zero_gamma": Gate("a closing batch norm starts with γ = 0 and β = 0"),
    "rezero": Gate("a scalar behind the last layer starts at 0 (ReZero, SkipInit)"),
    "fixup": Gate("no norms; last convolution 0, the others scaled by the depth of the stack; scalar shifts and a multiplier"),
    "layerscale": Gate(f"a scale per channel starts at {LAYERSCALE_INITIAL:g}", exact=False, bound=LAYERSCALE_INITIAL),
    "none": Gate("nothing: a control that is not the identity", exact=False, bound=1.0),
}

_NO_SHORTCUT = "a plain block has no shortcut, so no gate makes it the identity"
KINDS = {
    "preact": Kind((NORM, ACT, Conv(3), NORM, ACT, Conv(3)), "zero_conv", {}),
    "bottleneck": Kind((NORM, ACT, Conv(1, 0.25), NORM, ACT, Conv(3, 0.25), NORM, ACT, Conv(1)), "zero_conv", {}),
    "depthwise": Kind((NORM, ACT, Conv(3, depthwise=True), NORM, ACT, Conv(1)), "zero_conv", {}),
    "postact": Kind(
        (Conv(3), NORM, ACT, Conv(3), NORM),
        "zero_gamma",
        {
            "zero_conv": "the norm behind the zero convolution undoes the identity within one step (explosive)",
            "fixup": "fixup has no norms, and its shifts in front of the closing ReLU are not the identity's",
        },
        kind="postact",
    ),
    "plain": Kind(
        (Conv(3), NORM, ACT, Conv(3), NORM, ACT),
        "none",
        {gate: _NO_SHORTCUT for gate in GATES if gate != "none"},
        residual=False,
    ),
}


@dataclass(frozen=True)
class BlockSpec:
    """What a residual block is made of; refuses the pairs of block and gate that cannot work.

    Args:
        block: A key of `KINDS`.
        gate: A key of `GATES`, or None for the block's default.
        seed: Integer for reproducible weights, or None.
        depth: Number of blocks in the stack; only `fixup` uses it.
        scale: Constant factor of the branch, applied after its gate; a positive number.

    Raises:
        ValueError: The block, gate or scale is invalid, or the pair of block and gate is dead or explosive.
    """

    block: str = "preact"
    gate: str | None = None
    seed: int | None = None
    depth: int = 1
    scale: float = 1.0

    def __post_init__(self):
        if not isinstance(self.block, str) or self.block not in KINDS:
            raise ValueError(f"unknown block {self.block!r}{nearest(self.block, KINDS)}")
        if isinstance(self.gate, (tuple, list)) or "+" in str(self.gate):
            raise ValueError(
                f"a block takes one gate, got {self.gate!r}: "
                "two zeros in a row leave every parameter without gradient (dead for ever)"
            )
        if self.gate is None:
            object.__setattr__(self, "gate", KINDS[self.block].gate)
        if not isinstance(self.gate, str) or self.gate not in GATES:
            raise ValueError(f"unknown gate {self.gate!r}{nearest(self.gate, GATES)}")
        if reason := KINDS[self.block].refused.get(self.gate):
            raise ValueError(f'gate "{self.gate}" cannot be used with block "{self.block}": {reason}')
        object.__setattr__(self, "depth", whole_number("depth", self.depth, 1))
        if self.seed is not None:
            object.__setattr__(self, "seed", whole_number("seed", self.seed, 0))
        object.__setattr__(self, "scale", positive_number("scale", self.scale))
        if self.scale != 1 and not self.kind.residual:
            raise ValueError(f'`scale` needs a shortcut to be measured against; block "{self.block}" has none')

    @property
    def kind(self) -> Kind:
        return KINDS[self.block]

    @property
    def is_exact(self) -> bool:
        """Whether the block's output is `==` its input before training."""
        return GATES[self.gate].exact

    @property
    def bound(self) -> float:
        """Largest share of |F(x)| that the block adds before training; F is the branch without gate and scale."""
        return GATES[self.gate].bound * self.scale

    def steps(self):
        """The branch's steps with the gate's own layers in place."""
        steps = list(self.kind.steps)
        if self.gate == "zero_gamma" and steps[-1] != NORM:
            steps.append(NORM)
        if self.gate == "fixup":
            steps = [SHIFT if step == NORM else step for step in steps]
            steps = [part for step in steps for part in ([SHIFT, step] if isinstance(step, Conv) else [step])]
        if tail := _tails(self.gate):
            steps.append(tail)
        return steps


def _tails(gate):
    """Arguments of the `Affine` layer that closes a branch, or None."""
    return {
        "rezero": {"scale": "scalar", "initial": 0.0},
        "layerscale": {"scale": "channel", "initial": LAYERSCALE_INITIAL},
        "fixup": {"scale": "scalar", "initial": 1.0, "shift": True},
    }.get(gate)


def branch_layers(spec, channels, rank, data_format, name, dtype=None):
    """The layers of one branch, in order, not yet built.

    Args:
        spec: `BlockSpec`.
        channels: channels of the input, and so of the output.
        rank: number of spatial axes, 0 (vectors) to 3.
        data_format: `"channels_last"` or `"channels_first"`.
        name: prefix of the layers' names.
        dtype: dtype policy of the layers.

    Returns:
        List of Keras layers, to be called one after the other.

    Raises:
        ValueError: a depthwise block on vectors or 3-D data, for which Keras has no layer.
    """
    steps = spec.steps()
    convs = [step for step in steps if isinstance(step, Conv)]
    axis = 1 if data_format == "channels_first" else -1
    seeds = _seeds(spec.seed, len(convs))
    # Fixup: with m convolutions in each of L branches the first m-1 are scaled by L^(-1/(2m-2)).
    shrink = spec.depth ** (-1 / (2 * len(convs) - 2)) if spec.gate == "fixup" else 1.0
    common = {"dtype": dtype}
    layers, count, done = [], {}, 0

    def label(part):
        count[part] = count.get(part, 0) + 1
        return f"{name}_{part}{count[part]}"

    for index, step in enumerate(steps):
        last_step = index == len(steps) - 1
        if step == NORM:
            gamma = "zeros" if spec.gate == "zero_gamma" and last_step else "ones"
            # Momentum 0.9: statistics of a new branch must catch up within a short fine-tuning.
            layers.append(
                keras.layers.BatchNormalization(
                    axis=axis, momentum=0.9, epsilon=1e-5, gamma_initializer=gamma, name=label("norm"), **common
                )
            )
        elif step == ACT:
            layers.append(keras.layers.Activation("relu", name=label("relu"), **common))
        elif step == SHIFT:
            layers.append(Affine(scale=None, shift=True, name=label("shift"), **common))
        elif isinstance(step, Conv):
            done += 1
            last = done == len(convs)
            zero = last and spec.gate in ("zero_conv", "fixup")
            std = 1.0 if last else shrink
            initializer = "zeros" if zero else keras.initializers.VarianceScaling(2.0 * std**2, "fan_in", seed=seeds[done - 1])
            normed = not last_step and steps[index + 1] == NORM
            layers.append(
                _conv(
                    step,
                    channels,
                    rank,
                    data_format,
                    initializer,
                    use_bias=not normed and spec.gate != "fixup",
                    name=label("conv" if rank else "dense"),
                    **common,
                )
            )
        else:
            layers.append(Affine(axis=axis, name=f"{name}_scale", **step, **common))
    return layers


def _seeds(seed, count):
    return [None] * count if seed is None else [int(s) for s in np.random.SeedSequence(seed).generate_state(count)]


def _conv(step, channels, rank, data_format, initializer, **kwargs):
    if step.depthwise and rank in (0, 3):
        data = "3-D data" if rank else "vectors"
        raise ValueError(f'Keras has no depthwise convolution for {data}; use block "preact" or "bottleneck"')
    if rank == 0:
        return keras.layers.Dense(max(1, int(channels * step.width)), kernel_initializer=initializer, **kwargs)
    kwargs |= {"padding": "same", "data_format": data_format}
    if step.depthwise:
        layer = getattr(keras.layers, f"DepthwiseConv{rank}D")
        return layer(step.size, depthwise_initializer=initializer, **kwargs)
    filters = max(1, int(channels * step.width))
    return getattr(keras.layers, f"Conv{rank}D")(filters, step.size, kernel_initializer=initializer, **kwargs)


def gate_parameters(gate, branch):
    """The variables that are all zero exactly when an exact gate holds its branch at zero.

    Args:
        gate: a key of `GATES`, or None.
        branch: the branch's layers with weights, in order.

    Returns:
        List of variables; empty for `None` and `"none"`.
    """
    if not branch or gate in (None, "none"):
        return []
    last = branch[-1]
    if gate in ("zero_conv", "zero_gamma"):
        return list(last.weights)[:2]
    if gate == "fixup":
        return list(branch[-2].weights)[:1] + [last.shift]
    return [last.scale]
