"""A config to a model, whatever its family."""

import keras

# Keras has no public way to drop variables that wait for their first value; it would fill them at the next occasion.
from keras.src.backend.common import global_state

from .config import ResNetConfig, VGGConfig
from .resnet import resnet
from .vgg import vgg

BUILDERS = {ResNetConfig: resnet, VGGConfig: vgg}
WAITING = "uninitialized_variables"


def build(config, **options):
    """The model of a config; `options` are the fields of `BuildOptions`."""
    return BUILDERS[type(config)](config, **options)


def outline(config, **options):
    """The same model without numbers in its weights, for names, shapes and counts: it takes no memory at any size."""
    before = list(global_state.get_global_attribute(WAITING, []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            return build(config, **options)
    finally:
        global_state.set_global_attribute(WAITING, before)
