"""`resnet-export serve` as a process."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import numpy as np
import pytest
from tiny_models import classifier_logits

from resnet_export.serving import protocol


def free_port():
    """A port of this machine that nobody listens on, for programs that cannot be told to take port 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running `resnet-export serve --port 0 --json`."""

    def __init__(self, *arguments, **popen):
        command = [sys.executable, "-m", "resnet_export", "serve", "--port", "0", "--json", "--device", "cpu", "--threads", "1"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | popen
        self.process = subprocess.Popen([*command, *map(str, arguments)], **pipes)

    def wait(self, event):
        for line in self.process.stdout:
            message = json.loads(line)
            self.url = message.get("url", getattr(self, "url", None))
            self.grpc = message.get("grpc", getattr(self, "grpc", None))
            self.details = message if "url" in message else getattr(self, "details", {})
            if message["event"] == event:
                return self
        raise AssertionError(self.process.stderr.read())

    @property
    def address(self):
        url = urlsplit(self.url)
        return url.hostname, url.port

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(20)


@contextlib.contextmanager
def serving(*arguments, **popen):
    server = Server(*arguments, **popen)
    try:
        yield server.wait("ready")
    finally:
        server.process.kill()
        server.process.communicate()


def self_signed(folder, name="certificate"):
    """Paths of a certificate for 127.0.0.1 and of its key; skips where there is no openssl."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return certificate, key


def infer(client, pixels, prefix=""):
    """Ask the model `bytes` of an httpx client's server, and check its answer."""
    body, length = protocol.encode_request({"images": pixels})
    answer = client.post(f"{prefix}/v2/models/bytes/infer", content=body, headers={protocol.HEADER_LENGTH: str(length)})
    assert answer.status_code == 200, answer.text
    found = protocol.decode_response(answer.content, int(answer.headers[protocol.HEADER_LENGTH])).outputs["logits"]
    np.testing.assert_allclose(found, classifier_logits(pixels), rtol=1e-5, atol=1e-6)
