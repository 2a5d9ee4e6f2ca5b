"""A request that is refused leaves memory at once: no cycle of frames keeps its tensors until the garbage collector runs."""

import contextlib
import gc
import types

import numpy as np
import pytest

for module in ("starlette", "prometheus_client", "grpc"):
    pytest.importorskip(module, reason="needs the extras `serve` and `grpc`")
pytest.importorskip("httpx", reason="needs the extra `client`")
from grpc_running import Client, grpc_running
from starlette.testclient import TestClient
from test_app import application, post, wait_ready
from test_grpc import request
from tiny_models import gatherer

from resnet_export.serving import protocol


@contextlib.contextmanager
def no_cycles():
    """Fails if what the block leaves behind has frames of the server in it."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        frames = [item for item in gc.garbage if isinstance(item, types.FrameType)]
        left = [frame.f_code.co_qualname for frame in frames if frame.f_code.co_filename.startswith(FOLDER)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left, left


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return gatherer(tmp_path_factory.mktemp("cycles") / "table.onnx")


FOLDER = protocol.__file__.rpartition("/")[0]
CASES = {
    "the model fails": {"ids": np.array([[4242]])},
    "a wrong shape": {"ids": np.array([4])},
    "a wrong name": {"other": np.array([[4]])},
}
LIMITS = {"max_buffered": 100_000}


@pytest.mark.parametrize("case", [*CASES, "too much memory"])
def test_http(table, case):
    inputs = CASES.get(case) or {"ids": np.zeros((200, 1), int)}
    body, length = protocol.encode_request(inputs)
    body = body if case in CASES else body + bytes(100_000)
    with TestClient(application({"table": table}, app=LIMITS)) as client:
        wait_ready(client)
        post(client, "table", body, length)
        with no_cycles():
            assert post(client, "table", body, length).status_code >= 400


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "too much memory"])
@pytest.mark.parametrize("streamed", [False, True])
def test_grpc(table, case, streamed):
    message = request("table", CASES.get(case) or {"ids": np.zeros((20_000, 1), int)})

    def ask():
        if streamed:
            [answer] = client.stream(iter([message]))
            assert answer.error_message
        else:
            with pytest.raises(Exception, match=".") as caught:
                client("ModelInfer", message)
            del caught

    with grpc_running({"table": table}, options=LIMITS) as server, Client(server.address) as client:
        ask()
        with no_cycles():
            ask()
