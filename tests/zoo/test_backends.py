"""The same file gives the same logits on every Keras backend; each runs in a process of its own."""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_resnet as kr
from tests.zoo.test_builder import KINDS, pixels, shared

LOAD = """
import sys, numpy as np, keras, keras_resnet
folder, *kinds = sys.argv[1:]
x = np.load(f"{folder}/x.npy")
np.savez(f"{folder}/{keras.backend.backend()}.npz", **{
    kind: keras.saving.load_model(f"{folder}/{kind}.keras").predict(x, verbose=0) for kind in kinds
})
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models of every kind as files, and what this backend makes of them."""
    folder = tmp_path_factory.mktemp("backends")
    x = pixels((21, 18, 3))
    np.save(folder / "x.npy", x)
    outputs = {}
    for kind in KINDS:
        model = shared(kind)
        model.save(folder / f"{kind}.keras")
        outputs[kind] = model.predict(x, verbose=0)
    return folder, outputs


def _other_backends():
    for backend in sorted({"tensorflow", "jax", "torch"} - {keras.backend.backend()}):
        missing = importlib.util.find_spec(backend) is None
        yield pytest.param(backend, marks=pytest.mark.skipif(missing, reason=f"backend {backend} is not installed"))


@pytest.mark.parametrize("backend", _other_backends())
def test_logits_do_not_depend_on_the_backend(backend, saved):
    folder, outputs = saved
    root = os.path.dirname(os.path.dirname(kr.__file__))
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder), *KINDS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(folder / f"{backend}.npz")
    for kind, expected in outputs.items():
        difference = np.abs(found[kind] - expected).max()
        assert difference <= 1e-5 * np.abs(expected).max(), (kind, difference / np.abs(expected).max())
