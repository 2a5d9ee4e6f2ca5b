"""`train`: a run by its description, from a model of the zoo or a file."""

import os
import sys
from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf

from .. import data as datasets
from ..growth import with_drop_path
from ..modelcard import card
from ..models.loading import ModelFileError, load_model_file
from ..models.pretrained import kept_classes
from ..models.registry import create_model
from ..models.transfer import replace_head
from ..zoo.whitening import has_whitening_stem, whiten_stem
from .callbacks import CallbackLike
from .faults import errors_of
from .feeds import takes_any_size
from .fitting import run_training
from .loop import Result
from .precision import chosen_precision
from .run import Run, TrainingError
from .strategies import Placement, place

FILES = (".keras", ".h5", ".hdf5")
# Training images from which a whitening stem is computed.
WHITENING_BATCH, WHITENING_BATCHES = 500, 10


def train(
    run: Run,
    out: str | os.PathLike[str] | None = None,
    *,
    callbacks: Iterable[CallbackLike] = (),
    quiet: bool = False,
    report: Callable[[str], None] | None = None,
    unsafe_lambda: bool = False,
) -> Result:
    """Train a model of the zoo or of a file, as a `Run` describes.

    Args:
        run: The run.
        out: Folder of the results; see `fit`.
        callbacks: See `fit`.
        quiet: Print nothing.
        report: Called with lines about damaged images; None prints them.
        unsafe_lambda: Whether Python code in `Lambda` layers of a model file may run. Only for files that you trust.

    Returns:
        `Result`; its model has the data's preprocessing and class names in its card.

    Raises:
        TrainingError: See its subclasses; the message says what to do.
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
        run = run.replace(precision=_precision(run, placement, out, quiet))
        with placement.strategy.scope():
            model = _model(run, source, report or _print, unsafe_lambda)
        if run.weights is None and not run.model.endswith(FILES) and has_whitening_stem(model):
            whiten_stem(model, _first_images(source, model))
        return run_training(model, source, run, placement, out, callbacks, quiet)


def _precision(run: Run, placement: Placement, out: str | os.PathLike[str] | None, quiet: bool) -> str:
    """The precision of a run; that of a model from a file is its own."""
    if run.model.endswith(FILES):
        return "float32" if run.precision == "auto" else run.precision
    is_silent = quiet or not placement.chief
    return chosen_precision(run, placement, out, (lambda line: None) if is_silent else _print)


def _first_images(source: datasets.Source, model: keras.Model) -> np.ndarray:
    """Training images as the model takes them, for its whitening stem."""
    size, split, batch = model.inputs[0].shape[1:3], source.train, min(WHITENING_BATCH, source.train.size)
    batches = datasets.evaluation_batches(split, batch=batch, size=size, num_classes=1, crop=source.crop)
    found = batches.take(WHITENING_BATCHES).as_numpy_iterator()
    return np.concatenate([images[weights > 0] for images, _, weights in found])


def _model(run: Run, source: datasets.Source, report: Callable[[str], None], unsafe_lambda: bool) -> keras.Model:
    former = keras.config.dtype_policy()
    keras.config.set_dtype_policy(run.precision)
    try:
        if run.model.endswith(FILES):
            return _with_head(_load(run, unsafe_lambda), source, report)
        return _create(run, source)
    except (ValueError, OSError) as error:
        raise TrainingError(str(error)) from error
    finally:
        keras.config.set_dtype_policy(former)


def _load(run: Run, unsafe_lambda: bool) -> keras.Model:
    if not os.path.exists(run.model):
        raise TrainingError(f"no such file: {run.model}")
    for name in ("model_options", "weights"):
        if getattr(run, name):
            raise TrainingError(f"`{name}` is for models of the zoo; {run.model} is used unchanged")
    if run.precision != "float32":
        raise TrainingError(f"`precision` is for models of the zoo; {run.model} has the precision it was built with")
    try:
        model = load_model_file(run.model, unsafe_lambda=unsafe_lambda)
    except ModelFileError as error:
        raise TrainingError(error.for_commands()) from error
    if run.image_size and not takes_any_size(model):
        size = "×".join(map(str, model.inputs[0].shape[1:3]))
        raise TrainingError(f"`image_size` is for models that take any size; {run.model} takes images of {size}")
    return model if run.drop_path is None else with_drop_path(model, run.drop_path, run.seed)


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def _with_head(model: keras.Model, source: datasets.Source, report: Callable[[str], None]) -> keras.Model:
    """The model itself if its classes are those of the data, else with a new head; classes of the same name keep theirs."""
    if len(model.outputs) != 1:
        return model
    known, classes, shape = card(model), list(map(str, source.classes)), model.outputs[0].shape
    units = shape[-1] if len(shape) == 2 else None
    if units == len(classes) and (known is None or not known.labels or known.labels == classes):
        return model
    if units == 1 and len(classes) == 2:
        return model
    # A renamed class is still the same class where all others are in their places.
    if known is not None and units == len(classes) and kept_classes(known.labels, classes) is None:
        return model
    report(f"{model.name}: new classifier for {len(classes)} classes; the model's own was for others")
    return replace_head(model, len(classes), labels=classes)


def _create(run: Run, source: datasets.Source) -> keras.Model:
    options = dict(run.model_options)
    for name, instead in (("weights", "`weights` (--weights)"), ("num_classes", "the classes of the data")):
        if name in options:
            raise TrainingError(f"`{name}` is not a further argument of the model; it comes from {instead}")
    if run.drop_path is not None:
        options.setdefault("drop_path", run.drop_path)
    if run.image_size:
        options.setdefault("input_shape", (run.image_size, run.image_size, source.train.channels))
    elif source.image_size:
        options.setdefault("input_shape", (*source.image_size, source.train.channels))
    if run.weights is None:
        options.setdefault("preprocessing", source.preprocessing)
    # Classes that the weights know by name keep what was learned about them.
    options.setdefault("labels", list(map(str, source.classes)))
    return create_model(run.model, weights=run.weights, num_classes=len(source.classes), **options)
