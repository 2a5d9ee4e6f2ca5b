"""The lowest versions that setup.py allows: an environment that has them, and parts of the suite in it."""

import functools
import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
# The environment that runs the tests lends these to the new one, with whatever the small packages need themselves.
LARGE = ("tensorflow", "keras", "tf2onnx", "onnxruntime", "onnxruntime-gpu")
EXTRAS = ("serve", "grpc", "client", "batch")
SERVING = ("app", "grpc", "grpc_core", "bulk", "protocol", "server", "operators", "tritonclient")
PARTS = {
    "serving": [*(f"tests/serving/test_{name}.py" for name in SERVING), "-m", "not slow"],
    "export": ["tests/export/test_onnx.py", "tests/export/test_cli.py", "-m", "not slow", "-k", "not zoo"],
}


@functools.cache
def floors():
    """`{package: lowest version}` of the requirements for this platform."""
    import setuptools
    from packaging.requirements import Requirement

    described = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: described.update(arguments))
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    texts = described["install_requires"] + [text for name in EXTRAS for text in described["extras_require"][name]]
    found = {}
    for requirement in map(Requirement, texts):
        if requirement.name not in LARGE and (requirement.marker is None or requirement.marker.evaluate()):
            [lowest] = [part.version for part in requirement.specifier if part.operator == ">="]
            found[requirement.name] = lowest
    return found


@pytest.fixture(scope="module")
def python():
    """The interpreter of an environment in `runs/floors`, which is made where it does not fit setup.py."""
    folder = ROOT / "runs" / "floors"
    found, stamp = folder / "bin" / "python", folder / "floors.txt"
    wanted = "\n".join(f"{name}=={version}" for name, version in floors().items())
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [found, "-m", "pip", "install", "--quiet", "--no-deps", *wanted.split()]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode and "No matching distribution" not in done.stderr:
            pytest.skip(f"the lowest versions cannot be installed here: {done.stderr[-300:]}")
        assert done.returncode == 0, done.stderr
        stamp.write_text(wanted)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return found


def test_versions_are_the_lowest(python):
    code = "import importlib.metadata, sys; print(*[importlib.metadata.version(name) for name in sys.argv[1:]])"
    done = subprocess.run([python, "-c", code, *floors()], capture_output=True, text=True, check=True)
    versions = dict(zip(floors(), done.stdout.split(), strict=True))
    assert {name: padded(version) for name, version in versions.items()} == {k: padded(v) for k, v in floors().items()}


def padded(version):
    return tuple((*map(int, version.split(".")), 0, 0))[:3]


@pytest.mark.parametrize("part", PARTS)
def test_suite_passes_with_them(python, part):
    command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *PARTS[part]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTEST_ADDOPTS": ""})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
