"""Residual networks for Keras that start as the identity: layers, zoo, growth."""

import importlib
import sys

# Functional models of depth 1202 overrun the default limit of 1000 while Keras builds, loads or clones them.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 9_000))

from . import blocks, layers
from ._version import __version__
from .blocks import ResidualBlock, find_blocks, residual_stack
from .growth import block_scales, drift, grow, growth_scores, identity_report, prune, without_blocks
from .modelcard import ModelCard, card, set_card
from .models.loading import load_model_file
from .models.pretrained import load_weights, save_weights
from .models.registry import ModelInfo, Plugin, constructor, create_model, list_models, list_weights, model_info
from .models.transfer import add_preprocessing, freeze_batch_norm, replace_head, with_card
from .preprocessing import Preprocessing
from .weights.sources import WeightSource
from .zoo.assembly import feature_info
from .zoo.config import Growth, ResNetConfig, VGGConfig, config_from_dict

# Users look for every layer in `kr.layers`, but a block is made of those layers and therefore defined above them.
layers.ResidualBlock = ResidualBlock


def __getattr__(name):
    # These need TensorFlow, whatever Keras' backend is, so they are imported when they are asked for.
    if name in ("data", "training"):
        return importlib.import_module(f"{__name__}.{name}")
    # Every variant is a constructor too (`keras_resnet.resnet50()`), those of plug-ins included.
    if not name.startswith("_") and name in list_models():
        return constructor(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), "data", "training", *list_models()])
