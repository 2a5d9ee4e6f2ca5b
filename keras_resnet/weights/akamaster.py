"""akamaster/pytorch_resnet_cifar10: ResNet-20 to 1202 on CIFAR-10, option A (or B) shortcuts, ImageNet mean and deviation."""

from .origin import TORCH_VARIABLES, Origin, by_rules
from .torchvision import BLOCK

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RULES = {
    **BLOCK,
    r"stage(\d+)_block(\d+)_shortcut_conv": "layer{0}.{1-1}.shortcut.0",
    r"stage(\d+)_block(\d+)_shortcut_norm": "layer{0}.{1-1}.shortcut.1",
    r"predictions": "linear",
}


def _translate(config, layer, variable):
    return f"{by_rules(RULES, layer)}.{TORCH_VARIABLES[variable]}"


def _fits(config, arrays):
    if "layer2.0.shortcut.0.weight" in arrays:
        return None
    if config.shortcut != "pad":
        return (
            f"its shortcuts are option A with zero channels on both sides (shortcut='pad'), the model's are {config.shortcut!r}; "
            "take the variant without a suffix"
        )
    return None


ORIGIN = Origin(
    "akamaster",
    lambda arrays: "layer1.0.conv1.weight" in arrays and "linear.weight" in arrays,
    _translate,
    torch_layout=True,
    ignored=r".*num_batches_tracked",
    fits=_fits,
    preprocessing="torch",
    card={"dataset": "CIFAR-10", "licence": "BSD-2-Clause"},
    labels=CLASSES,
)
