"""What operators need: readiness before the end, prefixes, Unix sockets, reloads, logs and metrics. Real servers, httpx."""

import json
import signal
import time

import numpy as np
import pytest
from running import infer, serving

for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs the extra `client`")
if not hasattr(signal, "SIGHUP"):
    pytest.skip("needs POSIX", allow_module_level=True)
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import gatherer

from resnet_export.serving import protocol


def test_readiness_ends_before_the_listener_does(models, pixels):
    with serving(models["bytes"], "--shutdown-delay", "2") as server:
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        # New connections are still accepted and answered, but a load balancer is told to stay away.
        with httpx.Client(base_url=server.url) as client:
            assert client.get("/v2/health/ready").status_code == 503
            assert client.get("/v2/health/live").status_code == 200
            infer(client, pixels)
        assert server.process.wait(20) == 0


def test_root_path_with_and_without_a_proxy_that_removes_it(models, pixels):
    with serving(models["bytes"], "--root-path", "/nets/a", "--api-key-file", _keys(models, "k")) as server:
        with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer k"}) as client:
            for prefix in ("", "/nets/a"):
                infer(client, pixels, prefix)
                assert client.get(prefix + "/").headers["content-type"].startswith("text/html")
            assert client.get("/nets/b/v2").status_code == 404
        assert httpx.get(f"{server.url}/nets/a/v2/health/ready").status_code == 200
        assert httpx.get(f"{server.url}/nets/a/v2").status_code == 401


def _keys(models, *keys):
    path = models["bytes"].parent / "keys"
    path.write_text("\n".join(keys))
    return path


def test_unix_socket(models, pixels, tmp_path):
    path = tmp_path / "s"
    for _ in range(2):
        with serving(models["bytes"], "--uds", path) as server:
            assert server.url == f"unix:{path}"
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
                infer(client, pixels)
            # Killed, and its socket is left behind.
            server.process.kill()
            server.process.wait()
            assert path.exists()
    with serving(models["bytes"], "--uds", path) as server:
        assert server.stop() == 0 and not path.exists()


def test_keys_are_read_again_on_sighup_and_stay_if_they_cannot_be(models):
    path = _keys(models, "old")
    with serving(models["bytes"], "--api-key-file", path) as server:

        def status(key):
            return httpx.get(f"{server.url}/v2", headers={"Authorization": f"Bearer {key}"}).status_code

        def after_hangup(key, wanted):
            server.process.send_signal(signal.SIGHUP)
            for _ in range(100):
                if status(key) == wanted:
                    return
                time.sleep(0.05)
            raise AssertionError(f"{key} never got {wanted}")

        assert (status("old"), status("new")) == (200, 401)
        path.write_text("new")
        after_hangup("new", 200)
        assert status("old") == 401
        path.write_text("")
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert status("new") == 200
        server.stop()
        assert "were not reloaded" in server.process.stderr.read()


def test_metrics_have_a_port_of_their_own_and_count_reasons_and_stages(models, pixels):
    with serving(models["bytes"], "--metrics-port", "0", "--api-key-file", _keys(models, "k")) as server:
        headers = {"Authorization": "Bearer k"}
        with httpx.Client(base_url=server.url, headers=headers) as client:
            infer(client, pixels)
            assert client.post("/v2/models/bytes/infer", content=b"{").status_code == 400
            assert client.get("/v2/models/nope").status_code == 404
            assert client.get("/metrics").status_code == 404
        assert httpx.get(f"{server.url}/v2").status_code == 401
        text = httpx.get(server.details["metrics_url"]).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    counts = {
        (s.labels["route"], s.labels["status"], s.labels["reason"]): s.value
        for s in samples
        if s.name == "resnet_export_http_requests_total"
    }
    assert counts["infer", "200", "ok"] == counts["infer", "400", "invalid"] == 1
    assert counts["model_metadata", "404", "not_found"] == 1 and counts["none", "401", "unauthorized"] == 1
    for stage in ("queue", "input", "compute", "output"):
        found = [s for s in samples if s.name.startswith("resnet_export_stage_duration_seconds") and s.labels["stage"] == stage]
        [last] = [s.value for s in found if s.labels.get("le") == "+Inf"]
        assert last == 1 and sum(s.value for s in found if s.name.endswith("_sum")) > 0


def test_logs_are_json_lines_and_hold_no_colours(models, pixels, tmp_path):
    # A model that fails while it runs makes onnxruntime talk.
    with serving(models["bytes"], gatherer(tmp_path / "table.onnx"), "--access-log") as server:
        with httpx.Client(base_url=server.url) as client:
            infer(client, pixels)
            body, length = protocol.encode_request({"ids": np.array([[4242]])})
            answer = client.post("/v2/models/table/infer", content=body, headers={protocol.HEADER_LENGTH: str(length)})
            assert answer.status_code == 500
            client.get("/no\u2028thing\x1b[31m".replace("\x1b", "%1b"))
        server.stop()
        lines = [json.loads(line) for line in server.process.stderr.read().splitlines()]
    found = [line for line in lines if line["logger"] == "resnet_export.access" and line["path"].endswith("bytes/infer")]
    assert len(found) == 1
    assert {k: found[0][k] for k in ("method", "status", "reason", "model")} == {
        "method": "POST",
        "status": 200,
        "reason": "ok",
        "model": "bytes",
    }
    assert found[0]["milliseconds"] > 0 and found[0]["bytes_received"] > pixels.size
