"""Residual networks for Keras that start as the identity: layers, blocks, a zoo of models, growth of trained models.

The public names are listed in `__init__.pyi`, from which editors complete them, and are imported when they are first used. Every
variant of the zoo is also a constructor: `keras_resnet.resnet50(weights=…)`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import lazy_loader

from . import deprecated

# Functional models of depth 1202 exceed the default limit of 1000 while Keras builds, loads or clones them.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 9_000))

deprecated.find_moved_modules()

# These modules register their classes with Keras, so that saved models load without `custom_objects`.
from . import blocks, layers, preprocessing

# Users look for every layer in `kr.layers`, but a block is made of those layers and therefore defined above them.
layers.ResidualBlock = blocks.ResidualBlock

# The stub also has the signatures of all variants, so `lazy_loader.attach_stub`, which parses the whole file, would take 16 ms.
_imports = re.findall(r"^from \.([\w.]*) import (\w+)", Path(__file__).with_suffix(".pyi").read_text("utf-8"), re.MULTILINE)
_public_name, _, __all__ = lazy_loader.attach(
    __name__,
    submodules=[name for module, name in _imports if not module],
    submod_attrs={module: [name for owner, name in _imports if owner == module] for module, _ in _imports if module},
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _public_name(name)
    if name in deprecated.MOVED:
        return deprecated.moved_module(name)
    # The variants of plug-ins are constructors too, so the names are not all known in advance.
    if not name.startswith("_"):
        from .models.registry import constructor, list_models

        if name in list_models():
            return constructor(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from .models.registry import list_models

    return sorted({*globals(), *__all__, *list_models()})
