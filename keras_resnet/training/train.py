"""A run by its description: model by name, data by name, placed, trained."""

import os

import keras
import tensorflow as tf

from .. import data as datasets
from ..hints import first_line
from ..modelcard import card_layer, set_card
from ..registry import create_model
from .faults import errors_of
from .fitting import run_training
from .run import TrainingError
from .strategies import place


def train(run, out=None, *, callbacks=(), quiet=False, report=None):
    """Train a model of the zoo from scratch or from weights, as a `Run` says.

    Args:
        run: `Run`.
        out: folder of the results; see `fit`.
        callbacks: see `fit`.
        quiet: print nothing.
        report: called with lines about damaged images; None prints them.

    Returns:
        `Result`; its model has the data's preprocessing and class names in its card.

    Raises:
        TrainingError: and its subclasses.
    """
    with errors_of(out, len(run.workers) > 1 or "TF_CONFIG" in os.environ):
        placement = place(run, quiet)
        if run.deterministic:
            tf.config.experimental.enable_op_determinism()
        keras.utils.set_random_seed(run.seed)
        try:
            source = datasets.load(run.data, run.data_path, corrupt=run.corrupt, cache=run.cache, report=report)
        except (ValueError, OSError, ImportError) as error:
            raise TrainingError(str(error)) from error
        with placement.strategy.scope():
            model = _model(run, source)
        return run_training(model, source, run, placement, out, callbacks, quiet)


def _model(run, source):
    former = keras.config.dtype_policy()
    keras.config.set_dtype_policy(run.precision)
    try:
        return _load(run) if run.model.endswith(".keras") else _create(run, source)
    except (ValueError, OSError) as error:
        raise TrainingError(str(error)) from error
    finally:
        keras.config.set_dtype_policy(former)


def _load(run):
    if not os.path.exists(run.model):
        raise TrainingError(f"no such file: {run.model}")
    for name in ("model_options", "image_size", "drop_path", "weights"):
        if getattr(run, name):
            raise TrainingError(f"`{name}` is for models of the zoo; {run.model} comes as it is")
    if run.precision != "float32":
        raise TrainingError(f"`precision` is for models of the zoo; {run.model} has the precision it was built with")
    try:
        return keras.saving.load_model(run.model, compile=False)
    except Exception as error:  # Whatever the file holds: Keras has no error of its own for it.
        raise TrainingError(f"{run.model} cannot be loaded: {first_line(error)}") from error


def _create(run, source):
    options = dict(run.model_options)
    for name, instead in (("weights", "`weights` (--weights)"), ("num_classes", "the classes of the data")):
        if name in options:
            raise TrainingError(f"`{name}` is no further argument of the model; it comes from {instead}")
    if run.drop_path is not None:
        options.setdefault("drop_path", run.drop_path)
    if run.image_size:
        options.setdefault("input_shape", (run.image_size, run.image_size, source.train.channels))
    elif source.image_size:
        options.setdefault("input_shape", (*source.image_size, source.train.channels))
    if run.weights is None:
        options.setdefault("preprocessing", source.preprocessing)
    model = create_model(run.model, weights=run.weights, num_classes=len(source.classes), **options)
    if card_layer(model) is not None:
        set_card(model, labels=list(source.classes))
    return model
