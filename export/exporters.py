"""Keras to ONNX: trace without weights, translate op by op, clean the graph, write, verify what was written, then rename."""

import dataclasses
import functools
import hashlib
import json
import tempfile
from importlib import metadata as distributions
from pathlib import Path

import numpy as np

from . import artifact
from .artifact import publishing
from .conversion import passes
from .conversion.fallback import stock_model
from .conversion.passes import finish
from .conversion.passes import opset as opsets
from .conversion.rebuild import in_float32, with_open_size, without_identity_blocks
from .conversion.signature import image_preprocessing
from .conversion.signature import interface as interface_of
from .conversion.trace import NotWeightless, trace
from .conversion.translate import to_ir
from .errors import UsageError
from .results import ExportResult
from .verification.onnx_file import TOLERANCES, judge, read_samples, require, statistics_batch
from .verification.randomization import hiding_variables, randomised, statistics

OPTIONS = {
    "opset": 17,
    "layout": "nhwc",
    "input_dtype": "float32",
    "resize": False,
    "outputs": None,
    "dynamic_size": False,
    "top_k": None,
    "prune_identity": None,
}


def to_onnx(
    model,
    path,
    *,
    opset=17,
    layout="nhwc",
    input_dtype="float32",
    resize=False,
    outputs=None,
    dynamic_size=False,
    top_k=None,
    prune_identity=None,
    labels=None,
    external_data=None,
    precision="float32",
    calibration=None,
    max_drop=1.0,
    target="cpu",
    samples=None,
    overwrite=True,
    keep_failed=False,
    progress=None,
):
    """Export a Keras model to a verified ONNX file; differs from `model.export`: a file that does not match is not written.

    Args:
        model: built Keras model, Functional or Sequential. Mixed precision is rebuilt in float32.
        path: file to write.
        opset: 13 to 23.
        layout: `"nhwc"` or `"nchw"`: layout of image inputs.
        input_dtype: `"float32"`, or `"uint8"` for a model that takes pixels.
        resize: take uint8 images of any size, resized and cropped in the graph as the card says, see `resizing`.
        outputs: names among those the model offers, see `interface.interface`; by default `logits`, `features` or all of several.
        dynamic_size: open height and width instead of the model's.
        top_k: adds the outputs `top_classes` and `top_probabilities` of so many classes.
        prune_identity: True leaves out residual blocks that do nothing, a number those whose gate is at most that;
            see `keras_resnet.prune`.
        labels: class names in the order of the logits; by default the card's.
        external_data: weights in a second file, `path + ".data"`; by default only where one file would pass 2 GB.
        precision: `"float32"`, `"float16"` or `"int8"`; see `to_float16` and `to_int8`, which then get the verified float32 file.
        calibration, max_drop, target: for int8, see `to_int8`.
        samples: images to verify on beside random batches: a folder, or an array in the file's layout.
        overwrite: whether `path` may exist.
        keep_failed: keep a file that failed verification as `path + ".failed"`.
        progress: function that is told each step by name.

    Returns:
        ExportResult

    Raises:
        UsageError: an option or the model does not fit, or the file cannot be written.
        MismatchError: the file does not compute what the model computes; nothing is left behind.
    """
    tell = progress or (lambda step: None)
    options = {
        "opset": opset,
        "layout": layout,
        "input_dtype": input_dtype,
        "resize": resize,
        "outputs": outputs,
        "dynamic_size": dynamic_size,
        "top_k": top_k,
        "prune_identity": prune_identity,
    }
    opsets.check_opset(opset)
    target_path = artifact.check_target(path, overwrite)
    if precision != "float32":
        from .quantization.precision import side_by_side

        lower = _lower_precision(precision, calibration, max_drop, target)
        if external_data:
            raise UsageError(f"`external_data` goes with float32, not with {precision}")
        with tempfile.TemporaryDirectory(prefix=f".{target_path.name}.", dir=target_path.parent) as folder:
            full = Path(folder) / target_path.name
            first = to_onnx(model, full, **options, labels=labels, samples=samples, progress=progress)
            tell(precision)
            result = lower(full, path, samples=samples, overwrite=overwrite, keep_failed=keep_failed)
            tell("bench")
            result = side_by_side(full, result)
        return dataclasses.replace(result, notes=(*first.notes, *result.notes))
    interface, notes = prepared(model, options)
    samples = None if samples is None else read_samples(samples, interface)
    with publishing(path, overwrite, keep_failed) as work:
        tell("convert")
        converted, method = convert(interface, opset)
        if method == "stock":
            notes.append("converted by tf2onnx's own road: this model reads variables in a way that the fast one cannot follow")
        metadata = metadata_of(interface, options, labels)
        stamp(converted, metadata)
        tell("write")
        artifact.write_onnx(converted, work, external_data)
        tell("verify")
        weights = weights_of(converted)
        look = tamed(work, interface, opset)
        report = judge(work, interface, expected_weights=weights, expected_card=metadata["card"], samples=samples, tamed=look)
        del weights, converted
        if report.passed:
            report = judge_randomised(report, interface, opset, work.parent / "randomised.onnx")
        report = dataclasses.replace(report, path=str(path))
        require(report)
        sha256, size = artifact.digest(work), artifact.disk_size(work)
    return ExportResult(str(path), report, sha256, method, size, tuple(notes))


def _lower_precision(precision, calibration, max_drop, target):
    from .quantization.precision import check_int8, opened, to_float16, to_int8

    if precision == "float16":
        return to_float16
    if precision != "int8":
        raise UsageError(f"`precision` must be one of {', '.join(TOLERANCES)}, got {precision!r}")
    if calibration is None:
        raise UsageError("`precision` int8 needs `calibration` images")
    check_int8(target, max_drop)
    calibration = opened(calibration)
    return functools.partial(to_int8, calibration=calibration, max_drop=max_drop, target=target)


def prepared(model, options):
    """The model as it will be exported, seen through its interface, and notes on what had to be changed.

    Args:
        model: Keras model.
        options: dict over `OPTIONS`; missing ones have their default.

    Returns:
        `(Interface, list of notes)`.
    """
    options, notes = OPTIONS | options, []
    if options["prune_identity"] is not None and options["prune_identity"] is not False:
        model, note = without_identity_blocks(model, float(options["prune_identity"] is not True and options["prune_identity"]))
        notes.append(note)
    model, note = in_float32(model)
    notes += [note] if note else []
    if options["dynamic_size"] and options["resize"]:
        raise UsageError("`dynamic_size` and `resize` exclude each other: an image is resized to the model's one size")
    if options["dynamic_size"]:
        model = with_open_size(model)
    view = interface_of(model, **{key: options[key] for key in ("outputs", "layout", "input_dtype", "resize", "top_k")})
    return view, notes


def convert(interface, opset=17):
    """An onnx-ir model of an interface, not yet written or verified; the same model gives the same result.

    Args:
        interface: `interface.Interface`.
        opset: 13 to 23.

    Returns:
        `(onnx_ir.Model, method)`, method being `"weightless"` or `"stock"`.

    Raises:
        UsageError: an op has no counterpart in ONNX.
    """
    low, method = min(opset, opsets.HANDLERS), "weightless"
    try:
        model = to_ir(trace(interface, interface.specs()), low)
    except NotWeightless:
        model, method = stock_model(interface, interface.specs(), low), "stock"
    for value, port in zip(model.graph.inputs, interface.inputs, strict=True):
        value.shape = finish.ir.Shape(port.shape)
    passes.clean(model.graph)
    finish.round_weights(model.graph)
    if opset > opsets.HANDLERS:
        finish.canonical_names(model.graph, [port.name for port in interface.inputs], list(interface.outputs))
        model = opsets.raise_opset(model, opset)
    finish.canonical_names(model.graph, [port.name for port in interface.inputs], list(interface.outputs))
    finish.name_dimensions(model.graph, interface.layout == "nchw")
    finish.strip(model)
    model.ir_version = opsets.ir_version(opset)
    return model, method


def expected_weights(interface, options):
    """`{initialiser name: tensor}` that a file of this model must hold."""
    return weights_of(convert(interface, (OPTIONS | options)["opset"])[0])


def weights_of(model):
    """`{initialiser name: tensor}` of an onnx-ir model."""
    return {name: value.const_value for name, value in model.graph.initializers.items()}


def judge_randomised(report, interface, opset, path):
    """Verify the conversion of an untrained model once more, with random batch-norm statistics, biases and gates.

    Args:
        report: the report on the file as shipped.
        interface: `interface.Interface` of the model.
        opset: opset of the file.
        path: a throw-away file.

    Returns:
        the report as it is for a trained model; else with what the second look found.
    """
    hiding = hiding_variables(interface.model)
    if not hiding:
        return report
    with randomised(interface, statistics_batch(interface), hiding):
        converted, _ = convert(interface, opset)
        artifact.write_onnx(converted, path)
        second = judge(path, interface, expected_weights=weights_of(converted), tamed=tamed(path, interface, opset))
    for file in artifact.companions(path):
        file.unlink()
    return with_second_look(report, second, len(hiding))


def judge_graph(report, path, interface, opset):
    """The same for a file that is there already: its own graph gets the random weights, since the fault may be in it.

    Args and Returns as `judge_randomised`; `path` is the file.
    """
    hiding = hiding_variables(interface.model)
    if not hiding:
        return report
    second = _with_other_weights(path, interface, opset, hiding)
    if second is not None:
        return with_second_look(report, second, len(hiding))
    note = f"{len(hiding)} constant weights (untrained) hide what lies behind them, and the graph is another one without them"
    return dataclasses.replace(report, notes=(*report.notes, note))


def with_second_look(report, second, count):
    """A report together with what a second one, with random values for `count` constant weights, found."""
    note = f"{count} constant weights (untrained): verified again with random ones, max relative error {second.worst():.1e}"
    return dataclasses.replace(
        report,
        passed=second.passed,
        diverges=second.diverges,
        problems=tuple(f"with random weights in place of constant ones: {problem}" for problem in second.problems),
        notes=(*report.notes, note),
    )


def _with_other_weights(path, interface, opset, variables, strict=False):
    """A report on the graph of a file with random values for some variables.

    None where the model's graph is another one with these, as where a scalar of 1 was left out; a strict look reports that.
    """
    with randomised(interface, statistics_batch(interface), variables), tempfile.TemporaryDirectory() as folder:
        weights = weights_of(convert(interface, opset)[0])
        names = {tensor.name for tensor in artifact.read_proto(path, external_data=False).graph.initializer}
        if names != set(weights) and not strict:
            return None
        other = Path(folder) / "other.onnx"
        artifact.write_with_weights(path, other, weights)
        look = None if strict else tamed(other, interface, opset)
        return judge(other, interface, expected_weights=weights, tamed=look, strict=strict)


def tamed(path, interface, opset):
    """A function that judges the graph of a file with batch-norm statistics that fit the data; None for a model without norms.

    Its weights are compared one by one elsewhere; this settles what the graph does with them where rounding drowns it.
    """
    variables = statistics(interface.model)
    if not variables:
        return None

    @functools.cache
    def look():
        return _with_other_weights(path, interface, opset, variables, strict=True)

    return look


def stamp(model, metadata):
    """Put metadata into an onnx-ir model."""
    model.metadata_props.clear()
    model.metadata_props.update(artifact.encode_metadata(metadata))


def metadata_of(interface, options, labels=None, precision="float32"):
    """What a file says about itself; see `artifact`.

    Raises:
        UsageError: the number of labels is not the number of classes.
    """
    tolerance = {"relative": TOLERANCES[precision], "precision": precision}
    return {
        "card": card_of(interface, labels),
        "options": {key: value for key, value in options.items() if value != OPTIONS[key]},
        "sha256": model_digest(interface.model),
        "tolerances": tolerance,
        "versions": versions(),
    }


def card_of(interface, labels=None):
    """The model's card as a dict, with the input's size and the labels filled in; models from elsewhere get a plain one."""
    from keras_resnet.modelcard import ModelCard, card

    found = card(interface.model) or ModelCard(interface.model.name)
    labels = list(labels) if labels is not None else found.labels
    classes = interface.model.outputs[0].shape[-1]
    if labels is not None and {"logits", "probabilities"} & set(interface.outputs) and len(labels) != classes:
        raise UsageError(f"`labels` must name the {classes} classes of the model, got {len(labels)}")
    preprocessing = image_preprocessing(interface.model)
    if interface.fit:  # what is left to do outside the graph
        preprocessing |= {"size": None, "resize": None}
    return found.replace(preprocessing=preprocessing, labels=labels).to_dict()


def model_digest(model):
    """sha256 over a model's config and its weights in order, hexadecimal."""
    config = json.dumps(model.get_config(), sort_keys=True, default=lambda thing: type(thing).__name__)
    total = hashlib.sha256(config.encode())
    for variable in model.weights:
        total.update(np.ascontiguousarray(variable.numpy()).data)
    return total.hexdigest()


def versions():
    """Versions of what made the file."""
    from keras_resnet._version import __version__

    return {"keras_resnet_export": __version__} | {
        name: distributions.version(name) for name in ("keras", "onnx", "onnx-ir", "tensorflow", "tf2onnx")
    }
