"""Ray Serve, in an environment that has ray: a local cluster, its replicas killed and exchanged under load."""

import gzip
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import numpy as np
import pytest
from peers import ROOT, python_with
from PIL import Image
from running import free_port, serving
from tiny_models import gatherer

from resnet_export.cli import main
from resnet_export.serving import protocol

pytestmark = pytest.mark.slow


@pytest.fixture
def environment(tmp_path_factory):
    """The packages for an interpreter in which they are not installed; the folder of `resnet_export` has another name here."""
    import resnet_export

    packages = tmp_path_factory.mktemp("packages")
    (packages / "resnet_export").symlink_to(Path(resnet_export.__file__).parent)
    folders = [ROOT, Path(__file__).parent, packages]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "RAY_USAGE_STATS_ENABLED": "0"}


def test_replicas_die_and_are_exchanged_without_a_wrong_answer(tmp_path, environment):
    python = python_with("ray", "ray")
    command = [python, Path(__file__).with_name("ray_suite.py"), tmp_path, str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0 and done.stdout.strip().endswith("served"), done.stdout + done.stderr


@pytest.mark.parametrize("to", ["the command", "all its processes"])
def test_command_serves_on_ray_and_stops_cleanly(to, models, environment):
    python, port = python_with("ray", "ray"), free_port()
    command = [python, "-m", "resnet_export", "serve", str(models["tiny"]), "--engine", "ray", "--port", str(port), "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )
    try:
        events = (json.loads(line) for line in process.stdout if line.startswith("{"))
        assert next(event for event in events if event["event"] == "ready")
        import httpx

        assert httpx.get(f"http://127.0.0.1:{port}/v2/models/tiny").json()["name"] == "tiny"
        if to == "the command":
            process.terminate()
            assert process.wait(60) == 0
        else:  # the cluster ends before what it has taken is answered, which is said at once
            os.killpg(process.pid, signal.SIGTERM)
            assert process.wait(30) == 1
        assert next(event for event in events if event["event"] == "stopped")
    finally:
        process.kill()
        process.communicate()


def exchange(address, *parts):
    """Send the parts of a request, with a pause between them; the status and the body of the answer."""
    with socket.create_connection(address, timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(0.1)
        answer = HTTPResponse(connection)
        answer.begin()
        body = answer.read()
    if answer.headers.get("content-type") == "application/json":
        # The package has a version only where it is installed.
        body = json.loads(re.sub(rb'"version": ?"[^"]*"', b'"version": ""', body))
        if isinstance(body, dict):
            body.pop("milliseconds", None)
    return answer.status, body


def requests(pixels):
    """`{what: parts of a request}`: every route, and what broke servers before."""
    body, length = protocol.encode_request({"images": pixels})
    binary = {protocol.HEADER_LENGTH: length}
    text, _ = protocol.encode_request({"images": pixels}, binary=False)
    bad, bad_length = protocol.encode_request({"ids": np.array([[4242]])})
    file = io.BytesIO()
    Image.fromarray(pixels[0]).save(file, "PNG")
    model = "/v2/models/bytes"
    key = {"Authorization": "Bearer k"}
    found = {
        path: [head("GET", path, key)]
        for path in ("/", "/v2", "/v2/health/live", "/v2/health/ready", model, f"{model}/ready", f"{model}/versions/1")
        + (f"{model}/config", f"{model}/card", "/openapi.json", "/nothing", "/v2/models/none", f"{model}/versions/7")
    }
    posts = {
        "binary": (f"{model}/infer", body, binary),
        "JSON": (f"{model}/infer", text, {}),
        "gzip": (f"{model}/infer", gzip.compress(text), {"Content-Encoding": "gzip"}),
        "image": (f"{model}/classify?top=2", file.getvalue(), {}),
        "not an image": (f"{model}/classify", b"nothing", {}),
        "index": ("/v2/repository/index", b"", {}),
        "load": ("/v2/repository/models/bytes/load", b"", {}),
        "not JSON": (f"{model}/infer", b"{", {}),
        "unknown encoding": (f"{model}/infer", text, {"Content-Encoding": "br"}),
        "too large": (f"{model}/infer", bytes(2**20 + 1), {}),
        "a model that fails": ("/v2/models/table/infer", bad, {protocol.HEADER_LENGTH: bad_length}),
        "method": (model, b"", {}),
        "empty": (f"{model}/infer", b"", {}),
    }
    for name, (path, content, headers) in posts.items():
        found[name] = [head("POST", path, headers | key | {"Content-Length": len(content)}) + content]
    upgrade = head("POST", f"{model}/infer", {"Connection": "Upgrade", "Upgrade": "h2c", "Content-Length": len(text)} | key)
    found["h2c, the body later"] = [upgrade, text]
    found["h2c, the body at once"] = [upgrade + text]
    found["no key"] = [head("GET", "/v2", {})]
    found["a malformed host"] = [head("GET", "/v2", key, host="a b/c")]
    return found


def head(method, path, headers, host="x"):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def test_two_replicas_answer_as_one_process_does_and_finish_what_they_have(models, environment, pixels, tmp_path):
    python, port = python_with("ray", "ray"), free_port()
    (tmp_path / "keys").write_text("k")
    options = [models["bytes"], gatherer(tmp_path / "table.onnx"), "--max-body-mb", "1", "--api-key-file", tmp_path / "keys"]
    command = [python, "-m", "resnet_export", "serve", *options, "--engine", "ray", "--port", port, "--json", "--threads", "1"]
    command += ["--min-replicas", "2", "--max-replicas", "2"]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        events = (json.loads(line) for line in process.stdout if line.startswith("{"))
        assert next(event for event in events if event["event"] == "ready")
        with serving(*options) as server:
            for name, parts in requests(pixels).items():
                assert exchange(("127.0.0.1", port), *parts) == exchange(server.address, *parts), name
        statuses = under_load(("127.0.0.1", port), requests(pixels), stop=process.terminate)
        assert process.wait(60) == 0
        # Once the application has gone, the proxy knows no routes, or is not there any more.
        leaving = {404, 503, "gone"}
        assert statuses["good"] - leaving == {200} and statuses["bad"] - leaving == {500}, statuses
        assert not statuses["cut"], statuses
    finally:
        process.kill()
        process.communicate()
        log.close()


def under_load(address, table, stop):
    """Good and bad requests at a time, until a while after `stop`; the statuses, and how often an answer was cut off."""
    wanted = exchange(address, *table["binary"])
    found, ended = {"good": set(), "bad": set(), "cut": 0}, threading.Event()

    def ask(name, kind):
        while not ended.is_set():
            try:
                status, body = exchange(address, *table[name])
            except ConnectionRefusedError:
                status, body = "gone", None
            except (OSError, HTTPException):
                # Accepted and not answered: only once the proxy has ended is that right.
                found["cut"] += not stopped.is_set()
                continue
            found[kind].add(status)
            assert status != 200 or (status, body) == wanted

    stopped = threading.Event()
    threads = [threading.Thread(target=ask, args=pair) for pair in [("binary", "good")] * 6 + [("a model that fails", "bad")] * 2]
    for thread in threads:
        thread.start()
    time.sleep(3)
    stop()
    time.sleep(2)
    stopped.set()
    ended.set()
    for thread in threads:
        thread.join()
    return found


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
        (["--engine", "ray", "--allow-control"], "cannot be combined with --engine ray"),
        (["--engine", "ray", "--port", 0], "needs a fixed --port"),
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
    assert "--force needs --write-config" in capsys.readouterr().err


def test_missing_ray_is_named(models, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "resnet_export.serving.cluster", raising=False)
    assert main(["serve", str(models["tiny"]), "--engine", "ray"]) == 4
    assert "pip install 'keras-resnet-export[cluster]'" in capsys.readouterr().err
