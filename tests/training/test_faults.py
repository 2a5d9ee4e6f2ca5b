"""Kills, signals, full disks, losses that are no numbers: what a run keeps, and what it says."""

import csv
import io
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
from keras_resnet.training import checkpoint, logs
from keras_resnet.training.steps import Steps
from keras_resnet.weights.formats import safetensors

from .models import At, Losses, network, run

SCRIPT = Path(__file__).with_name("killed.py")


@pytest.mark.slow
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
    with pytest.raises(training.Interrupted, match="step 4 of 22") as stopped:
        training.fit(network(), "digits", run=run(), out=tmp_path, callbacks=[terminate], quiet=True)
    assert stopped.value.exit_code == 143
    assert checkpoint.read(tmp_path)[1]["step"] == 4
    losses = Losses()
    result = training.fit(network(), "digits", run=run(), out=tmp_path, callbacks=[losses], quiet=True)
    assert len(losses.values) == 22 - 4 and len(result.history) == 2
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.Handlers.SIG_DFL)
    again = training.fit(network(), "digits", run=run(), out=tmp_path, quiet=True)
    assert again.summary == result.summary


class Validation(keras.callbacks.Callback):
    """Sends SIGTERM in the first batch of the n-th evaluation, and counts batches."""

    def __init__(self, number):
        super().__init__()
        self.number, self.begun, self.batches, self.averages = number, 0, 0, []

    def on_test_begin(self, logs=None):
        self.begun += 1

    def on_test_batch_begin(self, batch, logs=None):
        self.batches += 1
        if self.begun == self.number:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("epoch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_termination_during_validation_saves_at_once_and_measures_again(tmp_path, epoch):
    description = run(validate="test", ema=0.9, holdout=100)
    broken, losses, ends = Validation(epoch), Losses(), []
    told = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append((epoch, logs["val_loss"])))
    with pytest.raises(training.Interrupted, match=f"saved at step {10 * epoch} of 20") as stopped:
        training.fit(network(), "digits", run=description, out=tmp_path, callbacks=[broken], quiet=True)
    # Three batches of test images make a validation.
    assert stopped.value.exit_code == 143 and broken.batches == 3 * (epoch - 1) + 1
    state = checkpoint.read(tmp_path)[1]
    assert state["step"] == 10 * epoch and len(state["rows"]) == epoch - 1 and "val_loss" not in state["pending"]
    with open(tmp_path / "log.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == epoch - 1
    result = training.fit(network(), "digits", run=description, out=tmp_path, callbacks=[losses, told], quiet=True)
    # The epoch whose validation was broken ends for callbacks too.
    assert [number for number, _ in ends] == list(range(epoch - 1, 2))
    np.testing.assert_allclose([loss for _, loss in ends], [row["val_loss"] for row in result.history[epoch - 1 :]], atol=1e-5)
    assert len(losses.values) == 20 - 10 * epoch and [row["epoch"] for row in result.history] == [1, 2]
    row = result.history[epoch - 1]
    assert state["pending"].items() <= row.items()
    if epoch == 2:
        measured = {"loss": result.summary["test_loss"], "accuracy": result.summary["test_accuracy"]}
    else:
        # Not bit for bit without `deterministic`, but weights instead of their averages would show.
        measured = training.fit(network(), "digits", run=description, quiet=True).history[0]
        measured = {"loss": measured["val_loss"], "accuracy": measured["val_accuracy"]}
    np.testing.assert_allclose(row["val_loss"], measured["loss"], rtol=0.01)
    np.testing.assert_allclose(row["val_accuracy"], measured["accuracy"], atol=0.02)
    with open(tmp_path / "log.csv", newline="") as file:
        assert [float(line["val_loss"]) for line in csv.DictReader(file)] == [line["val_loss"] for line in result.history]


@pytest.mark.slow
def test_a_callback_may_end_the_run_at_the_epoch_whose_validation_was_broken(tmp_path):
    description = run(validate="test")
    with pytest.raises(training.Interrupted, match="saved at step 11 of 22"):
        training.fit(network(), "digits", run=description, out=tmp_path, callbacks=[Validation(1)], quiet=True)
    losses = Losses()
    enough = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(enough.model, "stop_training", True))
    result = training.fit(network(), "digits", run=description, out=tmp_path, callbacks=[enough, losses], quiet=True)
    assert losses.values == [] and len(result.history) == 1 and checkpoint.read(tmp_path)[1]["ended"]
    assert training.fit(network(), "digits", run=description, out=tmp_path, quiet=True).summary == result.summary


def test_callbacks_hear_of_an_epoch_whose_last_step_was_asked_to_be_the_last(tmp_path):
    ends = []
    told = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: ends.append(epoch))
    terminate = At(11, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(training.Interrupted, match="saved at step 11 of 22"):
        training.fit(network(), "digits", run=run(), out=tmp_path, callbacks=[terminate, told], quiet=True)
    assert ends == [0] and len(checkpoint.read(tmp_path)[1]["rows"]) == 1


@pytest.mark.slow
def test_termination_during_the_last_measurement_is_no_loss(tmp_path, monkeypatch):
    """The test set may be large; all but its measurement is saved already."""
    evaluate = Steps.evaluate

    def asked(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(Steps, "evaluate", asked)
    with pytest.raises(training.Interrupted, match="saved at step 11 of 11"):
        training.fit(network(), "digits", run=run(epochs=1), out=tmp_path, quiet=True)
    assert not (tmp_path / "model.keras").exists()
    monkeypatch.undo()
    losses = Losses()
    result = training.fit(network(), "digits", run=run(epochs=1), out=tmp_path, callbacks=[losses], quiet=True)
    assert not losses.values and result.summary["test_accuracy"] > 0.1 and (tmp_path / "model.keras").exists()


def test_two_runs_do_not_share_a_folder_and_a_kill_leaves_no_lock(tmp_path):
    """The holder is another process, which knows of nothing but the file."""
    held = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a+'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write('process 1 on moon'); file.flush(); print(flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", held, str(tmp_path / checkpoint.LOCK)], stdout=subprocess.PIPE)
    losses = Losses()
    go = lambda: training.fit(network(), "digits", run=run(epochs=1), out=tmp_path, callbacks=[losses], quiet=True)  # noqa: E731
    try:
        holder.stdout.readline()
        with pytest.raises(training.TrainingError, match=r"in use by a run in progress \(process 1 on moon\)") as refused:
            go()
        assert refused.value.exit_code == 2 and not losses.values and not (tmp_path / "run.yaml").exists()
    finally:
        holder.kill()
        holder.wait()
    go()
    assert len(losses.values) == 11


def test_the_folder_is_a_runs_own_until_it_ends(tmp_path):
    def intrude(model):
        with pytest.raises(training.TrainingError, match=f"process {os.getpid()} on"), checkpoint.lock(tmp_path):
            pass

    training.fit(network(), "digits", run=run(epochs=1), out=tmp_path, callbacks=[At(3, intrude)], quiet=True)
    with checkpoint.lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(checkpoint.fcntl, "flock", unsupported)
    with checkpoint.lock(tmp_path):
        assert (tmp_path / checkpoint.LOCK).exists()


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
    with pytest.raises(training.TrainingError, match="step 8 could not be written.*No space left.*previous one is kept"):
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


@pytest.mark.slow
def test_another_run_in_the_folder_is_refused(tmp_path):
    training.fit(network(), "digits", run=run(epochs=1), out=tmp_path, quiet=True)
    with pytest.raises(training.TrainingError, match="holds another run.*seed 0 there, 1 here"):
        training.fit(network(), "digits", run=run(epochs=1, seed=1), out=tmp_path, quiet=True)


@pytest.mark.slow
def test_how_steps_are_run_may_change_when_a_run_goes_on(tmp_path):
    stop = At(4, lambda model: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(training.Interrupted):
        training.fit(network(), "digits", run=run(), out=tmp_path, callbacks=[stop], quiet=True)
    training.fit(network(), "digits", run=run(steps_per_execution=2), out=tmp_path, quiet=True)
    assert training.Run.load(tmp_path / "run.yaml").steps_per_execution == 2
    assert checkpoint.read(tmp_path)[1]["step"] == 22


def test_time_left_is_that_of_the_images_left():
    said = io.StringIO()
    row = {"epoch": 4, "step": 30, "loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1, "images_per_second": 64.0, "seconds": 3.0}
    logs.Progress(100, 10, 64, file=said).epoch(row, 10)
    assert said.getvalue().rstrip().endswith("1 min 10 s left")


def test_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / checkpoint.FILE).write_bytes(b"\x08\0\0\0\0\0\0\0broken")
    with pytest.raises(training.TrainingError, match="cannot be read.*remove it to restart"):
        training.fit(network(), "digits", run=run(), out=tmp_path, quiet=True)


@pytest.mark.slow
def test_another_model_or_other_images_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (256, 8, 8, 1)).astype("uint8"), np.arange(256) % 10
    training.fit(network(), (x, y), run=run(epochs=1), out=tmp_path, quiet=True)
    again = Losses()
    training.fit(network(), (x, y[:, None]), run=run(epochs=1), out=tmp_path, callbacks=[again], quiet=True)
    assert not again.values
    with pytest.raises(training.TrainingError, match="holds another run.*layout"):
        training.fit(kr.grow(network(), "stage1_block1_out"), (x, y), run=run(epochs=1), out=tmp_path, quiet=True)
    other = x.copy()
    other[:, 0, 0] += 1
    for images, labels in ((x, y[::-1].copy()), (other, y)):
        with pytest.raises(training.TrainingError, match="holds another run.*content"):
            training.fit(network(), (images, labels), run=run(epochs=1), out=tmp_path, quiet=True)


# Seed 0 is the one that `Dataset.shuffle` treats in a way of its own.
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
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
    with pytest.raises(training.TrainingError, match=r"it holds 1,437 records, train.json says 2,000"):
        training.fit(network(), str(tmp_path), run=run(), quiet=True)


@pytest.mark.slow
def test_weights_from_a_file_do_not_hinder_going_on(tmp_path):
    options = {"model": "resnet20", "data": "digits", "epochs": 1, "batch_size": 256, "validate": "none"}
    first = training.train(training.Run.of(**options), tmp_path / "first", quiet=True)
    kr.save_weights(first.model, tmp_path / "weights.safetensors")
    second = training.Run.of(**options, weights=str(tmp_path / "weights.safetensors"))
    result = training.train(second, tmp_path / "second", quiet=True)
    assert training.train(second, tmp_path / "second", quiet=True).summary == result.summary
