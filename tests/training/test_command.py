"""`scripts/train.py` on one device: flags, files, exit codes."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from keras_resnet import training

PATH = Path(__file__).resolve().parents[2] / "scripts" / "train.py"


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("train_command", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def invoke(command, monkeypatch):
    """Run the command in this process; leaving it is an exception here."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(command.os, "_exit", leave)
    return lambda *arguments: CliRunner().invoke(command.main, list(map(str, arguments)))


def test_help_explains_every_option(invoke):
    result = invoke("--help")
    assert result.exit_code == 0
    for words in ("scripts/train.py --recipe cpu-budget", "--batch-size", "global batch", "--lost-worker", "Exit codes"):
        assert words in result.output
    assert all(
        f"--{name.replace('_', '-')}" in result.output
        for name in training.Run.__dataclass_fields__
        if name not in ("growth", "model_options")
    )


def test_recipes_are_listed_with_their_sources(invoke):
    output = invoke("--recipes").output
    assert all(name in output and recipe["source"] in output for name, recipe in training.RECIPES.items())


def test_a_run_ends_with_one_line_of_json_and_can_be_repeated_from_its_description(invoke, tmp_path):
    flags = ["--model", "resnet20", "--data", "digits", "--epochs", 1, "--batch-size", 256, "--validate", "none", "--seed", 3]
    result = invoke(*flags, "--out", tmp_path / "a", "--set", "norm_momentum=0.8", "--grow", "0:stage1_block1_out:1")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["seed"] == 3 and summary["steps"] == 5
    assert "global batch 256" in result.stderr and "grown before epoch 1" in result.stderr
    again = training.Run.load(tmp_path / "a" / "run.yaml", epochs=2)
    assert (again.epochs, again.seed, again.model_options) == (2, 3, {"norm_momentum": 0.8})
    assert again.growth == ((0, "stage1_block1_out", 1),)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--data", "digit"], 2, "did you mean"),
        (["--model", "resnet21", "--data", "digits"], 2, "resnet20"),
        (["--data", "nowhere/photos"], 2, "no data at"),
        (["--recipe", "goyal"], 2, "unknown recipe"),
        (["--grow", "1:x"], 2, "EPOCH:PLACES:BLOCKS"),
        (["--data", "digits", "--devices", "GPU:0"], 4, "no device GPU:0"),
        (["--epochs", "many"], 2, "not a valid integer"),
        (["missing.yaml"], 2, "cannot be read"),
        (["--data", "digits", "--batch-size", "5000"], 2, "at most the number of training images"),
        (["--data", "digits", "--set", "gates=zero_gamma"], 2, "unknown argument"),
    ],
)
def test_bad_input_is_one_sentence(invoke, tmp_path, arguments, code, says):
    result = invoke(*arguments, "--out", tmp_path / "run")
    assert result.exit_code == code and says in result.output, result.output
    assert "Traceback" not in result.output and not (tmp_path / "run" / "model.keras").exists()
