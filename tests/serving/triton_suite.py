"""What tritonclient, the reference client, must be able to do with a server: `python triton_suite.py PART HOST:PORT`."""

import asyncio
import sys

import numpy as np
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

LABELS = ["red", "green", "blue", "dark: night", "grün"]


def tensor(name, array, datatype, binary=True):
    item = triton.InferInput(name, list(array.shape), datatype)
    item.set_data_from_numpy(array, binary_data=binary)
    return item


def refused(call, text, status=400):
    try:
        call()
    except InferenceServerException as error:
        assert text in str(error) and error.status() == str(status), error
        return
    raise AssertionError(f"not refused: {text}")


def models(client, address):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype("u1")
    floats = images.astype("f4")

    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1") and not client.is_model_ready("tiny", "2") and not client.is_model_ready("none")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("tiny")["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 8, 8, 3]}]
    assert client.get_model_config("tiny")["max_batch_size"] == 16
    assert {entry["name"]: entry["state"] for entry in client.get_model_repository_index()}["tiny"] == "READY"

    plain = client.infer("tiny", [tensor("images", floats, "FP32")]).as_numpy("logits")
    assert plain.shape == (3, 5) and plain.dtype == np.float32
    for binary_in in (False, True):
        for binary_out in (False, True):
            wanted = [triton.InferRequestedOutput("logits", binary_data=binary_out)]
            sent = [tensor("images", floats, "FP32", binary_in)]
            answer = client.infer("tiny", sent, outputs=wanted, request_id="abc", model_version="1")
            assert np.array_equal(answer.as_numpy("logits"), plain)
            assert answer.get_response()["id"] == "abc"
            assert answer.get_response()["model_version"] == "1"
    for packing in ("gzip", "deflate"):
        sent = [tensor("images", images, "UINT8")]
        answer = client.infer("bytes", sent, request_compression_algorithm=packing, response_compression_algorithm=packing)
        assert np.array_equal(answer.as_numpy("logits"), plain)

    half = np.arange(8, dtype="f2").reshape(2, 4)
    answer = client.infer("half", [tensor("x", half, "FP16")])
    assert np.array_equal(answer.as_numpy("y"), 2 * half) and answer.as_numpy("n").dtype == np.float16
    answer = client.infer("half", [tensor("x", half, "FP16")], outputs=[triton.InferRequestedOutput("n")])
    assert answer.as_numpy("y") is None and answer.as_numpy("n").shape == (2, 1)

    words = np.array([[b"a", "grün".encode()]], dtype=object)
    for binary in (False, True):
        sent = [tensor("a", words, "BYTES", binary), tensor("b", np.ones((1, 2), "f4"), "FP32", not binary)]
        wanted = [triton.InferRequestedOutput("d", binary_data=binary), triton.InferRequestedOutput("c", binary_data=not binary)]
        answer = client.infer("echo", sent, outputs=wanted)
        found = [item if isinstance(item, bytes) else item.encode() for item in answer.as_numpy("c").ravel()]
        assert found == words.ravel().tolist() and answer.as_numpy("d").tolist() == [[1, 1]]

    for binary in (False, True):
        answer = client.infer(
            "bytes", [tensor("images", images, "UINT8")], outputs=[triton.InferRequestedOutput("logits", binary, class_count=2)]
        )
        found = answer.as_numpy("logits")
        assert found.shape == (3, 2)
        for row, scores in zip(found, plain, strict=True):
            text = row[0] if isinstance(row[0], str) else row[0].decode()
            value, index, label = text.split(":", 2)
            assert int(index) == scores.argmax() and label == LABELS[int(index)] and abs(float(value) - scores.max()) < 1e-5

    before = client.get_inference_statistics("bytes")["model_stats"][0]
    waiting = [client.async_infer("bytes", [tensor("images", images[:1] + i, "UINT8")]) for i in range(64)]
    rows = np.concatenate([item.get_result().as_numpy("logits") for item in waiting])
    singly = [client.infer("bytes", [tensor("images", images[:1] + i, "UINT8")]).as_numpy("logits") for i in range(64)]
    np.testing.assert_allclose(rows, np.concatenate(singly), rtol=1e-5, atol=1e-5)
    after = client.get_inference_statistics("bytes", "1")["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 128
    print(f"{after['execution_count'] - before['execution_count'] - 64} executions for 64 requests at once")

    counted = {"success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"}
    assert set(after["inference_stats"]) == counted and after["inference_stats"]["success"]["count"] >= 128
    for batch in after["batch_stats"]:
        assert set(batch) == {"batch_size", "compute_input", "compute_infer", "compute_output"}
    assert {entry["name"] for entry in client.get_inference_statistics()["model_stats"]} >= {"tiny", "bytes", "half", "echo"}

    sent = [tensor("images", floats, "FP32")]
    more = {"priority": 3, "timeout": 10_000_000, "sequence_id": 7, "sequence_start": True, "sequence_end": True}
    own = {"text": "x", "whole": 1, "part": 2.5, "flag": True}
    answer = client.infer("tiny", sent, parameters=own, headers={"x-y": "1"}, query_params={"a": "1", "b": ["2", "3"]}, **more)
    assert np.array_equal(answer.as_numpy("logits"), plain) and "id" not in answer.get_response()
    for name in ("abc-ü", 'a"b', "0"):
        assert client.infer("tiny", sent, request_id=name).get_response()["id"] == name
    swapped = [triton.InferRequestedOutput("n"), triton.InferRequestedOutput("y")]
    answer = client.infer("half", [tensor("x", half, "FP16")], outputs=swapped).get_response()
    assert [output["name"] for output in answer["outputs"]] == ["n", "y"]
    images_of_many_sizes(client)

    refused(lambda: client.infer("none", [tensor("images", floats, "FP32")]), "no model", 404)
    refused(lambda: client.infer("tiny", sent, model_version="9"), "no version", 404)
    refused(lambda: client.infer("tiny", [tensor("pictures", floats, "FP32")]), "got pictures")
    refused(lambda: client.infer("tiny", [tensor("images", images, "UINT8")]), "must be FP32")
    refused(lambda: client.infer("tiny", [tensor("images", floats[:, :4], "FP32")]), "must have shape")
    refused(lambda: client.infer("tiny", [tensor("images", floats[:0], "FP32")]), "at least one row")
    refused(lambda: client.infer("tiny", []), "at least one tensor")
    refused(lambda: client.infer("tiny", sent * 2), "given twice")
    refused(lambda: client.infer("single", [tensor("images", floats[:2], "FP32")]), "must have shape")
    refused(lambda: client.infer("tiny", sent, outputs=[triton.InferRequestedOutput("x")]), "has no output 'x'")
    refused(lambda: client.infer("half", [tensor("x", half, "FP16")], outputs=[triton.InferRequestedOutput("y", False)]), "FP16")
    elsewhere = triton.InferInput("images", [3, 8, 8, 3], "FP32")
    elsewhere.set_shared_memory("region", floats.nbytes)
    refused(lambda: client.infer("tiny", [elsewhere]), "shared memory")
    elsewhere = triton.InferRequestedOutput("logits")
    elsewhere.set_shared_memory("region", 60)
    refused(lambda: client.infer("tiny", sent, outputs=[elsewhere]), "shared memory")
    refused(lambda: client.infer("bytes", [tensor("images", np.zeros((300, 8, 8, 3), "u1"), "UINT8")]), "256 rows", 413)
    refused(lambda: client.get_model_metadata("none"), "no model", 404)
    refused(lambda: client.get_model_config("tiny", "7"), "no version", 404)
    refused(lambda: client.load_model("tiny"), "--allow-control", 403)
    refused(lambda: client.unload_model("tiny"), "--allow-control", 403)
    for missing in (client.get_system_shared_memory_status, client.get_trace_settings, client.get_log_settings):
        refused(missing, "nothing at", 404)

    body, length = triton.InferenceServerClient.generate_request_body([tensor("images", floats, "FP32")])
    answer = client._post("v2/models/tiny/infer", body, {"Inference-Header-Content-Length": str(length)}, None)
    assert answer.status_code == 200
    for broken in (body[:-1], body + b"x"):
        answer = client._post("v2/models/tiny/infer", broken, {"Inference-Header-Content-Length": str(length)}, None)
        assert answer.status_code == 400
    answer = client._post("v2/models/tiny/infer", body, {"Inference-Header-Content-Length": str(len(body) + 1)}, None)
    assert answer.status_code == 400

    asyncio.run(conforms_async(address, floats, plain))


def images_of_many_sizes(client):
    random = np.random.default_rng(1)
    sent = [random.integers(0, 256, (1 + i % 3, 4 + i % 5, 4 + i % 7, 3)).astype("f4") for i in range(40)]
    waiting = [client.async_infer("open", [tensor("images", item, "FP32")], request_id=str(i)) for i, item in enumerate(sent)]
    for number, (item, future) in enumerate(zip(sent, waiting, strict=True)):
        answer = future.get_result()
        assert answer.get_response()["id"] == str(number)
        alone = client.infer("open", [tensor("images", item, "FP32")]).as_numpy("logits")
        np.testing.assert_allclose(answer.as_numpy("logits"), alone, rtol=1e-5, atol=1e-5)


def datatypes(client, address):
    names = {"float64": "FP64"}
    for model in sorted(entry["name"] for entry in client.get_model_repository_index()):
        if model == "bool":
            array = np.array([[True, False, True, True], [False, False, True, False]])
        elif model == "float64":
            array = np.array([[1e300, -1e-300, 0.1, 0], [1, 2, 3, 4]])
        else:
            limits = np.iinfo(model)
            array = np.array([[0, 1, 2, 3], [limits.max, limits.min, limits.max - 1, 1]], model)
        for binary_in in (False, True):
            for binary_out in (False, True):
                sent = [tensor("x", array, names.get(model, model.upper()), binary_in)]
                wanted = [triton.InferRequestedOutput("y", binary_out), triton.InferRequestedOutput("n", not binary_out)]
                answer = client.infer(model, sent, outputs=wanted)
                assert answer.get_output("y")["datatype"] == names.get(model, model.upper())
                for name, expected in (("y", array), ("n", array[:, :1])):
                    found = answer.as_numpy(name)
                    assert found.dtype == array.dtype and np.array_equal(found, expected), (model, name, found)


def control(client, address):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype("u1")
    sent = [tensor("images", images, "UINT8")]
    assert client.get_model_metadata("net")["versions"] == ["1", "3"]
    old, new = (client.infer("net", sent, model_version=version).as_numpy("logits") for version in ("1", "3"))
    newest = client.infer("net", sent)
    assert np.array_equal(newest.as_numpy("logits"), new) and not np.allclose(old, new)
    assert newest.get_response()["model_version"] == "3"
    for dependents in (False, True):
        client.unload_model("net", unload_dependents=dependents)
        assert not client.is_model_ready("net") and client.is_model_ready("other")
        # What was unloaded on purpose is no reason to take the server out of service.
        assert client.is_server_ready()
        states = {(entry["name"], entry["version"]): entry["state"] for entry in client.get_model_repository_index()}
        assert states == {("net", "1"): "UNAVAILABLE", ("net", "3"): "UNAVAILABLE", ("other", "1"): "READY"}
        refused(lambda: client.infer("net", sent), "not loaded", 404)
        client.load_model("net")
        assert np.array_equal(client.infer("net", sent, model_version="1").as_numpy("logits"), old)
    for name in ("none", "../etc"):
        refused(lambda name=name: client.load_model(name), "no", 404)
        refused(lambda name=name: client.unload_model(name), "no", 404)
    refused(lambda: client.load_model("net", config='{"name": "net"}'), "cannot be sent")


async def conforms_async(address, floats, plain):
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_server_ready() and not await client.is_model_ready("none")
        packings = (None, "gzip", "deflate")
        answers = await asyncio.gather(
            *(
                client.infer(
                    "tiny",
                    [tensor("images", floats[i % 3 : i % 3 + 1], "FP32", bool(i % 2))],
                    request_id=str(i),
                    outputs=[triton.InferRequestedOutput("logits", binary_data=bool(i % 4 < 2))],
                    request_compression_algorithm=packings[i % 3],
                    response_compression_algorithm=packings[i // 3 % 3],
                )
                for i in range(24)
            )
        )
        assert [answer.get_response()["id"] for answer in answers] == [str(i) for i in range(24)]
        found = np.concatenate([answer.as_numpy("logits") for answer in answers])
        np.testing.assert_allclose(found, np.tile(plain, (8, 1)), rtol=1e-5, atol=1e-5)
        assert (await client.get_model_metadata("tiny"))["name"] == "tiny"
        for call in (client.infer("none", [tensor("images", floats, "FP32")]), client.get_model_metadata("tiny", "9")):
            try:
                await call
            except InferenceServerException as error:
                assert error.status() == "404", error
            else:
                raise AssertionError("not refused")


if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[2], concurrency=64) as connected:
        {"models": models, "datatypes": datatypes, "control": control}[sys.argv[1]](connected, sys.argv[2])
    print("conforms")
