"""Residual networks for Keras that start as the identity: layers, zoo, growth."""

import sys

# Functional models of depth 1202 overrun the default limit of 1000 while Keras builds, loads or clones them.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 9_000))

from . import layers
from ._version import __version__
from .modelcard import ModelCard, card, set_card
