"""Large bodies and answers: the server stays responsive, and its memory bounded, whatever clients send or do not take."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
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


STREAMS = (
    "--max-rows",
    "999999",
    "--max-batch",
    "262144",
    "--no-warm-up",
    "--body-timeout",
    "2",
    "--max-buffered-mb",
    "64",
    "--grpc-port",
    "0",
)
# As much JSON as the tests send.
WIDE = ("--max-body-mb", "256", "--max-json-mb", "512", "--max-buffered-mb", "4096")
LIMITS = ("--max-rows", "9999999", "--max-batch", "9999999", "--no-warm-up", "--body-timeout", "20")


def memory(pid):
    """Bytes that a process holds in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid):
    """The worker processes of a server; Python's own resource tracker is not one."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    found = [int(child) for children in lists for child in children]
    return [child for child in found if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


PROBE = """
import select, socket, sys, time
# One connection after the other, so that accepting is part of what is measured.
while not select.select([sys.stdin], [], [], 0.01)[0]:
    started = time.perf_counter()
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60) as connection:
        connection.sendall(b"GET /v2/health/live HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200"), sys.argv
    print(time.perf_counter() - started)
"""


@contextlib.contextmanager
def liveness(*servers):
    """Ask each server for its liveness every 10 ms; yields a list that holds the slowest answer of each at the end, in seconds.

    Every server is asked by a process of its own, which no work of this one delays.
    """
    slowest = []
    commands = [[sys.executable, "-c", PROBE, host, str(port)] for host, port in (server.address for server in servers)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    probes = [subprocess.Popen(command, **pipes) for command in commands]
    try:
        yield slowest
    finally:
        found = [probe.communicate("end")[0] for probe in probes]
    assert not any(probe.returncode for probe in probes)
    slowest += [max(map(float, output.split())) for output in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "rows"),
    [("in", 2_300_000), ("out", 4_000_000), ("both", 1_000_000)],
    ids=["100 MB of JSON in", "16 million floats out", "both"],
)
def test_liveness_is_answered_within_100_ms_while_large_json_is_handled(path, direction, rows):
    """An idle server on the same machine is asked at the same time: what delays it too is not this server's doing."""
    x = np.random.default_rng(0).normal(size=(rows, 4)).astype("f4")
    outputs = [protocol.RequestedOutput("y", binary=direction == "in")]
    body, length = protocol.encode_request({"x": x}, outputs, binary=direction == "out")
    assert direction != "in" or len(body) > 100e6
    headers = {"Accept-Encoding": "identity"} | ({protocol.HEADER_LENGTH: str(length)} if length else {})
    with (
        serving(path, *LIMITS, *WIDE) as server,
        serving(path, *LIMITS) as idle,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        with liveness(server, idle) as slowest:
            time.sleep(0.2)
            started = time.perf_counter()
            answer = client.post("/v2/models/same/infer", content=body, headers=headers)
            took = time.perf_counter() - started
        assert answer.status_code == 200, answer.text[:200]
        length = answer.headers.get(protocol.HEADER_LENGTH)
        assert (length is None) == (direction != "in")
        found = protocol.decode_response(answer.content, None if length is None else int(length))
        assert np.array_equal(found.outputs["y"], x)
    shown = [f"{1000 * seconds:.0f} ms" for seconds in slowest]
    print(f"{direction}: {took:.2f} s, slowest liveness {shown[0]}, of an idle server {shown[1]}")
    assert slowest[0] < 0.1 + slowest[1]


def test_large_json_is_handled_in_a_process_of_its_own(path):
    """The mechanism behind the figures above, which do not depend on the machine: who parses what."""
    small, large = (np.random.default_rng(4).normal(size=(rows, 4)).astype("f4") for rows in (1_000, 60_000))
    with serving(path, *LIMITS) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for x, wanted in ((small, 0), (large, 1)):
            body, _ = protocol.encode_request({"x": x}, binary=False)
            answer = client.post("/v2/models/same/infer", content=body, headers={"Accept-Encoding": "identity"})
            assert np.array_equal(protocol.decode_response(answer.content).outputs["y"], x)
            assert len(children(server.process.pid)) == wanted


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
            [child] = children(server.process.pid)
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
    fields += "Connection: close\r\n" + ("Accept-Encoding: gzip\r\n" if compressed else "")
    data = f"POST /v2/models/same/infer HTTP/1.1\r\n{fields}\r\n".encode() + body
    with (
        serving(path, *LIMITS[:-1], "2", "--max-buffered-mb", "64", "--max-body-mb", "17") as server,
        contextlib.ExitStack() as stack,
        httpx.Client(base_url=server.url, timeout=20) as client,
    ):
        client.get("/v2/health/live")
        before, peak, files = memory(server.process.pid), 0, open_files(server.process.pid)
        connections = []
        for _ in range(12):
            connection = stack.enter_context(socket.create_connection(server.address, timeout=20))
            with contextlib.suppress(OSError):
                connection.sendall(data)
            connections.append(connection)
            peak = max(peak, memory(server.process.pid))
            assert client.get("/v2/health/live").status_code == 200
        print(f"{(peak - before) / 2**20:.0f} MiB at most")
        assert peak - before < 160 * 2**20, f"{(peak - before) / 2**20:.0f} MiB"
        # The deadline cuts them off, and then there is room again.
        deadline = time.monotonic() + 30
        while open_files(server.process.pid) > files + 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        wait_for_room(lambda: client.post("/v2/models/same/infer", content=body, headers={protocol.HEADER_LENGTH: str(length)}))
        for connection in connections:
            with contextlib.suppress(OSError):
                received = 0
                while chunk := connection.recv(2**20):
                    received += len(chunk)
                assert received < len(body)


def wait_for_room(ask):
    """Ask until the answer is no longer that the server is busy."""
    deadline = time.monotonic() + 30
    while (answer := ask()).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert answer.status_code == 200, answer.text


@pytest.mark.slow
def test_answers_on_grpc_streams_that_nobody_takes_are_bounded_in_memory_and_time(path):
    """Twelve streams ask for 4 MiB sixteen times each, and none reads."""
    grpc = pytest.importorskip("grpc", reason="needs the extra `grpc`")
    from resnet_export.serving import grpc_messages as messages

    x = np.random.default_rng(6).normal(size=(2**18, 4)).astype("f4")
    asked = messages.ModelInferRequest(model_name="same", raw_input_contents=[x.tobytes()])
    asked.inputs.add(name="x", datatype="FP32", shape=x.shape)
    encoded, done = asked.SerializeToString(), threading.Event()

    def requests():
        yield from [encoded] * 16
        done.wait(60)

    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    with (
        serving(path, *STREAMS) as server,
        httpx.Client(base_url=server.url, timeout=20) as client,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(done.set)
        before, peak, calls = memory(server.process.pid), 0, []
        for _ in range(12):
            channel = stack.enter_context(grpc.insecure_channel(server.grpc, options))
            calls.append(channel.stream_stream(messages.STREAM_METHOD)(requests(), timeout=120))
        end = time.monotonic() + 6
        while time.monotonic() < end:
            peak = max(peak, memory(server.process.pid))
            assert client.get("/v2/health/live").status_code == 200
            time.sleep(0.02)
        print(f"{(peak - before) / 2**20:.0f} MiB at most")
        assert peak - before < 384 * 2**20, f"{(peak - before) / 2**20:.0f} MiB"
        # All answers together would have 768 MiB. Those who asked for them have been cut off by now.
        body, length = protocol.encode_request({"x": np.tile(x, (2, 1))}, [protocol.RequestedOutput("y", True)])
        wait_for_room(lambda: client.post("/v2/models/same/infer", content=body, headers={protocol.HEADER_LENGTH: str(length)}))
        done.set()
        # A stream without a large answer has small ones that say so, and is not cut off.
        refused = [[bool(answer.error_message) for answer in answers_of(call)] for call in calls]
        assert sum(len(answers) < 16 for answers in refused) >= 1
        assert all(all(answers) for answers in refused if len(answers) == 16), refused


def answers_of(call):
    """The answers of a stream until it ends, however it does."""
    from resnet_export.serving import grpc_messages as messages

    with contextlib.suppress(Exception):
        for encoded in call:
            yield messages.ModelStreamInferResponse.FromString(encoded)


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
