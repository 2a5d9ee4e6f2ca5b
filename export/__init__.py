"""Verified ONNX and SavedModel export of Keras models. Names load on first use: reading an artefact needs no TensorFlow."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from .runtime import installation as clash

if (_rival := clash.installed_version()) is not None:
    warnings.warn(f"{clash.sentence(_rival)}; to fix it: {clash.FIX}", stacklevel=2)

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from .errors import DeviceError as DeviceError
    from .errors import ExportError as ExportError
    from .errors import MismatchError as MismatchError
    from .errors import UsageError as UsageError
    from .exporters import to_onnx as to_onnx
    from .exporters import to_savedmodel as to_savedmodel
    from .exporters import verify as verify
    from .quantization.float16 import to_float16 as to_float16
    from .quantization.int8 import to_int8 as to_int8
    from .results import ExportResult as ExportResult
    from .results import VerificationReport as VerificationReport
    from .runtime.benchmark import bench as bench
    from .runtime.doctor import diagnose as diagnose
    from .runtime.inspection import inspect as inspect
    from .runtime.prediction import predict as predict
    from .runtime.sessions import session as session

_HOME = {
    "to_onnx": "exporters",
    "to_savedmodel": "exporters",
    "verify": "exporters",
    "to_float16": "quantization.float16",
    "to_int8": "quantization.int8",
    "predict": "runtime.prediction",
    "session": "runtime.sessions",
    "bench": "runtime.benchmark",
    "inspect": "runtime.inspection",
    "diagnose": "runtime.doctor",
    "ExportResult": "results",
    "VerificationReport": "results",
    "ExportError": "errors",
    "UsageError": "errors",
    "MismatchError": "errors",
    "DeviceError": "errors",
}
__all__ = sorted(_HOME)


if not TYPE_CHECKING:  # a type checker would take every name, misspelt ones too, for one of the package

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name == f"{__name__}.{name}":
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
            raise


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
