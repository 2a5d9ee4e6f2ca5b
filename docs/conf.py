"""Sphinx configuration; `scripts/docs` builds the site."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
version_file: dict[str, str] = {}
exec((ROOT / "keras_resnet" / "_version.py").read_text("utf-8"), version_file)

project = "keras-resnet-export"
author = "The keras-resnet-export authors"
version = release = version_file["__version__"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["_build", "notebooks/**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = project
nitpicky = False

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

# Docstrings write code in single backticks, as Keras' do.
default_role = "literal"
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
