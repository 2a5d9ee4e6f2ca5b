"""Conformance with tritonclient, in an environment of its own, because it would downgrade ours."""

import subprocess
from pathlib import Path

import pytest
from peers import python_with
from running import serving

pytestmark = pytest.mark.slow


def test_tritonclient_gets_what_it_expects(models):
    python = python_with("tritonclient", "triton")
    arguments = [f"{name}={path}" for name, path in models.items()]
    with serving(*arguments) as server:
        suite = Path(__file__).with_name("triton_suite.py")
        done = subprocess.run([python, suite, server.url.removeprefix("http://")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("conforms\n"), done.stdout + done.stderr
