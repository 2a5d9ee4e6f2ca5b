"""The layers Keras lacks. All are registered, so `keras.saving.load_model` needs no `custom_objects`."""

import keras
from keras import ops

PACKAGE = "keras_resnet"
register = keras.saving.register_keras_serializable(PACKAGE)


@register
class ResidualAdd(keras.layers.Layer):
    """`shortcut + branch`: the one mark by which drift, prune, parameter groups and reports find a residual block.

    Differs from `keras.layers.Add`: exactly two inputs, shortcut first; the sum has the shortcut's dtype (only the
    branch is cast), so that a block built under a mixed policy does not round a float32 trunk.

    Args:
        block: name of the block; the prefix of its layers' names.
        gate: what holds the branch at zero in the beginning (a key of `keras_resnet.growth.GATES`), or None.
        kind: `"preact"` if nothing follows the addition, `"postact"` if a ReLU that belongs to the block does.
        grown: whether `grow`, `residual_stack` or `ResidualBlock` put the block there (and not an architecture).

    Call arguments:
        inputs: `[shortcut, branch]`, two tensors of the same shape.

    Source: He et al. 2015 (arXiv 1512.03385), equation 1.
    """

    def __init__(self, block=None, gate=None, kind="preact", grown=False, **kwargs):
        kwargs.setdefault("autocast", False)
        super().__init__(**kwargs)
        if kind not in ("preact", "postact"):
            raise ValueError(f'`kind` must be "preact" or "postact", got {kind!r}')
        self.block, self.gate, self.kind, self.grown = block, gate, kind, bool(grown)
        self.supports_masking = True

    def call(self, inputs):
        shortcut, branch = inputs
        return shortcut + ops.cast(branch, shortcut.dtype)

    def compute_output_spec(self, inputs):
        shortcut, branch = inputs
        if len(shortcut.shape) != len(branch.shape) or any(
            a is not None and b is not None and a != b for a, b in zip(shortcut.shape, branch.shape, strict=True)
        ):
            raise ValueError(f"shortcut and branch of a residual block must have one shape, got {shortcut.shape} and {branch.shape}")
        return keras.KerasTensor(shortcut.shape, dtype=shortcut.dtype)

    def get_config(self):
        return {**super().get_config(), "block": self.block, "gate": self.gate, "kind": self.kind, "grown": self.grown}


@register
class Card(keras.layers.Layer):
    """Identity layer that carries a model's card; attributes of a Functional model are lost on save, layers are not.

    Pinned to float32, since pixels would be rounded under a mixed policy. Read it with `keras_resnet.card(model)`.

    Args:
        card: JSON-serialisable dict, see `keras_resnet.modelcard.ModelCard`.
    """

    def __init__(self, card, **kwargs):
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.card = dict(card)

    def call(self, inputs):
        return inputs

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)

    def get_config(self):
        return {**super().get_config(), "card": self.card}
