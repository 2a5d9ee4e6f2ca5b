"""What tritonclient, the reference client, must be able to do with a server: `python triton_suite.py HOST:PORT`."""

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


def refused(call, text):
    try:
        call()
    except InferenceServerException as error:
        assert text in str(error), error
        return
    raise AssertionError(f"not refused: {text}")


def conforms(client, address):
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

    refused(lambda: client.infer("none", [tensor("images", floats, "FP32")]), "no model")
    refused(lambda: client.infer("tiny", [tensor("images", floats, "FP32")], model_version="9"), "no version")
    refused(lambda: client.infer("tiny", [tensor("pictures", floats, "FP32")]), "got pictures")
    refused(lambda: client.infer("tiny", [tensor("images", images, "UINT8")]), "must be FP32")
    refused(lambda: client.infer("tiny", [tensor("images", floats[:, :4], "FP32")]), "must have shape")
    unknown = [triton.InferRequestedOutput("x")]
    refused(lambda: client.infer("tiny", [tensor("images", floats, "FP32")], outputs=unknown), "has no output 'x'")
    refused(lambda: client.get_model_metadata("none"), "no model")
    refused(lambda: client.load_model("tiny"), "--allow-control")
    refused(lambda: client.unload_model("tiny"), "--allow-control")

    body, length = triton.InferenceServerClient.generate_request_body([tensor("images", floats, "FP32")])
    answer = client._post("v2/models/tiny/infer", body, {"Inference-Header-Content-Length": str(length)}, None)
    assert answer.status_code == 200
    for broken in (body[:-1], body + b"x"):
        answer = client._post("v2/models/tiny/infer", broken, {"Inference-Header-Content-Length": str(length)}, None)
        assert answer.status_code == 400
    answer = client._post("v2/models/tiny/infer", body, {"Inference-Header-Content-Length": str(len(body) + 1)}, None)
    assert answer.status_code == 400

    asyncio.run(conforms_async(address, floats, plain))


async def conforms_async(address, floats, plain):
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_server_ready() and not await client.is_model_ready("none")
        sent = [[tensor("images", floats[i : i + 1], "FP32")] for i in (0, 1, 2) * 8]
        answers = await asyncio.gather(*(client.infer("tiny", inputs) for inputs in sent))
        found = np.concatenate([answer.as_numpy("logits") for answer in answers])
        np.testing.assert_allclose(found, np.tile(plain, (8, 1)), rtol=1e-5, atol=1e-5)
        assert (await client.get_model_metadata("tiny"))["name"] == "tiny"


if __name__ == "__main__":
    with triton.InferenceServerClient(sys.argv[1], concurrency=64) as connected:
        conforms(connected, sys.argv[1])
    print("conforms")
