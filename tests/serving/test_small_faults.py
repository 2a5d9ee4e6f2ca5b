"""Small faults that other people's clients and files found, one test for each kind."""

import io
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from tiny_models import classifier

from resnet_export.errors import UsageError
from resnet_export.runtime import images
from resnet_export.serving import bulk, commands, protocol
from resnet_export.serving.models import ModelOptions, ServedModel, Source
from resnet_export.serving.protocol import ProtocolError
from resnet_export.serving.repository import Repository


@pytest.mark.parametrize(
    "header, encoding",
    [
        ("", None),
        ("identity", None),
        ("gzip", "gzip"),
        ("GZIP;Q=0.5", "gzip"),
        ("gzip;q=0", None),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip;q=0.1, deflate;q=0.9", "deflate"),
        ("gzip; q=0.000, *;q=0.5", "deflate"),
        ("gzip;q=0.5, identity", None),
        ("br, *;q=0", None),
        ("gzip;q=nonsense", None),
    ],
)
def test_accepted_encoding(header, encoding):
    assert protocol.accepted_encoding(header) == encoding


def test_unknown_parameters_of_any_type_are_ignored():
    tensor = {
        "name": "x",
        "shape": [1],
        "datatype": "FP32",
        "data": [1],
        "parameters": {"content_type": None, "headers": {"a": []}},
    }
    message = {"inputs": [tensor], "parameters": {"headers": {"host": "x"}, "list": [1], "none": None}}
    from resnet_export.serving import json_text

    assert protocol.decode_request(json_text.dumps(message)).inputs["x"].tolist() == [1]


def test_empty_batch_is_told_to_have_rows(models):
    model = ServedModel(Source("tiny", "1", models["tiny"]), ModelOptions(device="cpu", threads=1))
    with pytest.raises(ProtocolError, match="at least one row"):
        model.prepare({"images": np.zeros((0, 8, 8, 3), "f4")})
    assert model.classifies_images
    assert not ServedModel(Source("half", "1", models["half"]), ModelOptions(device="cpu", threads=1)).classifies_images


@pytest.mark.parametrize("key", ["schlüssel", "tab\tkey", "zero\u200bwidth"])
def test_key_that_cannot_be_sent_is_refused(tmp_path, key):
    (tmp_path / "keys").write_text(f"good\n{key}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="key 2 .* cannot be sent"):
        commands.read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_text("\ufeffgood\n", encoding="utf-8")
    assert commands.read_keys(tmp_path / "keys") == ("good",)


def file_of(array, kind):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def test_deep_images_are_scaled_or_refused_but_never_clipped():
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for kind in ("PNG", "TIFF", "PPM"):
        found = images.decode(file_of(ramp.astype("u2"), kind), channels=1)
        assert np.array_equal(found[:, :, 0], (ramp.astype("u2") >> 8).astype("u1")), kind
    for dtype, text in (("f4", "floating-point"), ("i4", "32-bit integer")):
        with pytest.raises(UsageError, match=text):
            images.decode(file_of(ramp.astype(dtype), "TIFF"))


def test_folder_with_a_bad_name_is_skipped_and_the_log_says_why(tmp_path, caplog):
    classifier(tmp_path / "good" / "1" / "model.onnx")
    classifier(tmp_path / "bad name" / "1" / "model.onnx")
    repository = Repository([], tmp_path, ModelOptions(device="cpu"))
    assert repository.names() == ["good"]
    assert "bad name" in caplog.text and "is not served" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are bytes")
@pytest.mark.parametrize("out", ["csv", "jsonl", "parquet"])
def test_file_names_that_are_not_utf8(tmp_path, pixels, out):
    if out == "parquet":
        pytest.importorskip("pyarrow", reason="needs the extra `batch`")
    folder = tmp_path / "images"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(file_of(pixels[0], "PNG"))
    found = bulk.run(
        bulk.read_items([folder]),
        bulk.LocalClassifier(classifier(tmp_path / "tiny.onnx"), "cpu", threads=1),
        tmp_path / f"rows.{out}",
    )
    assert (found["images"], found["errors"]) == (1, 0)
    assert out == "parquet" or "caf\\xe9.png" in (tmp_path / f"rows.{out}").read_text().replace("\\\\", "\\")


class Fixed:
    """A classifier without a model, which may wait in the middle."""

    top = 1

    def __init__(self, gate=None):
        self.gate, self.settings = gate, {"model": "m", "top": 1}

    def rows(self, items):
        for item in items:
            if self.gate:
                self.gate.wait(20)
            yield bulk.error_row(item.name, "none")


def test_empty_folder_of_parts_is_a_run_that_has_not_begun(tmp_path):
    (tmp_path / "rows.jsonl.partial").mkdir()
    items = [bulk.Item("a", b"")]
    assert bulk.run(items, Fixed(), tmp_path / "rows.jsonl", resume=True)["images"] == 1
    (tmp_path / "more.jsonl.partial").mkdir()
    assert bulk.run(items, Fixed(), tmp_path / "more.jsonl")["images"] == 1


def test_second_process_that_resumes_is_refused(tmp_path):
    pytest.importorskip("fcntl", reason="needs POSIX")
    out, gate = tmp_path / "rows.jsonl", threading.Event()
    items = [bulk.Item(str(number), b"") for number in range(3)]
    first = threading.Thread(target=lambda: bulk.run(items, Fixed(gate), out))
    first.start()
    try:
        while not (tmp_path / "rows.jsonl.partial" / "settings.json").exists():
            pass
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match="another process"):
                bulk.run(items, Fixed(), out, **how)
    finally:
        gate.set()
        first.join()
    assert len(out.read_text().splitlines()) == 3


def test_client_asks_again_from_its_first_request_on(models, monkeypatch):
    httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
    from resnet_export.serving import client

    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(client, "_pause", lambda attempt, answer: 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UsageError):
            client.RemoteClassifier(f"http://127.0.0.1:{server.server_port}", "m", client.RemoteOptions(retries=3))
        server.shutdown()
    assert len(asked) == 4 and httpx
