"""Ray Serve, in an environment that has ray: a local cluster, its replicas killed and exchanged under load."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peers import ROOT, python_with
from PIL import Image

from resnet_export.cli import main

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def environment():
    import resnet_export

    folders = [ROOT, Path(__file__).parent, Path(resnet_export.__file__).parent.parent]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "RAY_USAGE_STATS_ENABLED": "0"}


def test_replicas_die_and_are_exchanged_without_a_wrong_answer(tmp_path, environment):
    python = python_with("ray", "ray")
    command = [python, Path(__file__).with_name("ray_suite.py"), tmp_path, str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0 and done.stdout.strip().endswith("served"), done.stdout + done.stderr


def test_command_serves_on_ray_and_stops_cleanly(models, environment):
    python, port = python_with("ray", "ray"), free_port()
    command = [python, "-m", "resnet_export", "serve", str(models["tiny"]), "--engine", "ray", "--port", str(port), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        events = (json.loads(line) for line in process.stdout if line.startswith("{"))
        assert next(event for event in events if event["event"] == "ready")
        import httpx

        assert httpx.get(f"http://127.0.0.1:{port}/v2/models/tiny").json()["name"] == "tiny"
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_configuration_is_written_and_mistakes_are_told(models, tmp_path, environment):
    python = python_with("ray", "ray")
    target = tmp_path / "serve.yaml"

    def run(*arguments):
        command = [python, "-m", "resnet_export", "serve", str(models["tiny"]), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    done = run("--engine", "ray", "--min-replicas", 2, "--max-replicas", 5, "--write-config", target)
    assert done.returncode == 0, done.stderr
    [application] = json.loads(target.read_text())["applications"]
    assert application["args"]["replicas"] == [2, 5] and application["import_path"] == "resnet_export.serving.cluster:application"
    again = ["--engine", "ray", "--max-replicas", 7, "--write-config", target]
    assert run(*again, "--force").returncode == 0
    assert json.loads(target.read_text())["applications"][0]["args"]["replicas"] == [1, 7]
    for arguments, text in [
        (again, "--force"),
        (["--engine", "ray", "--min-replicas", 3], "must be at least --min-replicas (3)"),
        (["--engine", "ray", "--allow-control"], "do not go with --engine ray"),
        (["--engine", "ray", "--port", 0], "needs a port of its own"),
    ]:
        done = run(*arguments)
        assert done.returncode == 2 and text in done.stderr, done


def test_images_on_ray_data_give_the_rows_of_one_process(models, tmp_path, environment, pixels):
    python = python_with("ray", "ray")
    for number in range(200):
        Image.fromarray(pixels[number % 6] ^ np.uint8(number)).save(tmp_path / f"{number:03d}.png")
    (tmp_path / "007.png").write_bytes(b"broken")
    near, far = tmp_path / "near.jsonl", tmp_path / "far.jsonl"
    assert main(["predict", str(models["tiny"]), str(tmp_path), "--out", str(near), "--device", "cpu", "--batch", "4"]) == 0
    command = [python, "-m", "resnet_export", "predict", models["tiny"], tmp_path, "--device", "cpu", "--out", far]
    command += ["--engine", "ray", "--workers", "2", "--batch", "4"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (near, far)]
    assert len(rows[0]) == 200 and [row["file"] for row in rows[0]] == [row["file"] for row in rows[1]]
    for one, other in zip(*rows, strict=True):
        assert one | {"probabilities": 0} == other | {"probabilities": 0}
        assert one["probabilities"] == pytest.approx(other["probabilities"], rel=1e-5)


def test_options_of_the_cluster_need_it(models, capsys):
    assert main(["serve", str(models["tiny"]), "--max-replicas", "3"]) == 2
    assert "--max-replicas needs --engine ray" in capsys.readouterr().err
    assert main(["serve", str(models["tiny"]), "--engine", "ray", "--force"]) == 2
    assert "--force belongs to --write-config" in capsys.readouterr().err


def test_missing_ray_is_named(models, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "resnet_export.serving.cluster", raising=False)
    assert main(["serve", str(models["tiny"]), "--engine", "ray"]) == 4
    assert "pip install 'keras-resnet-export[cluster]'" in capsys.readouterr().err
