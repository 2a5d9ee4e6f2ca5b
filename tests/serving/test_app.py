"""The application in one process: every endpoint, in JSON and binary, with good and bad requests."""

import asyncio
import gzip
import io
import json
import threading
import zlib

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from tiny_models import LABELS, TABLE, classifier, classifier_logits, gatherer, infer_json

from resnet_export.runtime.sessions import Session
from resnet_export.serving import protocol
from resnet_export.serving.app import AppOptions, create_app
from resnet_export.serving.batcher import BatchOptions
from resnet_export.serving.models import ModelOptions, Source
from resnet_export.serving.repository import Repository

CLASSES = 5


def application(paths, folder=None, app=None, warm_up=True, **model):
    sources = [Source(name, "1", path) for name, path in paths.items()]
    options = ModelOptions(**{"device": "cpu", "threads": 1, "batch": BatchOptions(max_rows=4), "warm_up": warm_up} | model)
    repository = Repository(sources, folder, options)
    repository.open()
    return create_app(repository, AppOptions(**(app or {})), "9.9")


def wait_ready(client):
    for _ in range(2000):
        if client.get("/v2/health/ready").status_code == 200:
            return client
    raise AssertionError("never ready")


@pytest.fixture(scope="module")
def client(models):
    with TestClient(application(models)) as client:
        yield wait_ready(client)


def post(client, model, body, length=None, **headers):
    if length is not None:
        headers[protocol.HEADER_LENGTH] = str(length)
    return client.post(f"/v2/models/{model}/infer", content=body, headers={"Accept-Encoding": "identity"} | headers)


def response_of(answer):
    assert answer.status_code == 200, answer.text
    header = answer.headers.get(protocol.HEADER_LENGTH)
    return protocol.decode_response(answer.content, None if header is None else int(header))


def assert_logits(found, pixels):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, classifier_logits(pixels), rtol=1e-5, atol=1e-6)


def assert_error(answer, status, text):
    assert answer.status_code == status and text in answer.json()["error"], (answer.status_code, answer.text)
    assert set(answer.json()) == {"error"}


def jpeg(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def test_health_and_metadata(client):
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2", "/v2/"):
        found = client.get(path).json()
        assert found["version"] == "9.9" and {"binary_tensor_data", "classification", "statistics"} <= set(found["extensions"])
    expected = {
        "name": "tiny",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 8, 8, 3]}],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}],
    }
    assert client.get("/v2/models/tiny").json() == client.get("/v2/models/tiny/versions/1").json() == expected
    assert client.get("/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}
    assert client.get("/v2/models/echo").json()["inputs"][0] == {"name": "a", "datatype": "BYTES", "shape": [-1, 2]}
    assert client.get("/v2/models/tiny/card").json()["card"]["labels"] == LABELS


def test_config_is_tritons(client):
    found = client.get("/v2/models/tiny/config").json()
    assert found["max_batch_size"] == 4 and found["backend"] == "onnxruntime"
    assert found["input"] == [{"name": "images", "data_type": "TYPE_FP32", "dims": [8, 8, 3]}]
    assert client.get("/v2/models/single/config").json()["max_batch_size"] == 0
    assert client.get("/v2/models/echo/config").json()["input"][0]["data_type"] == "TYPE_STRING"


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True])
def test_infer_in_json_and_binary(client, pixels, binary_in, binary_out):
    images = pixels.astype("f4")
    outputs = [protocol.RequestedOutput("logits", binary_out)]
    body, length = protocol.encode_request({"images": images}, outputs, request_id="7", binary=binary_in)
    answer = post(client, "tiny", body, length)
    assert (protocol.HEADER_LENGTH in answer.headers) == binary_out
    found = response_of(answer)
    assert (found.model_name, found.model_version, found.id) == ("tiny", "1", "7")
    assert_logits(found.outputs["logits"], pixels)


def test_all_outputs_in_the_form_asked_for(client):
    x = np.arange(8, dtype="f2").reshape(2, 4)
    body, length = protocol.encode_request({"x": x})
    found = response_of(post(client, "half", body, length)).outputs
    assert np.array_equal(found["y"], 2 * x) and np.array_equal(found["n"], x.sum(1, keepdims=True))
    # One binary and one JSON output in one answer, of which FP16 has no JSON form.
    outputs = [protocol.RequestedOutput("n", True), protocol.RequestedOutput("y", False)]
    assert_error(post(client, "half", *protocol.encode_request({"x": x}, outputs)), 400, "'y' is FP16, which has no JSON form")
    outputs = [protocol.RequestedOutput("n", True)]
    assert list(response_of(post(client, "half", *protocol.encode_request({"x": x}, outputs))).outputs) == ["n"]


def test_mixed_inputs_and_bytes(client):
    words = np.array([["a", "ü"], ["", "long " * 20]], object)
    numbers = np.array([[1.5, -2.0, np.nan], [0, 1, 2]], "f4")
    head = {
        "inputs": [
            {"name": "a", "datatype": "BYTES", "shape": [2, 2], "data": words.tolist()},
            {"name": "b", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": 24}},
        ],
        "outputs": [{"name": "d", "parameters": {"binary_data": True}}, {"name": "c"}],
    }
    head = json.dumps(head).encode()
    answer = post(client, "echo", head + numbers.tobytes(), len(head))
    found = response_of(answer).outputs
    assert list(found) == ["d", "c"]
    assert np.array_equal(found["d"], numbers, equal_nan=True)
    assert [[w.decode() for w in row] for row in found["c"].tolist()] == words.tolist()


def test_uint8_and_raw_binary(client, pixels):
    found = response_of(post(client, "bytes", *protocol.encode_request({"images": pixels})))
    assert_logits(found.outputs["logits"], pixels)
    found = response_of(post(client, "bytes", pixels[2].tobytes(), 0))
    assert_logits(found.outputs["logits"], pixels[2:3])
    assert_error(post(client, "bytes", b"123", 0), 400, "takes 192 bytes (UINT8, shape [1, 8, 8, 3]), got 3")
    assert_error(post(client, "echo", b"123", 0), 400, "needs a model with one input")
    assert_error(post(client, "open", b"123", 0), 400, "needs an input of fixed size")


def test_requests_larger_than_a_batch_are_split(client):
    before = client.get("/v2/models/bytes/stats").json()["model_stats"][0]
    pixels = np.random.default_rng(5).integers(0, 256, (11, 8, 8, 3)).astype("u1")
    found = response_of(post(client, "bytes", *protocol.encode_request({"images": pixels})))
    assert_logits(found.outputs["logits"], pixels)
    after = client.get("/v2/models/bytes/stats").json()["model_stats"][0]
    assert after["execution_count"] - before["execution_count"] == 3
    assert after["inference_count"] - before["inference_count"] == 11


def test_model_without_batch_axis_takes_its_own_shape_only(client, pixels):
    images = pixels.astype("f4")
    found = response_of(post(client, "single", *protocol.encode_request({"images": images[:1]})))
    assert_logits(found.outputs["logits"], pixels[:1])
    answer = post(client, "single", *protocol.encode_request({"images": images[:2]}))
    assert_error(answer, 400, "must have shape [1, 8, 8, 3], got [2, 8, 8, 3]")


def test_classification_extension(client, pixels):
    outputs = [protocol.RequestedOutput("logits", classes=2)]
    logits = classifier_logits(pixels)
    for binary in (False, True):
        outputs = [protocol.RequestedOutput("logits", binary, classes=2)]
        found = response_of(post(client, "bytes", *protocol.encode_request({"images": pixels}, outputs))).outputs["logits"]
        assert found.shape == (6, 2)
        for row, scores in zip(found, logits, strict=True):
            for text, index in zip(row, np.argsort(-scores)[:2], strict=True):
                value, found_index, label = text.decode().split(":", 2)
                assert (int(found_index), label) == (index, LABELS[index])
                assert float(value) == pytest.approx(scores[index], rel=1e-4, abs=2e-6)
    body = protocol.encode_request({"images": pixels}, [protocol.RequestedOutput("logits", classes=99)])
    assert response_of(post(client, "bytes", *body)).outputs["logits"].shape == (6, CLASSES)


def test_compression_both_ways(client, pixels):
    body, length = protocol.encode_request({"images": pixels})
    for encoding, pack, unpack in (("gzip", gzip.compress, gzip.decompress), ("deflate", zlib.compress, zlib.decompress)):
        headers = {"Content-Encoding": encoding, protocol.HEADER_LENGTH: str(length), "Accept-Encoding": f"br, {encoding};q=0.5"}
        with client.stream("POST", "/v2/models/bytes/infer", content=pack(body), headers=headers) as answer:
            raw = b"".join(answer.iter_raw())
        assert answer.status_code == 200 and answer.headers["content-encoding"] == encoding
        plain = protocol.decode_response(unpack(raw), int(answer.headers[protocol.HEADER_LENGTH]))
        assert_logits(plain.outputs["logits"], pixels)
    assert_error(post(client, "bytes", body, length, **{"Content-Encoding": "gzip"}), 400, "not valid gzip")
    assert_error(post(client, "bytes", body, length, **{"Content-Encoding": "br"}), 415, "must be gzip or deflate")


def test_classify_an_image_file(client, pixels):
    answer = client.post("/v2/models/tiny/classify?top=3", content=jpeg(pixels[0]))
    assert answer.status_code == 200, answer.text
    logits = classifier_logits(pixels[:1])[0]
    probabilities = np.exp(logits) / np.exp(logits).sum()
    found = answer.json()
    assert found["model_name"] == "tiny" and found["model_version"] == "1" and found["milliseconds"] > 0
    order = np.argsort(-logits)[:3]
    assert [entry["class"] for entry in found["predictions"]] == order.tolist()
    assert [entry["label"] for entry in found["predictions"]] == [LABELS[i] for i in order]
    assert [entry["probability"] for entry in found["predictions"]] == pytest.approx(probabilities[order], rel=1e-4)
    # Another size is brought to the model's; a model of open size takes it as it is.
    big = np.kron(pixels[0], np.ones((3, 5, 1), "u1"))
    found = client.post("/v2/models/open/classify", content=jpeg(big)).json()["predictions"]
    assert [entry["probability"] for entry in found] == pytest.approx(sorted(probabilities, reverse=True), rel=1e-4)


def test_classify_refuses_what_is_no_image(client, pixels):
    def classify(body, model="tiny", query="", **headers):
        return client.post(f"/v2/models/{model}/classify{query}", content=body, headers=headers)

    png = jpeg(pixels[0])
    assert_error(classify(b"GIF89a nonsense"), 400, "not an image")
    assert_error(classify(b""), 400, "empty")
    assert_error(classify(png[:60]), 400, "damaged")
    assert_error(classify(png, query="?top=0"), 400, "`top` must be a number from 1 to 1000")
    assert_error(classify(png, query="?top=1e3"), 400, "`top`")
    assert_error(classify(png, model="half"), 400, "does not take one batch of images")
    assert_error(classify(b"--x", **{"Content-Type": "multipart/form-data; boundary=x"}), 415, "--data-binary")
    header = bytearray(png)
    header[16:24] = (10**6).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    assert classify(bytes(header)).status_code == 400
    # Pillow hands this format to another program, if there is one.
    assert_error(classify(jpeg(pixels[0], "EPS")), 400, "not an image in a format that is read (JPEG, PNG")


@pytest.mark.parametrize("shape", [(500_000, 1, 3), (1, 500_000, 3)])
def test_long_and_narrow_picture_is_refused_before_it_grows(tmp_path, shape):
    """Half a megapixel, of which resizing the shorter side would make 32,000 megapixels."""
    path = classifier(tmp_path / "tiny.onnx", resize=256)
    with TestClient(application({"tiny": path})) as client:
        wait_ready(client)
        body = jpeg(np.zeros(shape, "u1"))
        assert_error(client.post("/v2/models/tiny/classify", content=body), 400, "too long and narrow")
        assert client.post("/v2/models/tiny/classify", content=jpeg(np.zeros((9, 300, 3), "u1"))).status_code == 200


def test_tensor_of_open_size_has_no_endless_side(client):
    narrow = {"images": np.zeros((1, 1, 65_536, 3), "f4")}
    assert_error(post(client, "open", *protocol.encode_request(narrow)), 413, "has a side of more than 65,535")
    assert response_of(post(client, "open", *protocol.encode_request({"images": narrow["images"][:, :, 1:]})))


@pytest.mark.parametrize(
    "model, inputs, status, text",
    [
        ("nope", {"images": ("FP32", np.zeros((1, 8, 8, 3)))}, 404, "there is no model 'nope'"),
        ("tiny/versions/2", {"images": ("FP32", np.zeros((1, 8, 8, 3)))}, 404, "has no version '2'; it has 1"),
        ("tiny", {"pictures": ("FP32", np.zeros((1, 8, 8, 3)))}, 400, "inputs of model 'tiny' are images; got pictures"),
        ("tiny", {"images": ("FP64", np.zeros((1, 8, 8, 3)))}, 400, "must be FP32, got FP64"),
        ("tiny", {"images": ("FP32", np.zeros((1, 8, 9, 3)))}, 400, "must have shape [-1, 8, 8, 3], got [1, 8, 9, 3]"),
        ("tiny", {"images": ("FP32", np.zeros((8, 8, 3)))}, 400, "must have shape"),
        ("tiny", {"images": ("FP32", np.zeros((0, 8, 8, 3)))}, 400, "at least one row"),
        ("tiny", {"images": ("FP32", np.zeros((257, 8, 8, 3)))}, 413, "may have 256 rows, got 257"),
        ("echo", {"a": ("BYTES", np.array([["x", "y"]])), "b": ("FP32", np.zeros((2, 1)))}, 400, "same number of rows"),
    ],
)
def test_what_the_model_cannot_take_is_named(client, model, inputs, status, text):
    assert_error(post(client, model, infer_json(inputs)), status, text)


def test_other_errors_are_json_too(client):
    assert_error(client.get("/nothing"), 404, "there is nothing at /nothing")
    assert_error(client.get("/v2/models/tiny/infer"), 405, "GET is not allowed here")
    assert_error(client.get("/v2/models/../../etc/passwd"), 404, "there is nothing")
    assert_error(client.get("/v2/models/%2e%2e"), 404, "there is no model")
    assert_error(post(client, "tiny", b"{"), 400, "not valid JSON")
    assert_error(post(client, "tiny", b"{}", 3), 400, "but the body has only 2 bytes")
    body = infer_json({"images": ("FP32", np.zeros((1, 8, 8, 3)))}, outputs=[{"name": "x"}])
    assert_error(post(client, "tiny", body), 400, "has no output 'x'; it has logits")
    body = protocol.encode_request({"a": np.array([[b"\xff", b""]], object), "b": np.zeros((1, 1), "f4")})
    assert_error(post(client, "echo", *body), 400, "input 'a' must hold UTF-8 strings")


def test_nan_comes_back_in_binary_and_is_refused_in_json(client):
    images = np.full((1, 8, 8, 3), np.nan, "f4")
    found = response_of(post(client, "tiny", *protocol.encode_request({"images": images}))).outputs["logits"]
    assert np.isnan(found).all()
    outputs = [protocol.RequestedOutput("logits")]
    assert_error(post(client, "tiny", *protocol.encode_request({"images": images}, outputs)), 400, "NaN or infinity")


def test_statistics_and_metrics_agree(models, pixels):
    with TestClient(application({"tiny": models["tiny"]}, warm_up=False)) as client:
        wait_ready(client)
        for rows in (1, 2, 2, 6):
            response_of(post(client, "tiny", *protocol.encode_request({"images": pixels[:rows].astype("f4")})))
        post(client, "tiny", b"{")
        stats = client.get("/v2/models/tiny/versions/1/stats").json()
        assert stats == client.get("/v2/models/stats").json() == client.get("/v2/models/tiny/stats").json()
        [entry] = stats["model_stats"]
        assert (entry["inference_count"], entry["execution_count"]) == (11, 5)
        assert entry["inference_stats"]["success"]["count"] == 4 and entry["inference_stats"]["fail"]["count"] == 0
        assert {b["batch_size"]: b["compute_infer"]["count"] for b in entry["batch_stats"]} == {1: 1, 2: 3, 4: 1}
        metrics = client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        families = {family.name: family for family in text_string_to_metric_families(metrics.text)}
        for name, value in (("request_success", 4), ("count", 11), ("exec_count", 5), ("pending_request_count", 0)):
            [sample] = families[f"nv_inference_{name}"].samples
            assert (sample.labels, sample.value) == ({"model": "tiny", "version": "1"}, value)
            # The parser renames counters; Triton's dashboards look for the plain names.
            assert f'nv_inference_{name}{{model="tiny",version="1"}} {value}' in metrics.text.splitlines()
        assert families["process_resident_memory_bytes"].samples[0].value > 1e6


def test_keys_are_asked_for(models):
    with TestClient(application({"tiny": models["tiny"]}, app={"api_keys": ("s3cret", "other")})) as client:
        wait_ready(client)
        for path in ("/v2/models/tiny", "/metrics", "/v2", "/openapi.json"):
            answer = client.get(path)
            assert_error(answer, 401, "Bearer")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert client.get(path, headers={"Authorization": "Basic s3cret"}).status_code == 401
            for key in ("s3cret", "other"):
                assert client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert client.get("/").status_code == client.get("/v2/health/live").status_code == 200


def test_limits(models, pixels):
    limits = {"max_pixels": 100, "max_open_pixels": 50, "max_request_rows": 2}
    with TestClient(application(models, app={"max_body": 2000}, **limits)) as client:
        wait_ready(client)
        assert_error(post(client, "tiny", bytes(2001)), 413, "more than 2,000 bytes")
        bomb = gzip.compress(bytes(10**6))
        assert_error(post(client, "bytes", bomb, **{"Content-Encoding": "gzip"}), 413, "unpacks to more than 2,000 bytes")
        picture = jpeg(np.zeros((11, 10, 3), "u1"))
        assert_error(client.post("/v2/models/tiny/classify", content=picture), 400, "at most 100 pixels")
        # Its header alone is beyond what Pillow itself lets pass.
        bomb = b"P6 1000000 1000000 255\n"
        assert_error(client.post("/v2/models/tiny/classify", content=bomb), 400, "too many pixels; at most 100 pixels")
        assert_error(post(client, "bytes", *protocol.encode_request({"images": pixels[:3]})), 413, "may have 2 rows, got 3")
        wide = protocol.encode_request({"images": np.zeros((1, 7, 10, 3), "f4")})
        assert_error(post(client, "open", *wide), 413, "[1, 7, 10, 3] has more than 50 pixels")
        picture = jpeg(np.zeros((10, 10, 3), "u1"))
        assert_error(client.post("/v2/models/open/classify", content=picture), 413, "[1, 10, 10, 3] has more than 50 pixels")
        packed = client.post("/v2/models/tiny/classify", content=gzip.compress(picture), headers={"Content-Encoding": "gzip"})
        assert packed.status_code == 200
        assert response_of(post(client, "bytes", *protocol.encode_request({"images": pixels[:2]})))


def test_repository_control(tmp_path, pixels):
    classifier(tmp_path / "net" / "1" / "model.onnx")
    classifier(tmp_path / "flat.onnx", bias=np.ones(CLASSES))
    images = pixels[:1].astype("f4")
    body = protocol.encode_request({"images": images})
    with TestClient(application({}, folder=tmp_path, app={"allow_control": True})) as client:
        wait_ready(client)
        index = client.post("/v2/repository/index").json()
        assert index == [{"name": n, "version": "1", "state": "READY", "reason": ""} for n in ("flat", "net")]
        first = response_of(post(client, "net", *body)).outputs["logits"]

        classifier(tmp_path / "net" / "10" / "model.onnx", bias=np.zeros(CLASSES))
        assert client.get("/v2/models/net").json()["versions"] == ["1"]
        assert client.post("/v2/repository/models/net/load", content=b"{}").status_code == 200
        assert client.get("/v2/models/net").json()["versions"] == ["1", "10"]
        newest = response_of(post(client, "net", *body))
        assert newest.model_version == "10" and not np.allclose(newest.outputs["logits"], first)
        assert np.array_equal(response_of(post(client, "net/versions/1", *body)).outputs["logits"], first)

        (tmp_path / "net" / "11").mkdir()
        (tmp_path / "net" / "11" / "model.onnx").write_bytes(b"no model")
        answer = client.post("/v2/repository/models/net/load")
        assert_error(answer, 400, "version 11 of model 'net' does not open")
        assert str(tmp_path) not in answer.text
        assert response_of(post(client, "net", *body)).model_version == "10"

        options = b'{"parameters": {"unload_dependents": false}}'
        assert client.post("/v2/repository/models/net/unload", content=options).status_code == 200
        assert_error(post(client, "net", *body), 404, "not loaded")
        assert client.get("/v2/models/net/ready").status_code == 404
        # Like Triton: what was unloaded on purpose is no reason to take the server out of service.
        assert client.get("/v2/health/ready").status_code == 200
        assert [e["name"] for e in client.post("/v2/repository/index", content=b'{"ready": true}').json()] == ["flat"]
        assert response_of(post(client, "flat", *body))

        for name in ("nope", "..", "%2e%2e%2fnet"):
            assert client.post(f"/v2/repository/models/{name}/load").status_code == 404
        answer = client.post("/v2/repository/models/net/load", content=b'{"parameters": {"file:1/model.onnx": "AAAA"}}')
        assert_error(answer, 400, "cannot be sent")


def test_control_is_off_unless_allowed(client):
    for action in ("load", "unload"):
        assert_error(client.post(f"/v2/repository/models/tiny/{action}"), 403, "--allow-control")
    assert client.get("/v2/models/tiny/ready").status_code == 200


def asynchronously(app, work):
    async def main():
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
                while (await client.get("/v2/health/ready")).status_code != 200:
                    await asyncio.sleep(0.01)
                return await work(client)

    return asyncio.run(main())


def test_many_clients_share_batches_and_get_their_own_rows(models):
    images = np.random.default_rng(11).integers(0, 256, (64, 8, 8, 3)).astype("u1")

    async def work(client):
        async def one(image):
            body, length = protocol.encode_request({"images": image[None]})
            headers = {protocol.HEADER_LENGTH: str(length), "Accept-Encoding": "identity"}
            return response_of(await client.post("/v2/models/bytes/infer", content=body, headers=headers)).outputs["logits"]

        found = await asyncio.gather(*map(one, images))
        return np.concatenate(found), (await client.get("/v2/models/bytes/stats")).json()["model_stats"][0]

    app = application({"bytes": models["bytes"]}, batch=BatchOptions(max_rows=16, max_delay=0.05))
    found, stats = asynchronously(app, work)
    assert_logits(found, images)
    assert stats["inference_count"] == 64 and stats["execution_count"] <= 16


def test_full_queue_and_deadline_are_503_with_retry_after(models, monkeypatch):
    gate, run = threading.Event(), Session.run

    async def work(client):
        monkeypatch.setattr(Session, "run", lambda self, feeds: gate.wait(20) and run(self, feeds))

        def send(**parameters):
            body, length = protocol.encode_request({"images": np.zeros((1, 8, 8, 3), "u1")}, parameters=parameters)
            headers = {protocol.HEADER_LENGTH: str(length), "Accept-Encoding": "identity"}
            return asyncio.create_task(client.post("/v2/models/bytes/infer", content=body, headers=headers))

        running = send()
        answer = await send(timeout=30_000)
        assert_error(answer, 503, "no answer within 0.03 s")
        waiting = send()
        while 'pending_request_count{model="bytes",version="1"} 1\n' not in (await client.get("/metrics")).text:
            await asyncio.sleep(0.005)
        refused = await send()
        assert_error(refused, 503, "1 rows wait already; at most 1 may")
        assert refused.headers["retry-after"] == "1"
        gate.set()
        assert [(await task).status_code for task in (running, waiting)] == [200, 200]
        assert response_of(await send())

    asynchronously(application({"bytes": models["bytes"]}, batch=BatchOptions(max_rows=1, queue_rows=1), warm_up=False), work)


def test_slow_body_is_408_and_leaves_nothing_behind(models):
    async def slow():
        yield b"{"
        await asyncio.sleep(20)

    async def work(client):
        assert_error(await client.post("/v2/models/bytes/infer", content=slow()), 408, "did not come within 0.05 s")
        body, length = protocol.encode_request({"images": np.zeros((1, 8, 8, 3), "u1")})
        headers = {protocol.HEADER_LENGTH: str(length), "Accept-Encoding": "identity"}
        assert response_of(await client.post("/v2/models/bytes/infer", content=body, headers=headers))

    asynchronously(application({"bytes": models["bytes"]}, app={"body_timeout": 0.05}), work)


def test_bodies_of_all_requests_together_are_bounded(models):
    body, length = protocol.encode_request({"images": np.zeros((8, 8, 8, 3), "u1")})
    headers = {protocol.HEADER_LENGTH: str(length), "Accept-Encoding": "identity"}

    async def work(client):
        go_on, arrived = asyncio.Event(), []

        async def halting():
            yield body[:-1]
            arrived.append(1)
            await go_on.wait()
            yield body[-1:]

        def send(content):
            return asyncio.create_task(client.post("/v2/models/bytes/infer", content=content, headers=headers))

        slow = [send(halting()), send(halting())]
        while len(arrived) < 2:
            await asyncio.sleep(0.001)
        refused = await send(body)
        assert_error(refused, 503, "too many requests at once")
        assert refused.headers["retry-after"] == "1"
        go_on.set()
        for task in slow:
            assert len(response_of(await task).outputs["logits"]) == 8
        assert response_of(await send(body))

    asynchronously(application({"bytes": models["bytes"]}, app={"max_buffered": 2 * len(body) + 10}), work)


def test_large_pictures_in_small_files_count_as_what_they_become(models, monkeypatch):
    picture = jpeg(np.zeros((300, 400, 3), "u1"))
    assert len(picture) < 10_000
    go_on, run = threading.Event(), Session.run

    def halting(self, inputs, *outputs):
        assert go_on.wait(20)
        return run(self, inputs, *outputs)

    async def work(client):
        def send():
            return asyncio.create_task(client.post("/v2/models/open/classify", content=picture))

        monkeypatch.setattr(Session, "run", halting)
        tasks = [send() for _ in range(3)]
        # The one that is refused ends while the model still holds the others.
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        go_on.set()
        answers = await asyncio.gather(*tasks)
        assert sorted(answer.status_code for answer in answers) == [200, 200, 503]
        assert_error(next(answer for answer in answers if answer.status_code == 503), 503, "too many requests at once")
        assert (await send()).status_code == 200

    asynchronously(application({"open": models["open"]}, app={"max_buffered": 2 * 300 * 400 * 3 * 4 + 30_000}), work)


def test_model_failure_is_500_and_harms_nobody_else(models, monkeypatch):
    run = Session.run

    def failing(self, feeds):
        if feeds["images"].max() == 255:
            raise RuntimeError("out of memory\nsecond line")
        return run(self, feeds)

    with TestClient(application({"bytes": models["bytes"]}, batch=BatchOptions(max_rows=1))) as client:
        wait_ready(client)
        monkeypatch.setattr(Session, "run", failing)
        bad = protocol.encode_request({"images": np.full((1, 8, 8, 3), 255, "u1")})
        assert_error(post(client, "bytes", *bad), 500, "model 'bytes' failed: out of memory")
        good = protocol.encode_request({"images": np.full((1, 8, 8, 3), 254, "u1")})
        assert response_of(post(client, "bytes", *good))
        [entry] = client.get("/v2/models/bytes/stats").json()["model_stats"]
        assert entry["inference_stats"]["fail"]["count"] == 1 and entry["inference_stats"]["success"]["count"] == 1


def test_one_bad_request_does_not_fail_its_batch(tmp_path):
    """An index out of range is found only when the model runs, together with what other clients sent."""
    path = gatherer(tmp_path / "table.onnx")

    async def work(client):
        async def one(index):
            body, length = protocol.encode_request({"ids": np.array([[index]])})
            headers = {protocol.HEADER_LENGTH: str(length), "Accept-Encoding": "identity"}
            return await client.post("/v2/models/table/infer", content=body, headers=headers)

        indices = [*range(8), 4242, *range(7)]
        answers = await asyncio.gather(*map(one, indices))
        for index, answer in zip(indices, answers, strict=True):
            if index == 4242:
                assert_error(answer, 500, "4242")
            else:
                assert np.array_equal(response_of(answer).outputs["y"], TABLE[[[index]]])
        [entry] = (await client.get("/v2/models/table/stats")).json()["model_stats"]
        assert (entry["inference_stats"]["fail"]["count"], entry["inference_count"]) == (1, 15)

    asynchronously(application({"table": path}, batch=BatchOptions(max_rows=16, max_delay=0.05)), work)


def test_server_is_alive_but_not_ready_while_it_warms_up(models, monkeypatch):
    gate, run = threading.Event(), Session.run
    monkeypatch.setattr(Session, "run", lambda self, feeds: gate.wait(20) and run(self, feeds))
    with TestClient(application({"bytes": models["bytes"]})) as client:
        assert client.get("/v2/health/live").status_code == 200
        assert_error(client.get("/v2/health/ready"), 503, "not all models are ready")
        answer = post(client, "bytes", b"{}")
        assert_error(answer, 503, "still being loaded")
        assert answer.headers["retry-after"] == "1"
        gate.set()
        wait_ready(client)
        # Warm-up ran every batch size, and is no part of the statistics.
        assert client.get("/v2/models/bytes/stats").json()["model_stats"][0]["execution_count"] == 0


def test_model_that_cannot_run_never_becomes_ready(models, monkeypatch):
    def broken(self, feeds):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(Session, "run", broken)
    with TestClient(application({"bytes": models["bytes"]})) as client:
        while client.post("/v2/repository/index").json()[0]["state"] == "LOADING":
            pass
        [entry] = client.post("/v2/repository/index").json()
        assert entry["state"] == "UNAVAILABLE" and "no kernel" in entry["reason"]
        assert client.get("/v2/health/ready").status_code == 503
