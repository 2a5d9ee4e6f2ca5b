"""Parameter groups: which variables decay, which are gates, which are trunk, found by `ResidualAdd` and by what layers are."""

from dataclasses import dataclass

import keras

from ..graphs import is_weighted, walk
from ..growth.blocks import find_blocks
from ..growth.gates import gate_parameters


@dataclass(frozen=True, eq=False)
class Group:
    """Variables that are treated alike.

    Args:
        name: e.g. `"trunk, decayed"`.
        variables: of the model.
        lr_multiplier: factor on the learning rate.
        decay: whether weight decay applies.
    """

    name: str
    variables: list
    lr_multiplier: float = 1.0
    decay: bool = True


def new_layers(model):
    """Layers of grown blocks, and the head (the last weighted layer): what learns while the trunk is frozen."""
    blocks = [block for block in find_blocks(model) if block.add.grown]
    grown = [layer for block in blocks for layer in [*block.branch, block.add]]
    weighted = [node.operation for _, _, node in walk(model) if is_weighted(node.operation)]
    return grown, weighted[-1:]


def parameter_groups(model, *, gate_lr_multiplier=1.0, trunk_lr_multiplier=1.0):
    """Sort a model's trainable variables by role.

    Gates, γ, β and biases do not decay: decay pulls a gate back to its plateau (arXiv 1706.02677, section 5.1, for γ and β).
    A gate that is a convolution (`zero_conv`, `fixup`) is a gate as well: its kernel does not decay either.

    Args:
        model: Functional or Sequential.
        gate_lr_multiplier: factor on the learning rate of gates.
        trunk_lr_multiplier: factor for what is neither gate, nor grown, nor head.

    Returns:
        List of `Group`, without empty ones; each trainable variable is in exactly one.
    """
    gates = [v for block in find_blocks(model) for v in gate_parameters(block.add.gate, _with_weights(block.branch))]
    grown, head = new_layers(model)
    fresh = [v for layer in [*grown, *head] for v in layer.trainable_variables]
    kernels = _kernels(model)
    gate_ids, fresh_ids = {id(v) for v in gates}, {id(v) for v in fresh}
    buckets = {}
    for variable in model.trainable_variables:
        is_gate, decays = id(variable) in gate_ids, id(variable) in kernels and id(variable) not in gate_ids
        role = "gates" if is_gate else "new" if id(variable) in fresh_ids else "trunk"
        buckets.setdefault((role, decays), []).append(variable)
    factors = {"gates": gate_lr_multiplier, "new": 1.0, "trunk": trunk_lr_multiplier}
    return [
        Group(role if role == "gates" else f"{role}, {'decayed' if decays else 'not decayed'}", found, factors[role], decays)
        for (role, decays), found in buckets.items()
    ]


def _with_weights(layers):
    return [layer for layer in layers if layer.weights]


def _kernels(model):
    """Ids of the variables that multiply inputs: of two or more axes that are not broadcast, outside of norms."""
    norms = (keras.layers.BatchNormalization, keras.layers.GroupNormalization, keras.layers.LayerNormalization)
    return {
        id(variable)
        for layer in model._flatten_layers()
        if not isinstance(layer, norms)
        for variable in layer.trainable_variables
        if sum(side > 1 for side in variable.shape) >= 2 or variable.name.endswith("kernel")
    }
