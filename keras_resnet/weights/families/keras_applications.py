"""keras.applications: ResNet (v1, with the stride in the 1×1 convolution and biases), ResNetV2 and VGG."""

from .checkpoint_format import CheckpointFormat, by_rules

STEM_AND_HEAD = {r"stem_conv": "conv1_conv", r"stem_norm": "conv1_bn", r"head_norm": "post_bn"}
SHORTCUT = {
    r"stage(\d+)_block(\d+)_shortcut_conv": "conv{0+1}_block{1}_0_conv",
    r"stage(\d+)_block(\d+)_shortcut_norm": "conv{0+1}_block{1}_0_bn",
}
V1 = {
    **STEM_AND_HEAD,
    **SHORTCUT,
    r"stage(\d+)_block(\d+)_conv(\d)": "conv{0+1}_block{1}_{2}_conv",
    r"stage(\d+)_block(\d+)_norm(\d)": "conv{0+1}_block{1}_{2}_bn",
}
V2 = {
    **STEM_AND_HEAD,
    **SHORTCUT,
    r"stage(\d+)_block(\d+)_conv(\d)": "conv{0+1}_block{1}_{2}_conv",
    r"stage(\d+)_block(\d+)_norm1": "conv{0+1}_block{1}_preact_bn",
    r"stage(\d+)_block(\d+)_norm(\d)": "conv{0+1}_block{1}_{2-1}_bn",
}
IMAGE = {"size": [224, 224]}
CARD = {"dataset": "ImageNet-1k"}


def _name(rules):
    return lambda config, layer, variable: f"{by_rules(rules, layer)}/{variable}"


def _v1_fits(config, arrays):
    if config.stride_in != "1x1":
        return "it has the stride in the 1×1 (v1), the model in the 3×3"
    return None


def _v2_fits(config, arrays):
    if config.stride_block != "last":
        return "it has the stride in the last block of a stage, the model in the first"
    return None


RESNET = CheckpointFormat(
    "keras.applications",
    lambda arrays: "conv1_conv/kernel" in arrays and "conv1_bn/gamma" in arrays,
    _name(V1),
    family="resnet",
    fits=_v1_fits,
    preprocessing="caffe",
    card=CARD,
    image=IMAGE,
)
RESNETV2 = CheckpointFormat(
    "keras.applications",
    lambda arrays: "conv2_block1_preact_bn/gamma" in arrays,
    _name(V2),
    family="resnet",
    fits=_v2_fits,
    preprocessing="tf",
    card=CARD,
    image=IMAGE,
)
VGG = CheckpointFormat(
    "keras.applications",
    lambda arrays: "block1_conv1/kernel" in arrays and arrays["block1_conv1/kernel"].shape == (3, 3, 3, 64),
    _name({}),
    family="vgg",
    preprocessing="caffe",
    card=CARD,
    image=IMAGE,
)
