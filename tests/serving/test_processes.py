"""`serve --processes`: several servers on one port, which replace each other, end together and count for themselves."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import serving

for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
if not sys.platform.startswith("linux"):
    pytest.skip("needs Linux", allow_module_level=True)
from tiny_models import classifier_logits

from resnet_export.cli import main
from resnet_export.serving import protocol


def children(pid):
    """Process ids of the servers that a process has started."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return {child for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()}


def eventually(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def infer(url, pixels):
    """One request on a connection of its own, which the kernel gives to any of the processes."""
    body, length = protocol.encode_request({"images": pixels})
    answer = httpx.post(f"{url}/v2/models/bytes/infer", content=body, headers={protocol.HEADER_LENGTH: str(length)})
    assert answer.status_code == 200, answer.text
    found = protocol.decode_response(answer.content, int(answer.headers[protocol.HEADER_LENGTH])).outputs["logits"]
    np.testing.assert_allclose(found, classifier_logits(pixels), rtol=1e-5, atol=1e-6)


def answers(url, pixels):
    try:
        infer(url, pixels)
    except httpx.TransportError:
        return False
    return True


def two_free_ports():
    for port in range(20_000, 60_000, 37):
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue
    raise AssertionError("no free ports")


def test_processes_share_the_work_and_replace_each_other(models, pixels):
    port = two_free_ports()
    with serving(models["bytes"], "--processes", "2", "--metrics-port", port) as server:
        for _ in range(40):
            infer(server.url, pixels)
        counts = []
        for number in (port, port + 1):
            text = httpx.get(f"http://127.0.0.1:{number}/metrics").text
            line = next(line for line in text.splitlines() if line.startswith("nv_inference_request_success{"))
            counts.append(float(line.split()[-1]))
        assert sum(counts) == 40 and min(counts) > 0, counts
        before = children(server.process.pid)
        assert len(before) == 2
        os.kill(min(before), signal.SIGKILL)
        eventually(lambda: len(children(server.process.pid) - before) == 1)
        eventually(lambda: all(answers(server.url, pixels) for _ in range(20)))
        started = children(server.process.pid)
        assert server.stop() == 0
        assert not any(Path(f"/proc/{child}").exists() for child in started)


@pytest.mark.slow
def test_no_server_outlives_its_parent(models):
    with serving(models["bytes"], "--processes", "2") as server:
        started = children(server.process.pid)
        server.process.kill()
        eventually(lambda: not any(Path(f"/proc/{child}").exists() for child in started))


def test_what_cannot_start_is_said_once(models, tmp_path, capfd):
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, text in (
            ([models["bytes"], "--port", port], f"cannot listen on 127.0.0.1:{port}"),
            ([models["bytes"], "--uds", tmp_path / "s"], "--uds does not go with --processes"),
            ([models["bytes"], "--allow-control"], "--allow-control does not go with --processes"),
            ([tmp_path / "broken.onnx", "--port", "0"], "broken.onnx"),
        ):
            assert main(["serve", *map(str, arguments), "--device", "cpu", "--processes", "2"]) == 2
            output, errors = capfd.readouterr()
            assert errors.count(text) == 1 and "Traceback" not in errors and "serving" not in output, (arguments, errors)
