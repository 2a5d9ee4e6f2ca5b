"""Many images, here and through a server: order, errors as rows, resuming, retries."""

import csv
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import self_signed, serving
from tiny_models import LABELS, classifier_logits

from resnet_export.cli import main
from resnet_export.errors import UsageError
from resnet_export.serving import bulk

httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra `batch`")
import pyarrow

from resnet_export.serving import client as remote


def best(pixels):
    logits = classifier_logits(pixels[None])[0]
    shares = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-logits)
    return order.tolist(), [LABELS[i] for i in order], shares[order]


def assert_row(row, pixels, top=5):
    classes, labels, shares = best(pixels)
    assert row["error"] is None and row["classes"] == classes[:top] and row["labels"] == labels[:top]
    assert row["probabilities"] == pytest.approx(shares[:top], rel=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """37 images in two levels, of which one is broken and one is of another size."""
    folder = tmp_path_factory.mktemp("images")
    images = np.random.default_rng(9).integers(0, 256, (37, 8, 8, 3)).astype("u1")
    (folder / "deep").mkdir()
    names = [folder / ("deep" if index % 3 == 0 else ".") / f"{index:03d}.png" for index in range(37)]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(name)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.md").write_text("not an image either")
    Image.fromarray(np.kron(images[0], np.ones((2, 2, 1), "u1"))).save(folder / "large.png")
    return folder, {str(name.resolve()): image for name, image in zip(names, images, strict=True)}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_folder_gives_one_row_per_image_in_order(models, folder, tmp_path):
    folder, images = folder
    out = tmp_path / "out.jsonl"
    found = bulk.run(bulk.read_items([folder]), bulk.LocalClassifier(models["tiny"], "cpu", top=3, batch=4, workers=2), out)
    rows = read(out)
    assert found == {"file": str(out), "images": 39, "errors": 1, "resumed": 0}
    assert [row["file"] for row in rows] == [item.name for item in bulk.read_items([folder])]
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    for row in rows:
        if row["file"].endswith("broken.png"):
            assert "not an image" in row["error"] and row["classes"] == []
        elif not row["file"].endswith("large.png"):
            assert_row(row, images[row["file"]], top=3)
    assert list(tmp_path.iterdir()) == [out]


def test_open_sizes_and_fixed_batches_give_the_same(models, folder, tmp_path):
    folder, images = folder
    for name in ("open", "single", "bytes"):
        rows = list(bulk.LocalClassifier(models[name], "cpu", batch=4).rows(bulk.read_items([folder])))
        assert len(rows) == 39
        for row in rows:
            if row["file"] in images:
                assert_row(row, images[row["file"]])
    [large] = [row for row in rows if row["file"].endswith("large.png")]
    assert large["error"] is None


def test_lists_and_tables_are_read(models, folder, tmp_path):
    folder, images = folder
    some = list(images)[:5]
    (tmp_path / "list.txt").write_text("\n".join([some[0], "", "missing.png", *some[1:]]))
    encoded = [Path(name).read_bytes() for name in some]
    nested = [{"bytes": data, "path": name} for data, name in zip(encoded, some, strict=True)]
    parquet.write_table(pyarrow.table({"image": encoded}), tmp_path / "bytes.parquet")
    parquet.write_table(pyarrow.table({"image": nested}), tmp_path / "nested.parquet")
    parquet.write_table(pyarrow.table({"path": some}), tmp_path / "paths.parquet")
    local = bulk.LocalClassifier(models["tiny"], "cpu")
    rows = list(local.rows(bulk.read_items([tmp_path / "list.txt"])))
    assert rows.pop(1)["error"].endswith("missing.png does not exist")
    tables = [list(local.rows(bulk.read_items([tmp_path / f"{name}.parquet"]))) for name in ("bytes", "nested", "paths")]
    for found in (rows, *tables):
        for row, name in zip(found, some, strict=True):
            assert_row(row, images[name])
    assert [item.name for item in bulk.read_items([tmp_path / "bytes.parquet"])][4] == "bytes.parquet#4"
    parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="neither a column `image` nor `path`; it has x"):
        list(bulk.read_items([tmp_path / "other.parquet"]))


def test_csv_and_parquet_hold_the_same(models, folder, tmp_path):
    folder, _ = folder
    local = bulk.LocalClassifier(models["tiny"], "cpu", top=2)
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        bulk.run(bulk.read_items([folder]), local, tmp_path / name)
    rows = read(tmp_path / "a.jsonl")
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == rows
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(rows, table, strict=True):
        assert (line["file"], line["error"]) == (row["file"], row["error"] or "")
        if not row["error"]:
            assert [int(line["class1"]), int(line["class2"])] == row["classes"]
            assert [line["label1"], line["label2"]] == row["labels"]
            assert float(line["probability2"]) == row["probabilities"][1]


class Stopping:
    """A classifier that is interrupted after a number of rows."""

    def __init__(self, inner, after):
        self.inner, self.after, self.asked = inner, after, 0
        self.settings, self.top = inner.settings, inner.top

    def rows(self, items):
        for row in self.inner.rows(items):
            if self.asked == self.after:
                raise KeyboardInterrupt
            self.asked += 1
            yield row


def test_interrupted_run_is_gone_on_with(models, folder, tmp_path, monkeypatch):
    folder, _ = folder
    monkeypatch.setattr(bulk, "PART_ROWS", 5)
    local = bulk.LocalClassifier(models["tiny"], "cpu", batch=4)
    bulk.run(bulk.read_items([folder]), local, tmp_path / "whole.jsonl")
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        bulk.run(bulk.read_items([folder]), Stopping(local, 13), out)
    assert not out.exists()
    with pytest.raises(UsageError, match="resume it with --resume"):
        bulk.run(bulk.read_items([folder]), local, out)
    with pytest.raises(UsageError, match="was started with"):
        bulk.run(bulk.read_items([folder]), bulk.LocalClassifier(models["tiny"], "cpu", top=1), out, resume=True)
    with pytest.raises(UsageError, match="image 10 is now"):
        bulk.run(list(bulk.read_items([folder]))[1:], local, out, resume=True)
    counting = Stopping(local, -1)
    assert bulk.run(bulk.read_items([folder]), counting, out, resume=True)["resumed"] == 10
    assert counting.asked == 39 - 10
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_killed_process_is_gone_on_with(models, folder, tmp_path):
    folder, _ = folder
    names = sorted(str(path) for path in folder.rglob("0*.png"))
    (tmp_path / "list.txt").write_text("\n".join(names * 400))
    command = [sys.executable, "-m", "resnet_export", "predict", str(models["tiny"]), str(tmp_path / "list.txt")]
    command += ["--device", "cpu", "--top", "1", "--out", str(tmp_path / "out.csv")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "out.csv.partial"
    while not list(parts.glob("part-*.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images"] == len(names) * 400 and 0 < found["resumed"] < found["images"]
    with open(tmp_path / "out.csv", newline="") as file:
        assert [line["file"] for line in csv.DictReader(file)] == names * 400


@pytest.mark.slow
def test_server_gives_the_same_as_the_file(models, folder, tmp_path, capsys):
    folder, _ = folder
    local = list(bulk.LocalClassifier(models["tiny"], "cpu").rows(bulk.read_items([folder])))
    with serving(models["tiny"], f"bytes={models['bytes']}") as server:
        assert main(["predict", "--url", server.url, "--model", "bytes", str(folder), "--out", str(tmp_path / "far.jsonl")]) == 0
        for far, near in zip(read(tmp_path / "far.jsonl"), local, strict=True):
            assert far | {"probabilities": 0} == near | {"probabilities": 0}
            assert far["probabilities"] == pytest.approx(near["probabilities"], rel=1e-5)
        capsys.readouterr()
        assert main(["predict", "--url", server.url, str(folder)]) == 2
        assert "name the model with --model" in capsys.readouterr().err
        assert main(["predict", "--url", server.url, "--model", "none", str(folder)]) == 2
        assert "no model 'none'" in capsys.readouterr().err
        assert main(["predict", "--url", server.url, "--model", "tiny", str(folder), "--json"]) == 2
        assert len(capsys.readouterr().out.splitlines()) == 39
    for named in ([], ["--model", "tiny"]):
        assert main(["predict", "--url", server.url, *named, str(folder)]) == 2
        assert "does not answer" in capsys.readouterr().err


def test_address_without_scheme_and_server_with_key(models, folder, tmp_path, capsys):
    image, keys = str(next(iter(folder[1]))), tmp_path / "keys"
    keys.write_text("# mine\nopen sesame\n")
    with serving(models["bytes"], "--api-key-file", keys) as server:
        address = server.url.removeprefix("http://")
        assert main(["predict", "--url", address, "--api-key-file", str(keys), image]) == 0
        assert capsys.readouterr().out.startswith(image)
        assert main(["predict", "--url", address, image]) == 2
        assert "an API key is needed" in capsys.readouterr().err


def test_https_with_a_certificate_of_ones_own(models, folder, tmp_path, capsys, monkeypatch):
    certificate, key = self_signed(tmp_path)
    image = str(next(iter(folder[1])))
    with serving(models["bytes"], "--ssl-certfile", certificate, "--ssl-keyfile", key) as server:
        assert server.url.startswith("https://")
        assert main(["predict", "--url", server.url, image]) == 2
        assert "certificate verify failed" in capsys.readouterr().err
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert main(["predict", "--url", server.url, image]) == 0


class Moody(BaseHTTPRequestHandler):
    """A v2 server in JSON only, without card or labels, that answers every request well only at the third time."""

    asked: dict = {}
    always = None

    def log_message(self, *arguments):
        pass

    def reply(self, status, message, **headers):
        body = json.dumps(message).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        replies = {
            "/v2": {"name": "moody", "extensions": []},
            "/v2/models/net": {
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 8, 8, 3]}],
                "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}],
            },
        }
        self.reply(200 if self.path in replies else 404, replies.get(self.path, {"error": "no"}))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        tries = self.asked[body] = self.asked.get(body, 0) + 1
        if self.always or tries < 3:
            self.reply(self.always or (503 if tries == 1 else 500), {"error": "a bad day"}, **{"Retry-After": "0"})
            return
        pixels = np.array(json.loads(body)["inputs"][0]["data"]).reshape(-1, 8, 8, 3)
        output = {"name": "logits", "datatype": "FP32", "shape": [1, 5], "data": classifier_logits(pixels).ravel().tolist()}
        self.reply(200, {"model_name": "net", "outputs": [output]})


class MoodyServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        # A client that gives up at the first bad answer does not wait for those to its other requests.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@pytest.fixture
def moody():
    handler = type("Handler", (Moody,), {"asked": {}})
    server = MoodyServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_client_tries_again_and_needs_no_extensions(moody, folder):
    handler, url = moody
    folder, images = folder
    rows = list(remote.RemoteClassifier(url, "net").rows(bulk.read_items([folder / "deep"])))
    assert len(rows) == 13 and set(handler.asked.values()) == {3}
    for row in rows:
        assert_row(row | {"labels": best(images[row["file"]])[1]}, images[row["file"]])
        assert row["labels"] == [None] * 5


@pytest.mark.parametrize("status, ends", [(503, True), (500, False), (400, False), (401, True)])
def test_client_ends_for_servers_and_goes_on_for_images(moody, folder, status, ends):
    handler, url = moody
    handler.always = status
    classifier = remote.RemoteClassifier(url, "net", remote.RemoteOptions(retries=1))
    items = list(bulk.read_items([folder[0] / "deep"]))[:3]
    if ends:
        with pytest.raises(UsageError, match="a bad day"):
            list(classifier.rows(items))
    else:
        assert [row["error"] for row in classifier.rows(items)] == ["a bad day"] * 3
    # When the first image ends the run, the others may not have been tried again yet.
    assert max(handler.asked.values()) == (2 if status in (500, 503) else 1)


def test_wrong_usage(models, folder, tmp_path, capsys):
    for arguments, text in [
        (["predict", str(models["tiny"])], "Missing argument"),
        (["predict", str(models["tiny"]), str(folder[0]), "--out", "x.doc"], "must end in .csv, .parquet, .jsonl"),
        (["predict", str(models["half"]), str(folder[0])], "does not take one batch of images"),
        (["predict", str(models["tiny"]), str(tmp_path / "no.txt"), "--out", str(tmp_path / "o.csv")], "cannot read the list"),
        (["predict", str(models["tiny"]), str(folder[0]), "--top", "0"], "--top"),
    ]:
        assert main(arguments) == 2
        assert text in capsys.readouterr().err


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("no image")
    with pytest.raises(UsageError, match="holds no images"):
        list(bulk.read_items([tmp_path]))
