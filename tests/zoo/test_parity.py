"""Replays recorded outputs of the reference implementations; `scripts/parity.py record` writes them.

Weights and images are made again from the seed, by the reference's own parameter names, so a fixture is outputs only.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet.models.registry import config_of
from keras_resnet.weights.families import keras_applications, keras_hub, timm, torchvision
from keras_resnet.weights.matching import assign
from keras_resnet.weights.synthetic import images, state_for, values

FIXTURES = Path(__file__).parent / "fixtures"
RECORD = json.loads((FIXTURES / "parity.json").read_text())
LOGITS = np.load(FIXTURES / "parity.npz")
BAR = 1e-4


def format_of(case):
    """The naming the reference uses; among several of one package the config decides."""
    config = config_of(case["model"])
    if case["peer"] == "torchvision":
        return torchvision.VGG if config.family == "vgg" else torchvision.RESNET
    if case["peer"] == "timm":
        return timm.RESNETV2 if config.preact else torchvision.RESNET
    if case["peer"] == "keras":
        return keras_applications.RESNETV2 if config.preact else keras_applications.RESNET
    return keras_hub.FORMAT


@functools.cache
def network(name, peer, seed, size, changes):
    """Our model with the recorded weights; built once for all sizes, but for VGG, whose head is made for one."""
    options = {"include_preprocessing": False, "input_shape": (size, size, 3), "include_top": peer != "keras_hub"}
    model = kr.create_model(name, num_classes=RECORD["classes"], **{**options, **dict(changes)})
    config, checkpoint_format = kr.config_from_dict(kr.card(model).config), format_of({"model": name, "peer": peer})
    state = state_for(model, config, checkpoint_format, seed)
    if checkpoint_format is keras_applications.RESNET:
        state |= biases_of(model, config, checkpoint_format, seed)
    assign(model, config, state, checkpoint_format)
    return model


def replay(case, **changes):
    """`(our outputs, recorded outputs)`; with `changes` a network that must not fit."""
    size = case["size"] if case["model"].startswith("vgg") else None
    options = tuple({**case["options"], **changes}.items())
    model = network(case["model"], case["peer"], case["seed"], size, options)
    return np.array(model(images(case["size"], case["seed"]))), LOGITS[case["key"]]


def biases_of(model, config, checkpoint_format, seed):
    """keras.applications' v1 convolutions have biases, ours do not: they end in the moving means."""
    names = [layer for layer in model.layers if layer.name.endswith("conv") or "_conv" in layer.name and layer.weights]
    keys = {checkpoint_format.translate(config, layer.name, "bias"): layer.filters for layer in names}
    return {key: values(key, (filters,), seed, False) for key, filters in keys.items()}


def difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def _id(case):
    options = "-".join(f"{key}{value}" for key, value in case["options"].items())
    return "-".join(filter(None, (case["peer"], case["model"], options, str(case["size"]))))


# The fast rows have every kind of block, stem and shortcut once; these are the heavier ones of a kind.
SLOW = ("vgg11_bn", "resnet50", "resnet50s", "resnetrs50", "resnetv2_50d", "resnetv2_50d_gn")


def _marked(case):
    return pytest.param(case, id=_id(case), marks=[pytest.mark.slow] if case["model"] in SLOW else [])


@pytest.mark.parametrize("case", map(_marked, RECORD["cases"]))
def test_outputs_are_those_of_the_reference(case):
    assert difference(*replay(case)) <= BAR


# (recorded model, a change that leaves all shapes as they are)
FAULTS = [
    ("resnet50", {"stride_in": "1x1"}),
    ("resnet18", {"padding": "same"}),
    ("resnet18", {"norm_epsilon": 1e-3}),
    ("resnet26t", {"shortcut_norm": True, "stem_pool": "conv"}),
    ("resnet50_v1", {"stride_in": "3x3"}),
    ("resnetv2_50_keras", {"stride_block": "first"}),
    ("resnetv2_18", {"stem_pool": "max_zero"}),
    ("resnetv2_50x1_bit", {"weight_standardization": False}),
    ("resnetv2_50x1_bit", {"norm_groups": 16}),
    ("resnetblur18", {"antialias": False}),
    ("seresnet18", {"activation": "gelu"}),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{name}-{'-'.join(fault)}" for name, fault in FAULTS])
def test_planted_faults_are_caught(name, fault):
    case = next(case for case in RECORD["cases"] if case["model"] == name and case["size"] % 2 == 0)
    try:
        found, expected = replay(case, **fault)
    except ValueError as error:
        assert "missing" in str(error) or "left over" in str(error)
    else:
        assert difference(found, expected) > 10 * BAR
