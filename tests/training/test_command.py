"""`scripts/train.py` on one device: flags, files, exit codes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import pytest
from click.testing import CliRunner

from keras_resnet import training

from .test_workers import interruptible

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
        (["--data", "digits", "--set", "num_classes=5"], 2, "it comes from the classes of the data"),
        (["--data", "digits", "--set", "weights=cifar10"], 2, "(--weights)"),
        (["--grow", "²:*:1"], 2, "EPOCH:PLACES:BLOCKS"),
        (["--data", "digits", "--devices", "0"], 4, "no device 0"),
        (["--milestones", "a,b"], 2, "a list of numbers"),
        (["--workers", "1,2"], 2, "host:port"),
        (["--workers", "a:1, a:1"], 2, "must be different ones"),
        (["--workers", "a:1,b:2", "--local-workers", "2"], 2, "leave out --workers"),
    ],
)
def test_bad_input_is_one_sentence(invoke, tmp_path, arguments, code, says):
    result = invoke(*arguments, "--out", tmp_path / "run")
    assert result.exit_code == code and says in result.output, result.output
    assert "Traceback" not in result.output and not (tmp_path / "run" / "model.keras").exists()


@pytest.mark.parametrize("content", ["text", "archive", "class", "silent"])
def test_a_file_that_is_no_model_is_one_sentence(invoke, tmp_path, content):
    path = tmp_path / "m.keras"
    if content == "text":
        path.write_text("no model")
    elif content == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "other content")
    else:
        strange = type("Strange", (keras.layers.Layer,), {"call": lambda self, x: x, "__module__": "strange"})
        if content == "silent":  # An error without a text.
            strange.from_config = classmethod(lambda cls, config: (_ for _ in ()).throw(NotImplementedError()))
            strange = keras.saving.register_keras_serializable("tests")(strange)
        inputs = keras.Input((8, 8, 1))
        keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(strange()(inputs)))).save(path)
    result = invoke("--model", path, "--data", "digits", "--out", tmp_path / "run")
    assert result.exit_code == 2 and f"Error: {path}" in result.output and "Traceback" not in result.output, result.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_workers_end_with_their_parent(tmp_path, number):
    """Children that would sleep, and a signal to the parent alone."""
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    script = (
        f"import importlib.util, sys; spec = importlib.util.spec_from_file_location('c', {str(PATH)!r}); "
        "c = importlib.util.module_from_spec(spec); spec.loader.exec_module(c); "
        f"c.__file__ = {str(sleeper)!r}; sys.exit(c._spawn(2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, preexec_fn=interruptible)
    children = [int(parent.stderr.readline().split("]")[1]) for _ in range(2)]
    parent.send_signal(number)
    assert parent.wait(30) == 128 + number
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
