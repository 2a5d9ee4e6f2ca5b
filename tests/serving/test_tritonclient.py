"""Conformance with tritonclient, in an environment of its own, because it would downgrade ours."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from peers import python_with
from running import serving
from tiny_models import classifier, identity

pytestmark = pytest.mark.slow
DTYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float64")


def conform(part, *arguments):
    python = python_with("tritonclient", "triton")
    with serving(*arguments) as server:
        suite = Path(__file__).with_name("triton_suite.py")
        command = [python, suite, part, server.url.removeprefix("http://")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("conforms\n"), done.stdout + done.stderr


def test_tritonclient_gets_what_it_expects(models):
    conform("models", *(f"{name}={path}" for name, path in models.items()))


def test_every_datatype_in_every_form(tmp_path):
    conform("datatypes", *(identity(tmp_path / f"{dtype}.onnx", dtype) for dtype in DTYPES))


def test_versions_come_and_go(tmp_path):
    classifier(tmp_path / "net" / "1" / "model.onnx", dtype="uint8")
    classifier(tmp_path / "net" / "3" / "model.onnx", dtype="uint8", bias=np.zeros(5))
    classifier(tmp_path / "other.onnx")
    conform("control", "--repository", tmp_path, "--allow-control")
