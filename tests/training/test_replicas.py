"""The same training on one device, on two logical devices and in two processes: one result."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_resnet.training.cli import free_ports

SCRIPT = Path(__file__).with_name("replicas.py")
COMMON = {
    "batch_size": 28, "learning_rate": 0.1, "base_batch": 28, "nesterov": True, "weight_decay": 1e-3, "crop_padding": 1,
    "clip_norm": 1.0, "epochs": 1, "seed": 4, "sync_batch_norm": True, "label_smoothing": 0.1,
}  # fmt: skip


def start(out, options, config=None):
    arguments = [sys.executable, str(SCRIPT), str(out), json.dumps(options)] + ([json.dumps(config)] if config else [])
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def placements(tmp_path_factory):
    """Results in float64 by placement."""
    return trained(tmp_path_factory.mktemp("replicas"), ("float64",))


def trained(folder, dtypes, **common):
    """Results by dtype and placement of a run with some options changed."""

    def options(**changes):
        return [{**COMMON, "precision": dtype, **common, **changes} for dtype in dtypes]

    workers = {"cluster": {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}}
    finish(start(folder / "one", options(devices=["CPU:0"])))
    finish(start(folder / "mirrored", options(devices=["CPU:0", "CPU:1"])))
    tasks = [{**workers, "task": {"type": "worker", "index": i}} for i in (0, 1)]
    finish(*(start(folder / "workers", options(), task) for task in tasks))
    names = [(dtype, name) for dtype in dtypes for name in ("one", "mirrored", "workers")]
    return {(dtype, name): dict(np.load(folder / f"{name}-{dtype}.npz")) for dtype, name in names}


def differences(one, other, letter):
    return [np.abs(one[name] - other[name]).max() for name in one if name[0] == letter and name[1:].isdigit()]


@pytest.mark.parametrize("placement", ["mirrored", "workers"])
def test_float64_agrees_over_fifty_steps(placements, placement):
    one, other = placements["float64", "one"], placements["float64", placement]
    assert len(one["losses"]) == 51
    # Keras reports losses in float32; the weights are what is computed in float64.
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=0, atol=1e-6)
    found = differences(one, other, "w")
    assert len(found) > 20 and max(found) <= 1e-8
    assert abs(one["test_loss"] - other["test_loss"]) <= 2e-6  # figures are rounded to six places
    assert one["test_accuracy"] == other["test_accuracy"]


def test_float64_moved(placements):
    one = placements["float64", "one"]
    assert one["losses"][-1] < one["losses"][0] - 0.05
    assert max(differences(one, {name.replace("e", "w", 1): value for name, value in one.items() if name[0] == "e"}, "w")) > 1e-3


@pytest.mark.slow
def test_float32_agrees_over_three_steps(tmp_path):
    placements = trained(tmp_path, ("float32",))
    for placement in ("mirrored", "workers"):
        one, other = placements["float32", "one"], placements["float32", placement]
        np.testing.assert_allclose(other["losses"][:3], one["losses"][:3], rtol=0, atol=1e-4)
        found = differences(one, other, "e")
        assert len(found) > 20 and max(found) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"clip_norm": 0.0}, {"optimizer": "adamw", "learning_rate": 0.001}], ids=str)
def test_accumulated_gradients_are_those_of_one_device(tmp_path, changes):
    found = trained(tmp_path, ["float64"], accumulate=4, **changes)
    one = found["float64", "one"]
    for placement in ("mirrored", "workers"):
        assert max(differences(one, found["float64", placement], "w")) <= 1e-8
    # Three steps are no update yet.
    assert max(differences(one, {f"w{name[1:]}": v for name, v in one.items() if name[0] == "e"}, "w")) > 1e-3


@pytest.mark.slow
def test_matched_scales_of_grown_blocks_are_those_of_one_device(tmp_path):
    changes = {"epochs": 2, "batch_size": 280, "growth": [[1, "conv2d", 1]], "growth_scale": "match", "learning_rate": 0.01}
    found = trained(tmp_path, ["float64"], **changes)
    for placement in ("mirrored", "workers"):
        other = found["float64", placement]
        assert max(differences(found["float64", "one"], other, "w")) <= 1e-7
        np.testing.assert_allclose(other["scales"], found["float64", "one"]["scales"], rtol=1e-7)
    assert other["scales"][0] != 1


@pytest.mark.slow
def test_figures_are_those_of_the_saved_model_without_synchronised_batch_norm(tmp_path):
    script = Path(__file__).with_name("unsynchronised.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (summary, row, file) in json.loads(done.stdout.splitlines()[-1]).items():
        np.testing.assert_allclose(summary, file, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(row, file, atol=2e-6, err_msg=name)
