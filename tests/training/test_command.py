"""`resnet-train` on one device: flags, files, exit codes."""

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

import keras_resnet as kr
from keras_resnet import training
from keras_resnet.training import cli
from keras_resnet.training.run import GROUPS, OPTIONS

from .test_workers import interruptible

PATH = Path(__file__).resolve().parents[2] / "scripts" / "train.py"


@pytest.fixture
def invoke(monkeypatch):
    """Run the command in this process; leaving it is an exception here."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(cli.os, "_exit", leave)
    return lambda *arguments: CliRunner().invoke(cli.main, list(map(str, arguments)))


def test_help_sorts_every_option_into_a_group_with_its_default_and_begins_with_five(invoke):
    result = invoke("--help")
    assert result.exit_code == 0
    sections = {part.split(":\n")[0].strip(): part for part in result.output.split("\n\n") if ":\n" in part}
    first = [line.split()[0] for line in sections["Start with these"].splitlines()[1:] if line.strip().startswith("--")]
    assert first == ["--data", "--model", "--recipe", "--epochs", "--out"]
    for group in GROUPS.values():
        for name, item in group.__dataclass_fields__.items():
            if name in cli.FIRST + cli.OTHERWISE:
                continue
            flag = f"--{name.replace('_', '-')}"
            assert flag in sections[group.__doc__], name
            if isinstance(item.default, float):
                assert f"[default: {item.default}]" in " ".join(sections[group.__doc__].split()), name
    assert "resnet-train --data" in result.output and "Exit codes" in result.output
    assert len(OPTIONS) > 50


def test_the_script_in_a_checkout_is_the_command():
    help_of = subprocess.run([sys.executable, PATH, "--help"], capture_output=True, text=True)
    assert help_of.returncode == 0 and help_of.stdout.startswith("Usage: resnet-train") and not help_of.stderr


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


def test_the_elastic_recipe_drops_branches_of_a_file_too(invoke, tmp_path):
    sizes = {"depths": (1, 1, 1), "widths": (4, 4, 8), "stem_widths": (4,), "input_shape": (8, 8, 1), "channels": 1}
    model = kr.create_model("resnet20", num_classes=10, preprocessing="none", **sizes)
    kr.grow(model, "stage1_block1_out", seed=1).save(tmp_path / "grown.keras")
    flags = ["--recipe", "elastic", "--data", "digits", "--epochs", 1, "--batch-size", 512, "--crop-padding", 0]
    result = invoke(*flags, "--model", tmp_path / "grown.keras", "--out", tmp_path / "a")
    assert result.exit_code == 0 and "recipe elastic: stochastic depth" in result.stderr, result.output
    trained = keras.saving.load_model(tmp_path / "a" / "model.keras")
    rates = [layer.rate for layer in trained.layers if isinstance(layer, kr.layers.DropPath)]
    assert rates == pytest.approx([0.5 / 3, 1 / 3, 0.5])


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--data", "digit"], 2, "did you mean"),
        (["--model", "resnet21", "--data", "digits"], 2, "resnet20"),
        (["--data", "nowhere/photos"], 2, "no data at"),
        (["--recipe", "goyal"], 2, "unknown recipe"),
        (["--grow", "1:x"], 2, "EPOCH:AFTER:BLOCKS"),
        (["--data", "digits", "--devices", "GPU:0"], 4, "no device GPU:0"),
        (["--epochs", "many"], 2, "not a valid integer"),
        (["--lr", "0.1"], 2, "No such option '--lr'. Did you mean '--learning-rate'?"),
        (["--batch_size", "3"], 2, "Did you mean '--batch-size'?"),
        (["--augment"], 2, "No such option '--augment'.\n"),
        (["--data", ""], 2, "`data` is empty"),
        (["--data", __file__], 2, "is a file, but not an .npz; give a folder of images"),
        (["--data", "digits", "--growth-scale", "much"], 2, "must be one of 'match' or a number above 0"),
        (["--data", "digits", "--epochs", "2", "--initial-epoch", "2"], 2, "must be below `epochs` (2)"),
        (["missing.yaml"], 2, "cannot be read"),
        (["--data", "digits", "--batch-size", "5000"], 2, "at most the number of training images"),
        (["--data", "digits", "--set", "gates=zero_gamma"], 2, "unknown argument"),
        (["--data", "digits", "--set", "num_classes=5"], 2, "it comes from the classes of the data"),
        (["--data", "digits", "--set", "weights=cifar10"], 2, "(--weights)"),
        (["--grow", "²:*:1"], 2, "EPOCH:AFTER:BLOCKS"),
        (["--data", "digits", "--devices", "0"], 4, "no device 0"),
        (["--milestones", "a,b"], 2, "a list of numbers"),
        (["--workers", "1,2"], 2, "host:port"),
        (["--workers", "a:1, a:1"], 2, "must all be different"),
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


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_local_workers_end_with_their_parent(tmp_path, number):
    """Children that would sleep, and a signal to the parent alone."""
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    script = f"import sys; from keras_resnet.training import cli; sys.exit(cli._spawn(2, [{str(sleeper)!r}]))"
    source = str(PATH.parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "TF_CPP_MIN_LOG_LEVEL": "3"}
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=interruptible
    )
    lines = (line for line in parent.stderr if line.startswith("["))
    children = [int(next(lines).split("]")[1]) for _ in range(2)]
    parent.send_signal(number)
    assert parent.wait(30) == 128 + number
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


@pytest.mark.slow
def test_a_pretrained_model_gets_the_recipe_for_fine_tuning_and_it_is_said(invoke, tmp_path):
    flags = ["--model", "resnet20", "--data", "digits", "--epochs", 1, "--batch-size", 512, "--validate", "none"]
    assert invoke(*flags, "--out", tmp_path / "first").exit_code == 0
    tuned = ["--model", tmp_path / "first" / "model.keras", *flags[2:], "--out"]
    result = invoke(*tuned, tmp_path / "second")
    assert result.exit_code == 0 and "recipe finetune: the head alone first" in result.stderr, result.output
    assert training.Run.load(tmp_path / "second" / "run.yaml").clip_norm == 1.0
    assert training.Run.of(weights="cifar10").recipe == "finetune"
    for changes in ({"weights": "cifar10", "learning_rate": 0.1}, {}, {"weights": "cifar10", "recipe": "from-scratch"}):
        assert training.Run.of(**changes).clip_norm == 0


def test_legacy_files_are_models_and_get_the_class_names(invoke, tmp_path):
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(keras.layers.Rescaling(0.01)(inputs))))
    model.save(tmp_path / "old.h5")
    result = invoke(
        "--model", tmp_path / "old.h5", "--data", "digits", "--epochs", 1, "--batch-size", 512, "--out", tmp_path / "run"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["classes"] == list("0123456789")
    assert kr.card(keras.saving.load_model(tmp_path / "run" / "model.keras")).labels == list("0123456789")


@pytest.mark.slow
def test_code_and_classes_of_a_model_file_need_their_options(invoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "halves.py").write_text(
        "import keras\n\n\n@keras.saving.register_keras_serializable('halves')\nclass Halve(keras.layers.Layer):\n"
        "    def call(self, x):\n        return x / 2\n"
    )
    script = (
        "import keras, halves\n"
        "i = keras.Input((8, 8, 1))\n"
        "x = keras.layers.Lambda(lambda x: x / 2)(i)\n"
        "keras.Model(i, keras.layers.Dense(10)(keras.layers.Flatten()(x))).save('lambda.keras')\n"
        "keras.Model(i, keras.layers.Dense(10)(keras.layers.Flatten()(halves.Halve()(i)))).save('class.keras')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
    flags = ["--data", "digits", "--epochs", 1, "--batch-size", 512, "--validate", "none", "--learning-rate", 0.01]
    for name, option, given in (("lambda", "--unsafe-lambda", []), ("class", "--import", ["halves"])):
        refused = invoke("--model", f"{name}.keras", *flags, "--out", f"{name}-run")
        assert refused.exit_code == 2 and option in refused.output and "keras_resnet." not in refused.output
        for _ in range(2):  # the second time the run is finished, and its model is loaded
            result = invoke("--model", f"{name}.keras", *flags, option, *given, "--out", f"{name}-run")
            assert result.exit_code == 0, result.output
            assert ("may run in this process" in result.stderr) == (name == "lambda")
    missing = invoke("--model", "class.keras", *flags, "--import", "nowhere", "--out", "x")
    assert missing.exit_code == 2 and "cannot import nowhere" in missing.output
