"""The type checker on both packages and on the client programs of `tests/typing`, right and wrong ones."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_packages_and_client_programs_pass_the_type_checker():
    """`client_wrong` must have exactly the errors that it states. Fast after `.ci/run`, which leaves the checker's cache."""
    pytest.importorskip("mypy", reason="needs the extra `dev`")
    command = [sys.executable, "-m", "mypy", "--python-executable", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
