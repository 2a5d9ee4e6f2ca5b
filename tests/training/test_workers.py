"""`resnet-train` in two processes: started by hand and by itself, killed, and going on."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keras_resnet.training.cli import free_ports

TRAIN = [sys.executable, str(Path(__file__).resolve().parents[2] / "scripts" / "train.py")]
COMMON = ["--data", "digits", "--batch-size", "128", "--validate", "none", "--save-every", "4", "--seed", "1"]
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}


def launch(folder, index, ports, *arguments):
    workers = ",".join(f"127.0.0.1:{port}" for port in ports)
    command = [*TRAIN, *COMMON, "--out", str(folder), "--workers", workers, "--index", str(index), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, preexec_fn=interruptible, **pipes)


def interruptible():
    """Undo what a shell does to a command in the background, this test suite perhaps: there Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, what, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.2)


def wait_until_bound(port):
    def bound():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(bound, f"process that listens on {port}", seconds=60)


def wait_for_epoch(folder, number):
    log = folder / "log.csv"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > number, f"epoch {number}")


def epochs_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_lost_worker_stops_the_other_and_both_go_on(tmp_path, victim):
    arguments, ports = ("--epochs", "12"), free_ports(2)
    processes = [launch(tmp_path / "run", index, ports, *arguments) for index in (0, 1)]
    wait_for_epoch(tmp_path / "run", 2)
    processes[victim].kill()
    _, errors = processes[1 - victim].communicate(timeout=600)
    assert processes[1 - victim].returncode == 1 and "another worker is gone; the checkpoint of step" in errors
    done = len(epochs_of(tmp_path / "run"))
    ports = free_ports(2)
    processes = [launch(tmp_path / "run", index, ports, *arguments) for index in (0, 1)]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert "resuming from step" in outputs[0][1] and done >= 2
    assert epochs_of(tmp_path / "run") == list(range(1, 13))


@pytest.mark.slow
def test_worker_waits_for_the_other_as_asked(tmp_path):
    arguments, ports = ("--epochs", "12", "--lost-worker", "wait"), free_ports(2)
    waiting, lost = (launch(tmp_path / "run", index, ports, *arguments) for index in (0, 1))
    wait_for_epoch(tmp_path / "run", 2)
    lost.kill()
    lost.wait()
    back = launch(tmp_path / "run", 1, ports, *arguments)
    outputs = [process.communicate(timeout=600) for process in (waiting, back)]
    assert (waiting.returncode, back.returncode) == (0, 0), outputs
    assert "Waiting for the other workers" in outputs[0][1]
    assert epochs_of(tmp_path / "run") == list(range(1, 13))


@pytest.mark.slow
def test_termination_of_one_worker_saves_and_ends_both(tmp_path):
    ports = free_ports(2)
    processes = [launch(tmp_path / "run", index, ports, "--epochs", "200", "--validate", "test") for index in (0, 1)]
    wait_for_epoch(tmp_path / "run", 1)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert all("stopped as asked, saved at step" in errors for _, errors in outputs)


@pytest.mark.slow
def test_workers_with_different_folders_are_refused(tmp_path):
    """Only the first worker has a checkpoint where the second looks for it in vain."""
    first = subprocess.run([*TRAIN, *COMMON, "--epochs", "1", "--out", str(tmp_path / "0")], capture_output=True, env=ENVIRONMENT)
    assert first.returncode == 0, first.stderr
    ports = free_ports(2)
    processes = [launch(tmp_path / str(index), index, ports, "--epochs", "1") for index in (0, 1)]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert all(f"{tmp_path / str(i)} is not the same folder for all workers" in outputs[i][1] for i in (0, 1)), outputs


@pytest.mark.slow
def test_one_index_given_twice_is_one_sentence(tmp_path):
    ports = free_ports(2)
    first = launch(tmp_path / "run", 0, ports)
    try:
        for line in first.stderr:
            if "waits for" in line:
                break
        assert f"worker 0 on 127.0.0.1:{ports[0]} waits for 127.0.0.1:{ports[1]}" in line
        wait_until_bound(ports[0])
        second = launch(tmp_path / "run", 0, ports)
        _, errors = second.communicate(timeout=120)
        assert second.returncode == 2 and "is the port in use, or --index given twice?" in errors, errors
        assert "Traceback" not in errors and first.poll() is None
        first.send_signal(signal.SIGINT)
        assert first.wait(30) in (130, -signal.SIGINT)
    finally:
        first.kill()
        first.wait()


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_refused_until_the_first_is_killed(tmp_path):
    command = [*TRAIN, *COMMON, "--out", str(tmp_path / "run"), "--epochs", "300"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        wait_for_epoch(tmp_path / "run", 1)
        second = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
        assert second.returncode == 2 and f"is in use by a run in progress (process {first.pid} on" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    third = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert any("resuming from step" in line for line in third.stderr)
    finally:
        third.kill()
        third.wait()


@pytest.mark.slow
def test_three_local_workers_give_one_summary(tmp_path):
    command = [
        *TRAIN,
        "--data",
        "digits",
        "--batch-size",
        "126",
        "--epochs",
        "2",
        "--out",
        str(tmp_path / "run"),
        "--local-workers",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=400)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 22 and summary["test_accuracy"] > 0.3
    assert "MultiWorkerMirroredStrategy, process 1 of 3, 3 replicas; global batch 126, 42 per replica" in done.stderr
