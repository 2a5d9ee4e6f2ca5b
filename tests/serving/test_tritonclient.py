"""Conformance with tritonclient, in an environment of its own, because it would downgrade ours."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from peers import python_with
from running import self_signed, serving
from tiny_models import classifier, identity

pytestmark = pytest.mark.slow
DTYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float64")


both = pytest.mark.parametrize("protocol", ["http", "grpc"])


def run_suite(name, *arguments):
    command = [python_with("tritonclient", "triton"), Path(__file__).with_name(name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("conforms\n"), done.stdout + done.stderr


def conform(protocol, part, *arguments, more=()):
    python_with("tritonclient", "triton")
    if protocol == "http":
        with serving(*arguments) as server:
            run_suite("triton_suite.py", part, server.url.split("//")[1], *more)
    else:
        pytest.importorskip("grpc", reason="needs the extra `grpc`")
        with serving(*arguments, "--grpc-port", "0") as server:
            run_suite("triton_grpc_suite.py", part, server.grpc, *more)


@both
def test_tritonclient_gets_what_it_expects(models, protocol):
    conform(protocol, "models", *(f"{name}={path}" for name, path in models.items()))


@both
def test_every_datatype_in_every_form(tmp_path, protocol):
    conform(protocol, "datatypes", *(identity(tmp_path / f"{dtype}.onnx", dtype) for dtype in DTYPES))


@both
def test_versions_come_and_go(tmp_path, protocol):
    classifier(tmp_path / "net" / "1" / "model.onnx", dtype="uint8")
    classifier(tmp_path / "net" / "3" / "model.onnx", dtype="uint8", bias=np.zeros(5))
    classifier(tmp_path / "other.onnx")
    conform(protocol, "control", "--repository", tmp_path, "--allow-control")


def test_grpc_with_a_certificate_and_keys(models, tmp_path):
    certificate, key = self_signed(tmp_path)
    (tmp_path / "keys").write_text("sesame\n")
    files = ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--api-key-file", tmp_path / "keys"]
    conform("grpc", "secure", models["bytes"], *files, more=["sesame", certificate])


def test_grpc_messages_are_tritons():
    run_suite("triton_grpc_suite.py", "descriptors")
