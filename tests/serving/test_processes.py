"""`serve --processes`: several servers on one port, which replace each other, end together and count for themselves."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from running import infer, serving

for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
if not sys.platform.startswith("linux"):
    pytest.skip("needs Linux", allow_module_level=True)
from resnet_export.cli import main
from resnet_export.errors import ExportError
from resnet_export.serving.processes import Supervisor


def children(pid):
    """Process ids of the servers that a process has started."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return {child for child in found if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()}


def eventually(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def answers(url, pixels):
    """Whether a new connection, which the kernel gives to any of the processes, gets its answer."""
    try:
        with httpx.Client(base_url=url) as client:
            infer(client, pixels)
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
        assert all(answers(server.url, pixels) for _ in range(40))
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
            ([models["bytes"], "--uds", tmp_path / "s"], "--uds cannot be combined with --processes"),
            ([models["bytes"], "--metrics-port", "0"], "--metrics-port 0 cannot be combined with --processes"),
            ([models["bytes"], "--allow-control"], "--allow-control cannot be combined with --processes"),
            ([tmp_path / "broken.onnx", "--port", "0"], "broken.onnx"),
        ):
            assert main(["serve", *map(str, arguments), "--device", "cpu", "--processes", "2"]) == 2
            output, errors = capfd.readouterr()
            assert errors.count(text) == 1 and "Traceback" not in errors and "serving" not in output, (arguments, errors)


def crash(index, announce):
    os._exit(7)


def stop_parent(index, announce):
    """Stop the supervisor before it has started the second process, then serve until told to stop."""
    if index == 0:
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)


def test_a_process_that_crashes_before_it_is_ready_ends_the_server():
    with pytest.raises(ExportError, match="process [01] ended with exit code 7 before it was ready"):
        Supervisor(crash, 2, lambda *event, **details: None).run()


def test_a_signal_during_the_start_stops_every_process(monkeypatch):
    events, start = [], Supervisor._start

    def slowly(self, index):
        if index:
            eventually(lambda: self._ended_by is not None)
        start(self, index)

    monkeypatch.setattr(Supervisor, "_start", slowly)
    supervisor = Supervisor(stop_parent, 2, lambda event, *rest, **details: events.append(event))
    began = time.monotonic()
    assert supervisor.run() == signal.SIGTERM and events == ["stopped"] and time.monotonic() - began < 30
