"""Models and images for the server's tests."""

import numpy as np
import pytest
from tiny_models import classifier, doubler, echo


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Paths of the models, by name."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "tiny": classifier(folder / "tiny.onnx"),
        "bytes": classifier(folder / "bytes.onnx", dtype="uint8"),
        "open": classifier(folder / "open.onnx", size=None),
        "single": classifier(folder / "single.onnx", batch=1),
        "half": doubler(folder / "half.onnx"),
        "echo": echo(folder / "echo.onnx"),
    }


@pytest.fixture
def pixels():
    """Images whose rows differ."""
    return np.random.default_rng(3).integers(0, 256, (6, 8, 8, 3)).astype("u1")
