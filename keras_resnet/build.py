"""A config to a model, whatever its family."""

import keras

from .config import ResNetConfig, VGGConfig
from .resnet import resnet
from .vgg import vgg

BUILDERS = {ResNetConfig: resnet, VGGConfig: vgg}


def build(config, **options):
    """The model of a config; `options` are the fields of `BuildOptions`."""
    return BUILDERS[type(config)](config, **options)


def outline(config, **options):
    """The same model without numbers in its weights: for names, shapes and counts. No memory is taken for the weights."""
    with keras.StatelessScope():
        return build(config, **options)
