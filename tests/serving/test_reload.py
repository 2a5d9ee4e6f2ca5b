"""Models that are loaded, unloaded and replaced while requests for them arrive."""

import asyncio
import io

import numpy as np
import pytest

for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
from PIL import Image
from running import serving
from tiny_models import BIAS, classifier, classifier_logits

from resnet_export.serving import protocol

RELOADS = 60


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


async def load_while(client, change, ask, clients=8):
    """Let `clients` ask without a pause while `change` runs; returns all their answers."""
    answers, done = [], asyncio.Event()

    async def one(number):
        while not done.is_set():
            answers.append(await ask(client, number))

    tasks = [asyncio.create_task(one(number)) for number in range(clients)]
    try:
        await change(client)
    finally:
        done.set()
        await asyncio.gather(*tasks)
    return answers


def run_against(server, work):
    async def main():
        async with httpx.AsyncClient(base_url=server.url, timeout=30, headers={"Accept-Encoding": "identity"}) as client:
            return await work(client)

    return asyncio.run(main())


def test_no_request_fails_while_its_model_is_reloaded(tmp_path, pixels):
    """Two versions of the weights take turns; every answer is one or the other, whichever route it took."""
    path = tmp_path / "net" / "1" / "model.onnx"
    biases = [BIAS, BIAS + np.float32(1)]
    classifier(path, dtype="uint8", bias=biases[0])
    body, length = protocol.encode_request({"images": pixels[:2]})
    expected = [classifier_logits(pixels[:2]) - BIAS + bias for bias in biases]

    async def ask(client, number):
        if number % 4 == 0:
            return await client.post("/v2/models/net/classify?top=5", content=png(pixels[0]))
        if number % 4 == 1:
            return await client.post("/v2/models/net/infer", content=pixels[0].tobytes(), headers={protocol.HEADER_LENGTH: "0"})
        return await client.post("/v2/models/net/infer", content=body, headers={protocol.HEADER_LENGTH: str(length)})

    async def change(client):
        for turn in range(RELOADS):
            classifier(path, dtype="uint8", bias=biases[(turn + 1) % 2])
            answer = await client.post("/v2/repository/models/net/load")
            assert answer.status_code == 200, answer.text

    with serving("--repository", tmp_path, "--allow-control", "--max-batch", "4") as server:
        answers = run_against(server, lambda client: load_while(client, change, ask))
    assert len(answers) > RELOADS
    failed = [answer.text for answer in answers if answer.status_code != 200]
    assert not failed, (len(failed), len(answers), failed[:3])
    for answer in answers:
        if protocol.HEADER_LENGTH in answer.headers:
            found = protocol.decode_response(answer.content, int(answer.headers[protocol.HEADER_LENGTH])).outputs["logits"]
            assert any(np.allclose(found, want[: len(found)], rtol=1e-5, atol=1e-5) for want in expected)


def test_unloading_finishes_what_was_taken_and_refuses_the_rest_with_404(tmp_path, pixels):
    classifier(tmp_path / "net" / "1" / "model.onnx", dtype="uint8")
    body, length = protocol.encode_request({"images": pixels})

    async def ask(client, number):
        return await client.post("/v2/models/net/infer", content=body, headers={protocol.HEADER_LENGTH: str(length)})

    async def change(client):
        for _ in range(RELOADS // 3):
            for action in ("unload", "load"):
                assert (await client.post(f"/v2/repository/models/net/{action}")).status_code == 200

    with serving("--repository", tmp_path, "--allow-control") as server:
        answers = run_against(server, lambda client: load_while(client, change, ask))
    assert {answer.status_code for answer in answers} <= {200, 404}
    assert {answer.json()["error"] for answer in answers if answer.status_code == 404} <= {"model 'net' is not loaded"}
    assert any(answer.status_code == 200 for answer in answers)
