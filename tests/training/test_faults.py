"""Kills, signals, full disks, losses that are no numbers: what a run keeps, and what it says."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_resnet as kr
from keras_resnet import data, training
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


def test_another_model_or_other_images_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (256, 8, 8, 1)).astype("uint8"), np.arange(256) % 10
    training.fit(network(), (x, y), run=run(epochs=1), out=tmp_path, quiet=True)
    again = Losses()
    training.fit(network(), (x, y[:, None]), run=run(epochs=1), out=tmp_path, callbacks=[again], quiet=True)
    assert not again.values
    with pytest.raises(training.TrainingError, match="holds another run.*weights"):
        training.fit(network(seed=6), (x, y), run=run(epochs=1), out=tmp_path, quiet=True)
    with pytest.raises(training.TrainingError, match="holds another run.*labels"):
        training.fit(network(), (x, y[::-1].copy()), run=run(epochs=1), out=tmp_path, quiet=True)


# Seed 0 is the one that `Dataset.shuffle` treats in a way of its own.
@pytest.mark.parametrize("seed", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_shards_train_and_go_on_whatever_the_global_seed(tmp_path, seed):
    source = data.load("digits")
    data.write_tfrecords(
        source.train, tmp_path / "shards", "train", classes=source.classes, shards=2, preprocessing=source.preprocessing
    )
    shards = str(tmp_path / "shards")
    assert data.load(shards).image_size == (8, 8) and not data.load(shards).crop
    keras.utils.set_random_seed(seed)
    whole = training.fit(network(), shards, run=run(seed=seed), out=tmp_path / "whole", quiet=True)
    terminate = At(15, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(training.Interrupted):
        training.fit(network(), shards, run=run(seed=seed), out=tmp_path / "broken", callbacks=[terminate], quiet=True)
    keras.utils.set_random_seed(seed + 1)
    broken = training.fit(network(), shards, run=run(seed=seed), out=tmp_path / "broken", quiet=True)
    # Not bit for bit without `deterministic`, but other images would show.
    assert abs(broken.history[0]["loss"] - whole.history[0]["loss"]) < 0.02 * whole.history[0]["loss"]
    assert whole.history[-1]["loss"] < 0.5


def test_records_that_are_missing_end_the_run(tmp_path):
    source = data.load("digits")
    data.write_tfrecords(source.train, tmp_path, "train", classes=source.classes, preprocessing=source.preprocessing)
    meta = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps({**meta, "records": [2000]}))
    with pytest.raises(training.TrainingError, match="the data ended at step 22 of 30"):
        training.fit(network(), str(tmp_path), run=run(), quiet=True)


def test_weights_from_a_file_do_not_hinder_going_on(tmp_path):
    options = {"model": "resnet20", "data": "digits", "epochs": 1, "batch_size": 256, "validate": "none"}
    first = training.train(training.Run.of(**options), tmp_path / "first", quiet=True)
    kr.save_weights(first.model, tmp_path / "weights.safetensors")
    second = training.Run.of(**options, weights=str(tmp_path / "weights.safetensors"))
    result = training.train(second, tmp_path / "second", quiet=True)
    assert training.train(second, tmp_path / "second", quiet=True).summary == result.summary
