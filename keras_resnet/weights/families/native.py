"""This package's own names: `layer/variable`, in `.keras`, `.weights.h5` and `.safetensors` files."""

from .checkpoint_format import CheckpointFormat

FORMAT = CheckpointFormat(
    "keras_resnet",
    lambda arrays: "stage1_block1_conv1/kernel" in arrays or "block1_conv1/kernel" in arrays,
    lambda config, layer, variable: f"{layer}/{variable}",
)
