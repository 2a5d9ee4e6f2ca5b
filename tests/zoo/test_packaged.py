"""Weights in the package: what their cards say is so."""

import runpy
from pathlib import Path

import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.weights.files import open_weights
from keras_resnet.weights.sources import packaged

ROOT = Path(__file__).resolve().parents[2]


def test_document_is_current():
    document = runpy.run_path(str(ROOT / "scripts" / "weights.py"))["document"]
    assert (ROOT / "docs" / "weights.md").read_text(encoding="utf-8") == document()


@pytest.mark.parametrize(("model", "tag"), packaged())
def test_accuracy_of_the_card(model, tag, cifar_test):
    path = packaged()[model, tag]
    facts = open_weights(path).card.weights
    assert (
        Path(path).stat().st_size <= 6_000_000
        and facts["licence"]
        and facts["command"]
        and len(facts["curve"]) == facts["epochs"]
    )
    images, labels = cifar_test
    assert facts["test_images"] == len(images)
    found = kr.create_model(model, weights=tag).predict(images, batch_size=250, verbose=0).argmax(-1)
    assert 100 * np.mean(found == labels) == pytest.approx(facts["accuracy"], abs=0.05)
