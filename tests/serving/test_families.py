"""Families: requests get the member they ask for, or one that the deadline or the queue allows; the answer names it."""

import asyncio
import functools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")
pytest.importorskip("httpx", reason="needs the extra `client`")
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from test_app import application, assert_error, jpeg, post, response_of, wait_ready
from tiny_models import BIAS, LABELS, MEMBERS, classifier, classifier_logits, family

from resnet_export.artifact import digest
from resnet_export.cli import main
from resnet_export.errors import MismatchError, UsageError
from resnet_export.family import read_family
from resnet_export.serving import protocol
from resnet_export.serving.batcher import Batcher, BatchOptions
from resnet_export.serving.families import ServedFamily, member_sources
from resnet_export.serving.models import ModelOptions, ServedModel, Source
from resnet_export.serving.protocol import ProtocolError
from resnet_export.serving.repository import find_models, parse_sources


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def client(path):
    with TestClient(application({"net": path, "tiny": path.parent / "net-1.onnx"})) as client:
        yield wait_ready(client)


def ask(client, pixels, **parameters):
    """The member that has answered, after a check that the numbers are those of that member."""
    body, length = protocol.encode_request({"images": pixels.astype("f4")}, request_id="7", parameters=parameters)
    found = response_of(post(client, "net", body, length))
    assert (found.model_name, found.model_version, found.id) == ("net", "1", "7")
    depth = found.parameters["depth"]
    expected = classifier_logits(pixels) - BIAS + MEMBERS[depth]
    np.testing.assert_allclose(found.outputs["logits"], expected, rtol=1e-4, atol=1e-4)
    return depth


def opened(path, **options):
    options = {"batch": BatchOptions(max_rows=4, max_delay=0.0)} | options
    return ServedFamily(Source("net", "1", path), ModelOptions(device="cpu", threads=1, **options))


# ---------------------------------------------------------------- choice


def test_a_request_gets_the_member_it_asks_for(client, pixels):
    assert ask(client, pixels) == "1"
    for depth, name in (("0.75", "0.75"), (0.75, "0.75"), (1, "1"), (1.0, "1"), ("1.0", "1"), ("0.5", "0.5")):
        assert ask(client, pixels, depth=depth) == name
    for depth in ("0.6", 0.25, "net", True, "nan", "a" * 99):
        answer = post(client, "net", *protocol.encode_request({"images": pixels.astype("f4")}, parameters={"depth": depth}))
        assert_error(answer, 400, "has no depth")
        assert "it has 1, 0.75, 0.5" in answer.text
    answer = post(client, "tiny", *protocol.encode_request({"images": pixels.astype("f4")}, parameters={"depth": "1"}))
    assert_error(answer, 400, "model 'tiny' is not a family")
    assert "depth" not in response_of(post(client, "tiny", *protocol.encode_request({"images": pixels.astype("f4")}))).parameters


def test_json_answers_and_images_name_the_member_too(client, pixels):
    outputs = [protocol.RequestedOutput("logits", False)]
    answer = post(client, "net", *protocol.encode_request({"images": pixels.astype("f4")}, outputs, parameters={"depth": "0.5"}))
    assert answer.json()["parameters"] == {"depth": "0.5"}
    for query, depth in (("", "1"), ("?depth=0.75", "0.75")):
        found = client.post(f"/v2/models/net/classify{query}", content=jpeg(pixels[0])).json()
        assert found["depth"] == depth and found["predictions"][0]["label"] in LABELS
    assert_error(client.post("/v2/models/net/classify?depth=2", content=jpeg(pixels[0])), 400, "has no depth '2'")
    assert "depth" not in client.post("/v2/models/tiny/classify", content=jpeg(pixels[0])).json()
    assert client.get("/v2/models/net").json()["inputs"][0]["shape"] == [-1, 8, 8, 3]
    assert client.get("/v2/models/net/card").json()["card"]["labels"] == LABELS


def test_a_deadline_chooses_the_deepest_member_that_is_in_time(path):
    model = opened(path)
    model.seconds = [{1: 0.010, 4: 0.016}, {1: 0.006, 4: 0.010}, {1: 0.002, 4: 0.004}]

    def chosen(timeout, rows=1):
        return model.choose({}, rows, timeout).depth

    # A quarter more than the median must fit.
    assert [chosen(t) for t in (None, 1.0, 0.0126, 0.0124, 0.0076, 0.0074, 0.0001)] == [
        "1",
        "1",
        "1",
        "0.75",
        "0.75",
        "0.5",
        "0.5",
    ]
    # Three rows run as a batch of four; nine as two of four and one.
    assert chosen(0.0201, 3) == "1" and chosen(0.0199, 3) == "0.75" and chosen(1.25 * 0.0422, 9) == "1"
    assert chosen(1.25 * 0.0418, 9) == "0.75"
    # What a request names, it gets, in time or not.
    assert model.choose({"depth": "1"}, 1, 0.0001).depth == "1"
    model.batcher._started_rows = 4  # A batch of the deepest member runs: 16 ms.
    assert [chosen(t) for t in (0.033, 0.028, 0.022)] == ["1", "0.75", "0.5"]


def test_members_that_are_not_faster_are_never_chosen(path):
    model = opened(path, adaptive=True)
    assert model._ladder == [0, 1, 2]
    model.seconds = [{4: 0.004}, {4: 0.005}, {4: 0.003}]
    from resnet_export.serving.families import _faster_and_faster

    model._ladder = _faster_and_faster(model.seconds)
    assert model._ladder == [0, 2]
    model.batcher._waiting = 4
    assert model.choose({}).depth == "0.5" and model.choose({"depth": "0.75"}).depth == "0.75"


def test_the_queue_chooses_only_where_that_is_on(path):
    model, fixed = opened(path, adaptive=True), opened(path)
    for rows, depth in ((0, "1"), (3, "1"), (4, "0.75"), (7, "0.75"), (8, "0.5"), (100, "0.5")):
        for each, expected in ((model, depth), (fixed, "1")):
            each.members[2].batcher._waiting, each.members[0].batcher._waiting = rows - rows // 2, rows // 2
            assert each.choose({}).depth == expected
    assert model.choose({"depth": 1}).depth == "1"


def test_all_members_share_one_queue_limit(path):
    model = opened(path, batch=BatchOptions(max_rows=4, queue_rows=10))
    model.members[1].batcher._waiting, model.members[2].batcher._waiting = 4, 5
    assert model.choose({}, 1).depth == "1"
    with pytest.raises(ProtocolError, match="model 'net' is busy: 9 rows wait already; at most 10 may") as caught:
        model.choose({}, 2)
    assert (caught.value.status, caught.value.reason) == (503, "queue_full") and model.statistics.requests["fail"].count == 1


def test_latencies_are_measured_when_the_server_warms_up(path, monkeypatch):
    model = opened(path)
    assert model.seconds[0] == {1: 0.008, 2: 0.016, 4: 0.032}, "until then they are those of the file"
    delays, run = {"1": 0.006, "0.75": 0.003, "0.5": 0.0}, ServedModel._run_on

    def slow(self, session, inputs):
        time.sleep(delays[self.depth] * len(inputs["images"]))
        return run(self, session, inputs)

    monkeypatch.setattr(ServedModel, "_run_on", slow)
    model.warm_up()
    assert [sorted(seconds) for seconds in model.seconds] == [[1, 2, 4]] * 3
    assert all(
        seconds[rows] >= delays[depth] * rows for depth, seconds in zip(delays, model.seconds, strict=True) for rows in (1, 4)
    )
    assert model.seconds[0][4] != 0.032 and model._ladder == [0, 1, 2]


# ---------------------------------------------------------------- load


def load(path, requests, adaptive):
    """Members by the order of requests that all come at once, while a batch takes 10 ms."""

    async def answers():
        model = opened(path, adaptive=adaptive, warm_up=False, batch=BatchOptions(max_rows=4, max_delay=0.0, queue_rows=1000))
        running, most = [], []

        def slow(inner, inputs):
            running.append(1)
            most.append(len(running))
            time.sleep(0.01)
            running.pop()
            return inner(inputs)

        for member in model.members:
            member.session.run = functools.partial(slow, member.session.run)

        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (requests, 1, 8, 8, 3)).astype("f4")

        async def one(image):
            member = model.choose({}, 1)
            return member.depth, (await member.infer({"images": image})).outputs["logits"]

        tasks = []
        for image in pixels:
            tasks.append(asyncio.create_task(one(image)))
            await asyncio.sleep(0)
        found = await asyncio.gather(*tasks)
        for image, (depth, logits) in zip(pixels, found, strict=True):
            np.testing.assert_allclose(logits, classifier_logits(image) - BIAS + MEMBERS[depth], rtol=1e-4, atol=1e-4)
        assert max(most) == 1, "members run in turns, as one model would"
        assert sum(member.statistics.inferences for member in model.members) == requests
        assert [member.batcher.unfinished for member in model.members] == [0, 0, 0]
        await model.close()
        with pytest.raises(RuntimeError, match="cannot schedule"):
            model._threads.submit(int)
        return [depth for depth, _ in found]

    return asyncio.run(answers())


def test_under_load_an_adaptive_family_goes_shallower_and_every_answer_is_its_members(path):
    found = load(path, 30, adaptive=True)
    assert found[0] == "1" and found[-1] == "0.5" and set(found) == set(MEMBERS)
    assert load(path, 12, adaptive=False) == ["1"] * 12


def test_batchers_that_share_threads_count_what_waits_for_one():
    async def scenario():
        release, threads = threading.Event(), ThreadPoolExecutor(1)
        echo = lambda inputs: release.wait(10) and inputs  # noqa: E731
        first, second = (Batcher(echo, BatchOptions(max_rows=2, max_delay=0.0), threads=threads) for _ in range(2))
        one = np.zeros((1, 1), "f4")
        tasks = [asyncio.create_task(batcher.submit({"x": one})) for batcher in (first, second)]
        await asyncio.sleep(0.05)
        assert (first.waiting, first.unfinished, second.waiting, second.unfinished) == (0, 1, 1, 1)
        late = asyncio.create_task(second.submit({"x": one}, 0.01))
        with pytest.raises(Exception, match="no answer within"):
            await late
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        assert second.waiting == 0
        release.set()
        await tasks[0]
        await first.close()
        await second.close()
        assert threads.submit(lambda: 5).result() == 5, "who shares threads does not close them"

    asyncio.run(scenario())


# ---------------------------------------------------------------- metrics


def test_metrics_count_per_member_and_statistics_all_together(path, pixels):
    with TestClient(application({"net": path, "tiny": path.parent / "net-1.onnx"})) as client:
        wait_ready(client)
        for depth, times in (("1", 1), ("0.75", 2), ("0.5", 3)):
            for _ in range(times):
                ask(client, pixels[:2], depth=depth)
        lines = client.get("/metrics").text.splitlines()
        for depth, times in (("1", 1), ("0.75", 2), ("0.5", 3)):
            labels = f'{{model="net",version="1",depth="{depth}"}}'
            assert f"nv_inference_request_success{labels} {times}" in lines and f"nv_inference_count{labels} {2 * times}" in lines
        assert 'nv_inference_count{model="tiny",version="1"} 0' in lines
        assert len(list(text_string_to_metric_families("\n".join(lines) + "\n"))) > 10
        (entry,) = client.get("/v2/models/net/stats").json()["model_stats"]
        assert entry["inference_count"] == 12 and entry["inference_stats"]["success"]["count"] == 6
        assert entry["batch_stats"][0]["batch_size"] == 2 and entry["batch_stats"][0]["compute_infer"]["count"] == 6
        assert entry["last_inference"] > 0 and len(client.get("/v2/models/stats").json()["model_stats"]) == 2


# ---------------------------------------------------------------- files


def test_a_replaced_member_is_refused(tmp_path, capsys):
    path = family(tmp_path)
    classifier(tmp_path / "net-0.75.onnx", bias=BIAS + 11)
    with pytest.raises(MismatchError, match=r"net-0\.75\.onnx is not the file that family\.json was written for: its digest"):
        opened(path)
    assert main(["serve", str(path), "--port", "0"]) == 3
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "net-0.75.onnx").unlink()
    with pytest.raises(UsageError, match=r"names the member net-0\.75\.onnx, which is missing"):
        opened(path)


@pytest.mark.parametrize(
    ("change", "what"), [({"labels": LABELS[::-1]}, "labels"), ({"size": 9}, "inputs"), ({"dtype": "uint8"}, "inputs")]
)
def test_members_that_are_another_model_are_refused(tmp_path, change, what):
    path = family(tmp_path)
    stored = json.loads(path.read_text())
    stored["members"][2]["sha256"] = digest(classifier(tmp_path / "net-0.5.onnx", **change))
    path.write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=rf"the member net-0\.5\.onnx has other {what} than net-1\.onnx"):
        opened(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.update(format=2), "has format 2, which this version does not know"),
        (lambda stored: stored.update(members=[]), "is not a family"),
        (lambda stored: stored["members"][0].update(file="../net-1.onnx"), "is not a family"),
        (lambda stored: stored["members"][0].pop("sha256"), "is not a family"),
        (lambda stored: stored["members"][0].update(name="0.5"), "two members have the same name"),
        (lambda stored: stored.pop("name"), "is not a family"),
        (lambda stored: stored.pop("format"), "is not a family"),
    ],
)
def test_damaged_families_are_refused(tmp_path, change, message):
    path = family(tmp_path)
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=message):
        read_family(path)
    path.write_text("[1]")
    with pytest.raises(UsageError, match="is not a family"):
        read_family(path)


def test_names_folders_and_options(path, tmp_path, capsys):
    assert parse_sources([str(path)]) == [Source("net", "1", path.absolute())]
    assert parse_sources([f"a={path}", f"a={path}"])[1] == Source("a", "2", path.absolute())
    family(tmp_path / "models" / "mine")
    assert find_models(tmp_path / "models") == [Source("mine", "1", tmp_path / "models" / "mine" / "family.json")]
    assert main(["serve", str(path.parent / "net-1.onnx"), "--adaptive", "--port", "0"]) == 2
    assert "--adaptive needs a family" in capsys.readouterr().err


def test_in_a_triton_repository_members_are_models_of_their_own(path, tmp_path, capsys):
    assert [source.name for source in member_sources(Source("net", "1", path))] == ["net-1", "net-0.75", "net-0.5"]
    assert main(["triton", str(path), str(tmp_path / "models")]) == 0
    capsys.readouterr()
    for depth in MEMBERS:
        config = (tmp_path / "models" / f"net-{depth}" / "config.pbtxt").read_text()
        assert config.startswith(f'name: "net-{depth}"')
        assert digest(tmp_path / "models" / f"net-{depth}" / "1" / "model.onnx") == digest(path.parent / f"net-{depth}.onnx")


def test_grpc_answers_name_the_member(path, pixels):
    pytest.importorskip("grpc", reason="needs the extra `grpc`")
    from grpc_running import Client, grpc_running
    from test_grpc import outputs_of, request

    with grpc_running({"net": path}) as server, Client(server.address) as client:
        for depth, expected in ((None, "1"), ("0.5", "0.5"), (0.75, "0.75")):
            parameters = {} if depth is None else {"depth": depth}
            answer = client("ModelInfer", request("net", {"images": pixels.astype("f4")}, **parameters))
            assert answer.parameters["depth"].string_param == expected
            wanted = classifier_logits(pixels) - BIAS + MEMBERS[expected]
            np.testing.assert_allclose(outputs_of(answer)["logits"], wanted, rtol=1e-4, atol=1e-4)
