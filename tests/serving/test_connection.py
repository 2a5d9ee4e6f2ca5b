"""Connections as real and hostile clients use them: raw sockets, curl, and Java's HttpClient where there is one."""

import contextlib
import json
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest
from running import serving
from tiny_models import classifier_logits

for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
resource = pytest.importorskip("resource", reason="needs POSIX")
from resnet_export.serving import protocol

IMAGES = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3)).astype("u1")
INFER = "/v2/models/bytes/infer"


@pytest.fixture(scope="module")
def server(models):
    with serving(f"bytes={models['bytes']}", "--body-timeout", "1", "--max-body-mb", "1") as server:
        yield server


def converse(server, *segments, pause=0.05, half_close=False, timeout=8):
    """What the server sends back for segments sent one after the other, until it closes the connection."""
    with socket.create_connection(server.address, timeout=timeout) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for segment in segments:
            with contextlib.suppress(OSError):
                connection.sendall(segment)
            time.sleep(pause)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                answer += chunk
        return answer


def split(answers):
    """Raw bytes as a list of `(status, headers, body)`."""
    found = []
    while answers:
        head, _, answers = answers.partition(b"\r\n\r\n")
        line, *fields = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, value in (field.split(":", 1) for field in fields)}
        size = int(headers.get("content-length", 0))
        found.append((int(line.split()[1]), headers, answers[:size]))
        answers = answers[size:]
    return found


def request(*fields, method="POST", path=INFER, body=b"", host="x", version="1.1"):
    hosts = [f"Host: {host}"] if host is not None else []
    lengths = [f"Content-Length: {len(body)}"] if body else []
    return "\r\n".join([f"{method} {path} HTTP/{version}", *hosts, *fields, *lengths, "", ""]).encode() + body


def infer_request(*fields, **changes):
    body, length = protocol.encode_request({"images": IMAGES})
    return request(f"{protocol.HEADER_LENGTH}: {length}", *fields, body=body, **changes)


def assert_logits(answer):
    status, headers, body = answer
    assert status == 200, body
    found = protocol.decode_response(body, int(headers[protocol.HEADER_LENGTH.lower()])).outputs["logits"]
    np.testing.assert_allclose(found, classifier_logits(IMAGES), rtol=1e-5, atol=1e-6)


UPGRADES = {
    "h2c": ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAA"],
    "websocket": [
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    ],
    "several": ["Connection: keep-alive", "Connection: upgrade", "Upgrade: h2c", "Upgrade: foo/2"],
}


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("cut", ["whole", "head-body", "bytes", "chunked"])
def test_upgrade_is_ignored_and_the_body_is_a_body(server, upgrade, cut):
    """However the request is cut up, its body is neither lost nor taken for the next request."""
    data = infer_request(*UPGRADES[upgrade])
    head, _, body = data.partition(b"\r\n\r\n")
    if cut == "chunked":
        head = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
        body = (
            b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 100]), body[i : i + 100]) for i in range(0, len(body), 100))
            + b"0\r\n\r\n"
        )
    last = request("Connection: close", method="GET", path="/v2")
    segments = {
        "whole": [head + b"\r\n\r\n" + body + last],
        "head-body": [head + b"\r\n\r\n", body, last],
        "bytes": [*((head + b"\r\n\r\n" + body)[i : i + 37] for i in range(0, len(data), 37)), last],
        "chunked": [head + b"\r\n\r\n" + body[:50], body[50:], last],
    }[cut]
    answers = split(converse(server, *segments, pause=0.01))
    assert len(answers) == 2
    assert_logits(answers[0])
    assert answers[1][0] == 200 and json.loads(answers[1][2])["name"] == "resnet-export"


def test_a_body_is_never_executed_as_a_request(server):
    smuggled = request(method="POST", path="/v2/repository/index", body=b"{}")
    answers = split(converse(server, request(*UPGRADES["h2c"], "Connection: close", body=smuggled)))
    assert len(answers) == 1 and answers[0][0] == 400 and b"not valid JSON" in answers[0][2]
    answers = split(converse(server, b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n" + smuggled))
    assert [status for status, _, _ in answers] == [400]


def test_upgrade_on_every_route_is_answered_as_without_it(server):
    for path in ("/", "/v2", "/v2/health/live", "/metrics", "/nothing"):
        plain, upgraded = (
            split(converse(server, request("Connection: close", *fields, method="GET", path=path), pause=0))[0]
            for fields in ([], UPGRADES["h2c"])
        )
        assert plain[0] == upgraded[0] and (path == "/metrics" or plain[2] == upgraded[2])


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl_with_http2_gets_its_answer(server, tmp_path):
    body, length = protocol.encode_request({"images": IMAGES}, [protocol.RequestedOutput("logits")])
    (tmp_path / "body").write_bytes(body)
    done = subprocess.run(
        ["curl", "-sS", "--http2", "--data-binary", f"@{tmp_path / 'body'}", "-H", f"{protocol.HEADER_LENGTH}: {length}"]
        + ["-H", "Content-Type: application/octet-stream", server.url + INFER],
        capture_output=True,
        timeout=20,
    )
    found = protocol.decode_response(done.stdout).outputs["logits"]
    np.testing.assert_allclose(found, classifier_logits(IMAGES), rtol=1e-5, atol=1e-6)


JAVA = """
import java.net.URI; import java.net.http.*; import java.nio.file.*;
public class Client {
  public static void main(String[] a) throws Exception {
    HttpClient client = HttpClient.newHttpClient();
    for (int i = 0; i < 3; i++) {
      HttpRequest request = HttpRequest.newBuilder(URI.create(a[0])).header("Inference-Header-Content-Length", a[2])
        .POST(HttpRequest.BodyPublishers.ofFile(Path.of(a[1]))).build();
      System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
    }
  }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_java_gets_its_answers(server, tmp_path):
    body, length = protocol.encode_request({"images": IMAGES}, [protocol.RequestedOutput("logits")])
    (tmp_path / "body").write_bytes(body)
    (tmp_path / "Client.java").write_text(JAVA)
    command = ["java", str(tmp_path / "Client.java"), server.url + INFER, str(tmp_path / "body"), str(length)]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        np.testing.assert_allclose(
            protocol.decode_response(line).outputs["logits"], classifier_logits(IMAGES), rtol=1e-5, atol=1e-6
        )


EARLY = {
    "404": (request("Content-Length: 1000", path="/nothing"), 404),
    "405": (request("Content-Length: 1000", method="GET", path=INFER), 405),
    "413": (request("Content-Length: 99999999"), 413),
    "415": (request("Content-Length: 1000", "Content-Type: multipart/form-data", path="/v2/models/bytes/classify"), 415),
    "no-model": (request("Content-Length: 1000", path="/v2/models/nope/infer"), 404),
    "health": (request("Content-Length: 1000", method="GET", path="/v2/health/ready"), 200),
    "chunked-health": (request("Transfer-Encoding: chunked", method="GET", path="/v2/health/live"), 200),
    "bad-host": (request("Content-Length: 1000", host="a b"), 400),
}


# Each waits for its deadline; the other statuses take the same way.
OFTEN = ("404", "413", "health", "chunked-health")


@pytest.mark.parametrize("name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in EARLY])
def test_a_connection_ends_when_the_body_does_not_follow_an_early_answer(server, name):
    """Whether nothing more comes, or a byte now and then."""
    data, status = EARLY[name]
    started = time.monotonic()
    answers = split(converse(server, data))
    assert answers[0][0] == status
    assert time.monotonic() - started < 7
    with socket.create_connection(server.address, timeout=8) as connection:
        connection.sendall(data)
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - started < 9:
                connection.sendall(b"x" if "chunked" not in name else b"1")
                time.sleep(0.1)
        assert time.monotonic() - started < 8


def test_connections_of_one_address_are_bounded_and_do_not_lock_others_out(models):
    """With few files allowed, one address may take half of them; liveness is answered all the while."""

    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    with serving(models["bytes"], preexec_fn=limit) as server, contextlib.ExitStack() as stack:
        for _ in range(140):
            connection = stack.enter_context(socket.create_connection(server.address, timeout=5))
            with contextlib.suppress(OSError):
                connection.sendall(request("Content-Length: 1000", path="/nothing"))
        time.sleep(0.3)
        refused = split(converse(server, request(method="GET", path="/v2/health/live")))
        assert not refused or refused[0][0] == 503
        with socket.socket() as other:
            other.settimeout(5)
            other.bind(("127.0.0.2", 0))
            other.connect(server.address)
            other.sendall(request("Connection: close", method="GET", path="/v2/health/live"))
            assert b"".join(iter(lambda: other.recv(65536), b"")).endswith(b'{"live":true}')
        # The early answers end the connections, and then the address may come again.
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, httpx.HTTPError):
                if httpx.get(f"{server.url}/v2/health/live").status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise AssertionError("the address never got in again")


def test_half_closed_client_gets_its_answer(server):
    assert_logits(split(converse(server, infer_request(), pause=0, half_close=True))[0])
    answers = split(converse(server, infer_request() + infer_request(), pause=0, half_close=True))
    assert len(answers) == 2
    for answer in answers:
        assert_logits(answer)


def test_expecting_client_is_refused_before_it_sends_its_body(server):
    answer = converse(server, request("Expect: 100-continue", "Content-Length: 9999999"))
    assert b"100 Continue" not in answer
    status, headers, body = split(answer)[0]
    assert status == 413 and headers["connection"] == "close" and b"more than 1,048,576 bytes" in body
    with socket.create_connection(server.address, timeout=5) as connection:
        head, _, body = infer_request("Expect: 100-continue", "Connection: close").partition(b"\r\n\r\n")
        connection.sendall(head + b"\r\n\r\n")
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert_logits(split(answer)[0])


@pytest.mark.parametrize(
    "hosts, version, status",
    [
        (["localhost:8000"], "1.1", 200),
        (["[::1]:80"], "1.1", 200),
        ([], "1.0", 200),
        ([], "1.1", 400),
        (["a", "a"], "1.1", 400),
        (["a", "b"], "1.0", 400),
        ([""], "1.1", 400),
        (["a b"], "1.1", 400),
        (["a/b"], "1.1", 400),
        (["a@b"], "1.1", 400),
        (["a:b"], "1.1", 400),
        (["a:80:80"], "1.1", 400),
        (["[::1"], "1.1", 400),
        (["a?x=/v2/health/live"], "1.1", 400),
        (["a#b"], "1.1", 400),
        (["\\evil"], "1.1", 400),
    ],
)
def test_host_is_one_well_formed_name(server, hosts, version, status):
    fields = [f"Host: {host}" for host in hosts] + ["Connection: close"]
    [answer] = split(converse(server, request(*fields, method="GET", path="/v2", host=None, version=version), pause=0))
    assert answer[0] == status
    assert status == 200 or "Host" in json.loads(answer[2])["error"]


def test_garbage_after_a_request_does_not_spoil_its_answer(server):
    answers = split(converse(server, infer_request() + b"\x00garbage\r\n\r\n"))
    assert_logits(answers[0])
    assert [status for status, _, _ in answers[1:]] in ([], [400])


def test_endless_trailers_and_chunk_extensions_are_bounded(server):
    head = request("Transfer-Encoding: chunked")
    for endless in (b"0\r\n" + b"X: y\r\n" * 20_000, b"5;" + b"e" * 100_000):
        answers = split(converse(server, head, *[endless[i : i + 30_000] for i in range(0, len(endless), 30_000)]))
        assert [status for status, _, _ in answers] == [400]


def test_nothing_about_websockets_is_logged(models):
    with serving(models["bytes"]) as server:
        for fields in UPGRADES.values():
            converse(server, request(*fields, "Connection: close", method="GET", path="/v2"))
        server.stop()
        assert "ebsocket" not in server.process.stderr.read()
