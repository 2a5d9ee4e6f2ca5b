"""Libraries of others that need an environment of their own, `.venv-NAME` in the repository, unless ours has them."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_with(module, environment):
    """The interpreter that has a module: ours, `$ENVIRONMENT_PYTHON`, or the one in `.venv-ENVIRONMENT`; skips without."""
    if importlib.util.find_spec(module):
        return sys.executable
    variable = f"{environment.upper()}_PYTHON"
    for candidate in (os.environ.get(variable), ROOT / f".venv-{environment}" / "bin" / "python"):
        if candidate and Path(candidate).exists():
            return str(candidate)
    pytest.skip(f"needs {module}: in an environment .venv-{environment}, or one whose python {variable} names")
