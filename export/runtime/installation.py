"""The one package that installs the same import folder as this one: PyPI's `keras-resnet`."""

from __future__ import annotations

import os
import re
import sys

RIVAL = "keras-resnet"
METADATA = re.compile(r"keras[-_.]resnet(-|\.egg-info)", re.IGNORECASE)
FIX = "pip uninstall -y keras-resnet && pip install --force-reinstall --no-deps keras-resnet-export"


def installed_version() -> str | None:
    """Return the version of `keras-resnet` that is installed next to this distribution, or None."""
    # Importing `importlib.metadata` takes two thirds of the time of `import resnet_export`, so this looks at file names first.
    if not any(_may_be_in(folder) for folder in sys.path):
        return None
    from importlib import metadata

    try:
        return metadata.version(RIVAL)
    except metadata.PackageNotFoundError:
        return None


def _may_be_in(folder: str) -> bool:
    """Whether an entry of `sys.path` may have the metadata of `keras-resnet`, by the names in it."""
    try:
        return any(map(METADATA.match, os.listdir(folder or ".")))
    except NotADirectoryError:  # an archive
        return True
    except OSError:  # there is no such folder
        return False


def sentence(version: str) -> str:
    """Describe the conflict with another package of that name."""
    return f"{RIVAL} {version} owns the import name keras_resnet too"
