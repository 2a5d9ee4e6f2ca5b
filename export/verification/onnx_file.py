"""The judge of every artefact: what it computes against what Keras computes, and its weights against the model's."""

import dataclasses
import functools
import json
from dataclasses import dataclass

import numpy as np

from .. import artifact
from ..conversion.resizing import LEVELS, fitted
from ..conversion.signature import LOGITS, PROBABILITIES
from ..errors import MismatchError, UsageError
from ..results import Comparison, VerificationReport
from ..runtime import images
from . import refolding as weights
from .divergence import first_divergence

TOLERANCES = {"float32": 1e-5, "float16": 1e-2, "int8": None}
BATCHES = (1, 3)
RUNTIMES = {True: "onnxruntime, default", False: "onnxruntime, no optimisation"}
OPEN_SIZES = {"pixels": (96, 96), "noise": (107, 131)}


@dataclass(frozen=True)
class Case:
    """One batch to compare on: what it is, and `{input name: array}`."""

    data: str
    feeds: dict


def judge(
    path,
    interface,
    *,
    precision="float32",
    expected_weights=None,
    expected_card=None,
    samples=None,
    seed=0,
    tamed=None,
    strict=False,
):
    """Compare an ONNX file with a model; the file is opened as it lies on the disk.

    Batches of 1 (random pixels) and 3 (random normal numbers; odd sizes where the size is open), and the samples if given; each
    through onnxruntime with its default optimisation and with none.

    Args:
        path: ONNX file.
        interface: `interface.Interface` of the model.
        precision: key of `TOLERANCES`.
        expected_weights: `{initialiser name: array}` that the file must hold, or None.
        expected_card: the card (dict) that the file must bear, or None.
        samples: folder of images, or an array in the artefact's layout, or None.
        seed: seed of the random batches.
        tamed: function that judges the same graph with weights that do not amplify rounding, or None; see `second_opinion`.
        strict: no second opinion where Keras' own rounding is as large as the difference.

    Returns:
        VerificationReport
    """
    tolerance, comparisons, opinions = TOLERANCES[precision], [], []
    structure, exact = check_structure(path, interface), functools.cache(interface.in_float64)
    problems, notes = check_card(path, expected_card)
    problems = structure + problems
    if not structure:
        for case in cases(interface, samples, seed):
            found, wrong = _judge_case(path, interface, case, tolerance, exact, tamed, None if strict else opinions)
            comparisons, problems = comparisons + found, problems + wrong
    if interface.fit:
        wrong, said = check_resize(interface, next(cases(interface, seed=seed)).feeds)
        problems, notes = problems + wrong, notes + said
    notes += said_of(opinions, tamed)
    problems += [described(comparison) for comparison in comparisons if not comparison.passed]
    figures = diverges = None
    if expected_weights is not None:
        if precision == "float32":
            figures, wrong = compare_weights(path, expected_weights, interface.runner)
        else:
            figures, wrong = compare_halved(path, expected_weights)
        problems += wrong
    if problems and comparisons and tolerance is not None:
        diverges = _first_divergence(path, interface, seed)
    return VerificationReport(
        str(path), not problems, precision, tolerance, tuple(comparisons), figures, diverges, tuple(problems), tuple(notes)
    )


def _judge_case(path, interface, case, tolerance, exact, tamed, opinions):
    """`(comparisons, problems)` of one batch, each runtime in turn."""
    reference, largest = interface.reference(case.feeds)
    truth = truth_of(exact, case)
    comparisons, problems = [], []
    for optimise, runtime in RUNTIMES.items():
        got = _run(path, case.feeds, list(reference), optimise)
        if isinstance(got, str):
            problems.append(got)
            continue
        for name in reference:
            comparison = compare(name, measure(reference[name], got[name], largest[name]), case, runtime, tolerance)
            if tolerance == TOLERANCES["float32"] and opinions is not None:
                comparison = second_opinion(comparison, reference[name], got[name], largest[name], truth, tamed, opinions)
            comparisons.append(comparison)
    return comparisons, problems


def truth_of(exact, case):
    """A function that returns what `exact()`, an interface in float64, says of a batch; `{}` where there is none."""
    return functools.cache(lambda: exact().truth(case.feeds) if exact() else {})


ILL, ALIKE = 10, 3


def second_opinion(comparison, reference, got, largest, truth, tamed, opinions):
    """Whether a comparison that missed the float32 bound says anything: where Keras' own float32 is about as far from its
    float64, both are rounding.

    Untrained networks can amplify rounding without bound (a sigmoid of ±1000); trained ones hardly ever get here. The graph is
    then judged with batch-norm statistics that fit the data, at the same bound; without norms, the file's error must be of the
    size of Keras' own: two roundings of one size differ by chance.

    Args:
        comparison: the `Comparison`.
        reference, got, largest: what it compared.
        truth: function that returns `{output name: array}` in float64, see `truth_of`.
        tamed: as in `judge`.
        opinions: list that gets `(error of the file, error of Keras)` against float64, for `said_of`.

    Returns:
        the comparison, passed if it proves nothing and the other look finds nothing.
    """
    bound = TOLERANCES["float32"]
    if comparison.passed or not np.isfinite(comparison.relative) or comparison.output not in truth():
        return comparison
    true = truth()[comparison.output]
    file_error, keras_error = (measure(true, value, largest)["relative"] for value in (got, reference))
    if not keras_error > bound / ILL:
        return comparison
    opinions.append((file_error, keras_error))
    passed = tamed().passed if tamed else file_error <= max(bound, ALIKE * keras_error)
    return dataclasses.replace(comparison, passed=passed)


def said_of(opinions, tamed):
    """A note on ill-conditioned outputs, in a list; empty where there are none."""
    if not opinions:
        return []
    file_error, keras_error = (max(errors) for errors in zip(*opinions, strict=True))
    note = f"ill-conditioned: against Keras in float64 the file is off by {file_error:.1e}, Keras in float32 by {keras_error:.1e}"
    if tamed:
        note += f"; with batch-norm statistics that fit the data the file is off by {tamed().worst():.1e}"
    return [note]


def statistics_batch(interface):
    """Feeds to take batch-norm statistics from."""
    rng = np.random.default_rng(0)
    return {port.name: _random(rng, port, max(BATCHES), "pixels", interface) for port in interface.inputs}


def _first_divergence(path, interface, seed):
    """Noise first: among small numbers a small fault stands out; pixels reach what saturates."""
    for case in reversed(list(cases(interface, seed=seed))):
        try:
            layer = first_divergence(path, interface, case.feeds)
        except Exception:  # a file that does not run for this batch, which is among the problems already
            continue
        if layer is not None:
            return layer
    return None


def cases(interface, samples=None, seed=0):
    """The batches to compare on."""
    rng = np.random.default_rng(seed)
    for data, batch in zip(("pixels", "noise"), BATCHES, strict=True):
        yield Case(data, {port.name: _random(rng, port, batch, data, interface) for port in interface.inputs})
    if samples is not None:
        yield Case("samples", {interface.inputs[0].name: read_samples(samples, interface)})


MOST_SAMPLES = 64


def read_samples(samples, interface, most=MOST_SAMPLES):
    """Images for a comparison, as one array in the artefact's layout and dtype.

    Args:
        samples: folder of images (at most `most` of them are read, evenly by path, fitted as the model's card says), or an array.
        interface: `interface.Interface`.
        most: how many.

    Raises:
        UsageError: no such folder, no image in it, or an array of another shape than the input.
    """
    port = interface.inputs[0]
    if isinstance(samples, str | artifact.Path):
        samples = _read_folder(samples, interface, most)
    array = np.asarray(samples)
    fits = array.ndim == len(port.shape) and all(
        want is None or want == have for want, have in zip(port.shape, array.shape, strict=True)
    )
    if len(interface.inputs) != 1 or not fits:
        raise UsageError(f"samples must have the shape {list(port.shape)} of `{port.name}`, got {list(array.shape)}")
    return array.astype(port.dtype)


def _read_folder(folder, interface, most):
    from keras_resnet.modelcard import card

    shape = interface.inputs[0].shape
    if len(interface.inputs) != 1 or len(shape) != 4:
        raise UsageError("a folder of samples needs a model with one image input")
    known = card(interface.model)
    height, width, channels = (*shape[2:], shape[1]) if interface.layout == "nchw" else shape[1:]
    size = (height or OPEN_SIZES["pixels"][0], width or OPEN_SIZES["pixels"][1])
    files = images.find(folder)
    files = files[:: -(-len(files) // most)]
    pixels = np.stack([images.load(file, known.preprocessing if known else {}, size, channels) for file in files])
    return pixels.transpose(0, 3, 1, 2) if interface.layout == "nchw" else pixels


def _random(rng, port, batch, data, interface):
    shape = _filled(port.shape, batch, data, interface)
    if np.issubdtype(np.dtype(port.dtype), np.integer):
        return rng.integers(0, 256 if port.dtype == "uint8" else 2, shape).astype(port.dtype)
    if data == "pixels":
        return rng.integers(0, 256, shape).astype(port.dtype)
    return rng.normal(size=shape).astype(port.dtype)


def _filled(shape, batch, data, interface):
    first, sizes = 2 if interface.layout == "nchw" else 1, list(shape)
    opened = _around(*interface.fit["size"])[data] if interface.fit else OPEN_SIZES[data]
    for axis, size in enumerate(sizes):
        if size is None:
            sizes[axis] = batch if axis == 0 else opened[min(max(axis - first, 0), 1)]
    return sizes


def _around(height, width):
    """Sizes of images that a graph has to make smaller, and larger."""
    return {"pixels": (2 * height + 1, 3 * width - 2), "noise": (max(height * 3 // 4, 2), max(width - 3, 2))}


def check_resize(interface, feeds):
    """Compare the graph's resizing with Pillow's, which is what `predict` and the card mean.

    Returns:
        `(problems, notes)`, lists of sentences.
    """
    import tensorflow as tf

    (pixels,) = feeds.values()
    pixels = pixels // 2 + 64  # noise between black and white would make every filter overshoot
    upright = pixels if interface.layout == "nchw" else pixels.transpose(0, 3, 1, 2)
    got = fitted(tf.constant(upright, "float32"), interface.fit).numpy().transpose(0, 2, 3, 1)
    want = np.stack([images.fit(image, interface.fit) for image in upright.transpose(0, 2, 3, 1)])
    worst = float(np.abs(got - want).max())
    said = f"the graph's resizing is within {worst:.2f} of 255 levels of Pillow's"
    return ([], [said]) if worst <= LEVELS else ([f"{said}, at most {LEVELS} are allowed"], [])


AGREEMENT, AGREEMENT_SAMPLES, ROWS = 0.99, 512, 16


def agreement_text(share):
    """0.98 -> 98.00%; None, of scores that are not finite or have no classes, in words."""
    return "not measurable" if share is None else f"{share:.2%}"


def judge_int8(path, interface, samples, expected_card=None):
    """Compare the best classes of a quantised file with the model's, on images: its numbers are others by design.

    Args and Returns as `judge`; of a folder of samples `AGREEMENT_SAMPLES` are read.

    Raises:
        UsageError: the model ranks no classes, or the samples do not fit.
    """
    structure = check_structure(path, interface)
    problems, notes = check_card(path, expected_card)
    problems = structure + problems
    case = Case("samples", {interface.inputs[0].name: read_samples(samples, interface, AGREEMENT_SAMPLES)})
    found = {} if structure else _in_parts(path, interface, case)
    if isinstance(found, str):
        found, problems = {}, [*problems, found]
    comparisons = []
    for name in (LOGITS, PROBABILITIES):
        if name in found:
            comparison = compare(name, measure(*found[name]), case, RUNTIMES[True], np.inf)
            comparisons.append(dataclasses.replace(comparison, passed=(comparison.top1 or 0) >= AGREEMENT))
    if found and not comparisons:
        raise UsageError(f"{path} is int8 and ranks no classes, so there is nothing to agree on; verify the float32 file")
    for comparison in comparisons:
        if not comparison.passed:
            share = agreement_text(comparison.top1)
            problems.append(
                f"output `{comparison.output}`: top-1 agreement with the model is {share} on {comparison.batch} images, "
                f"below {AGREEMENT:.0%}"
            )
    return VerificationReport(
        str(path), not problems, "int8", 1 - AGREEMENT, tuple(comparisons), problems=tuple(problems), notes=tuple(notes)
    )


def _in_parts(path, interface, case):
    """`{output: (Keras' array, the file's)}` of many rows, a few at a time, or a sentence on why the file did not run."""
    ((name, rows),) = case.feeds.items()
    found = {}
    for start in range(0, len(rows), ROWS):
        feeds = {name: rows[start : start + ROWS]}
        reference, _ = interface.reference(feeds)
        got = _run(path, feeds, list(reference), True)
        if isinstance(got, str):
            return got
        for output, value in reference.items():
            found.setdefault(output, []).append((value, got[output]))
    return {output: tuple(map(np.concatenate, zip(*parts, strict=True))) for output, parts in found.items()}


def check_structure(path, interface):
    """Sentences on what is wrong with the file as a file: invalid, or with other inputs and outputs than the interface."""
    if invalid := check_valid(path):
        return invalid
    graph = artifact.read_proto(path, external_data=False).graph
    problems = []
    for kind, have, want in (
        ("inputs", [value.name for value in graph.input], [port.name for port in interface.inputs]),
        ("outputs", [value.name for value in graph.output], list(interface.outputs)),
    ):
        if have != want:
            problems.append(f"its {kind} are {', '.join(have)}, the model's {', '.join(want)}")
    return problems


COMPARED_ON_CARDS = ("config", "preprocessing", "labels")


def check_card(path, expected):
    """Compare what an artefact says of itself with the model's card: wrong labels or another resize make good numbers useless.

    Args:
        path: file or folder.
        expected: card (dict), or None to compare nothing. Labels that it lacks are not compared: they came from `--labels`.

    Returns:
        `(problems, notes)`, lists of sentences.
    """
    if expected is None:
        return [], []
    have = artifact.read_metadata(path).get("card") or {}
    want = json.loads(json.dumps(expected))
    notes, compared = [], list(COMPARED_ON_CARDS)
    if have.get("labels") and not want["labels"]:
        compared.remove("labels")
        notes.append("its labels were not compared: the model has none (give --labels)")
    wrong = [key for key in compared if have.get(key) != want[key]]
    return [f"its card differs in {key}: {_shown(have.get(key))}, the model's says {_shown(want[key])}" for key in wrong], notes


def _shown(value, most=120):
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def check_valid(path):
    """What onnx.checker, in full, says against a file: a list of one sentence, or of none."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        return [f"onnx.checker refuses it: {artifact.first_line(error)}"]
    return []


def _run(path, feeds, names, optimise):
    """`{name: array}` from onnxruntime, or a sentence on why it did not run. Its defaults are what users will meet."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:
        return f"onnxruntime does not run it: {artifact.first_line(error)}"


def compare(name, figures, case, runtime, tolerance):
    """A `Comparison` from the figures of `measure`."""
    first = next(iter(case.feeds.values()))
    passed, shape = figures["relative"] <= tolerance, list(first.shape)
    return Comparison(output=name, batch=shape[0], shape=shape, data=case.data, runtime=runtime, passed=passed, **figures)


def measure(reference, got, largest=None):
    """Error figures of two arrays as a dict; infinite where shapes differ or a number is not finite.

    Args:
        reference, got: arrays.
        largest: what `relative` is relative to; the largest |reference| by default.
    """
    nothing = {"max_abs": np.inf, "mean_abs": np.inf, "relative": np.inf, "cosine": 0.0, "top1": None, "top5": None}
    reference, got = np.asarray(reference, "float64"), np.asarray(got, "float64")
    if reference.shape != got.shape or not np.isfinite(reference).all() or not np.isfinite(got).all():
        return nothing
    difference = np.abs(reference - got)
    largest = np.abs(reference).max(initial=0) if largest is None else largest
    worst = float(difference.max(initial=0))
    norms = np.linalg.norm(reference) * np.linalg.norm(got)
    return {
        "max_abs": worst,
        "mean_abs": float(difference.mean()) if difference.size else 0.0,
        "relative": worst / float(largest) if largest > 0 else (0.0 if worst == 0 else np.inf),
        "cosine": float((reference * got).sum() / norms) if norms > 0 else float(worst == 0),
        "top1": agreement(reference, got, 1),
        "top5": agreement(reference, got, 5),
    }


def agreement(reference, got, k):
    """Share of rows whose `k` best classes are the same set; None where there are no rows of more than `k` scores."""
    if reference.ndim != 2 or reference.shape[1] <= k:
        return None
    best = [np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1) for scores in (reference, got)]
    return float((best[0] == best[1]).all(axis=1).mean())


def described(comparison):
    """A failed comparison as a sentence."""
    where = f"output `{comparison.output}`, batch {comparison.batch} ({comparison.data}), {comparison.runtime}"
    return f"{where}: max error {comparison.max_abs:.3g}, {comparison.relative:.3g} of the largest value"


WEIGHT_TOLERANCE = 1e-6


def compare_weights(path, expected, model):
    """Compare a file's initialisers, element by element: one wrong weight often does not show in the output.

    Args:
        path: ONNX file.
        expected: `{name: array}`: what the same conversion gives now.
        model: Keras model; its weights are folded a second way, see `weights.refold`.

    Returns:
        `(figures, problems)`.
    """
    have = file_weights(path)
    problems, worst, worst_name, elements = [], 0.0, None, 0
    for name in sorted(set(have) ^ set(expected)):
        problems.append(f"weight {name!r} is {'missing' if name in expected else 'not the model’s'}")
    for name in sorted(set(have) & set(expected)):
        error = weight_error(have[name], np.asarray(expected[name]))
        elements += have[name].size
        if error > worst:
            worst, worst_name = error, name
        if error > WEIGHT_TOLERANCE:
            problems.append(f"weight {name!r} differs: max error {error:.3g} of its largest value")
    refolded, wrong = weights.compare_refolded(have, model)
    figures = {"compared": len(set(have) & set(expected)), "elements": elements, "refolded": refolded}
    return figures | {"max_relative": worst, "worst": worst_name}, problems or wrong


HALF_WEIGHT_TOLERANCE = 1e-3


def compare_halved(path, expected):
    """Compare the float16 weights of a file with float32 ones of the same names, element by element.

    Args and Returns as `compare_weights`.
    """
    have = file_weights(path)
    shared = {name: np.asarray(value) for name, value in expected.items() if name in have and np.asarray(value).dtype.kind == "f"}
    problems = []
    for name, want in shared.items():
        error = weight_error(have[name], want)
        if error > HALF_WEIGHT_TOLERANCE:
            problems.append(f"weight {name!r} differs: max error {error:.3g} of its largest value")
    return {"compared": len(shared), "elements": sum(want.size for want in shared.values())}, problems


def file_weights(path):
    """`{initialiser name: array}` of an ONNX file."""
    import onnx

    base = str(artifact.Path(path).parent)
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor, base_dir=base) for tensor in artifact.read_proto(path).graph.initializer
    }


def weight_error(have, expected):
    """max |Δ| / max |expected|; infinite where shapes or kinds differ or a number is not finite."""
    expected = np.asarray(expected)
    if have.shape != expected.shape or have.dtype.kind != expected.dtype.kind:
        return np.inf
    if have.dtype.kind != "f":
        return 0.0 if np.array_equal(have, expected) else np.inf
    have, expected = have.astype("float64"), expected.astype("float64")
    if not np.isfinite(have).all():
        return 0.0 if np.array_equal(have, expected) else np.inf
    difference, largest = np.abs(have - expected).max(initial=0), np.abs(expected).max(initial=0)
    return float(difference / largest) if largest > 0 else (0.0 if difference == 0 else np.inf)


def require(report):
    """Return a report that passed; raise for one that did not.

    Raises:
        MismatchError: carries the report.
    """
    if not report.passed:
        raise MismatchError(report.summary(), report)
    return report


def verify(path, model, *, labels=None, samples=None, seed=0):
    """Compare an ONNX file or SavedModel folder with the model that it is said to come from.

    Args:
        path: file or folder.
        model: Keras model.
        labels: class names that the artefact must bear; by default those of the model's card.
        samples: images to compare on beside random batches: a folder, or an array in the artefact's layout.
        seed: seed of the random batches.

    Returns:
        VerificationReport; `passed` says whether everything agreed. Nothing is raised on a mismatch.

    Raises:
        UsageError: the artefact is missing or damaged, or the model cannot be read.
    """
    from ..exporters import OPTIONS, card_of, expected_weights, judge_graph, prepared, tamed

    folder = artifact.Path(path).is_dir()
    metadata = artifact.read_metadata(path)
    options, precision = metadata.get("options"), (metadata.get("tolerances") or {}).get("precision", "float32")
    if options is None and not folder:
        raise UsageError(
            f"{path} was not written by resnet-export: it does not say how its inputs and outputs map to the model's"
        )
    if precision == "int8" and samples is None:
        raise UsageError(f"{path} is int8: give images (--samples) on which its best classes have to be the model's")
    interface, _ = prepared(model, options or {})
    card = card_of(interface, labels)
    if folder:
        from ..savedmodel import judge_savedmodel

        return judge_savedmodel(path, interface, expected_card=None if options is None else card, samples=samples, seed=seed)
    if precision == "int8":
        return judge_int8(path, interface, samples, card)
    given = {"expected_weights": expected_weights(interface, options), "expected_card": card, "samples": samples, "seed": seed}
    if precision != "float32":
        return judge(path, interface, precision=precision, **given)
    opset = (OPTIONS | options)["opset"]
    report = judge(path, interface, tamed=tamed(path, interface, opset), **given)
    return judge_graph(report, path, interface, opset) if report.passed else report
