"""Random models through the exporter, judged by the untouched Keras model and plain onnxruntime."""

import random

import pytest
from hypothesis import given, settings

from . import generator


def test_every_layer_kind_of_keras_is_drawn_or_excluded_with_a_reason() -> None:
    kinds = generator.layer_kinds()
    assert kinds - set(generator.KINDS) - set(generator.EXCLUDED) == set(), "Keras has layer kinds that nobody decided on"
    assert set(generator.EXCLUDED) <= kinds and all(generator.EXCLUDED.values())
    assert not set(generator.KINDS) & set(generator.EXCLUDED)


def test_a_seed_always_gives_the_same_recipe() -> None:
    assert generator.recipe(7) == generator.recipe(7)
    assert generator.draw(random.Random(1)) != generator.draw(random.Random(2))


def test_models_compute_in_the_dtype_that_was_drawn() -> None:
    seen = set()
    for recipe in map(generator.recipe, range(40)):
        if recipe.policy not in seen:
            assert recipe.policy in {layer.dtype_policy.name for layer in recipe.model().layers}
            seen.add(recipe.policy)
    assert seen == set(generator.FLOATS)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(generator.recipes())
def test_hypothesis_draws_models(recipe: generator.Recipe) -> None:
    assert recipe.model().outputs
