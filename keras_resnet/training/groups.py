"""Parameter groups: which variables decay, and which are gates, new blocks, head or backbone, found by `ResidualAdd`."""

import warnings
from dataclasses import dataclass

import keras

from ..blocks.finding import find_blocks
from ..blocks.gates import gate_parameters
from ..graphs import is_weighted, layers_in, producer, walk


@dataclass(frozen=True, eq=False)
class Group:
    """Variables that are treated alike.

    Args:
        name: E.g. `"backbone, decayed"`.
        variables: Variables of the model.
        lr_multiplier: Factor on the learning rate.
        decay: Factor on the weight decay; 0 or False for none.
        is_orthogonal: Whether Muon makes the updates orthogonal.
    """

    name: str
    variables: list
    lr_multiplier: float = 1.0
    decay: float = 1.0
    is_orthogonal: bool = False


def new_layers(model: keras.Model) -> tuple[list, list]:
    """Return layers of grown blocks, and the head (the last weighted layer): what learns while the backbone is frozen."""
    blocks = [block for block in find_blocks(model) if block.add.grown]
    grown = [layer for block in blocks for layer in [*block.branch, block.add]]
    weighted = [node.operation for _, _, node in walk(model) if is_weighted(node.operation)]
    return grown, weighted[-1:]


def parameter_groups(
    model: keras.Model,
    *,
    gate_lr_multiplier: float = 1.0,
    backbone_lr_multiplier: float = 1.0,
    new_lr_multiplier: float = 1.0,
    new_decay_multiplier: float = 1.0,
    beta_lr_multiplier: float = 1.0,
    beta_decay_multiplier: float = 0.0,
    orthogonal: bool = False,
    trunk_lr_multiplier: float | None = None,
) -> list[Group]:
    """Sort a model's trainable variables by role.

    Gates, γ, β and biases do not decay: decay pulls a gate back to its plateau (arXiv 1706.02677, section 5.1, for γ and β).
    A gate that is a convolution (`zero_conv`, `fixup`) is a gate as well: its kernel does not decay either.

    Args:
        model: Functional or Sequential model.
        gate_lr_multiplier: Factor on the learning rate of gates.
        backbone_lr_multiplier: Factor on the learning rate of what is neither gate, nor grown, nor head.
        new_lr_multiplier: Factor on the learning rate of grown blocks, apart from their gates.
        new_decay_multiplier: Factor on the weight decay of grown blocks.
        beta_lr_multiplier: Factor on the learning rate of β, the biases of norms, in addition to that of their role.
        beta_decay_multiplier: Factor on the weight decay of β.
        orthogonal: Whether kernels of convolutions that a norm follows are groups of their own, for Muon. The norm takes their
            scale out, so they do not decay.
        trunk_lr_multiplier: Deprecated name of `backbone_lr_multiplier`.

    Returns:
        List of `Group`, without empty ones; each trainable variable is in exactly one.
    """
    if trunk_lr_multiplier is not None:
        warnings.warn("`trunk_lr_multiplier` was renamed to `backbone_lr_multiplier`", DeprecationWarning, stacklevel=2)
        backbone_lr_multiplier = trunk_lr_multiplier
    gates = [v for block in find_blocks(model) for v in gate_parameters(block.add.gate, _with_weights(block.branch))]
    grown, head = new_layers(model)
    roles = {id(v): "head" for layer in head for v in layer.trainable_variables}
    roles |= {id(v): "new" for layer in grown for v in layer.trainable_variables}
    roles |= {id(v): "gates" for v in gates}
    kernels = _kernels(model)
    kinds = dict.fromkeys(kernels, "decayed")
    if orthogonal:
        kinds |= dict.fromkeys(_normed_kernels(model), "orthogonal")
    if beta_lr_multiplier != 1 or beta_decay_multiplier:
        kinds |= {id(layer.beta): "β" for layer in _norms(model) if layer.center}
    buckets = {}
    for variable in model.trainable_variables:
        role = roles.get(id(variable), "backbone")
        kind = "gates" if role == "gates" else kinds.get(id(variable), "not decayed")
        buckets.setdefault((role, kind), []).append(variable)
    rates = {"gates": gate_lr_multiplier, "new": new_lr_multiplier, "head": 1.0, "backbone": backbone_lr_multiplier}
    decays = {"decayed": 1.0, "β": beta_decay_multiplier}
    return [
        Group(
            role if role == "gates" else f"{role}, {kind}",
            found,
            rates[role] * (beta_lr_multiplier if kind == "β" else 1.0),
            decays.get(kind, 0.0) * (new_decay_multiplier if role == "new" else 1.0),
            kind == "orthogonal",
        )
        for (role, kind), found in buckets.items()
    ]  # fmt: skip


def _with_weights(layers):
    return [layer for layer in layers if layer.weights]


NORMS = (keras.layers.BatchNormalization, keras.layers.GroupNormalization, keras.layers.LayerNormalization)
CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
POOLS = tuple(getattr(keras.layers, f"{kind}Pooling{rank}D") for kind in ("Max", "Average") for rank in (1, 2, 3))


def _norms(model):
    return [layer for layer in layers_in(model) if isinstance(layer, NORMS)]


def _normed_kernels(model):
    """Ids of the kernels of convolutions whose output goes, perhaps through a pool, into a norm."""
    found = set()
    for _, _, node in walk(model):
        if not isinstance(node.operation, NORMS):
            continue
        before = producer(node.input_tensors[0])
        while before is not None and isinstance(before.operation, POOLS):
            before = producer(before.input_tensors[0])
        if before is not None and isinstance(before.operation, CONVOLUTIONS):
            found.add(id(before.operation.kernel))
    return found


def _kernels(model):
    """Ids of the variables that multiply inputs: of two or more axes that are not broadcast, outside of norms."""
    return {
        id(variable)
        for layer in layers_in(model)
        if not isinstance(layer, NORMS)
        for variable in layer.trainable_variables
        if sum(side > 1 for side in variable.shape) >= 2 or variable.name.endswith("kernel")
    }
