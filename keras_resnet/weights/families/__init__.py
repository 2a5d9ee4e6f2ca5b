"""Checkpoint families: how projects name and lay out the arrays of their networks, one module per project.

To add a family, write a module with a `CheckpointFormat` and add it to `FORMATS`. Nothing else needs to change.
"""

from . import akamaster, keras_applications, keras_hub, native, small, timm, torchvision
from .checkpoint_format import CheckpointFormat

# The first that recognises the arrays wins.
FORMATS: tuple[CheckpointFormat, ...] = (
    akamaster.FORMAT,
    small.KUANGLIU,
    small.RESNET,
    small.WIDE_RESNET,
    small.CIFAR100,
    small.VGG,
    torchvision.RESNET,
    torchvision.VGG,
    timm.RESNETV2,
    timm.VGG,
    keras_hub.FORMAT,
    keras_applications.RESNETV2,
    keras_applications.RESNET,
    keras_applications.VGG,
    native.FORMAT,
)
# The arrays of VGGs have the same names in keras.applications and in this package. A file is taken for one of this package if it
# has a card and is not in Keras' legacy format.
FORMATS_OURS_FIRST = (native.FORMAT, *FORMATS[:-1])
