"""The one package that installs the same import folder as this one: PyPI's `keras-resnet`."""

from __future__ import annotations

from importlib import metadata

RIVAL = "keras-resnet"
FIX = "pip uninstall -y keras-resnet && pip install --force-reinstall --no-deps keras-resnet-export"


def installed_version() -> str | None:
    """Version of `keras-resnet` installed next to this distribution, or None."""
    try:
        return metadata.version(RIVAL)
    except metadata.PackageNotFoundError:
        return None


def sentence(version: str) -> str:
    """What is wrong where it is installed."""
    return f"{RIVAL} {version} owns the import name keras_resnet too"
