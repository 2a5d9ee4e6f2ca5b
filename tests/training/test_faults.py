"""Kills, signals, full disks, losses that are no numbers: what a run keeps, and what it says."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_resnet import training
from keras_resnet.training import checkpoint
from keras_resnet.weights import safetensors

from .models import At, Losses, network, run

SCRIPT = Path(__file__).with_name("killed.py")


def test_killed_run_ends_bit_for_bit_like_one_that_was_not(tmp_path):
    killed = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path), "5"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert checkpoint.read(tmp_path / "killed")[1]["step"] == 3
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], check=True)
    (broken, state), (whole, other) = (checkpoint.read(tmp_path / name) for name in ("killed", "whole"))
    assert broken.keys() == whole.keys()
    for name in whole:
        np.testing.assert_array_equal(broken[name], whole[name], err_msg=name)
    timed = ("images_per_second", "seconds")
    rows, others = ([{k: v for k, v in row.items() if k not in timed} for row in s["rows"]] for s in (state, other))
    assert rows == others and len(rows) == 4
    with open(tmp_path / "killed" / "log.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_termination_saves_and_the_same_call_goes_on(tmp_path):
    terminate = At(4, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(training.Interrupted, match="step 5 of 22") as stopped:
        training.fit(network(), "digits", run=run(), out=tmp_path, callbacks=[terminate], quiet=True)
    assert stopped.value.exit_code == 143
    assert checkpoint.read(tmp_path)[1]["step"] == 5
    losses = Losses()
    result = training.fit(network(), "digits", run=run(), out=tmp_path, callbacks=[losses], quiet=True)
    assert len(losses.values) == 22 - 5 and len(result.history) == 2
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.Handlers.SIG_DFL)
    again = training.fit(network(), "digits", run=run(), out=tmp_path, quiet=True)
    assert again.summary == result.summary


def test_loss_that_is_no_number_stops_with_the_step_and_keeps_the_weights(tmp_path):
    def poison(model):
        model.get_layer("predictions").bias.assign(np.full(10, np.nan))

    with pytest.raises(training.Diverged, match=r"not finite at step 8; the weights of step 6 are kept"):
        training.fit(network(), "digits", run=run(save_every=3), out=tmp_path, callbacks=[At(7, poison)], quiet=True)
    arrays, state = checkpoint.read(tmp_path)
    assert state["step"] == 6
    assert all(np.isfinite(array).all() for name, array in arrays.items() if name.startswith("model/"))


def test_full_disk_keeps_the_former_checkpoint(tmp_path, monkeypatch):
    write, calls = safetensors.write, []

    def full(path, *args):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(path, *args)

    monkeypatch.setattr(safetensors, "write", full)
    with pytest.raises(training.TrainingError, match="step 8 could not be written.*No space left.*former one is kept"):
        training.fit(network(), "digits", run=run(save_every=4), out=tmp_path, quiet=True)
    assert checkpoint.read(tmp_path)[1]["step"] == 4


def test_folder_that_cannot_be_written_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    losses = Losses()
    with pytest.raises(training.TrainingError, match="cannot be written.*choose another --out"):
        training.fit(network(), "digits", run=run(), out=tmp_path / "file" / "run", callbacks=[losses], quiet=True)
    assert not losses.values


def test_too_little_room_is_found_before_training(tmp_path):
    with pytest.raises(training.TrainingError, match="MiB free"):
        checkpoint.check_folder(tmp_path, 2**60)


def test_another_run_in_the_folder_is_refused(tmp_path):
    training.fit(network(), "digits", run=run(epochs=1), out=tmp_path, quiet=True)
    with pytest.raises(training.TrainingError, match="holds another run.*seed 0 there, 1 here"):
        training.fit(network(), "digits", run=run(epochs=1, seed=1), out=tmp_path, quiet=True)


def test_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / checkpoint.FILE).write_bytes(b"\x08\0\0\0\0\0\0\0broken")
    with pytest.raises(training.TrainingError, match="cannot be read.*remove it to begin again"):
        training.fit(network(), "digits", run=run(), out=tmp_path, quiet=True)
