"""What operators need, over gRPC: certificates and keys read again, counts, logs, readiness before the end, several processes."""

import json
import signal
import time
from urllib.request import urlopen

import numpy as np
import pytest
from running import self_signed, serving

grpc = pytest.importorskip("grpc", reason="needs the extra `grpc`")
for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra `serve`")
if not hasattr(signal, "SIGHUP"):
    pytest.skip("needs POSIX", allow_module_level=True)
from grpc_running import Client
from test_grpc import outputs_of, request
from tiny_models import classifier_logits


def infer(client, pixels, **more):
    found = outputs_of(client("ModelInfer", request("bytes", {"images": pixels}), **more))
    np.testing.assert_allclose(found["logits"], classifier_logits(pixels), rtol=1e-5, atol=1e-6)


def code_of(ask):
    """The name of the status with which a call ends."""
    try:
        ask()
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def test_signals_reach_grpc(models, pixels, tmp_path):
    """SIGHUP exchanges certificate and keys for new connections; SIGTERM ends readiness before it ends anything else."""
    certificate, key = self_signed(tmp_path)
    keys = tmp_path / "keys"
    keys.write_text("old")
    options = ("--ssl-certfile", certificate, "--ssl-keyfile", key, "--api-key-file", keys, "--shutdown-delay", "1.5")
    with serving(models["bytes"], "--grpc-port", "0", "--metrics-port", "0", "--access-log", *options) as server:

        def status(path, name):
            with Client(server.grpc, grpc.ssl_channel_credentials(path.read_bytes())) as client:
                metadata = [("authorization", f"Bearer {name}")]
                return code_of(lambda: infer(client, pixels, metadata=metadata, timeout=5))

        assert (status(certificate, "old"), status(certificate, "new")) == ("OK", "UNAUTHENTICATED")
        other, other_key = self_signed(tmp_path, "other")
        assert status(other, "old") == "UNAVAILABLE"
        old = tmp_path / "old.pem"
        old.write_bytes(certificate.read_bytes())
        certificate.write_bytes(other.read_bytes())
        key.write_bytes(other_key.read_bytes())
        keys.write_text("new")
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 10
        while status(other, "new") != "OK":
            assert time.monotonic() < end
            time.sleep(0.05)
        assert status(other, "old") == "UNAUTHENTICATED" and status(old, "new") == "UNAVAILABLE"

        counts = urlopen(server.details["metrics_url"]).read().decode()
        line = next(line for line in counts.splitlines() if 'grpc_code="OK"' in line and "ModelInfer" in line)
        assert line.startswith("grpc_server_handled_total{") and line.endswith(" 2.0")
        assert 'grpc_code="UNAUTHENTICATED",grpc_method="ModelInfer"' in counts

        with Client(server.grpc, grpc.ssl_channel_credentials(other.read_bytes())) as client:
            assert client("ServerReady").ready
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert not client("ServerReady").ready and client("ServerLive").live
            # New connections, too, are still accepted and answered.
            assert status(other, "new") == "OK"
        assert server.process.wait(20) == 0
        lines = [json.loads(line) for line in server.process.stderr.read().splitlines()]
    found = [(line["path"].rpartition("/")[2], line["status"]) for line in lines if line["logger"] == "resnet_export.access"]
    assert found.count(("ModelInfer", "OK")) == 3 and ("ModelInfer", "UNAUTHENTICATED") in found


def test_processes_share_the_grpc_port(models, pixels):
    with serving(models["bytes"], "--grpc-port", "0", "--processes", "2") as server:
        for _ in range(10):
            with Client(server.grpc, use_local_subchannel_pool=1) as client:
                infer(client, pixels)
        assert server.stop() == 0
