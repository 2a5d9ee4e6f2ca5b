"""Float16 and int8 from a verified float32 file, each checked against it. Imports neither Keras nor TensorFlow."""

import contextlib
import dataclasses
import logging
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from .. import artifact
from ..conversion.passes.common import attribute, remove_unused
from ..errors import MismatchError, UsageError
from ..metadata import TOLERANCES
from ..results import Comparison, ExportResult, VerificationReport
from ..runtime import images
from ..runtime.benchmark import bench
from ..runtime.prediction import batches, image_input, scores_output
from ..runtime.sessions import session
from ..verification.divergence import inner_tensors
from ..verification.metrics import agreement, measure
from ..verification.weights import compare_halved, file_weights

LARGEST_HALF = 65504.0
COSINE = 0.9999
TARGETS = ("cpu", "gpu")
# 2, 4, 8, 16, 32 layers go back to float32, one round after the other.
ROUNDS = 6
DEQUANTISED = "_DequantizeLinear_Output"  # what onnxruntime's quantiser appends to a tensor's name


def to_float16(source, path, *, samples=None, overwrite=True, keep_failed=False):
    """A float16 file with float32 inputs and outputs; what would overflow stays float32.

    onnxruntime's converter does the rewriting; its CPU kernels gain nothing from it, GPUs do.

    Args:
        source: float32 ONNX file.
        path: file to write.
        samples: folder of images or array to check on, beside random batches.
        overwrite: whether `path` may exist.
        keep_failed: keep a file that failed as `path + ".failed"`.

    Returns:
        ExportResult

    Raises:
        UsageError: a file cannot be read or written.
        MismatchError: the outputs differ by more than 1e-2 of the largest value, or the cosine is below 0.9999.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    artifact.check_target(path, overwrite)
    original = _float32_session(source)
    tries = list(_cases(original, samples))
    proto = artifact.read_proto(source)
    large = overflowing(source, tries)
    blocked = [*DEFAULT_OP_BLOCK_LIST, "Softmax"]
    with artifact.publishing(path, overwrite, keep_failed) as work, _quiet():
        half = convert_float_to_float16(proto, keep_io_types=True, op_block_list=blocked, node_block_list=large)
        _save(without_round_trips(half), work, source, "float16")
        report = _compare_half(work, source, original, tries)
        note = [f"{len(large)} nodes stay float32, since their numbers pass {LARGEST_HALF:.0f}"] if large else []
        report = dataclasses.replace(report, path=str(path), notes=tuple(note))
        require(report)
        return ExportResult(str(path), report, artifact.digest(work), "float16", artifact.disk_size(work), tuple(note))


def _float32_session(path):
    """A session of a file that is in float32 still.

    Raises:
        UsageError: it is in a lower precision already.
    """
    opened = session(path, "cpu")
    graph = artifact.read_proto(path, external_data=False).graph
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.node):
        raise UsageError(f"{path} is quantised already; give the float32 file that it was made from")
    if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer):
        raise UsageError(f"{path} is in float16 already; give the float32 file that it was made from")
    return opened


def without_round_trips(proto):
    """The model without casts from float32 to float16 and back, which the converter leaves between nodes that stay float32.

    They round, and turn what passes float16 into infinity.
    """
    model = ir.from_proto(proto)
    for node in list(model.graph):
        inner = node.inputs[0].producer() if node.op_type == "Cast" else None
        if inner is None or inner.op_type != "Cast" or node.outputs[0].is_graph_output():
            continue
        to_float, to_half = (attribute(cast, "to") for cast in (node, inner))
        if (to_float, to_half) == (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            ir.convenience.replace_all_uses_with(node.outputs[0], inner.inputs[0])
    remove_unused(model.graph)
    model.graph.sort()
    return ir.to_proto(model)


def overflowing(path, tries):
    """Names of the nodes that see numbers beyond float16 in one of the batches."""
    proto = artifact.read_proto(path, external_data=False)
    names = {name for node in proto.graph.node for name in node.output}
    large = {name for case in tries for name, value in inner_tensors(path, case.feeds, names).items() if _exceeds(value)}
    return [node.name for node in proto.graph.node if large & {*node.input, *node.output}]


def _exceeds(value):
    return np.issubdtype(value.dtype, np.floating) and float(np.abs(value).max(initial=0)) > LARGEST_HALF


@dataclass(frozen=True)
class Case:
    """One batch to compare on: what it is, and `{input name: array}`."""

    data: str
    feeds: dict


def _cases(model, samples):
    """Batches for a session: random pixels, random normal numbers, and the samples."""
    rng = np.random.default_rng(0)
    for data, batch, size in (("pixels", 1, (96, 96)), ("noise", 3, (107, 131))):
        yield Case(data, {value.name: _random(rng, value, batch, data, size) for value in model.inputs})
    if samples is not None:
        for array in read_images(samples, model):
            yield Case("samples", {model.inputs[0].name: array})


def _random(rng, value, batch, data, size):
    first, shape = 2 if value.layout == "nchw" else 1, list(value.shape)
    for axis, have in enumerate(shape):
        if isinstance(have, str):
            shape[axis] = batch if axis == 0 else size[min(max(axis - first, 0), 1)]
    if np.issubdtype(np.dtype(value.dtype), np.integer):
        return rng.integers(0, 256 if value.dtype == "uint8" else 2, shape).astype(value.dtype)
    return (rng.integers(0, 256, shape) if data == "pixels" else rng.normal(size=shape)).astype(value.dtype)


def compare(name, figures, case, runtime, tolerance):
    """A `Comparison` from the figures of `measure`."""
    first = next(iter(case.feeds.values()))
    passed, shape = figures["relative"] <= tolerance, list(first.shape)
    return Comparison(output=name, batch=shape[0], shape=shape, data=case.data, runtime=runtime, passed=passed, **figures)


def check_valid(path):
    """What onnx.checker, in full, says against a file: a list of one message, or an empty one."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return [f"onnx.checker refuses it: {artifact.first_line(error)}"]
    return []


def require(report):
    """Return a report that passed; raise for one that did not."""
    if not report.passed:
        raise MismatchError(report.summary(), report)
    return report


def _compare_half(path, source, original, tries):
    converted = session(path, "cpu")
    comparisons, problems = [], check_valid(path)
    for case in tries:
        reference, got = original.run(case.feeds), converted.run(case.feeds)
        for name in reference:
            figures = measure(reference[name], got[name])
            comparison = compare(name, figures, case, "onnxruntime, default", TOLERANCES["float16"])
            comparisons.append(dataclasses.replace(comparison, passed=comparison.passed and comparison.cosine >= COSINE))
    for comparison in comparisons:
        if not comparison.passed:
            problems.append(f"output `{comparison.output}`: error {comparison.relative:.3g}, cosine {comparison.cosine:.6f}")
    figures, wrong = compare_halved(path, file_weights(source))
    problems += wrong
    return VerificationReport(
        str(path), not problems, "float16", TOLERANCES["float16"], tuple(comparisons), figures, problems=tuple(problems)
    )


def to_int8(source, path, *, calibration, samples=None, target="cpu", max_drop=1.0, overwrite=True, keep_failed=False):
    """A statically quantised file (QDQ, int8 weights per channel); layers are left in float32 until the budget holds.

    onnxruntime's own defaults leave a third of a ResNet's convolutions in float32 and are half as fast on a CPU.

    Args:
        source: float32 ONNX file.
        path: file to write.
        calibration: images that set the ranges of activations: folder, `.npz` or `.npy` file, or array.
        samples: images to measure agreement on, likewise; the calibration images without.
        target: `"cpu"`: unsigned activations, 7-bit weights where the CPU has no VNNI; `"gpu"`: symmetric and signed.
        max_drop: allowed loss of top-1 agreement with the float32 file, in percent of the images.
        overwrite: whether `path` may exist.
        keep_failed: keep a file that failed as `path + ".failed"`.

    Returns:
        ExportResult; notes name the layers with the largest errors and those left in float32.

    Raises:
        UsageError: a file cannot be read or written, or the images do not fit.
        MismatchError: the budget does not hold, whatever is left in float32.
    """
    check_int8(target, max_drop)
    artifact.check_target(path, overwrite)
    original = _float32_session(source)
    ranking = scores_output(original)
    name = ranking.output
    ranges = read_images(calibration, original)
    tests = ranges if samples is None else read_images(samples, original)
    scores = [original.run(array, [name])[name] for array in tests]
    if scores[0].ndim != 2 or scores[0].shape[1] < 2:
        raise UsageError(f"{source} ranks no classes, so int8 has nothing to be judged by; take float16, or keep float32")
    with artifact.publishing(path, overwrite, keep_failed) as work:
        before = _before_first_convolution(source)
        excluded, found = list(before), None
        for attempt in range(ROUNDS):
            _quantise(source, work, original.inputs[0].name, ranges, excluded, target)
            found = _compare_scores(work, name, tests, scores, max_drop)
            errors = layer_errors(source, work, {original.inputs[0].name: tests[0][:8]})
            errors = {layer: error for layer, error in errors.items() if layer not in before}
            if found.passed or attempt == ROUNDS - 1:
                break
            excluded = excluded + [layer for layer in candidates(errors) if layer not in excluded][: 2 ** (attempt + 1)]
        notes = _int8_notes(errors, excluded[len(before) :], samples is None)
        layers = {layer: {"error": error, "added": added} for layer, (error, added) in errors.items()}
        found = dataclasses.replace(found, path=str(path), notes=tuple(notes), layers=layers)
        require(found)
        return ExportResult(str(path), found, artifact.digest(work), "int8", artifact.disk_size(work), tuple(notes))


def check_int8(target, max_drop):
    """Raises: UsageError: an option of `to_int8` has no such value."""
    if target not in TARGETS:
        raise UsageError(f"`target` must be one of {', '.join(TARGETS)}, got {target!r}")
    if not 0 <= max_drop <= 100:
        raise UsageError(f"`max_drop` must be from 0 to 100 percent, got {max_drop}")


def read_images(source, model):
    """Images as arrays that a session takes, each of 16 rows at most.

    Args:
        source: folder of images, `.npz` (its first array) or `.npy` file, or array.
        model: `runtime.Session`.

    Raises:
        UsageError: nothing there, or of another size than the model's input.
    """
    spec = image_input(model)
    source = opened(source)
    if isinstance(source, str | Path):
        return list(_in_rows(np.concatenate(list(batches(images.find(source), model.card, spec)))))
    array = np.asarray(source)
    fits = array.ndim == len(spec.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or not len(array):
        raise UsageError(f"images must have the shape {list(spec.shape)} of the model's input, got {list(array.shape)}")
    if not np.isfinite(array.astype("float32")).all():
        raise UsageError("images hold numbers that are not finite")
    return list(_in_rows(array.astype(spec.dtype)))


def opened(source):
    """The array in an `.npz` or `.npy` file; an array, or a folder with images in it, as it is.

    Raises:
        UsageError: no such file, no image in the folder, or no array in the file.
    """
    if not isinstance(source, str | Path):
        return source
    if not Path(source).is_dir():
        return _read_array(artifact.existing_file(source))
    images.find(source)
    return source


def _in_rows(array, rows=16):
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def _read_array(path):
    try:
        loaded = np.load(path, allow_pickle=False)
        return loaded[loaded.files[0]] if hasattr(loaded, "files") else loaded
    except (ValueError, OSError, IndexError) as error:
        raise UsageError(
            f"{path} is neither a folder of images nor an .npz or .npy file: {artifact.first_line(error)}"
        ) from error


def _before_first_convolution(path):
    """Names of the nodes in front of the first convolution: pixels to normalised input, where 8 bits are all there is."""
    graph, names = artifact.read_proto(path, external_data=False).graph, []
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in weights:
            return names
        names.append(node.name)
    return names


def _quantise(source, path, input_name, ranges, excluded, target):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.rows = iter(ranges)

        def get_next(self):
            array = next(self.rows, None)
            return None if array is None else {input_name: array}

    symmetric = target == "gpu" or platform.machine().lower() in ("aarch64", "arm64")
    with _quiet():
        quantize_static(
            artifact.read_proto(source),  # of a path it writes a copy beside it, over whatever bears that name
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=target == "cpu" and not symmetric and not has_vnni(),
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
            # A mean over batches, since a range set by one outlier wastes its levels: ResNet-20 agrees with its float32 file on
            # 99.87 % of CIFAR-10's training images, 99.77 % with the extremes themselves and with the entropy of histograms.
            extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": True, "CalibMovingAverage": True},
        )
    _save(artifact.read_proto(path), path, source, "int8")


def has_vnni(path="/proc/cpuinfo"):
    """Whether the CPU multiplies 8-bit numbers without overflow in between; without, weights get 7 bits."""
    with contextlib.suppress(OSError):
        return "vnni" in Path(path).read_text()
    return False


def _compare_scores(path, name, tests, scores, max_drop):
    quantised = session(path, "cpu")
    got = np.concatenate([quantised.run(array, [name])[name] for array in tests])
    reference = np.concatenate(scores)
    case = Case("samples", {quantised.inputs[0].name: np.concatenate(tests)})
    comparison = compare(name, measure(reference, got), case, "onnxruntime, default", np.inf)
    share = agreement(reference, got, 1)
    passed = share is not None and share >= 1 - max_drop / 100 and not check_valid(path)
    shown = "not measurable" if share is None else f"{share:.2%}"
    problem = f"top-1 agreement with float32 is {shown} on {len(got)} images, below {1 - max_drop / 100:.2%}"
    problems = () if passed else (problem,)
    comparison = dataclasses.replace(comparison, passed=passed)
    return VerificationReport(str(path), passed, "int8", max_drop / 100, (comparison,), problems=problems)


def layer_errors(source, path, feeds):
    """`{node name: (error of its output, error it added)}`, as shares ‖Δ‖ / ‖float32‖, of what multiplies or adds, in order.

    Args:
        source: float32 file.
        path: quantised file.
        feeds: one batch.
    """
    graph = artifact.read_proto(source, external_data=False).graph
    names = {name for node in graph.node for name in node.output}
    want = inner_tensors(source, feeds, names)
    have = inner_tensors(path, feeds, names | {name + DEQUANTISED for name in names})
    # A ReLU may have become the range of the quantised tensor; the plain name then holds what goes into it.
    have = {name: have.get(name + DEQUANTISED, have.get(name)) for name in want}
    error = {name: _share(have[name], want[name]) for name in want if have[name] is not None and want[name].dtype.kind == "f"}
    clipped = {node.input[0]: node.output[0] for node in graph.node if node.op_type in ("Relu", "Clip")}
    found = {}
    for node in graph.node:
        output = node.output[0] if node.output[0] in error else clipped.get(node.output[0])
        if output in error and node.op_type in ("Conv", "Gemm", "MatMul", "Add"):
            before = max((error.get(name, 0.0) for name in node.input), default=0.0)
            found[node.name] = (error[output], error[output] - before)
    return found


def _share(have, want):
    return float(np.linalg.norm(have.astype("float64") - want) / max(float(np.linalg.norm(want.astype("float64"))), 1e-30))


def worst_layers(errors):
    """Node names, those that add most error first."""
    return sorted(errors, key=lambda name: -errors[name][1])


def candidates(errors):
    """Node names in the order in which they go back to float32: first and last layer, known to be touchy, then by added error."""
    names = list(errors)
    return list(dict.fromkeys([*names[:1], *names[-1:], *worst_layers(errors)]))


def _int8_notes(errors, excluded, calibrated_on_tests):
    worst = ", ".join(f"{name} {errors[name][0]:.1%}" for name in worst_layers(errors)[:5])
    notes = [f"layers that add most error (‖Δ‖/‖float32‖ behind them): {worst}"]
    if excluded:
        notes.append(f"left in float32: {', '.join(excluded)}")
    if calibrated_on_tests:
        notes.append("agreement was measured on the calibration images; give --samples for others")
    return notes


def _save(proto, path, source, precision):
    """Write a converted file with the metadata of its source, and without opset domains that no node uses."""
    metadata = artifact.read_metadata(source)
    metadata["tolerances"] = {"relative": TOLERANCES[precision], "precision": precision}
    del proto.metadata_props[:]
    for key, value in artifact.encode_metadata(metadata).items():
        proto.metadata_props.add(key=key, value=value)
    used = {node.domain for node in proto.graph.node} | {""}
    kept = [entry for entry in proto.opset_import if entry.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    proto.producer_name, proto.producer_version, proto.doc_string = "resnet_export", "", ""
    onnx.save(proto, path)


def side_by_side(source, result, runs=11):
    """The result of `to_float16` or `to_int8` with its `table`: the file beside the float32 one that it was made from.

    Args:
        source: the float32 file.
        result: `ExportResult`.
        runs: timed runs of each, on the CPU, in turns.

    Returns:
        The result; without a table, and with a note that says why, where random input does not run (whole numbers that mean
        something).
    """
    rows = session(source, "cpu").inputs[0].shape[0]
    try:
        before, after = bench([source, result.path], devices=["cpu"], batches=[rows if isinstance(rows, int) else 1], runs=runs)
    except Exception as error:  # onnxruntime's have no common class; the file is written and verified by now
        return dataclasses.replace(result, notes=(*result.notes, f"not timed: {artifact.first_line(error)}"))
    shares = [comparison.top1 for comparison in result.report.comparisons if comparison.top1 is not None]
    table = (
        {"precision": "float32", "size": artifact.disk_size(source), "milliseconds": before.p50, "top1": 1.0},
        {"precision": result.method, "size": result.size, "milliseconds": after.p50, "top1": min(shares, default=None)},
    )
    return dataclasses.replace(result, table=table)


@contextlib.contextmanager
def _quiet():
    """onnxruntime's tools advise on standard logging while they work; what matters is checked afterwards."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
