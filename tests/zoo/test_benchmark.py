"""The arithmetic of the benchmark, on a clock that the test moves."""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = str(Path(__file__).resolve().parents[2] / "scripts")


@pytest.fixture
def pairs(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("benchmarks.pairs")
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


class Clock:
    now = 0.0

    def job(self, *seconds):
        """A function that takes these times in turn, over and over."""
        calls = iter(range(10**9))

        def run():
            self.now += seconds[next(calls) % len(seconds)]

        return run


def test_a_slower_candidate_is_told_from_noise(pairs, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pairs.time, "perf_counter", lambda: clock.now)
    quiet = pairs.compare("quiet", clock.job(1.0), clock.job(1.5), 31)
    assert quiet.ratio == pytest.approx(1.5) and quiet.spread == pytest.approx(0) and not quiet.meets(1.03)
    noisy = pairs.compare("noisy", clock.job(1.0, 1.2, 0.7, 1.4, 0.9), clock.job(1.0, 1.2, 0.7, 1.4, 0.9), 31)
    assert noisy.spread > 0.03 and noisy.meets(1.03)


def test_every_alternative_takes_every_place_in_the_order(pairs, monkeypatch):
    order = []
    pairs.compare("order", lambda: order.append("r"), lambda: order.append("c"), 3, warm_up=0)
    assert "".join(order) == "rcr" + "crr" + "rrc"
