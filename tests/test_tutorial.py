"""Every command and snippet of docs/tutorial-photos.md, in order, on a small folder of photos."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import keras_resnet as kr
from keras_resnet.training.cli import free_ports

REPOSITORY = Path(__file__).resolve().parents[1]
TUTORIAL = REPOSITORY / "docs" / "tutorial-photos.md"
TRAIN = REPOSITORY / "scripts" / "train.py"
COMMANDS = {
    "resnet-train": f"import runpy; runpy.run_path({str(TRAIN)!r}, run_name='__main__')",
    "resnet-export": "import sys; from resnet_export.cli import main; sys.exit(main())",
}
LIMIT = 600  # seconds for one command


def blocks():
    """`(language, text)` of the fenced blocks that have a language, in order."""
    return re.findall(r"^```(python|sh)\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path, cifar_test):
    """A folder with photos of three classes, and a shell environment that knows the commands of this checkout."""
    images, labels = cifar_test
    for label, name in {0: "airplane", 6: "frog", 9: "truck"}.items():
        numbers = np.flatnonzero(np.asarray(labels) == label)
        for part, first, count in (("train", 0, 30), ("val", 30, 10), ("test", 40, 10)):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for index, number in enumerate(numbers[first : first + count]):
                Image.fromarray(images[number]).resize((80, 72), Image.BICUBIC).save(folder / f"{index}.jpg")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, code in COMMANDS.items():
        (commands / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n')
        (commands / name).chmod((commands / name).stat().st_mode | stat.S_IEXEC)
    paths = [str(REPOSITORY), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TF_NUM_INTRAOP_THREADS": "1",
    }
    return tmp_path, environment


def run(command, place, environment):
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@contextlib.contextmanager
def in_the_background(command, place, environment, port):
    """A server while the block runs, once it answers."""
    process = subprocess.Popen(shlex.split(command), cwd=place, env=environment, start_new_session=True)
    try:
        for _ in range(600):
            assert process.poll() is None, command
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=1):
                break
            time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_everything_in_the_tutorial(place):
    folder, environment = place
    pytest.importorskip("uvicorn")
    if not shutil.which("curl"):
        pytest.skip("no curl")
    (port,) = free_ports(1)
    outputs, kinds = [], [kind for kind, _ in blocks()]
    assert kinds.count("python") == 2 and kinds.count("sh") == 6
    with contextlib.ExitStack() as stack:
        for kind, text in blocks():
            if kind == "python":
                # The only thing that needs a network.
                assert text.count('weights="imagenet"') == (1 if "MobileNet" in text else 0)
                code = text.replace('weights="imagenet"', "weights=None")
                outputs.append(run([sys.executable, "-c", code], folder, environment))
                continue
            command = text.strip().replace("8123", str(port))
            if command.startswith("resnet-export serve"):
                stack.enter_context(in_the_background(command, folder, environment, port))
                continue
            outputs.append(run(["bash", "-ec", command], folder, environment))
    assert "3 classes (airplane, frog, truck); 90 images for training (photos/train), 30 images for validation" in outputs[0]
    tuned, grown = (json.loads((folder / "runs" / name / "summary.json").read_text()) for name in ("photos", "grown"))
    assert tuned["test_accuracy"] > 0.6 and grown["test_accuracy"] > 0.6
    models = [kr.load_model_file(folder / "runs" / name / "model.keras") for name in ("photos", "grown", "mobilenet")]
    assert all(kr.card(model).labels == ["airplane", "frog", "truck"] for model in models)
    assert len(kr.find_blocks(models[1])) > len(kr.find_blocks(models[0])) and len(kr.find_blocks(models[2])) == 1
    assert "frog" in outputs[-2] and "frog" in json.dumps(json.loads(outputs[-1]))
