"""Verifying a SavedModel folder, signature by signature and variable by variable, against the untouched Keras model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import artifact
from ..conversion.prepare import Prepared
from ..conversion.savedmodel import (
    BYTES_INPUT,
    BYTES_SIGNATURE,
    SIGNATURE,
    argument_names,
    array_signatures,
    takes_files,
    tracked_variables,
)
from ..conversion.signature import Signature
from ..errors import UsageError
from ..metadata import TOLERANCES
from ..results import VerificationReport
from .cards import check_metadata
from .copies import compare_copy
from .divergence import first_divergence_in_graph
from .inputs import Case, find_cases
from .outputs import OutputComparison, Runner
from .reference import Reference
from .reverification import Loaded, Reverification

if TYPE_CHECKING:
    from collections.abc import Callable

    import keras
    import tensorflow as tf


def verify_savedmodel(
    path: str | os.PathLike[str],
    prepared: Prepared,
    *,
    metadata: dict[str, Any] | None = None,
    samples: object = None,
    seed: int = 0,
) -> VerificationReport:
    """Compare a SavedModel folder with a model; the folder is loaded from disk.

    The signature that takes encoded images gets lossless ones of the model's size. Folders of other makers may store their
    weights differently; these are not compared then.

    Args, Raises: See `onnx_file.verify_onnx`.
    """
    signature = prepared.signature
    loaded = load(path)
    problems, notes = check_metadata(path, metadata)
    problems += _wrong_signatures(loaded, signature)
    comparisons, figures, diverges = [], None, None
    if not problems:
        figures, wrong = compare_variables(loaded, signature.model)
        problems += wrong
        for name, view in array_signatures(signature).items():
            reference = Reference(view)
            cases = find_cases(reference, samples, seed)
            comparison = _compared(loaded, name, view, reference, cases)
            comparisons += comparison.comparisons
            problems += comparison.all_problems()
            notes += comparison.conditioning_notes()
            if comparison.failed and diverges is None:
                diverges = first_divergence_in_graph(view, cases)
            if name == SIGNATURE:
                problems += compare_copy(prepared, cases)
            if figures and not problems:
                again = Reverification(reference, cases, lambda folder, n=name, v=view: _with_present_weights(path, n, v))  # type: ignore[misc]
                outcome = again.run(comparison)
                problems, notes = problems + outcome.problems, notes + outcome.notes
    return VerificationReport(
        str(path),
        not problems,
        "float32",
        TOLERANCES["float32"],
        tuple(comparisons),
        figures,
        diverges,
        problems=tuple(problems),
        notes=tuple(dict.fromkeys(notes)),
    )


def load(path: str | os.PathLike[str]) -> Any:
    """Load a SavedModel folder with TensorFlow.

    Raises:
        UsageError: It is none, or has no signature `serving_default`.
    """
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(path))
        loaded.signatures[SIGNATURE]
    except Exception as error:
        reason = artifact.first_line(error)
        raise UsageError(f"{path} is not a readable SavedModel with the signature `{SIGNATURE}`: {reason}") from error
    return loaded


def compare_variables(loaded: Any, model: keras.Model) -> tuple[dict[str, int] | None, list[str]]:
    """Compare a loaded folder's variables with the model's: they are copies, so they have to be equal.

    Returns:
        `(figures, problems)`; `(None, [])` where they are not stored as `conversion.savedmodel` stores them.
    """
    pairs = _variables(loaded, model)
    if pairs is None:
        return None, []
    floats = [(have.numpy(), own) for have, own in pairs if have.dtype.is_floating]
    wrong = [own.path for have, own in floats if not np.array_equal(have, np.asarray(own), equal_nan=True)]
    figures = {"compared": len(floats), "elements": sum(have.size for have, _ in floats)}
    return figures, [f"weight {path!r} differs from the model's" for path in wrong]


def _variables(loaded: Any, model: keras.Model) -> list[tuple] | None:
    """`[(variable of the folder, variable of the model), …]`, or None where they do not correspond."""
    found, own = getattr(loaded, "weights", None), tracked_variables(model)
    try:
        if found is None or [tuple(have.shape) for have in found] != [tuple(variable.shape) for variable in own]:
            return None
    except (AttributeError, TypeError, ValueError):  # a folder from elsewhere, which has something else by that name
        return None
    return list(zip(found, own, strict=True))


def _with_present_weights(path: str | os.PathLike[str], name: str, view: Signature) -> Loaded | None:
    """The folder's graphs with the weights that the model has now; None where its variables are not known."""
    loaded = load(path)
    pairs = _variables(loaded, view.model)
    if pairs is None:
        return None
    for variable, own in pairs:
        variable.assign(own.value)
    return Loaded({f"TensorFlow, {name}": _runner(loaded, name, view)})


def _wrong_signatures(loaded: Any, signature: Signature) -> list[str]:
    """What is wrong with the names of signatures, inputs and outputs."""
    problems, served = [], loaded.signatures
    for name, view in array_signatures(signature).items():
        if name not in served:
            problems.append(f"the signature `{name}` is missing")
            continue
        have = set(served[name].structured_input_signature[1]), set(served[name].structured_outputs)
        want = set(argument_names(view)), set(view.names)
        if have != want:
            problems.append(
                f"`{name}` has the inputs and outputs {sorted(have[0] | have[1])}, the model {sorted(want[0] | want[1])}"
            )
    if takes_files(signature) and BYTES_SIGNATURE not in served:
        problems.append(f"the signature `{BYTES_SIGNATURE}` is missing")
    return problems


def _compared(loaded: Any, name: str, view: Signature, reference: Reference, cases: list[Case]) -> OutputComparison:
    """All batches through one signature; the first one through encoded image files too."""
    comparison, run = OutputComparison(reference), _runner(loaded, name, view)
    runtime = f"TensorFlow, {name}"
    for case in cases:
        comparison.compare(case, runtime, run)
    comparison.compare_unsaturated(cases[1], {runtime: run})
    if name == SIGNATURE and takes_files(view):
        pixels = {spec.name: np.clip(cases[0].feeds[spec.name], 0, 255).round().astype("float32") for spec in view.inputs}
        case = Case("image files", pixels, reference.values(pixels))
        if case.values.finite:
            comparison.compare(case, f"TensorFlow, {BYTES_SIGNATURE}", _runner_of_files(loaded, view))
    return comparison


def _runner(loaded: Any, name: str, view: Signature) -> Runner:
    """One signature of a loaded folder. What a call leaves in the states of recurrent layers is taken back."""
    import tensorflow as tf

    from keras_resnet.graphs import layers_in, state_variables

    own = {id(state) for layer in layers_in(view.model) for state in state_variables(layer)}
    states = [have for have, variable in _variables(loaded, view.model) or [] if id(variable) in own]

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray] | str:
        arguments = dict(zip(argument_names(view), (feeds[spec.name] for spec in view.inputs), strict=True))
        before = [state.numpy() for state in states]
        try:
            return _called(loaded.signatures[name], {key: tf.constant(value) for key, value in arguments.items()})
        finally:
            for state, value in zip(states, before, strict=True):
                state.assign(value)

    return run


def _called(signature: Callable[..., dict[str, tf.Tensor]], arguments: dict[str, tf.Tensor]) -> dict[str, np.ndarray] | str:
    """The outputs of a signature, or a message that says why TensorFlow does not run it."""
    import tensorflow as tf

    try:
        return {key: value.numpy() for key, value in signature(**arguments).items()}
    except tf.errors.OpError as error:
        return f"TensorFlow does not run it: {artifact.first_line(error)}"


def _runner_of_files(loaded: Any, view: Signature) -> Runner:
    import tensorflow as tf

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray] | str:
        (pixels,) = feeds.values()
        channels_last = pixels.transpose(0, 2, 3, 1) if view.layout == "nchw" else pixels
        encoded = [tf.io.encode_png(image).numpy() for image in channels_last.astype("uint8")]
        return _called(loaded.signatures[BYTES_SIGNATURE], {BYTES_INPUT: tf.constant(encoded)})

    return run
