"""Large bodies and answers: the server stays responsive, and its memory bounded, whatever clients send or do not take."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from running import serving
from tiny_models import identity

for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
if not Path("/proc/self/statm").exists():
    pytest.skip("needs /proc", allow_module_level=True)
from resnet_export.serving import protocol


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return identity(tmp_path_factory.mktemp("large") / "same.onnx", "float32")


LIMITS = ("--max-rows", "9999999", "--max-batch", "9999999", "--no-warm-up", "--body-timeout", "20")


def memory(pid):
    """Bytes that a process holds in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children(pid):
    """The worker processes of a server; Python's own resource tracker is not one."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in found if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


@contextlib.contextmanager
def liveness(server):
    """Asks for liveness every 10 ms; yields the list of seconds that the answers took."""
    seconds, done = [], threading.Event()

    def ask():
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not done.wait(0.01):
                started = time.perf_counter()
                assert client.get("/v2/health/live").status_code == 200
                seconds.append(time.perf_counter() - started)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seconds
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["in", "out", "both"])
def test_liveness_is_answered_while_large_json_is_handled(path, direction):
    """As a share of what the request takes: parsing on the event loop's thread would make it nearly all."""
    x = np.random.default_rng(0).normal(size=(400_000, 4)).astype("f4")
    outputs = [protocol.RequestedOutput("y", binary=direction == "in")]
    body, length = protocol.encode_request({"x": x}, outputs, binary=direction == "out")
    headers = {"Accept-Encoding": "identity"} | ({protocol.HEADER_LENGTH: str(length)} if length else {})
    with serving(path, *LIMITS) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        client.get("/v2/health/live")
        with liveness(server) as seconds:
            started = time.perf_counter()
            answer = client.post("/v2/models/same/infer", content=body, headers=headers)
            took = time.perf_counter() - started
        assert answer.status_code == 200, answer.text[:200]
        length = answer.headers.get(protocol.HEADER_LENGTH)
        assert (length is None) == (direction != "in")
        found = protocol.decode_response(answer.content, None if length is None else int(length))
        assert np.array_equal(found.outputs["y"], x)
    print(f"{direction}: {took:.2f} s, slowest liveness {1000 * max(seconds):.0f} ms of {len(seconds)}")
    assert max(seconds) < 0.4 * took


def test_json_beyond_the_limit_is_refused_with_advice(path):
    x = np.zeros((40_000, 4), "f4") + 0.123
    with serving(path, *LIMITS, "--max-json-mb", "1") as server, httpx.Client(base_url=server.url) as client:
        body, _ = protocol.encode_request({"x": np.tile(x, (10, 1))}, binary=False)
        answer = client.post("/v2/models/same/infer", content=body)
        assert answer.status_code == 413 and "as binary data" in answer.json()["error"]
        for rows in (10, 100):
            body, length = protocol.encode_request({"x": np.tile(x, (rows, 1))}, [protocol.RequestedOutput("y")])
            answer = client.post("/v2/models/same/infer", content=body, headers={protocol.HEADER_LENGTH: str(length)})
            assert answer.status_code == 413 and "ask for binary data" in answer.json()["error"]


def test_worker_that_dies_is_replaced(path):
    x = np.random.default_rng(1).normal(size=(100_000, 4)).astype("f4")
    body, _ = protocol.encode_request({"x": x}, binary=False)
    with serving(path, *LIMITS) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for _ in range(2):
            answer = client.post("/v2/models/same/infer", content=body, headers={"Accept-Encoding": "identity"})
            assert np.array_equal(protocol.decode_response(answer.content).outputs["y"], x)
            for child in children(server.process.pid):
                os.kill(child, signal.SIGKILL)
            answer = client.post("/v2/models/same/infer", content=body)
            assert answer.status_code in (200, 503)
        server.stop()
        assert "Traceback" not in server.process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_answers_that_nobody_takes_are_bounded_in_memory_and_time(path, compressed):
    """Twelve clients ask for 16 MiB each and do not read: the fourth is refused, and all are cut off in time."""
    x = np.random.default_rng(2).integers(0, 2**31, (2**20, 4), "i4").view("f4")
    x[~np.isfinite(x)] = 0
    body, length = protocol.encode_request({"x": x}, [protocol.RequestedOutput("y", True)])
    fields = f"Host: x\r\nContent-Length: {len(body)}\r\n{protocol.HEADER_LENGTH}: {length}\r\n"
    fields += "Accept-Encoding: gzip\r\n" if compressed else ""
    data = f"POST /v2/models/same/infer HTTP/1.1\r\n{fields}\r\n".encode() + body
    with (
        serving(path, *LIMITS[:-1], "2", "--max-buffered-mb", "64", "--max-body-mb", "17") as server,
        contextlib.ExitStack() as stack,
        httpx.Client(base_url=server.url, timeout=20) as client,
    ):
        before, peak = memory(server.process.pid), 0
        connections = []
        for _ in range(12):
            connection = stack.enter_context(socket.create_connection(server.address, timeout=20))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with contextlib.suppress(OSError):
                connection.sendall(data)
            connections.append(connection)
            peak = max(peak, memory(server.process.pid))
            assert client.get("/v2/health/live").status_code == 200
        assert peak - before < 160 * 2**20, f"{(peak - before) / 2**20:.0f} MiB"
        # The deadline cuts them off, and then there is room again.
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            answer = client.post("/v2/models/same/infer", content=body, headers={protocol.HEADER_LENGTH: str(length)})
            if answer.status_code == 200:
                break
            assert answer.status_code == 503
            time.sleep(0.2)
        assert answer.status_code == 200
        for connection in connections:
            with contextlib.suppress(OSError):
                received = 0
                while chunk := connection.recv(2**20):
                    received += len(chunk)
                assert received < len(body)


def test_slow_reader_that_keeps_up_gets_everything(path):
    x = np.random.default_rng(3).normal(size=(2**20, 4)).astype("f4")
    body, length = protocol.encode_request({"x": x}, [protocol.RequestedOutput("y", True)])
    fields = f"Host: x\r\nContent-Length: {len(body)}\r\n{protocol.HEADER_LENGTH}: {length}\r\nConnection: close\r\n"
    with serving(path, *LIMITS) as server, socket.create_connection(server.address, timeout=20) as connection:
        connection.sendall(f"POST /v2/models/same/infer HTTP/1.1\r\n{fields}\r\n".encode() + body)
        answer = bytearray()
        while chunk := connection.recv(2**18):
            answer += chunk
            time.sleep(0.01)
    head, _, content = bytes(answer).partition(b"\r\n\r\n")
    size = int(next(line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"inference-header")))
    assert json.loads(content[:size])["outputs"][0]["shape"] == [2**20, 4]
    assert np.array_equal(protocol.decode_response(content, size).outputs["y"], x)
