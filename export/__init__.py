"""Verified ONNX and SavedModel export of Keras models.

The public names are listed in `__init__.pyi`, from which editors complete them, and are imported when they are first used:
reading a file needs no TensorFlow.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import lazy_loader

from .runtime import installation as clash

if (_rival := clash.installed_version()) is not None:
    warnings.warn(f"{clash.sentence(_rival)}; to fix it: {clash.FIX}", stacklevel=2)

_public_name, _, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _public_name(name)
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name == f"{__name__}.{name}":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
