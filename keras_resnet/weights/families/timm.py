"""timm: pre-activation ResNets (BiT included) and VGGs. Its other ResNets have torchvision's names."""

from .checkpoint_format import TORCH_VARIABLES, CheckpointFormat, by_rules
from .torchvision import IGNORED, IMAGE, vgg_places

V2 = {
    r"stem_(conv|norm)(\d?)": "stem.{0}{1}",
    r"stage(\d+)_block(\d+)_(conv|norm)(\d)": "stages.{0-1}.blocks.{1-1}.{2}{3}",
    r"stage(\d+)_block(\d+)_shortcut_conv": "stages.{0-1}.blocks.{1-1}.downsample.conv",
    r"head_norm": "norm",
    r"predictions": "head.fc",
}


def _v2(config, layer, variable):
    return f"{by_rules(V2, layer)}.{TORCH_VARIABLES[variable]}"


def _vgg(config, layer, variable):
    places = {name: f"features.{place}" for name, place in vgg_places(config).items()}
    places |= {"fc1": "pre_logits.fc1", "fc2": "pre_logits.fc2", "predictions": "head.fc"}
    return f"{places.get(layer, layer)}.{TORCH_VARIABLES[variable]}"


def _v2_fits(config, arrays):
    if config.stride_block == "last":
        return "it has the stride in the first block of a stage, the model in the last"
    return None


RESNETV2 = CheckpointFormat(
    "timm",
    lambda arrays: "stages.0.blocks.0.conv1.weight" in arrays,
    _v2,
    family="resnet",
    torch_layout=True,
    ignored=IGNORED,
    fits=_v2_fits,
    preprocessing="tf",
    image=IMAGE,
)
VGG = CheckpointFormat(
    "timm",
    lambda arrays: "pre_logits.fc1.weight" in arrays,
    _vgg,
    family="vgg",
    torch_layout=True,
    ignored=IGNORED,
    preprocessing="torch",
    image=IMAGE,
)
