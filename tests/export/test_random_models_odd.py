"""The odd seeds of `test_random_models.py`, in a file of their own so that another process runs them."""

import pytest

from . import judging
from .test_random_models import SEEDS


def test_random_models_export_right_or_are_refused_truly() -> None:
    assert not (found := judging.failures(SEEDS[1::2], twice=9, savedmodel=9)), "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1060, 2060, 100))
def test_a_thousand_more(first: int) -> None:
    found = judging.failures(range(first, first + 100), savedmodel=10)
    assert not found, "\n".join(found)
