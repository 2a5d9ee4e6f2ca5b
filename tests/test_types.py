"""The type checker on both packages and on the client programs of `tests/typing`, right and wrong ones."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_export

ROOT = Path(__file__).parent.parent


def test_packages_and_client_programs_pass_the_type_checker():
    """`client_wrong` must have exactly the errors that it states. Fast after `.ci/run`, which leaves the checker's cache."""
    pytest.importorskip("mypy", reason="needs the extra `dev`")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", sys.executable], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_type_checkers_see_every_public_name():
    tree = ast.parse((ROOT / "export" / "__init__.py").read_text("utf-8"))
    seen = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    assert sorted(alias.asname for node in seen.body for alias in node.names) == resnet_export.__all__
    for node in seen.body:
        assert node.module == resnet_export._HOME[node.names[0].name]
