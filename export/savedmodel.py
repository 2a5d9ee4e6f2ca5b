"""Keras to a SavedModel folder with named signatures, verified like every artefact; it loads without this package."""

import contextlib
import dataclasses
import functools
import json
import re

import numpy as np

from . import artifact
from .artifact import publishing
from .conversion.resizing import fitted
from .conversion.signature import FEATURES, image_preprocessing
from .conversion.signature import interface as interface_of
from .conversion.trace import clean_name, concrete_function
from .errors import UsageError
from .exporters import metadata_of, prepared, with_second_look
from .results import ExportResult, VerificationReport
from .verification.onnx_file import (
    TOLERANCES,
    cases,
    check_card,
    compare,
    described,
    measure,
    read_samples,
    require,
    said_of,
    second_opinion,
    statistics_batch,
    truth_of,
)
from .verification.randomization import hiding_variables, randomised, statistics

SIGNATURE, BYTES_SIGNATURE, BYTES_INPUT = "serving_default", "serving_bytes", "image_bytes"
MARK = "saved_model.pb"


def to_savedmodel(
    model, path, *, outputs=None, layout="nhwc", labels=None, samples=None, overwrite=True, keep_failed=False, progress=None
):
    """Export a Keras model to a verified SavedModel; differs from `model.export` by its names and by the check.

    Signatures: `serving_default` (`images` to the outputs), `features` (what a classifier pools; for other models there is none)
    and, for image models of fixed size, `serving_bytes` (`image_bytes`: encoded JPEG, PNG, GIF or BMP files of any size).

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
    artifact.check_target(path, overwrite, MARK)
    options = {"outputs": outputs, "layout": layout}
    interface, notes = prepared(model, options)
    metadata = metadata_of(interface, options, labels)
    samples = None if samples is None else read_samples(samples, interface)
    with publishing(path, overwrite, keep_failed, MARK) as work:
        tell("write")
        write_savedmodel(interface, work)
        (work / artifact.FOLDER_FILE).write_text(json.dumps(metadata, ensure_ascii=False, indent=1, sort_keys=True), "utf-8")
        tell("verify")
        report = judge_savedmodel(work, interface, expected_card=metadata["card"], samples=samples)
        report = dataclasses.replace(report, path=str(path))
        require(report)
        sha256, size = artifact.digest(work), artifact.disk_size(work)
    return ExportResult(str(path), report, sha256, "savedmodel", size, tuple(notes))


def write_savedmodel(interface, path):
    """Write the folder, unverified. Variables are tracked one by one, so that nothing of Keras is needed to load it."""
    import tensorflow as tf

    module = tf.Module()
    module.weights = [variable.value for variable in interface.model.variables]
    module.served = {
        name: concrete_function(view, view.specs(argument_names(view)))[0] for name, view in array_signatures(interface).items()
    }
    if takes_files(interface):
        spec = tf.TensorSpec([None], tf.string, name=BYTES_INPUT)
        module.served[BYTES_SIGNATURE] = concrete_function(functools.partial(_from_bytes, interface), [spec])[0]
    try:
        with clean_variable_names(module.weights):
            tf.saved_model.save(module, str(path), signatures=dict(module.served))
    except tf.errors.OpError as error:
        raise OSError(artifact.first_line(error)) from error  # no number; `publishing` knows whether the disk is full


@contextlib.contextmanager
def clean_variable_names(variables):
    """Saving opens a name scope per variable, and Keras allows names, with spaces say, that TensorFlow refuses for one."""
    before = [variable._handle_name for variable in variables]
    try:
        for variable, name in zip(variables, before, strict=True):
            variable._handle_name = ":".join(map(clean_name, name.split(":")))
        yield
    finally:
        for variable, name in zip(variables, before, strict=True):
            variable._handle_name = name


def argument_names(interface):
    """The inputs' names as those of Python arguments, which is what a signature's are: `left eye` becomes `left_eye`."""
    names = []
    for port in interface.inputs:
        name = re.sub(r"\W", "_", port.name, flags=re.ASCII)
        name = name if name[:1].isalpha() else f"arg_{name}"
        names.append(f"{name}_{names.count(name)}" if name in names else name)
    return names


def array_signatures(interface):
    """`{signature name: Interface}` of those that take arrays: the outputs asked for, and the features of a classifier."""
    found = {SIGNATURE: interface}
    with contextlib.suppress(UsageError):
        features = interface_of(interface.model, outputs=[FEATURES], layout=interface.layout)
        found[FEATURES] = features
    return found


def takes_files(interface):
    """Whether image files can be served: one image input of fixed size with one or three channels."""
    shape = tuple(interface.model.inputs[0].shape)
    return len(interface.inputs) == 1 and len(shape) == 4 and None not in shape[1:] and shape[3] in (1, 3)


def _from_bytes(interface, encoded):
    """The outputs from encoded images, decoded, resized and cropped in the graph as the card says."""
    import tensorflow as tf

    height, width, channels = interface.model.inputs[0].shape[1:]
    preprocessing = image_preprocessing(interface.model)

    def decoded(image):
        pixels = tf.io.decode_image(image, channels=channels, expand_animations=False)
        upright = tf.transpose(tf.cast(pixels, tf.float32), [2, 0, 1])[None]
        return tf.ensure_shape(fitted(upright, preprocessing)[0], (channels, height, width))

    pixels = tf.map_fn(decoded, encoded, fn_output_signature=tf.float32)
    return interface(pixels if interface.layout == "nchw" else tf.transpose(pixels, [0, 2, 3, 1]))


def judge_savedmodel(path, interface, *, expected_card=None, samples=None, seed=0):
    """Compare a SavedModel folder with a model, signature by signature and weight by weight; it is loaded from the disk.

    Args and Returns as in `verification.judge`. The signature that takes encoded images gets lossless ones of the model's size.
    Folders of other makers may keep their weights otherwise; these are not compared then.
    """
    loaded = load(path)
    problems, notes = check_card(path, expected_card)
    opinions, tamed = [], tamed_savedmodel(loaded, path, interface)
    comparisons, wrong = _judge_served(loaded, interface, samples, seed, tamed, opinions)
    figures, unlike = compare_variables(loaded, interface.model)
    problems += wrong + unlike
    report = _report(path, comparisons, problems, notes + said_of(opinions, tamed), figures)
    hiding = hiding_variables(interface.model) if report.passed and figures else []
    return with_second_look(report, _with_other_variables(path, interface, hiding), len(hiding)) if hiding else report


def _report(path, comparisons, problems, notes=(), figures=None):
    problems = [*problems, *(described(comparison) for comparison in comparisons if not comparison.passed)]
    return VerificationReport(
        str(path),
        not problems,
        "float32",
        TOLERANCES["float32"],
        tuple(comparisons),
        figures,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def compare_variables(loaded, model):
    """Compare a loaded folder's variables with the model's: they are copies, so they have to be equal.

    Returns:
        `(figures, problems)` as `verification.compare_weights`; `(None, [])` where they do not lie as this module writes them.
    """
    pairs = _variables(loaded, model)
    if pairs is None:
        return None, []
    floats = [(have.numpy(), own) for have, own in pairs if have.dtype.is_floating]
    wrong = [own.path for have, own in floats if not np.array_equal(have, np.asarray(own), equal_nan=True)]
    figures = {"compared": len(floats), "elements": sum(have.size for have, _ in floats)}
    return figures, [f"weight {path!r} differs from the model's" for path in wrong]


def _variables(loaded, model):
    """`[(variable of the folder, variable of the model), …]`, or None where they do not correspond."""
    found = getattr(loaded, "weights", None)
    try:
        if found is None or [tuple(have.shape) for have in found] != [tuple(own.shape) for own in model.variables]:
            return None
    except (AttributeError, TypeError, ValueError):  # a folder from elsewhere, which has something else by that name
        return None
    return list(zip(found, model.variables, strict=True))


def load(path):
    """A SavedModel folder, loaded.

    Raises:
        UsageError: it is none, or has not the signature `serving_default`.
    """
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(path))
        loaded.signatures[SIGNATURE]
    except Exception as error:
        reason = artifact.first_line(error)
        raise UsageError(f"{path} is not a readable SavedModel with the signature `{SIGNATURE}`: {reason}") from error
    return loaded


def tamed_savedmodel(loaded, path, interface):
    """As `convert.tamed`, for a folder; None too where its variables are not known."""
    variables = statistics(interface.model)
    if not variables or _variables(loaded, interface.model) is None:
        return None
    return functools.cache(lambda: _with_other_variables(path, interface, variables, strict=True))


def _with_other_variables(path, interface, variables, strict=False):
    """A report on the same graphs with random values for some variables, assigned after loading."""
    with randomised(interface, statistics_batch(interface), variables):
        loaded = load(path)
        for variable, own in _variables(loaded, interface.model):
            variable.assign(own.value)
        tamed, opinions = (None, None) if strict else (tamed_savedmodel(loaded, path, interface), [])
        return _report(path, *_judge_served(loaded, interface, None, 0, tamed, opinions))


def _judge_served(loaded, interface, samples, seed, tamed, opinions):
    """`(comparisons, problems)` of all signatures."""
    comparisons, problems, served = [], [], loaded.signatures
    for name, view in array_signatures(interface).items():
        wrong = _wrong_signature(name, served.get(name), view)
        problems += wrong
        exact = functools.cache(view.in_float64)
        for case in () if wrong else cases(view, samples, seed):
            feeds = dict(zip(argument_names(view), case.feeds.values(), strict=True))
            comparisons += _compared(served[name], feeds, view, case, name, exact, tamed, opinions)
    if takes_files(interface):
        case = next(cases(interface, seed=seed))
        if BYTES_SIGNATURE in served:
            feeds = {BYTES_INPUT: _encoded(interface, case)}
            exact = functools.cache(interface.in_float64)
            comparisons += _compared(served[BYTES_SIGNATURE], feeds, interface, case, BYTES_SIGNATURE, exact, tamed, opinions)
        else:
            problems.append(f"the signature `{BYTES_SIGNATURE}` is missing")
    return comparisons, problems


def _wrong_signature(name, serve, view):
    """What is wrong with a signature's names: a list of one sentence, or of none."""
    if serve is None:
        return [f"the signature `{name}` is missing"]
    have = set(serve.structured_input_signature[1]), set(serve.structured_outputs)
    want = set(argument_names(view)), set(view.outputs)
    if have != want:
        return [f"`{name}` has the inputs and outputs {sorted(have[0] | have[1])}, the model {sorted(want[0] | want[1])}"]
    return []


def _encoded(interface, case):
    import tensorflow as tf

    (pixels,) = case.feeds.values()
    upright = pixels.transpose(0, 2, 3, 1) if interface.layout == "nchw" else pixels
    return [tf.io.encode_png(image).numpy() for image in upright.astype("uint8")]


def _compared(serve, feeds, view, case, signature, exact, tamed, opinions):
    import tensorflow as tf

    got = serve(**{name: tf.constant(value) for name, value in feeds.items()})
    reference, largest = view.reference(case.feeds)
    truth = truth_of(exact, case)
    found = []
    for name, expected in reference.items():
        numbers = got[name].numpy()
        figures = measure(expected, numbers, largest[name])
        comparison = compare(name, figures, case, f"TensorFlow, {signature}", TOLERANCES["float32"])
        if opinions is not None:
            comparison = second_opinion(comparison, expected, numbers, largest[name], truth, tamed, opinions)
        found.append(comparison)
    return found
