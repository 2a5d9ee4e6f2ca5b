"""Random models through the exporter, judged by the untouched Keras model and plain onnxruntime: the even ones of 60 seeds."""

import pytest

from . import judging

SEEDS = range(60)


def test_random_models_export_right_or_are_refused_truly() -> None:
    assert not (found := judging.failures(SEEDS[::2], twice=10, savedmodel=10)), "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(60, 1060, 100))
def test_a_thousand_more(first: int) -> None:
    found = judging.failures(range(first, first + 100), savedmodel=10)
    assert not found, "\n".join(found)
