"""Half a minute of what `mixed_load.py --minutes 60` does for an hour."""

import sys

import pytest

for module in ("starlette", "uvicorn", "prometheus_client", "grpc", "httpx"):
    pytest.importorskip(module, reason="needs the extras `serve`, `grpc` and `client`")
if not sys.platform.startswith("linux"):
    pytest.skip("needs /proc", allow_module_level=True)
import mixed_load

pytestmark = pytest.mark.slow


def test_no_answer_is_wrong_and_memory_stays_flat(tmp_path):
    report = mixed_load.run(30, tmp_path)
    print(report)
    assert not report["faults"], report
    kinds = ("binary", "JSON", "image", "large JSON", "gRPC", "gRPC stream of 20", "reload", "refused with 500")
    assert all(report["counts"].get(kind, 0) > 3 for kind in kinds), report["counts"]
    memory = report["memory_mib"]
    assert memory["end"] < memory["start"] + 150, memory
