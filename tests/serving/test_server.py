"""The server as a process: started, loaded, ill-treated and stopped from outside."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from running import Server, free_port, serving
from tiny_models import classifier, classifier_logits

resource = pytest.importorskip("resource", reason="needs POSIX")
for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
from resnet_export.serving import protocol


@pytest.fixture(scope="module")
def server(models):
    with serving(models["tiny"], f"bytes={models['bytes']}", "--body-timeout", "1") as server:
        yield server


def infer(client, images, model="bytes"):
    body, length = protocol.encode_request({"images": images})
    answer = client.post(f"/v2/models/{model}/infer", content=body, headers={protocol.HEADER_LENGTH: str(length)})
    assert answer.status_code == 200, answer.text
    return protocol.decode_response(answer.content, int(answer.headers[protocol.HEADER_LENGTH])).outputs["logits"]


def assert_alive(server, pixels):
    with httpx.Client(base_url=server.url, timeout=20) as client:
        np.testing.assert_allclose(infer(client, pixels), classifier_logits(pixels), rtol=1e-5, atol=1e-6)


def raw(server, data):
    """What the server sends back for raw bytes until it closes or is silent for two seconds."""
    with socket.create_connection(server.address, timeout=2) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
        answer = b""
        with contextlib.suppress(OSError):
            while chunk := connection.recv(65536):
                answer += chunk
        return answer


def test_sigterm_finishes_what_is_in_flight(models):
    data = request_bytes(np.zeros((1, 8, 8, 3), "u1"))
    with serving(models["bytes"], "--grace", "30") as server:
        with socket.create_connection(server.address, timeout=20) as connection:
            connection.sendall(data[:-50])
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(OSError):
                while True:
                    socket.create_connection(server.address, timeout=1).close()
                    time.sleep(0.02)
            assert server.process.poll() is None
            connection.sendall(data[-50:])
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert server.process.wait(20) == 0
        assert json.loads(server.process.stdout.read()) == {"event": "stopped"}


def test_interrupt_exits_with_130(models):
    with serving(models["bytes"]) as server:
        assert server.stop(signal.SIGINT) == 130


def request_bytes(images, model="bytes"):
    body, length = protocol.encode_request({"images": images})
    head = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{protocol.HEADER_LENGTH}: {length}\r\n\r\n".encode() + body


def logits_in(answer):
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer[:200]
    length = int(next(line.split(b":")[1] for line in head.split(b"\r\n") if b"header-content-length" in line.lower()))
    return protocol.decode_response(content, length).outputs["logits"]


def test_thousand_connections_work_at_once_and_bad_ones_harm_nobody(models):
    images = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3)).astype("u1")
    requests = [request_bytes(image[None]) for image in images]

    async def client(index, address, everybody):
        reader, writer = await asyncio.open_connection(*address)
        await everybody.wait()
        data = requests[index % len(requests)]
        if index % 10 == 8:
            # Slow: a few bytes at a time.
            for start in range(0, len(data), 50):
                writer.write(data[start : start + 50])
                await asyncio.sleep(0.05)
        elif index % 10 == 9:
            writer.write(data[: len(data) // 2])
            await asyncio.sleep(0.1)
            writer.transport.abort()
            return None
        else:
            writer.write(data)
        answer = await reader.read()
        writer.close()
        return answer

    async def all_clients(address):
        everybody = asyncio.Barrier(1000)
        return await asyncio.wait_for(asyncio.gather(*(client(i, address, everybody) for i in range(1000))), 60)

    # Fewer open files than connections, as macOS and old shells have it: the server raises its own limit.
    with open_files(4096), serving(models["bytes"], preexec_fn=lambda: limit_files(256)) as server:
        answers = asyncio.run(all_clients(server.address))
        waiting = httpx.get(f"{server.url}/metrics").content
    expected = classifier_logits(images)
    for index, answer in enumerate(answers):
        if index % 10 != 9:
            np.testing.assert_allclose(logits_in(answer)[0], expected[index % len(images)], rtol=1e-5, atol=1e-6)
    assert b'nv_inference_pending_request_count{model="bytes",version="1"} 0\n' in waiting


def limit_files(soft):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@contextlib.contextmanager
def open_files(wanted):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"needs {wanted} open files, the limit is {hard}")
    limit_files(wanted)
    yield
    limit_files(soft)


@pytest.mark.parametrize(
    "data, status",
    [
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET /v2 HTTP/1.1\r\n" + b"X: " + b"a" * 70_000, b"HTTP/1.1 400"),
        (b"POST /v2/models/bytes/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\nx", b"HTTP/1.1 413"),
        (b"POST /v2/models/bytes/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{", b"HTTP/1.1 408"),
    ],
    ids=["no-http", "endless-head", "huge-length", "stalled-body"],
)
def test_bad_http_is_answered_in_json_and_harms_nobody(server, pixels, data, status):
    answer = raw(server, data)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(status), answer
    assert json.loads(body)["error"]
    assert_alive(server, pixels)


def test_stalled_head_is_cut_off_and_a_kept_connection_is_not(server):
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nX: ")
        assert connection.recv(100) == b""
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/v2").status_code == 200
        kept = client.get("/v2").extensions["network_stream"]
        time.sleep(1.3)
        answer = client.get("/v2")
        assert answer.status_code == 200 and answer.extensions["network_stream"].get_extra_info("client_addr") == (
            kept.get_extra_info("client_addr")
        )


def test_client_that_sends_too_much_before_it_listens_is_told_and_may_go_on(models):
    with serving(models["bytes"], "--max-body-mb", "1") as server, socket.create_connection(server.address, timeout=10) as client:
        size = 5_000_000
        head = f"POST /v2/models/bytes/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n"
        client.sendall(head.encode() + bytes(size))
        client.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 413") and b"more than 1,048,576 bytes" in answer
    assert answer.endswith(b'{"ready":true}') and answer.count(b"HTTP/1.1 ") == 2


def test_clients_that_hang_up_harm_nobody(server, pixels):
    data = request_bytes(np.zeros((8, 8, 8, 3), "u1"))
    for end in [0, 20, len(data) // 2, len(data) - 1, len(data)] * 10:
        with socket.create_connection(server.address, timeout=5) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(data[:end])
    assert_alive(server, pixels)
    assert b'nv_inference_pending_request_count{model="bytes",version="1"} 0\n' in httpx.get(f"{server.url}/metrics").content


@pytest.mark.parametrize("fate", ["deleted", "replaced", "damaged"])
@pytest.mark.parametrize("external", [False, True])
def test_model_file_that_changes_while_it_is_served(tmp_path, pixels, fate, external):
    path = classifier(tmp_path / "bytes.onnx", dtype="uint8")
    data = tmp_path / "bytes.onnx.data"
    if external:
        onnx.save(onnx.load(path), path, save_as_external_data=True, location=data.name, size_threshold=0)
    with serving(path) as server:
        for file in filter(Path.exists, (path, data)):
            if fate == "deleted":
                file.unlink()
            elif fate == "replaced":
                file.write_bytes(os.urandom(file.stat().st_size))
            else:
                file.write_bytes(b"")
        assert_alive(server, pixels)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_disk_behind_the_log_is_no_reason_to_stop(models, pixels, unbuffered):
    port = free_port()
    with open("/dev/full", "w") as full:
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        server = Server(models["bytes"], "--access-log", "--port", port, stdout=full, stderr=full, env=environment)
    try:
        server.url = f"http://127.0.0.1:{port}"
        for _ in range(200):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{server.url}/v2/health/ready").status_code == 200:
                    break
            time.sleep(0.05)
        assert_alive(server, pixels)
        assert server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()


def test_repository_of_versions_is_served(tmp_path, pixels):
    classifier(tmp_path / "net" / "1" / "model.onnx", dtype="uint8")
    classifier(tmp_path / "net" / "2" / "model.onnx", dtype="uint8", bias=np.zeros(5))
    with serving("--repository", tmp_path) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/v2/models/net").json()["versions"] == ["1", "2"]
        np.testing.assert_allclose(infer(client, pixels, "net/versions/1"), classifier_logits(pixels), rtol=1e-5, atol=1e-6)
        assert not np.allclose(infer(client, pixels, "net"), classifier_logits(pixels))


def refused(*arguments):
    command = [sys.executable, "-W", "always::ResourceWarning", "-m", "resnet_export", "serve", "--device", "cpu"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_wrong_usage_is_one_sentence_and_exits_with_2(models, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    (tmp_path / "keys").write_text("# none\n\n")
    shutil.copy(models["tiny"], tmp_path / "a b.onnx")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, text in [
            ([], "no model to serve; give FILE or --repository"),
            ([tmp_path / "missing.onnx"], "does not exist"),
            ([tmp_path / "bad.onnx"], "is not a readable ONNX file"),
            ([tmp_path / "bad.onnx", "--uds", tmp_path / "socket"], "is not a readable ONNX file"),
            ([tmp_path / "bad.onnx", "--metrics-port", 0, "--port", 0], "is not a readable ONNX file"),
            ([tmp_path / "a b.onnx"], "write NAME="),
            (["--repository", tmp_path / "none"], "is not a folder"),
            ([models["tiny"], "--port", port], f"cannot listen on 127.0.0.1:{port}"),
            ([models["tiny"], "--host", "300.1.1.1"], "cannot listen on 300.1.1.1"),
            ([models["tiny"], "--api-key-file", tmp_path / "keys"], "contains no API key"),
            ([models["tiny"], "--api-key-file", tmp_path / "nokeys"], "cannot read the API keys"),
            ([models["tiny"], "--max-batch", 0], "--max-batch"),
            ([models["tiny"], "--ssl-keyfile", tmp_path / "keys"], "needs --ssl-certfile"),
            ([models["tiny"], "--ssl-certfile", tmp_path / "keys"], "TLS certificate or key cannot be used"),
        ]:
            done = refused(*arguments)
            assert done.returncode == 2 and text in done.stderr, (arguments, done)
            assert "Traceback" not in done.stderr and "ResourceWarning" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "socket").exists()


def test_serving_imports_neither_keras_nor_tensorflow(models):
    code = (
        "import sys, resnet_export.serving.app, resnet_export.serving.server, resnet_export.serving.commands as c\n"
        "from resnet_export.serving.repository import Repository, parse_sources\n"
        "from resnet_export.serving.models import ModelOptions\n"
        "Repository(parse_sources(sys.argv[1:]), None, ModelOptions()).open()\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'keras', 'tensorflow', 'keras_resnet', 'tf2onnx'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, models["tiny"]], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
