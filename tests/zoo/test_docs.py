"""The files that scripts/models.py writes are current."""

import inspect
import runpy
from pathlib import Path

import lazy_loader
import pytest

import keras_resnet as kr
from keras_resnet.models.registry import parameters
from keras_resnet.zoo.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("function", "path"), [("document", "docs/models.md"), ("stub", "keras_resnet/__init__.pyi")])
def test_what_is_derived_from_the_variants_is_current(function, path):
    made = runpy.run_path(str(ROOT / "scripts" / "models.py"))[function]()
    assert made == (ROOT / path).read_text(encoding="utf-8"), "run scripts/models.py"


def test_public_names_are_those_of_the_stub():
    assert kr.__all__ == lazy_loader.attach_stub("keras_resnet", kr.__file__)[2] and "grow" in kr.__all__


def test_every_public_name_exists():
    for name in kr.__all__:
        assert getattr(kr, name) is not None
    assert {*kr.__all__, *VARIANTS} <= set(dir(kr))
    with pytest.raises(AttributeError, match="module 'keras_resnet' has no attribute 'resnet5'"):
        kr.resnet5  # noqa: B018


def test_signatures_show_the_defaults_of_the_variant():
    shown = inspect.signature(kr.resnet50_v1).parameters
    assert list(shown) == [parameter.name for parameter in parameters(VARIANTS["resnet50_v1"])]
    assert shown["stride_in"].default == "1x1" and shown["include_top"].default is True
    assert kr.resnet20(**{name: p.default for name, p in inspect.signature(kr.resnet20).parameters.items()}).count_params()
