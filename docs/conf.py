"""Sphinx configuration; `scripts/docs` builds the site."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
version_file: dict[str, str] = {}
exec((ROOT / "keras_resnet" / "_version.py").read_text("utf-8"), version_file)

project = "keras-resnet-export"
author = "The keras-resnet-export authors"
version = release = version_file["__version__"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
nb_execution_mode = "off"  # notebooks are committed with their outputs
html_theme = "furo"
html_title = project
nitpicky = False

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = True
napoleon_use_ivar = True


def setup(app: Sphinx) -> None:
    """Have docstrings read as this project writes them."""
    app.connect("autodoc-process-docstring", _code_as_literals, priority=100)  # before napoleon reads the sections
    app.connect("sphinx-click-process-options", _stars_as_stars)


def _code_as_literals(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn code in single backticks into literals, and let bars stand for themselves: |Δ| is no substitution."""
    text = "\n".join(lines)
    parts = re.split(r"(?<!`)`([^`]+)`(?!`)", text)
    for index, part in enumerate(parts):
        if index % 2:
            before, after = parts[index - 1][-1:], parts[index + 1][:1]
            parts[index] = f"{_apart(before)}``{part}``{_apart(after)}"
        else:
            parts[index] = part.replace("|", r"\|")
    lines[:] = "".join(parts).split("\n")


def _stars_as_stars(app: Sphinx, context: object, lines: list[str]) -> None:
    """Let stars in the help of options stand for themselves: block*_pool begins no emphasis."""
    lines[:] = [re.sub(r"(?<=[^*\s])\*(?=\w)", r"\\*", line) for line in lines]


def _apart(neighbour: str) -> str:
    return r"\ " if neighbour.isalnum() else ""
