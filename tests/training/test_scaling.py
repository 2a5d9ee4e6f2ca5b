"""The arithmetic of the scaling table, and what the benchmarks say where no GPU is."""

import importlib
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

SCRIPTS = str(Path(__file__).resolve().parents[2] / "scripts")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_ring_volume_and_efficiency(benchmarks):
    scaling = benchmarks("scaling")
    assert scaling.ring_bytes(1_000, 1) == 0
    assert scaling.ring_bytes(1_000, 2) == 4_000
    assert scaling.ring_bytes(1_000, 8) == pytest.approx(7_000)
    options = {"bandwidth": 1e6, "step": 0.012, "latency": 0.0}
    assert scaling.efficiency(1_000, 1, overlap=0.0, **options) == 1
    assert scaling.efficiency(1_000, 2, overlap=0.0, **options) == pytest.approx(0.75)
    assert scaling.efficiency(1_000, 2, overlap=1.0, **options) == 1
    assert scaling.efficiency(1_000, 2, 1e6, 0.012, 0.0, latency=0.004) == pytest.approx(0.5)


def test_the_page_has_the_table_that_the_command_prints(benchmarks):
    page = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert "\n".join(benchmarks("scaling").table((500, 1500, 3000), 256, 0.0)) in page


def test_without_a_gpu_the_benchmark_says_so(benchmarks):
    result = CliRunner().invoke(benchmarks("train").train, ["--gpu"])
    assert result.exit_code == 4 and "no GPU" in result.output
