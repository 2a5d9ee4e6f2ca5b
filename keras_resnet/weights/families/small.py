"""Networks for CIFAR in the names of other repositories. Their files do not say how images were normalised."""

from .akamaster import RULES as AKAMASTER
from .checkpoint_format import TORCH_VARIABLES, CheckpointFormat, by_rules
from .torchvision import IGNORED, is_resnet, resnet_fits, translate_resnet, translate_vgg

# xternalz/WideResNet-pytorch, and repositories that follow it.
WIDE = {
    r"stem_conv": "conv1",
    r"stage(\d+)_block(\d+)_conv(\d)": "block{0}.layer.{1-1}.conv{2}",
    r"stage(\d+)_block(\d+)_norm(\d)": "block{0}.layer.{1-1}.bn{2}",
    r"stage(\d+)_block(\d+)_shortcut_conv": "block{0}.layer.{1-1}.convShortcut",
    r"head_norm": "bn1",
    r"predictions": "fc",
}
# weiaicunzai/pytorch-cifar100, where blocks are `torch.nn.Sequential`, in which activations count as well.
SEQUENTIAL = {
    r"stem_conv": "conv1.0",
    r"stem_norm": "conv1.1",
    r"stage(\d+)_block(\d+)_conv1": "conv{0+1}_x.{1-1}.residual_function.0",
    r"stage(\d+)_block(\d+)_norm1": "conv{0+1}_x.{1-1}.residual_function.1",
    r"stage(\d+)_block(\d+)_conv2": "conv{0+1}_x.{1-1}.residual_function.3",
    r"stage(\d+)_block(\d+)_norm2": "conv{0+1}_x.{1-1}.residual_function.4",
    r"stage(\d+)_block(\d+)_conv3": "conv{0+1}_x.{1-1}.residual_function.6",
    r"stage(\d+)_block(\d+)_norm3": "conv{0+1}_x.{1-1}.residual_function.7",
    r"stage(\d+)_block(\d+)_shortcut_conv": "conv{0+1}_x.{1-1}.shortcut.0",
    r"stage(\d+)_block(\d+)_shortcut_norm": "conv{0+1}_x.{1-1}.shortcut.1",
    r"predictions": "fc",
}


def _named(rules):
    return lambda config, layer, variable: f"{by_rules(rules, layer)}.{TORCH_VARIABLES[variable]}"


def _format(name, recognises, translate, family="resnet", fits=resnet_fits):
    return CheckpointFormat(name, recognises, translate, torch_layout=True, ignored=IGNORED, fits=fits, family=family)


def _has_small_stem(arrays):
    return "conv1.weight" in arrays and arrays["conv1.weight"].shape[-1] == 3


def _is_vgg(arrays):
    hidden = arrays.get("classifier.0.weight")
    return "features.0.weight" in arrays and ("classifier.weight" in arrays or (hidden is not None and hidden.shape[1] < 25_088))


# The names are those of torchvision's ResNets, for example in chenyaofo/pytorch-cifar-models.
RESNET = _format(
    "a CIFAR network in torchvision's names",
    lambda arrays: is_resnet(arrays) and _has_small_stem(arrays),
    translate_resnet,
)
# The names are akamaster's, but the stages or widths are others, for example in kuangliu/pytorch-cifar.
KUANGLIU = _format(
    "a CIFAR network in akamaster's names",
    lambda arrays: is_resnet(arrays) and "linear.weight" in arrays,
    _named(AKAMASTER),
)
WIDE_RESNET = _format("a Wide ResNet in xternalz' names", lambda arrays: "block1.layer.0.conv1.weight" in arrays, _named(WIDE))
CIFAR100 = _format(
    "a CIFAR network in weiaicunzai's names",
    lambda arrays: "conv2_x.0.residual_function.0.weight" in arrays,
    _named(SEQUENTIAL),
)
VGG = _format("a CIFAR network in torchvision's names", _is_vgg, translate_vgg, family="vgg", fits=lambda config, arrays: None)
