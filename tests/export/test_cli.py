"""The commands: what they print, their exit codes, and what they leave behind."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from PIL import Image

import keras_resnet as kr
from resnet_export.cli import main

from .conftest import build_mixed, noise, op_counts


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("keras") / "mixed.keras"
    build_mixed().save(path)
    return str(path)


@pytest.fixture
def run(capsys):
    """Run a command: `(exit code, standard output, standard error)`."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_help_is_fast_because_it_imports_nothing():
    code = "import sys; from resnet_export.cli import main; main(['onnx', '--help']); print(len(sys.modules))"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert "Example:" in done.stdout and "--force" in done.stdout
    assert not any(f" {name}" in done.stderr for name in ("numpy", "onnx", "keras", "tensorflow", "onnxruntime", "PIL", "rich"))


def test_road_from_file_to_prediction(run, saved, tmp_path):
    labels, target, figures = tmp_path / "labels.txt", tmp_path / "m.onnx", tmp_path / "figures.json"
    labels.write_text("\n".join("abcdefg"))
    code, out, _ = run("onnx", saved, "-o", target, "--labels", labels, "--report", figures)
    assert code == 0 and "matches the model" in out and json.loads(figures.read_text())["passed"] is True
    code, out, _ = run("verify", target, saved)
    assert code == 0 and "compared element by element" in out
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3)).astype("uint8")).save(tmp_path / "a.png")
    code, out, _ = run("predict", target, tmp_path / "a.png", "--top", 2, "--json")
    found = json.loads(out)[0]
    assert code == 0 and set(found["labels"]) < set("abcdefg") and len(found["classes"]) == 2
    assert found["probabilities"] == sorted(found["probabilities"], reverse=True)
    assert run("predict", target, tmp_path / "a.png")[1].splitlines()[0].split() == ["image", "class", "label", "probability"]


def test_existing_output_needs_force(run, saved, tmp_path):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")
    code, _, err = run("onnx", saved, target)
    assert code == 2 and "--force" in err and target.read_bytes() == b"old"
    assert run("onnx", saved, target, "--force")[0] == 0 and target.stat().st_size > 1000


def test_savedmodel(run, saved, tmp_path):
    code, out, _ = run("savedmodel", saved, tmp_path / "m", "--json")
    assert code == 0 and json.loads(out)["method"] == "savedmodel" and (tmp_path / "m" / "saved_model.pb").is_file()
    assert run("verify", tmp_path / "m", saved)[0] == 0


def test_mismatch_exits_3_and_says_where(run, saved, tmp_path):
    assert run("onnx", saved, tmp_path / "m.onnx")[0] == 0
    other = build_mixed()
    kernel = other.get_layer("last_conv").kernel
    kernel.assign(np.asarray(kernel) * 1.5)
    other.save(tmp_path / "other.keras")
    code, out, err = run("verify", tmp_path / "m.onnx", tmp_path / "other.keras")
    assert code == 3 and "does not match" in err and "'last_conv/kernel'" in out


def test_zoo_names(run):
    code, out, _ = run("list", "resnet5*", "--json")
    assert code == 0 and "resnet50" in json.loads(out) and "resnet18" not in json.loads(out)
    code, out, _ = run("info", "resnet20", "--json")
    info = json.loads(out)
    assert code == 0 and info["parameters"] == 271098 and info["inputs"][0]["shape"] == [None, 32, 32, 3]


def test_random_weights_are_announced_and_reproducible(run, tmp_path):
    results = []
    for name in ("a.onnx", "b.onnx"):
        code, out, err = run("onnx", "resnet20", tmp_path / name, "--json")
        assert code == 0 and err.strip() == "note: random weights (seed 0)"
        results.append(json.loads(out)["sha256"])
    assert results[0] == results[1]
    assert run("verify", tmp_path / "a.onnx", "resnet20", "--seed", 1)[0] == 3


@pytest.mark.slow
def test_preprocessing_goes_into_the_file(run, saved, tmp_path):
    code, _, _ = run("onnx", saved, tmp_path / "m.onnx", "--preprocessing", "tf", "--input", "uint8")
    assert code == 0 and run("verify", tmp_path / "m.onnx", saved, "--preprocessing", "tf")[0] == 0
    assert run("verify", tmp_path / "m.onnx", saved)[0] == 3


BAD = {
    "missing file": (["onnx", "{tmp}/no.keras", "{tmp}/o.onnx"], 2, "no.keras does not exist"),
    "corrupt file": (["onnx", "{tmp}/corrupt.keras", "{tmp}/o.onnx"], 2, "not a valid .keras file"),
    "unknown model": (["onnx", "resnt50", "{tmp}/o.onnx"], 2, "did you mean 'resnet50'"),
    "unknown pattern": (["list", "resnetx*"], 2, "no model matches 'resnetx*'"),
    "no output": (["onnx", "resnet20"], 2, "Missing output: give OUT"),
    "empty output": (["onnx", "resnet20", ""], 2, "the output needs a name"),
    "empty -o": (["onnx", "resnet20", "-o", ""], 2, "the output needs a name"),
    "empty folder name": (["savedmodel", "resnet20", ""], 2, "the output needs a name"),
    "empty model": (["onnx", "", "{tmp}/o.onnx"], 2, "the model needs a name"),
    "opset": (["onnx", "{keras}", "{tmp}/o.onnx", "--opset", "12"], 2, "13 to 23, got 12"),
    "no folder": (["onnx", "{keras}", "{tmp}/no/o.onnx"], 2, "does not exist"),
    "no labels": (["onnx", "resnet20", "{tmp}/o.onnx", "--labels", "{tmp}/no.txt"], 2, "no.txt does not exist"),
    "no samples": (["onnx", "{keras}", "{tmp}/o.onnx", "--samples", "{tmp}/empty"], 2, "holds no images"),
    "no module": (["onnx", "resnet20", "{tmp}/o.onnx", "--import", "nowhere"], 2, "cannot import nowhere"),
    "unknown mode": (["onnx", "resnet20", "{tmp}/o.onnx", "--preprocessing", "nonsense"], 2, "'torch'"),
    "no ONNX file": (["predict", "{tmp}/no.onnx", "{tmp}/a.png"], 2, "no.onnx does not exist"),
    "truncated ONNX file": (["predict", "{tmp}/cut.onnx", "{tmp}/a.png"], 2, "not an ONNX file that onnxruntime can run"),
    "verify truncated": (["verify", "{tmp}/cut.onnx", "{keras}"], 2, "not a readable ONNX file"),
    "inspect truncated": (["inspect", "{tmp}/cut.onnx"], 2, "not an ONNX file that onnxruntime can run"),
    "bench truncated": (["bench", "{tmp}/cut.onnx", "--device", "cpu"], 2, "not an ONNX file that onnxruntime can run"),
    "quantize truncated": (
        ["quantize", "{tmp}/cut.onnx", "{tmp}/o.onnx", "--fp16"],
        2,
        "not an ONNX file that onnxruntime can run",
    ),
    "verify int8 without images": (["verify", "{tmp}/int8.onnx", "{keras}"], 2, "give images on which to compare it"),
    "no calibration": (["onnx", "{keras}", "{tmp}/o.onnx", "--int8"], 2, "needs `calibration` images"),
    "empty calibration": (["onnx", "{keras}", "{tmp}/o.onnx", "--int8", "--calibration", "{tmp}/empty"], 2, "holds no images"),
    "other calibration": (
        ["onnx", "{keras}", "{tmp}/o.onnx", "--int8", "--calibration", "{tmp}/8.npy"],
        2,
        "must have the shape",
    ),
    "samples of a SavedModel": (["savedmodel", "{keras}", "{tmp}/o", "--samples", "{tmp}/empty"], 2, "holds no images"),
    "cut weights": (["onnx", "resnet20", "{tmp}/o.onnx", "--weights", "{tmp}/cut.th"], 2, "cut.th is not loaded"),
    "no weights": (["onnx", "resnet20", "{tmp}/o.onnx", "--weights", "{tmp}/no.th"], 2, "no.th"),
    "weights of another family": (["onnx", "vgg16", "{tmp}/o.onnx", "--weights", "{weights}"], 2, "does not belong to vgg16"),
    "no image": (["predict", "{good}", "{tmp}/corrupt.keras"], 2, "not an image"),
    "no device": (["predict", "{good}", "{tmp}/a.png", "--device", "cuda"], 4, "cuda does not start"),
    "unknown device": (["predict", "{good}", "{tmp}/a.png", "--device", "tpu"], 2, "`device` must be one of"),
    "unknown command": (["export"], 2, "No such command"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a ResNet-20."""
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    kr.save_weights(kr.create_model("resnet20"), path)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run, saved, mixed_export, weights, tmp_path, case):
    arguments, expected, message = BAD[case]
    (tmp_path / "cut.th").write_bytes(b"PK\x03\x04 nothing")
    np.save(tmp_path / "8.npy", np.zeros((4, 8, 8, 3), "float32"))
    proto = onnx.load(mixed_export[1])
    for entry in proto.metadata_props:
        entry.value = entry.value.replace('"precision": "float32"', '"precision": "int8"')
    onnx.save(proto, tmp_path / "int8.onnx")
    (tmp_path / "corrupt.keras").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "cut.onnx").write_bytes(mixed_export[1].read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    before = sorted(os.listdir(tmp_path))
    code, out, err = run(
        *(argument.format(tmp=tmp_path, good=mixed_export[1], keras=saved, weights=weights) for argument in arguments)
    )
    assert (code, out) == (expected, ""), err
    assert message in err and "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == before


REPORTS = {
    "onnx": ["onnx", "{good}.keras", "{tmp}/o.onnx", "--report"],
    "savedmodel": ["savedmodel", "{good}.keras", "{tmp}/o", "--report"],
    "verify": ["verify", "{good}", "resnet20", "--report"],
    "bench, table": ["bench", "{good}", "--csv"],
    "bench, figure": ["bench", "{good}", "--figure"],
    "inspect": ["inspect", "{good}", "--html"],
}
PLACES = {
    "": "needs a name",
    "{tmp}/no/r.svg": "does not exist",
    "{tmp}/folder.svg": "it is a folder",
    "{good}": "the command has another use for that file",
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place or "empty")
@pytest.mark.parametrize("command", REPORTS)
def test_figures_that_cannot_be_written_are_refused_before_the_work(run, mixed_export, tmp_path, monkeypatch, command, place):
    def work(*arguments, **options):
        raise AssertionError("work was done")

    for name in ("source.load_model", "runtime.benchmark.bench", "runtime.inspection.inspect"):
        monkeypatch.setattr(f"resnet_export.{name}", work)
    good = tmp_path / "good.onnx"
    good.write_bytes(mixed_export[1].read_bytes())
    (tmp_path / "folder.svg").mkdir()
    arguments = [*REPORTS[command], place]
    if place == "{good}" and command in ("onnx", "savedmodel"):
        arguments[-1] = arguments[2]
    before = sorted(os.listdir(tmp_path))
    code, out, err = run(*(argument.format(tmp=tmp_path, good=good) for argument in arguments))
    assert (code, out) == (2, "") and PLACES[place] in err and "Traceback" not in err, err
    assert sorted(os.listdir(tmp_path)) == before and good.read_bytes() == mixed_export[1].read_bytes()


def test_figures_are_written_whole_or_not_at_all(run, mixed_export, full_disk, tmp_path, monkeypatch):
    old = full_disk / "page.html"
    old.write_text("old")
    monkeypatch.setattr("resnet_export.runtime.inspection.picture", lambda inspection: "x" * 2**20)
    for name in (old, full_disk / "new.html", "/dev/full"):
        code, out, err = run("inspect", mixed_export[1], "--html", name)
        assert (code, out) == (2, "") and f"cannot write {name}: No space left on device" in err
    assert os.listdir(full_disk) == ["page.html"] and old.read_text() == "old"
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert run("inspect", mixed_export[1], "--html", tmp_path / "link")[0] == 0
    assert (tmp_path / "there").read_text().startswith("xxx") and (tmp_path / "link").is_symlink(), "links are written through"


def test_an_artefact_does_not_take_the_place_of_what_it_is_made_from(run, saved, mixed_export, tmp_path):
    keras_file, onnx_file = tmp_path / "m.keras", tmp_path / "m.onnx"
    shutil.copy(saved, keras_file)
    shutil.copy(mixed_export[1], onnx_file)
    (tmp_path / "same").symlink_to(keras_file)
    for arguments in (
        ["onnx", keras_file, keras_file],
        ["onnx", keras_file, tmp_path / "same"],
        ["savedmodel", keras_file, keras_file],
    ):
        code, _, err = run(*arguments, "--force")
        assert code == 2 and "another use for that file" in err
    assert run("quantize", onnx_file, onnx_file, "--fp16", "--force")[0] == 2
    code, _, err = run("onnx", saved, "/dev/null", "--force")
    assert code == 2 and "it is a device or a pipe" in err
    assert keras_file.read_bytes() == Path(saved).read_bytes() and onnx_file.read_bytes() == mixed_export[1].read_bytes()


@pytest.fixture
def full_disk(tmp_path):
    """A disk of its own with hardly any room; needs the right to mount one."""
    place = tmp_path / "full"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


FULL = {
    "onnx": ["onnx", "{keras}", "{out}"],
    "external data": ["onnx", "{keras}", "{out}", "--external-data"],
    "savedmodel": ["savedmodel", "{keras}", "{out}"],
    "float16": ["quantize", "{good}", "{out}", "--fp16"],
    "int8": ["quantize", "{good}", "{out}", "--int8", "--calibration", "{tmp}/c.npy"],
}


@pytest.mark.parametrize("case", FULL)
def test_disk_full_half_way(run, saved, mixed_export, full_disk, tmp_path, case):
    np.save(tmp_path / "c.npy", noise(4))
    out = full_disk / "m"
    code, said, err = run(*(part.format(keras=saved, good=mixed_export[1], out=out, tmp=tmp_path) for part in FULL[case]))
    assert (code, said) == (2, "") and f"cannot write {out}: No space left on device" in err, err
    assert os.listdir(full_disk) == []


MODULE = """
import keras
import tensorflow as tf

@keras.saving.register_keras_serializable("odd")
class Odd(keras.layers.Layer):
    def call(self, x):
        return tf.raw_ops.Betainc(a=x * x + 1, b=x * x + 1, x=x * 0 + 0.5)
"""


def test_an_op_that_cannot_be_converted_is_named_with_its_layer(run, tmp_path, monkeypatch):
    (tmp_path / "oddly.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        odd = importlib.import_module("oddly")
    keras.Sequential([keras.Input((4,)), odd.Odd(name="odd_one")]).save("m.keras")
    keras.saving.get_custom_objects().pop("odd>Odd")
    monkeypatch.delitem(sys.modules, "oddly")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = sorted(os.listdir(tmp_path))
    code, _, err = run("onnx", "m.keras", "m.onnx")
    assert code == 2 and "m.keras uses Odd, which is not known here; name the module that registers it with --import" in err, err
    (tmp_path / "broken.py").write_text("1 / 0")
    code, _, err = run("onnx", "m.keras", "m.onnx", "--import", "broken")
    (tmp_path / "broken.py").unlink()
    assert code == 2 and "cannot import broken: division by zero" in err
    code, _, err = run("onnx", "m.keras", "m.onnx", "--import", "oddly")
    assert code == 2 and "'Betainc' of layer 'odd_one' has no counterpart in ONNX" in err
    assert sorted(os.listdir(tmp_path)) == before


def test_prune_identity_takes_a_tolerance(run, tmp_path):
    x = inputs = keras.Input((16, 16, 3))
    for index in range(2):
        x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name=f"conv{index}")(x)
    deep = kr.grow(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x)), "conv*", gate="rezero", seed=1)
    (gate,) = kr.find_blocks(deep)[1].branch[-1].weights
    gate.assign(0.25)
    deep.save(tmp_path / "deep.keras")
    additions = {}
    for tolerance in ("0", "0.5"):
        code, _, err = run("onnx", tmp_path / "deep.keras", tmp_path / f"{tolerance}.onnx", "--prune-identity", tolerance)
        # Above the gate that has moved, the artefact is another function than the model, and is verified against what was pruned.
        assert code == 0, err
        additions[tolerance] = op_counts(tmp_path / f"{tolerance}.onnx").get("Add", 0)
    assert additions == {"0": 1, "0.5": 0}, "of two blocks"
    code, _, err = run("onnx", tmp_path / "deep.keras", tmp_path / "m.onnx", "--prune-identity", "-1")
    assert code == 2 and "prune-identity" in err
