"""Mixed load on one server: good clients of every kind, bad requests, hostile sockets, slow readers, and reloads meanwhile.

    python tests/serving/mixed_load.py --minutes 60

Every good answer is compared with what onnxruntime alone computes. Prints counts, latencies and memory as JSON, and ends with 1
if an answer was wrong or a good request failed.
"""

import contextlib
import io
import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import click
import grpc
import httpx
import numpy as np
import onnxruntime
from grpc_running import Client
from onnx import TensorProto
from PIL import Image
from running import serving
from test_connection import request as http_request
from test_grpc import outputs_of
from test_grpc import request as grpc_request
from tiny_models import classifier, echo, gatherer

from resnet_export.serving import grpc_messages, protocol

IMAGES = np.random.default_rng(11).integers(0, 256, (64, 8, 8, 3)).astype("u1")
LARGE = np.random.default_rng(12).normal(size=(1, 200_000)).astype("f4")
SLOW_READERS, HOSTILE = 12, 50
SAMPLE_SECONDS = 0.5


@dataclass
class Findings:
    """What all clients have seen so far."""

    counts: Counter = field(default_factory=Counter)
    seconds: dict = field(default_factory=lambda: defaultdict(list))
    faults: list = field(default_factory=list)
    memory: list = field(default_factory=list)

    def fault(self, kind, text):
        self.counts[f"{kind}: FAULT"] += 1
        if len(self.faults) < 20:
            self.faults.append(f"{kind}: {text[:500]}")

    def report(self):
        def milliseconds(values):
            p50, p99 = np.quantile(values, (0.5, 0.99))
            return {"p50": round(1000 * p50, 1), "p99": round(1000 * p99, 1), "max": round(1000 * max(values), 1)}

        # The first tenth is left out: the allocator and the caches are still growing.
        settled = self.memory[len(self.memory) // 10 :]
        part = max(1, len(settled) // 10)
        return {
            "counts": dict(sorted(self.counts.items())),
            "milliseconds": {kind: milliseconds(values) for kind, values in sorted(self.seconds.items())},
            "memory_mib": {
                "start": round(np.median(settled[:part]) / 2**20, 1),
                "end": round(np.median(settled[-part:]) / 2**20, 1),
                "max": round(max(self.memory) / 2**20, 1),
                "slope_per_hour_in_second_half": self.slope(),
            },
            "faults": self.faults,
        }

    def slope(self):
        """MiB per hour that the server's memory grows by in the second half, by medians of its tenths."""
        half = np.array(self.memory[len(self.memory) // 2 :]) / 2**20
        medians = [np.median(part) for part in np.array_split(half, min(10, len(half)))]
        hours = len(half) / len(medians) * SAMPLE_SECONDS / 3600
        return round(np.polyfit(np.arange(len(medians)) * hours, medians, 1)[0], 1) if len(medians) > 1 else 0.0


class Load:
    """The clients of one server.

    Args:
        server: A `running.Server` with gRPC.
        folder: The model repository.
        findings: Where what happens is counted.
    """

    def __init__(self, server, folder, findings):
        self.server, self.findings, self.ended = server, findings, threading.Event()
        path = str(folder / "net" / "1" / "model.onnx")
        bare = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.expected = bare.run(["logits"], {"images": IMAGES})[0]
        exponents = np.exp(self.expected - self.expected.max(1, keepdims=True))
        self.shares = exponents / exponents.sum(1, keepdims=True)

    def run(self, seconds):
        clients = [self.binary] * 3 + [
            self.json,
            self.image,
            self.large_json,
            self.live,
            self.bad,
            self.hostile,
            self.slow_readers,
        ]
        clients += [self.reload] + [self.grpc_unary] * 2 + [self.grpc_stream, self.sample_memory]
        threads = [threading.Thread(target=self.guarded, args=(client, number)) for number, client in enumerate(clients)]
        for thread in threads:
            thread.start()
        self.ended.wait(seconds)
        self.ended.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), thread

    def guarded(self, client, number):
        try:
            client(random.Random(number))
        except Exception as error:
            self.findings.fault(client.__name__, repr(error))

    @contextlib.contextmanager
    def timed(self, kind):
        started = time.perf_counter()
        try:
            yield
        except AssertionError as error:
            self.findings.fault(kind, str(error))
        except (httpx.HTTPError, grpc.RpcError, OSError) as error:
            self.findings.fault(kind, repr(error))
        else:
            self.findings.counts[kind] += 1
            self.findings.seconds[kind].append(time.perf_counter() - started)

    def http(self):
        return httpx.Client(base_url=self.server.url, timeout=60, headers={"Accept-Encoding": "identity"})

    def infer(self, client, model, inputs, outputs=None, binary=True):
        body, length = protocol.encode_request(inputs, outputs, binary=binary)
        headers = {} if length is None else {protocol.HEADER_LENGTH: str(length)}
        answer = client.post(f"/v2/models/{model}/infer", content=body, headers=headers)
        assert answer.status_code == 200, f"{answer.status_code} {answer.text}"
        length = answer.headers.get(protocol.HEADER_LENGTH)
        return protocol.decode_response(answer.content, None if length is None else int(length)).outputs

    def check(self, logits, rows):
        assert logits.shape == (len(rows), self.expected.shape[1]), logits.shape
        assert np.allclose(logits, self.expected[rows], rtol=1e-5, atol=1e-5), (logits, self.expected[rows])

    # Good clients.

    def binary(self, chance, binary=True):
        with self.http() as client:
            while not self.ended.is_set():
                rows = chance.sample(range(len(IMAGES)), chance.choice([1, 1, 2, 5, 20]))
                with self.timed("binary" if binary else "JSON"):
                    self.check(self.infer(client, "net", {"images": IMAGES[rows]}, binary=binary)["logits"], rows)

    def json(self, chance):
        self.binary(chance, binary=False)

    def image(self, chance):
        encoded = []
        for pixels in IMAGES:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            encoded.append(file.getvalue())
        with self.http() as client:
            while not self.ended.is_set():
                row = chance.randrange(len(IMAGES))
                with self.timed("image"):
                    answer = client.post("/v2/models/net/classify?top=5", content=encoded[row])
                    assert answer.status_code == 200, answer.text
                    found = {entry["class"]: entry["probability"] for entry in answer.json()["predictions"]}
                    assert np.allclose([found[index] for index in range(5)], self.shares[row], rtol=1e-4), found

    def large_json(self, chance):
        with self.http() as client:
            while not self.ended.wait(2):
                with self.timed("large JSON"):
                    inputs, outputs = {"a": LARGE, "b": LARGE[:, :1]}, [protocol.RequestedOutput("c")]
                    assert np.array_equal(self.infer(client, "same", inputs, outputs, binary=False)["c"], LARGE)

    def live(self, chance):
        with self.http() as client:
            while not self.ended.wait(0.05):
                with self.timed("liveness"):
                    assert client.get("/v2/health/live").status_code == 200

    def grpc_unary(self, chance):
        with Client(self.server.grpc, use_local_subchannel_pool=1) as client:
            while not self.ended.is_set():
                rows = chance.sample(range(len(IMAGES)), chance.choice([1, 1, 2, 5, 20]))
                with self.timed("gRPC"):
                    answer = client("ModelInfer", grpc_request("net", {"images": IMAGES[rows]}, raw=chance.random() < 0.7))
                    self.check(outputs_of(answer)["logits"], rows)

    def grpc_stream(self, chance):
        with Client(self.server.grpc, use_local_subchannel_pool=1) as client:
            while not self.ended.is_set():
                asked = [chance.sample(range(len(IMAGES)), 2) for _ in range(20)]
                with self.timed("gRPC stream of 20"):
                    answers = list(client.stream([grpc_request("net", {"images": IMAGES[rows]}) for rows in asked]))
                    assert len(answers) == len(asked), len(answers)
                    for answer, rows in zip(answers, asked, strict=True):
                        assert not answer.error_message, answer.error_message
                        self.check(outputs_of(answer.infer_response)["logits"], rows)

    def reload(self, chance):
        with self.http() as client:
            while not self.ended.wait(0.1):
                with self.timed("reload"):
                    answer = client.post("/v2/repository/models/net/load")
                    assert answer.status_code == 200, answer.text

    # Others.

    def bad(self, chance):
        fails, fails_length = protocol.encode_request({"ids": np.array([[4242]])})
        shape, shape_length = protocol.encode_request({"images": IMAGES[0]})
        table = [
            ("/v2/models/net/infer", b"{", {}, 400),
            ("/v2/models/net/infer", shape, {protocol.HEADER_LENGTH: str(shape_length)}, 400),
            ("/v2/models/table/infer", fails, {protocol.HEADER_LENGTH: str(fails_length)}, 500),
            ("/v2/models/none/infer", b"{}", {}, 404),
            ("/v2/models/net/classify", b"no image", {}, 400),
            ("/v2/models/net/infer", b"{}", {"Content-Encoding": "br"}, 415),
            ("/v2/models/net", b"", {}, 405),
            ("/v2/models/net/infer", bytes(9 * 2**20), {}, 413),
        ]
        codes = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND"}
        with self.http() as client, Client(self.server.grpc, use_local_subchannel_pool=1) as over_grpc:
            while not self.ended.wait(0.02):
                path, body, headers, status = chance.choice(table)
                with self.timed(f"refused with {status}"):
                    answer = client.post(path, content=body, headers=headers)
                    assert answer.status_code == status and "error" in answer.json(), answer.text
                name, status = chance.choice([("none", 404), ("net", 400)])
                try:
                    over_grpc("ModelInfer", grpc_request(name, {"images": IMAGES[0]}))
                    self.findings.fault("bad gRPC", f"{name} was answered")
                except grpc.RpcError as error:
                    self.findings.counts[f"gRPC refused with {error.code().name}"] += 1
                    if error.code().name != codes[status]:
                        self.findings.fault("bad gRPC", str(error))

    def hostile(self, chance):
        body, length = protocol.encode_request({"images": IMAGES[:2]})
        fields = (f"{protocol.HEADER_LENGTH}: {length}", f"Content-Length: {len(body)}")
        messages = [
            b"GET /v2 HTTP/1.1\r\nHost: x\r\n",
            bytes(range(256)) * 20,
            http_request("Content-Length: 100000", method="GET", path="/v2/health/live"),
            http_request(*fields, path="/v2/models/net/infer") + body[:-5],
            http_request("Connection: Upgrade", "Upgrade: h2c", *fields, path="/v2/models/net/infer") + body,
            http_request("Transfer-Encoding: chunked", path="/v2/models/net/infer") + b"fffffffffffffffff\r\n",
            http_request("Host: y", method="GET", path="/v2"),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ]
        held = []
        while not self.ended.wait(0.05):
            address = self.server.address
            if chance.random() < 0.3:
                host, port = self.server.grpc.rsplit(":", 1)
                address = host, int(port)
            with contextlib.suppress(ConnectionError):
                connection = socket.create_connection(address, timeout=5)
                held.append(connection)
                connection.sendall(chance.choice(messages))
                self.findings.counts["hostile sockets"] += 1
            while len(held) > HOSTILE:
                held.pop(0).close()
        for connection in held:
            connection.close()

    def slow_readers(self, chance):
        """Ask for answers over HTTP and gRPC, and never read them."""
        inputs = {"a": np.tile(LARGE, (5, 1)), "b": np.zeros((5, 1), "f4")}
        body, length = protocol.encode_request(inputs, [protocol.RequestedOutput("c", True)])
        data = http_request(f"{protocol.HEADER_LENGTH}: {length}", path="/v2/models/same/infer", body=body)
        asked = grpc_request("same", inputs).SerializeToString()
        held = []
        while not self.ended.wait(0.3):
            if chance.random() < 0.7:
                connection = socket.create_connection(self.server.address, timeout=20)
                with contextlib.suppress(OSError):
                    connection.sendall(data)
                held.append(connection)
            else:
                channel = grpc.insecure_channel(self.server.grpc, [("grpc.use_local_subchannel_pool", 1)])
                self.unread = channel.stream_stream(grpc_messages.STREAM_METHOD)(iter([asked] * 4), timeout=60)
                held.append(channel)
            self.findings.counts["slow readers"] += 1
            while len(held) > SLOW_READERS:
                held.pop(0).close()
        for connection in held:
            connection.close()

    def sample_memory(self, chance):
        while not self.ended.wait(SAMPLE_SECONDS):
            pages = Path(f"/proc/{self.server.process.pid}/statm").read_text().split()[1]
            self.findings.memory.append(int(pages) * os.sysconf("SC_PAGE_SIZE"))
            if len(self.findings.memory) % round(60 / SAMPLE_SECONDS) == 0:
                mebibytes = np.median(self.findings.memory[-round(60 / SAMPLE_SECONDS) :]) / 2**20
                minute = len(self.findings.memory) * SAMPLE_SECONDS / 60
                print(f"minute {minute:.0f}: {mebibytes:.1f} MiB (median)", file=sys.stderr, flush=True)


def run(seconds, folder):
    """Run the load; returns the report."""
    classifier(folder / "net" / "1" / "model.onnx", dtype="uint8")
    gatherer(folder / "table" / "1" / "model.onnx")
    echo(folder / "same" / "1" / "model.onnx", TensorProto.FLOAT, ("batch", "m"))
    options = ["--allow-control", "--max-batch", "16", "--body-timeout", "3", "--max-body-mb", "8"]
    findings = Findings()
    with serving("--repository", folder, *options, "--max-buffered-mb", "256", "--grpc-port", "0") as server:
        # The log of what is refused and what fails would fill the pipe.
        log = threading.Thread(target=server.process.stderr.read, daemon=True)
        log.start()
        Load(server, folder, findings).run(seconds)
        status = server.stop()
    if status != 0:
        findings.fault("server", f"ended with {status}")
    return findings.report()


@click.command()
@click.option("--minutes", type=float, default=60, show_default=True, help="How long the load lasts.")
def main(minutes):
    """Put mixed load on a server and report what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        report = run(60 * minutes, Path(folder))
    click.echo(json.dumps(report, indent=1))
    sys.exit(1 if report["faults"] else 0)


if __name__ == "__main__":
    main()
