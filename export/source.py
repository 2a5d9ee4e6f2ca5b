"""A Keras model from a file that Keras saved or a name of the zoo, for the command line and for scripts."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifact import existing_file, first_line
from .errors import DeviceError, UsageError

if TYPE_CHECKING:
    import keras

SUFFIXES = (".keras", ".h5", ".hdf5")

# Python names in messages of `keras_resnet`, and what the commands have instead.
IN_COMMANDS = {
    "`list_models()` has all": "`resnet-export list` shows all",
    "give `preprocessing=`": "give --preprocessing MODE",
    "; to load it all the same, give these fields as arguments": "",
}


def for_commands(message: object) -> str:
    """Return a message of `keras_resnet` on one line, with the options of the commands instead of arguments in Python."""
    line = first_line(message, most=1000)  # the hint comes last
    for python, option in IN_COMMANDS.items():
        line = line.replace(python, option)
    return line


def load_model(
    model: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    imports: Sequence[str] = (),
    preprocessing: str | None = None,
    unsafe_lambda: bool = False,
) -> tuple[keras.Model, list[str]]:
    """Load or build the model that a command names.

    Args:
        model: File that Keras saved (`.keras`, `.h5`, `.hdf5`; read in safe mode), or a name of the zoo.
        weights: For a name: what `keras_resnet.create_model` takes; None gives random weights.
        num_classes: For a name: number of logits; None is the weights' own number.
        seed: Seed of random weights.
        imports: Modules to import first, for third-party layers.
        preprocessing: Mode to put in front of a model that has none, see `keras_resnet.preprocessing.MODES`.
        unsafe_lambda: Whether Python code in the file's `Lambda` layers may run.

    Returns:
        `(keras.Model, notes)`.

    Raises:
        UsageError: No such file, name, module or mode, or the file cannot be loaded.
    """
    if not str(model):
        raise UsageError("the model needs a name, got an empty one")
    with quiet_start():
        import keras

        import keras_resnet as kr
        from keras_resnet.models.loading import ModelFileError, import_modules
    try:
        import_modules(imports)
    except ModelFileError as error:
        raise UsageError(str(error)) from error
    if is_file(model):
        for option, value in (("weights", weights), ("num_classes", num_classes)):
            if value is not None:
                raise UsageError(f"`{option}` needs the name of a zoo model; {model} has its own")
        notes = [f"code in Lambda layers of {model} may run in this process"] if unsafe_lambda else []
        try:
            loaded = kr.load_model_file(model, unsafe_lambda=unsafe_lambda)
        except ModelFileError as error:
            raise UsageError(error.for_commands()) from error
        except (ValueError, OSError) as error:
            raise UsageError(first_line(error)) from error
    else:
        if weights is None:
            keras.utils.set_random_seed(seed)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                loaded = kr.create_model(str(model), weights=weights, num_classes=num_classes)
        except (ValueError, OSError) as error:
            ending = "; a file must end in .keras, .h5 or .hdf5" if "." in str(model) else ""
            raise UsageError(f"{for_commands(error)}{ending}") from error
        notes = [f"random weights (seed {seed})"] if weights is None else []
        notes += [for_commands(entry.message) for entry in said if issubclass(entry.category, UserWarning)]
    return with_preprocessing(loaded, preprocessing), notes


def is_file(model: str | os.PathLike[str]) -> bool:
    """Return whether a command's MODEL is a file rather than a name of the zoo."""
    return str(model).endswith(SUFFIXES) or os.sep in str(model) or Path(model).is_file()


def with_preprocessing(model: keras.Model, mode: str | None) -> keras.Model:
    """Put a preprocessing layer and a card in front of a model; itself if `mode` is None.

    Raises:
        UsageError: The model has preprocessing already, or the mode is unknown.
    """
    if mode is None:
        return model
    import keras_resnet as kr

    try:
        return kr.add_preprocessing(model, mode)
    except ValueError as error:
        raise UsageError(first_line(error)) from error


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Read class names from a text file with one per line, or from a JSON list.

    Raises:
        UsageError: The file is missing or holds something else.
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
def quiet_start() -> Iterator[None]:
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


def zoo_names(pattern: str = "*") -> list[str]:
    """Return names of the zoo that match a shell pattern.

    Raises:
        UsageError: None does, or two packages declare one name.
    """
    with quiet_start():
        import keras_resnet as kr
    try:
        if names := kr.list_models(pattern):
            return names
    except ValueError as error:
        raise UsageError(first_line(error)) from error
    from keras_resnet.checks import nearest

    raise UsageError(f"no model matches {pattern!r}{nearest(pattern.strip('*'), kr.list_models())}")


def describe(model: str | os.PathLike[str], **source: Any) -> dict[str, Any]:
    """Describe a model for `info`: its size, and the inputs and outputs that its export would have. Args as `load_model`."""
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
