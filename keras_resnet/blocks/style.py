"""What the layers and blocks of one network have in common. The configs of the zoo inherit these fields."""

from dataclasses import dataclass
from typing import Any

from ..deprecated import old_arguments


@dataclass(frozen=True, kw_only=True)
class LayerStyle:
    """What the layers of one network have in common.

    Attributes:
        rank: Number of spatial axes: 1, 2 or 3; 0 for vectors.
        activation: Any name that Keras knows.
        norm_epsilon: Number that is added to the variance.
        norm_momentum: Momentum of the moving statistics, as Keras defines it.
    """

    rank: int = 2
    activation: str = "relu"
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9

    # Residual networks vary these too, as fields of `BlockStyle`.
    padding = "symmetric"
    norm = "batch"
    norm_groups = 32
    norm_scale = True
    weight_standardization = False
    initializer = "he"


def _with_conv_bias(arguments: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    if "projection_bias" not in arguments:
        return None
    biased = ("projection",) if arguments["projection_bias"] else ()
    kept = {name: value for name, value in arguments.items() if name != "projection_bias"}
    return {"conv_bias": biased, **kept}, f"`projection_bias={bool(biased)}` was renamed to `conv_bias={biased!r}`"


@old_arguments(_with_conv_bias)
@dataclass(frozen=True, kw_only=True)
class BlockStyle(LayerStyle):
    """What the blocks of one residual network have in common. The default is a post-activation block with option B.

    See `ResNetConfig`, which inherits the fields, for what they mean.
    """

    preact: bool = False
    shortcut: str = "projection"
    shortcut_norm: bool = True
    padding: str = "symmetric"
    norm: str = "batch"
    norm_groups: int = 32
    norm_scale: bool = True
    weight_standardization: bool = False
    initializer: str = "he"
    conv_bias: tuple[str, ...] = ()
    antialias: bool = False
    subsampling: str = "stride"
    gate: str | None = None
    dropout: float = 0.0
