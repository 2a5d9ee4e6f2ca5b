"""KerasHub: backbones of ResNets, named as in keras.applications, but with stages and blocks counted from 0."""

from .checkpoint_format import CheckpointFormat, by_rules
from .torchvision import IMAGE

V1 = {
    r"stem_conv": "conv1_conv",
    r"stem_norm": "conv1_bn",
    r"stage(\d+)_block(\d+)_shortcut_conv": "stack{0-1}_block{1-1}_0_conv",
    r"stage(\d+)_block(\d+)_shortcut_norm": "stack{0-1}_block{1-1}_0_bn",
    r"stage(\d+)_block(\d+)_conv(\d)": "stack{0-1}_block{1-1}_{2}_conv",
    r"stage(\d+)_block(\d+)_norm(\d)": "stack{0-1}_block{1-1}_{2}_bn",
}
V2 = {
    r"head_norm": "post_bn",
    r"stage(\d+)_block(\d+)_norm1": "stack{0-1}_block{1-1}_pre_activation_bn",
    r"stage(\d+)_block(\d+)_norm(\d)": "stack{0-1}_block{1-1}_{2-1}_bn",
    **V1,
}


def _translate(config, layer, variable):
    return f"{by_rules(V2 if config.preact else V1, layer)}/{variable}"


def _fits(config, arrays):
    if config.stride_in == "1x1" and config.block == "bottleneck":
        return "it has the stride in the 3×3 (v1.5), the model in the 1×1"
    return None


FORMAT = CheckpointFormat(
    "KerasHub",
    lambda arrays: "stack0_block0_1_conv/kernel" in arrays,
    _translate,
    family="resnet",
    fits=_fits,
    preprocessing="torch",
    image=IMAGE,
)
