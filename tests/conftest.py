"""Shared by all tests: quiet TensorFlow, the data folder, models built once, randomised statistics."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data():
    """Folder with CIFAR-10, real weights and photos; tests that need it are skipped where it is missing."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("KERAS_RESNET_DATA", default))
    if not folder.is_dir():
        pytest.skip("no data folder: set KERAS_RESNET_DATA")
    return folder
