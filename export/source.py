"""A Keras model from a `.keras` file or a name of the zoo, for the command line and for scripts."""

import contextlib
import importlib
import json
import os
import re
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

from .artifact import existing_file, first_line
from .errors import DeviceError, UsageError

SUFFIXES = (".keras", ".h5", ".hdf5")


def load_model(model, *, weights=None, seed=0, imports=(), preprocessing=None):
    """The model that a command names.

    Args:
        model: `.keras` file (read in safe mode), or a name of the zoo.
        weights: for a name: what `keras_resnet.create_model` takes; None gives random weights.
        seed: seed of random weights.
        imports: modules to import first, for third-party layers.
        preprocessing: mode to put in front of a model that has none, see `keras_resnet.preprocessing.MODES`.

    Returns:
        `(keras.Model, notes)`.

    Raises:
        UsageError: no such file, name, module or mode, or the file is damaged.
    """
    if not str(model):
        raise UsageError("the model needs a name, got an empty one")
    with quiet_start():
        import keras

        import keras_resnet as kr
    for name in imports:
        _import(name)
    if is_file(model):
        if weights is not None:
            raise UsageError(f"`weights` goes with a model name; {model} has its own weights")
        loaded, notes = _from_file(model), []
    else:
        if weights is None:
            keras.utils.set_random_seed(seed)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                loaded = kr.create_model(model, weights=weights)
        except (ValueError, OSError) as error:
            raise UsageError(f"{first_line(error)}; a file must end in .keras" if "." in model else first_line(error)) from error
        notes = [f"random weights (seed {seed})"] if weights is None else []
        notes += [first_line(entry.message) for entry in said if issubclass(entry.category, UserWarning)]
    return with_preprocessing(loaded, preprocessing), notes


def is_file(model):
    return str(model).endswith(SUFFIXES) or os.sep in str(model) or Path(model).is_file()


def _from_file(path):
    import keras

    path = existing_file(path)
    if path.suffix != ".keras":
        raise UsageError(f"{path} is not a .keras file; load it with Keras and save it as one")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is not a valid .keras file: it is damaged or something else; save the model again")
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as error:
        if unknown := re.search(r"Could not locate \w+ '(.+?)'", str(error)):
            hint = "name the module that registers it with --import"
            raise UsageError(f"{path} uses {unknown[1]}, which is not known here; {hint}") from error
        raise UsageError(f"{path} is not a .keras file that can be loaded: {first_line(error)}") from error


def _import(name):
    sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except Exception as error:  # the module is the user's; whatever it raises is about it
        raise UsageError(f"cannot import {name}: {first_line(error)}") from error
    finally:
        sys.path.remove(os.getcwd())


def with_preprocessing(model, mode):
    """The model with a preprocessing layer and a card in front; itself if `mode` is None.

    Raises:
        UsageError: the model has preprocessing already, or the mode is unknown.
    """
    if mode is None:
        return model
    import keras

    from keras_resnet.layers import Card
    from keras_resnet.modelcard import ModelCard, card, preprocessing_card
    from keras_resnet.preprocessing import Preprocessing

    known = card(model)
    if known is not None and known.preprocessing.get("mode", "none") != "none":
        raise UsageError(f"model {model.name!r} has preprocessing {known.preprocessing['mode']!r} already")
    try:
        layer = Preprocessing.of(mode, name="preprocessing")
    except ValueError as error:
        raise UsageError(first_line(error)) from error
    shape = tuple(model.inputs[0].shape)
    size = [int(side) for side in shape[1:3]] if len(shape) == 4 and None not in shape[1:3] else None
    entry = preprocessing_card(size=size) | layer.describe()
    described = known.replace(preprocessing=entry) if known else ModelCard(model.name, preprocessing=entry)
    pixels = keras.Input(shape[1:], name="images")
    return keras.Model(pixels, model(layer(Card(described.to_dict(), name="card")(pixels))), name=model.name)


def read_labels(path):
    """Class names from a text file with one per line, or from a JSON list.

    Raises:
        UsageError: the file is missing or holds something else.
    """
    try:
        text = existing_file(path).read_text(encoding="utf-8")
        labels = json.loads(text) if str(path).endswith(".json") else [line.strip() for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"{path} holds no labels: {first_line(error)}") from error
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise UsageError(f"{path} must hold one label per line, or a JSON list of strings")
    return labels


@contextlib.contextmanager
def quiet_start():
    """Hold back what TensorFlow prints while it is imported (its C++ side writes to the descriptor); shown if the import fails.

    Raises:
        DeviceError: TensorFlow or Keras is not installed.
    """
    if "tensorflow" in sys.modules or os.environ.get("RESNET_EXPORT_DEBUG"):
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            import tensorflow  # noqa: F401  # the import is the point

            yield
        except ModuleNotFoundError as error:
            raise DeviceError(
                f"{error.name} is not installed, and this command needs it: pip install keras-resnet-export"
            ) from error
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)


def zoo_names(pattern="*"):
    """Names of the zoo that match a shell pattern.

    Raises:
        UsageError: none does, or two packages declare one name.
    """
    with quiet_start():
        import keras_resnet as kr
    try:
        if names := kr.list_models(pattern):
            return names
    except ValueError as error:
        raise UsageError(first_line(error)) from error
    from keras_resnet.hints import nearest

    raise UsageError(f"no model matches {pattern!r}{nearest(pattern.strip('*'), kr.list_models())}")


def describe(model, **source):
    """What `info` shows of a model: its size, and the inputs and outputs it would be exported with. Args as `load_model`."""
    from .conversion.signature import signature_of

    loaded, _ = load_model(model, **source)
    import keras_resnet as kr

    info = kr.model_info(loaded)
    signature = signature_of(loaded)
    known = kr.card(loaded)
    return {
        "name": info.name,
        "parameters": info.total,
        "trainable": info.trainable,
        "macs": info.macs,
        "layers": len(loaded.layers),
        "inputs": [{"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype} for spec in signature.inputs],
        "outputs": [{"name": output.name, "kind": output.kind} for output in signature.outputs],
        "preprocessing": known.preprocessing if known else None,
        "labels": len(known.labels) if known and known.labels else None,
        "weights": (known.weights or {}).get("source") if known else None,
    }
