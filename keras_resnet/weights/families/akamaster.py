"""akamaster/pytorch_resnet_cifar10: ResNet-20 to 1202 for CIFAR-10, with option A (or B) and ImageNet's mean and deviation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .checkpoint_format import TORCH_VARIABLES, CheckpointFormat, by_rules
from .torchvision import BLOCK, IGNORED

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RULES = {
    **BLOCK,
    r"stage(\d+)_block(\d+)_shortcut_conv": "layer{0}.{1-1}.shortcut.0",
    r"stage(\d+)_block(\d+)_shortcut_norm": "layer{0}.{1-1}.shortcut.1",
    r"predictions": "linear",
}


def _translate(config, layer, variable):
    return f"{by_rules(RULES, layer)}.{TORCH_VARIABLES[variable]}"


def is_akamaster(arrays: Mapping[str, np.ndarray]) -> bool:
    """Return whether names and stem are akamaster's; kuangliu/pytorch-cifar uses the same names for wider networks."""
    stem = arrays.get("conv1.weight", np.empty(0))
    return "linear.weight" in arrays and "layer1.0.conv1.weight" in arrays and stem.shape == (16, 3, 3, 3)


def _fits(config, arrays):
    if "layer2.0.shortcut.0.weight" in arrays:
        return None
    if config.shortcut != "pad":
        return (
            f"its shortcuts are option A with zero channels on both sides (shortcut='pad'), the model's are {config.shortcut!r}"
        )
    return None


FORMAT = CheckpointFormat(
    "akamaster",
    is_akamaster,
    _translate,
    family="resnet",
    torch_layout=True,
    ignored=IGNORED,
    fits=_fits,
    preprocessing="torch",
    card={"dataset": "CIFAR-10", "licence": "BSD-2-Clause"},
    labels=CLASSES,
)
