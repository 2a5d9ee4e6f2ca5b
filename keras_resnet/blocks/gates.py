"""Gates: what holds a residual branch at zero in the beginning, and which pairs of block and gate cannot work.

A gate makes `F(x)` zero while leaving something a gradient. Pairs that have no gradient anywhere ("dead") or that lose the
identity within one step ("explosive") are refused when a `BlockSpec` is made.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np

from ..checks import nearest, positive_number, whole_number
from .branches import BRANCHES, Act, Branch, ConvPlan, Norm, Scale, Shift, Step, in_order, plan_convolutions

LAYERSCALE_INITIAL = 1e-5


@dataclass(frozen=True)
class Gate:
    """A row of `GATES`.

    Attributes:
        summary: What starts at which value.
        exact: Whether the block's output is `==` its input at first. Otherwise |y − x| ≤ `bound` · scale · |F(x)|.
        bound: Largest share of |F(x)| that is added at first.
        tail: Last step of the branch, or None.
        refused_after_activation: Why the gate cannot be used in a post-activation block; `""` if it can.
    """

    summary: str
    exact: bool = True
    bound: float = 0.0
    tail: Scale | None = None
    refused_after_activation: str = ""


GATES = {
    "zero_conv": Gate(
        "the last convolution and its bias start at 0, and no norm follows",
        refused_after_activation="the norm after the zero convolution undoes the identity within one step (explosive)",
    ),
    "zero_gamma": Gate("a closing batch norm starts with γ = 0 and β = 0"),
    "rezero": Gate("a scalar factor at the end starts at 0 (ReZero, SkipInit)", tail=Scale("scalar", 0.0)),
    "fixup": Gate(
        "no norms; the last convolution is 0, the others are scaled by the depth of the stack; scalar shifts and a factor",
        tail=Scale("scalar", 1.0, shift=True),
        refused_after_activation="fixup has no norms, and its shifts before the closing ReLU are not those of the identity",
    ),
    "layerscale": Gate(
        f"a factor per channel starts at {LAYERSCALE_INITIAL:g}",
        exact=False,
        bound=LAYERSCALE_INITIAL,
        tail=Scale("channel", LAYERSCALE_INITIAL),
    ),
    "none": Gate("nothing: a control that is not the identity", exact=False, bound=1.0),
}


@dataclass(frozen=True)
class Kind:
    """A row of `KINDS`: a block that growth can add.

    Attributes:
        branch: Its convolutions.
        preact: Whether norm and activation come before each convolution, and nothing after the addition.
        residual: Whether it has a shortcut.
    """

    branch: Branch
    preact: bool = True
    residual: bool = True

    @property
    def closes_with_relu(self) -> bool:
        """Whether a ReLU follows the addition, so that the block can be the identity on non-negative tensors only."""
        return self.residual and not self.preact

    @property
    def gate(self) -> str:
        """The default gate."""
        if not self.residual:
            return "none"
        return "zero_conv" if self.preact else "zero_gamma"

    @property
    def refused(self) -> dict[str, str]:
        """Why a gate cannot be used with this block, by the gate's name."""
        if not self.residual:
            return {name: "a plain block has no shortcut, so no gate makes it the identity" for name in GATES if name != "none"}
        reasons = {name: "" if self.preact else gate.refused_after_activation for name, gate in GATES.items()}
        return {name: reason for name, reason in reasons.items() if reason}

    @property
    def weighted_layers(self) -> int:
        """Number of convolutions, which is what `total_layers` counts."""
        return len(self.branch.convs)


# Every branch can be grown in its pre-activation form, whose identity needs no non-negative input. The basic one is named after
# that form.
KINDS = {
    **{"preact" if name == "basic" else name: Kind(branch) for name, branch in BRANCHES.items()},
    "postact": Kind(BRANCHES["basic"], preact=False),
    "plain": Kind(BRANCHES["basic"], preact=False, residual=False),
}


@dataclass(frozen=True)
class BlockSpec:
    """What a residual block is made of; pairs of block and gate that cannot work are refused.

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

    def __post_init__(self) -> None:
        if not isinstance(self.block, str) or self.block not in KINDS:
            raise ValueError(f"unknown block {self.block!r}{nearest(self.block, KINDS)}")
        if isinstance(self.gate, (tuple, list)) or "+" in str(self.gate):
            raise ValueError(
                f"a block takes one gate, got {self.gate!r}: "
                "two zeros in a row leave every parameter without gradient (it never trains)"
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
        """The row of `KINDS`."""
        return KINDS[self.block]

    @property
    def is_exact(self) -> bool:
        """Whether the block's output is `==` its input before training."""
        return GATES[self.gate].exact

    @property
    def bound(self) -> float:
        """Largest share of |F(x)| that the block adds before training; F is the branch without gate and scale."""
        return GATES[self.gate].bound * self.scale

    def steps(self, channels: int) -> list[Step]:
        """Return the steps of the branch, with the layers of the gate in their places.

        Args:
            channels: Number of channels of the input, and so of the output.
        """
        kind = self.kind
        steps: list[Step] = [*in_order(self._convolutions(channels), kind.preact)]
        if not kind.residual:
            steps.append(Act())
        if self.gate == "zero_gamma":
            steps = [*(steps[:-1] if isinstance(steps[-1], Norm) else steps), Norm(zero=True)]
        if self.gate == "fixup":
            steps = [Shift() if isinstance(step, Norm) else step for step in steps]
            steps = [part for step in steps for part in ((Shift(), step) if isinstance(step, ConvPlan) else (step,))]
        else:
            # A bias before a norm would have no effect, and fixup has shifts instead.
            normed = [isinstance(after, Norm) for after in (*steps[1:], None)]
            steps = [
                dataclasses.replace(step, bias=not has_norm) if isinstance(step, ConvPlan) else step
                for step, has_norm in zip(steps, normed, strict=True)
            ]
        steps = [Act("relu") if isinstance(step, Act) else step for step in steps]
        tail = GATES[self.gate].tail
        return steps if tail is None else [*steps, tail]

    def _convolutions(self, channels: int) -> list[ConvPlan]:
        branch = self.kind.branch
        plans = plan_convolutions(branch, channels, max(1, int(channels / branch.expansion)), channels)
        count = len(plans)
        # Fixup: with m convolutions in each of L branches the first m - 1 are scaled by L^(-1/(2m - 2)).
        shrink = self.depth ** (-1 / (2 * count - 2)) if self.gate == "fixup" else 1.0
        seeds = [None] * count if self.seed is None else np.random.SeedSequence(self.seed).generate_state(count).tolist()
        stds = [shrink] * (count - 1) + [1.0]
        initializers = [
            keras.initializers.VarianceScaling(2.0 * std**2, "fan_in", seed=seed) for std, seed in zip(stds, seeds, strict=True)
        ]
        if self.gate in ("zero_conv", "fixup"):
            initializers[-1] = "zeros"
        return [dataclasses.replace(plan, initializer=new) for plan, new in zip(plans, initializers, strict=True)]


def gate_parameters(gate: str | None, branch: Sequence[keras.layers.Layer]) -> list[keras.Variable]:
    """Return the variables that are all zero exactly when an exact gate holds its branch at zero.

    Args:
        gate: A key of `GATES`, or None.
        branch: The branch's layers with weights, in order.

    Returns:
        The variables; none for `None` and `"none"`.
    """
    if not branch or gate in (None, "none"):
        return []
    last = branch[-1]
    if gate in ("zero_conv", "zero_gamma"):
        return list(last.weights)[:2]
    if gate == "fixup":
        return list(branch[-2].weights)[:1] + [last.shift]
    return [last.scale]
