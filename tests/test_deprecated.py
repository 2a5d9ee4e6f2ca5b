"""Names of version 0.1 still work, and warn once with the new name, at the line that uses the old one."""

import importlib
import subprocess
import sys
import warnings

import pytest

import keras_resnet as kr
from keras_resnet.blocks import BlockStyle, LayerKit
from keras_resnet.deprecated import MOVED

# What users of version 0.1 could import from some of the modules that have moved.
NAMES = {
    "config": ["ResNetConfig", "VGGConfig", "Growth", "config_from_dict"],
    "registry": ["ModelInfo", "Plugin", "create_model", "list_models", "model_info"],
    "variants": ["VARIANTS"],
    "pretrained": ["load_weights", "save_weights"],
    "transfer": ["freeze_batch_norm", "replace_head"],
    "hints": ["nearest", "first_line"],
    "growth.blocks": ["ResidualBlock", "residual_stack", "append_block", "find_blocks"],
    "growth.gates": ["GATES", "KINDS", "BlockSpec"],
    "weights.torchfile": [],
}


@pytest.mark.parametrize("old", MOVED)
def test_modules_are_found_at_their_old_paths(old):
    sys.modules.pop(f"keras_resnet.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"'keras_resnet.{old}' was renamed to 'keras_resnet.{MOVED[old]}'") as warned:
        module = importlib.import_module(f"keras_resnet.{old}")
    assert len(warned) == 1
    new = importlib.import_module(f"keras_resnet.{MOVED[old]}")
    assert all(getattr(module, name) is getattr(new, name) for name in NAMES.get(old, vars(module)) if name[:2] != "__")
    assert new.__spec__.name == new.__name__ == f"keras_resnet.{MOVED[old]}"


def test_the_warning_points_to_the_import():
    program = "import warnings; warnings.simplefilter('error')\nimport keras_resnet\nfrom keras_resnet.config import ResNetConfig"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 'File "<string>", line 3' in done.stderr and "DeprecationWarning" in done.stderr.splitlines()[-1], done.stderr
    for package in ("keras_resnet.confg", "keras_resnet.weights.confg", "configs"):
        with pytest.raises(ModuleNotFoundError, match=package):
            importlib.import_module(package)


def test_modules_are_attributes_as_before():
    vars(kr).pop("registry", None)
    with pytest.warns(DeprecationWarning, match="keras_resnet.models.registry") as warned:
        assert kr.registry.model_info is kr.model_info
    assert warned[0].filename == __file__


def test_the_arguments_of_layer_kit():
    with pytest.warns(DeprecationWarning, match=r"`style=BlockStyle\(rank=3, norm='group', norm_groups=8\)` now") as warned:
        kit = LayerKit(rank=3, norm_kind="group", norm_groups=8, dtype="float16")
    assert kit == LayerKit(BlockStyle(rank=3, norm="group", norm_groups=8), dtype="float16") and warned[0].filename == __file__
    with pytest.raises(TypeError, match="colour"):
        LayerKit(colour=1)
    with pytest.raises(TypeError, match="rank"):
        LayerKit(style=BlockStyle(), rank=3)


def test_the_bias_of_projections():
    for bias, now in ((True, ("projection",)), (False, ())):
        with pytest.warns(DeprecationWarning, match="was renamed to `conv_bias=") as warned:
            assert BlockStyle(projection_bias=bias, gate="zero") == BlockStyle(conv_bias=now, gate="zero")
        assert warned[0].filename == __file__


def test_the_new_forms_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LayerKit(BlockStyle(rank=1)).style.rank == 1
