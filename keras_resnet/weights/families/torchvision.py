"""torchvision: ResNets, ResNeXts, Wide ResNets and VGGs. timm's ResNets without pre-activation have the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .checkpoint_format import TORCH_VARIABLES, CheckpointFormat, by_rules

if TYPE_CHECKING:
    import numpy as np


BLOCK = {
    r"stage(\d+)_block(\d+)_conv(\d)": "layer{0}.{1-1}.conv{2}",
    r"stage(\d+)_block(\d+)_norm(\d)": "layer{0}.{1-1}.bn{2}",
    r"stage(\d+)_block(\d+)_se_fc(\d)": "layer{0}.{1-1}.se.fc{2}",
    r"stem_norm": "bn1",
    r"stem_conv": "conv1",
    r"stem_conv([123])": "conv1.{0}",
    r"stem_norm3": "bn1",
    r"stem_norm([12])": "conv1.{0}",
    r"stem_pool_conv": "maxpool.0",
    # The last norm of a pre-activation network, e.g. in bearpaw/pytorch-classification.
    r"head_norm": "bn",
    r"predictions": "fc",
}
PLAIN_SHORTCUT = {
    r"stage(\d+)_block(\d+)_shortcut_conv": "layer{0}.{1-1}.downsample.0",
    r"stage(\d+)_block(\d+)_shortcut_norm": "layer{0}.{1-1}.downsample.1",
}
POOLED_SHORTCUT = {
    r"stage(\d+)_block(\d+)_shortcut_conv": "layer{0}.{1-1}.downsample.1",
    r"stage(\d+)_block(\d+)_shortcut_norm": "layer{0}.{1-1}.downsample.2",
}
# Positions in the stem's `torch.nn.Sequential`, in which activations count as well.
DEEP_STEM = {
    "stem_conv1": "conv1.0",
    "stem_norm1": "conv1.1",
    "stem_conv2": "conv1.3",
    "stem_norm2": "conv1.4",
    "stem_conv3": "conv1.6",
}


def resnet_rules(config: Any) -> dict[str, str]:
    """Return the rules for a `ResNetConfig`, see `by_rules`."""
    shortcut = POOLED_SHORTCUT if config.shortcut == "average" else PLAIN_SHORTCUT
    pool_norm = {"stem_pool_norm": "maxpool.2" if config.antialias else "maxpool.1"}
    return {**DEEP_STEM, **pool_norm, **shortcut, **BLOCK}


def translate_resnet(config: Any, layer: str, variable: str) -> str:
    """Return the name that torchvision and timm give a variable of a ResNet."""
    return f"{by_rules(resnet_rules(config), layer)}.{TORCH_VARIABLES[variable]}"


def resnet_fits(config: Any, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Return why a file with torch's conventions cannot belong to a config, or None."""
    if config.stride_in == "1x1" and config.block == "bottleneck":
        return "it has the stride in the 3×3 (v1.5), the model in the 1×1"
    projected = any(name.endswith(("downsample.0.weight", "downsample.1.weight", "shortcut.0.weight")) for name in arrays)
    if projected and config.shortcut.startswith("pad"):
        return "its shortcuts are projections, the model's are option A"
    return None


def vgg_places(config: Any) -> dict[str, int]:
    """Return the positions of layers in torchvision's `features`, in which norms, activations and pools count as well."""
    places, place = {}, 0
    for stage, count in enumerate(config.stages, start=1):
        for number in range(1, count + 1):
            places[f"block{stage}_conv{number}"] = place
            places[f"block{stage}_norm{number}"] = place + 1
            place += 3 if config.batch_norm else 2
        place += 1
    return places


def translate_vgg(config: Any, layer: str, variable: str) -> str:
    """Return torchvision's name of a variable of a VGG. Among the dense layers, activations and dropout count as well."""
    hidden = len(config.head_widths)
    places = {name: f"features.{place}" for name, place in vgg_places(config).items()}
    places |= {f"fc{number}": f"classifier.{3 * (number - 1)}" for number in range(1, hidden + 1)}
    places["predictions"] = f"classifier.{3 * hidden}" if hidden else "classifier"
    return f"{places.get(layer, layer)}.{TORCH_VARIABLES[variable]}"


IMAGENET = {"dataset": "ImageNet-1k"}
IMAGE = {"size": [224, 224], "resize": 256}
IGNORED = r".*num_batches_tracked"


def is_resnet(arrays: Mapping[str, np.ndarray]) -> bool:
    """Return whether arrays have the names of torchvision's ResNets, whatever the classifier is called."""
    return "layer1.0.conv1.weight" in arrays and ("conv1.weight" in arrays or "conv1.0.weight" in arrays)


RESNET = CheckpointFormat(
    "torchvision or timm",
    is_resnet,
    translate_resnet,
    family="resnet",
    torch_layout=True,
    ignored=IGNORED,
    fits=resnet_fits,
    preprocessing="torch",
    image=IMAGE,
)
VGG = CheckpointFormat(
    "torchvision",
    lambda arrays: "features.0.weight" in arrays and "pre_logits.fc1.weight" not in arrays,
    translate_vgg,
    family="vgg",
    torch_layout=True,
    ignored=IGNORED,
    preprocessing="torch",
    card=IMAGENET,
    image=IMAGE,
)
