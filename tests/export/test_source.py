"""Where a command's model comes from: files of any Keras format, names, class counts."""

import json

import keras
import numpy as np
import pytest

import keras_resnet as kr
from resnet_export.cli import main
from tests.helpers import randomise


@pytest.fixture
def run(capsys):
    """Run a command: `(exit code, standard output, standard error)`."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def legacy(tmp_path):
    """A classifier as an .h5 file, and the same content named .keras."""
    layers = keras.layers
    stack = [layers.Conv2D(4, 3, activation="relu"), layers.GlobalAveragePooling2D(), layers.Dense(3, activation="softmax")]
    model = keras.Sequential([keras.Input((16, 16, 3)), *stack])
    model.save(tmp_path / "old.h5")
    (tmp_path / "other.keras").write_bytes((tmp_path / "old.h5").read_bytes())
    return tmp_path


def test_every_command_takes_legacy_files(run, legacy):
    for name in ("old.h5", "other.keras"):
        code, out, err = run("info", legacy / name, "--json")
        assert code == 0 and json.loads(out)["parameters"] == 4 * 28 + 15, err
        assert run("onnx", legacy / name, legacy / "m.onnx", "--force")[0] == 0
        assert run("verify", legacy / "m.onnx", legacy / name)[0] == 0
    assert run("savedmodel", legacy / "old.h5", legacy / "saved")[0] == 0


def test_lambda_layers_need_a_flag_that_warns(run, tmp_path):
    keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda t: t / 255.0), keras.layers.Dense(2)]).save(tmp_path / "l.h5")
    code, out, err = run("info", tmp_path / "l.h5")
    assert (code, out) == (2, "") and "--unsafe-lambda" in err and "safe_mode" not in err
    code, _, err = run("onnx", tmp_path / "l.h5", tmp_path / "l.onnx", "--unsafe-lambda")
    assert code == 0 and "note: code in Lambda layers" in err and (tmp_path / "l.onnx").exists()


def test_class_count_of_weights_and_of_the_command(run, tmp_path):
    model = randomise(kr.create_model("resnet20", num_classes=7))
    arrays = {f"{layer.name}/{v.name}": np.array(v) for layer in model.layers for v in layer.weights}
    np.savez(tmp_path / "seven.npz", **arrays)
    weights = ("--weights", tmp_path / "seven.npz")
    code, _, err = run("onnx", "resnet20", tmp_path / "m.onnx", *weights, "--preprocessing", "cifar10")
    assert code == 0, err
    code, out, err = run("verify", tmp_path / "m.onnx", "resnet20", *weights, "--preprocessing", "cifar10", "--num-classes", 7)
    assert code == 0, err
    assert run("onnx", "resnet20", tmp_path / "three.onnx", *weights, "--num-classes", 3)[0] == 0
    code, _, err = run("onnx", tmp_path / "seven.npz", tmp_path / "o.onnx", "--num-classes", 3)
    assert code == 2 and "needs the name of a zoo model" in err
    assert run("info", "resnet20", "--num-classes", 0)[0] == 2


def test_messages_name_options_of_the_command(run, tmp_path):
    code, _, err = run("info", "resnet5")
    assert code == 2 and "`resnet-export list` shows all" in err and "list_models" not in err
    for suffix in (".h5", ".keras"):
        kr.create_model("resnet20", num_classes=7).save(tmp_path / f"seven{suffix}")
    code, _, err = run("info", "resnet56", "--weights", tmp_path / "seven.keras")
    assert code == 2 and "it fits 'resnet20'" in err and "as arguments" not in err
    code, out, err = run("onnx", "resnet20", tmp_path / "m.onnx", "--weights", tmp_path / "seven.h5", "--preprocessing", "torch")
    assert code == 0, err
    code, out, err = run("onnx", "resnet20", tmp_path / "m.onnx", "--force", "--weights", tmp_path / "seven.h5")
    assert code == 0 and "give --preprocessing MODE" in err
