"""Keras to a SavedModel folder with named signatures, verified like every artefact; it loads without this package."""

import dataclasses
import json

from . import artifact
from .artifact import publishing
from .convert import metadata_of, prepared
from .errors import UsageError
from .results import ExportResult, VerificationReport
from .tracing import concrete_function
from .verification import TOLERANCES, cases, compare, described, measure, require

SIGNATURE = "serving_default"


def to_savedmodel(
    model, path, *, outputs=None, layout="nhwc", labels=None, samples=None, overwrite=True, keep_failed=False, progress=None
):
    """Export a Keras model to a verified SavedModel; differs from `model.export` by its names and by the check.

    Args:
        model: built Keras model, Functional or Sequential. Mixed precision is rebuilt in float32.
        path: folder to write; the metadata lie in it as `keras_resnet.json`.
        outputs, layout, labels, samples: as in `to_onnx`.
        overwrite: whether the folder may exist; it is swapped for the new one at the end.
        keep_failed: keep a folder that failed verification as `path + ".failed"`.
        progress: function that is told each step by name.

    Returns:
        ExportResult

    Raises:
        UsageError: an option or the model does not fit, or the folder cannot be written.
        MismatchError: the folder does not compute what the model computes; nothing is left behind.
    """
    tell = progress or (lambda step: None)
    artifact.check_target(path, overwrite)
    options = {"outputs": outputs, "layout": layout}
    interface, notes = prepared(model, options)
    metadata = metadata_of(interface, options, labels)
    with publishing(path, overwrite, keep_failed) as work:
        tell("write")
        write_savedmodel(interface, work)
        (work / artifact.FOLDER_FILE).write_text(json.dumps(metadata, ensure_ascii=False, indent=1, sort_keys=True), "utf-8")
        tell("verify")
        report = dataclasses.replace(judge_savedmodel(work, interface, samples=samples), path=str(path))
        require(report)
        sha256, size = artifact.digest(work), artifact.disk_size(work)
    return ExportResult(str(path), report, sha256, "savedmodel", size, tuple(notes))


def write_savedmodel(interface, path):
    """Write the folder, unverified. Variables are tracked one by one, so that nothing of Keras is needed to load it."""
    import tensorflow as tf

    module = tf.Module()
    module.weights = [variable.value for variable in interface.model.variables]
    concrete, _ = concrete_function(interface, interface.specs([port.name for port in interface.inputs]))
    module.serve = concrete
    try:
        tf.saved_model.save(module, str(path), signatures={SIGNATURE: concrete})
    except tf.errors.OpError as error:
        raise UsageError(f"cannot write {path}: {artifact.first_line(error)}") from error


def judge_savedmodel(path, interface, *, samples=None, seed=0):
    """Compare a SavedModel folder with a model; it is loaded from the disk. Args and Returns as in `verification.judge`."""
    import tensorflow as tf

    tolerance, problems, comparisons = TOLERANCES["float32"], [], []
    try:
        loaded = tf.saved_model.load(str(path))
        serve = loaded.signatures[SIGNATURE]
    except Exception as error:
        raise UsageError(
            f"{path} is not a readable SavedModel with the signature `{SIGNATURE}`: {artifact.first_line(error)}"
        ) from error
    have = set(serve.structured_input_signature[1]), set(serve.structured_outputs)
    want = {port.name for port in interface.inputs}, set(interface.outputs)
    if have != want:
        problems.append(f"its inputs and outputs are {sorted(have[0] | have[1])}, the model's {sorted(want[0] | want[1])}")
    for case in () if problems else cases(interface, samples, seed):
        reference, largest = interface.reference(case.feeds)
        got = serve(**{name: tf.constant(value) for name, value in case.feeds.items()})
        for name in reference:
            figures = measure(reference[name], got[name].numpy(), largest[name])
            comparisons.append(compare(name, figures, case, "TensorFlow, graph", tolerance))
    problems += [described(comparison) for comparison in comparisons if not comparison.passed]
    return VerificationReport(str(path), not problems, "float32", tolerance, tuple(comparisons), problems=tuple(problems))
