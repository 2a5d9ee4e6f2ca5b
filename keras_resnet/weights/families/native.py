"""Files of this package (`.keras`, `.weights.h5`, `.safetensors`), in which arrays are named `layer/variable`."""

from .checkpoint_format import CheckpointFormat

FORMAT = CheckpointFormat(
    "keras_resnet",
    lambda arrays: "stage1_block1_conv1/kernel" in arrays or "block1_conv1/kernel" in arrays,
    lambda config, layer, variable: f"{layer}/{variable}",
)
