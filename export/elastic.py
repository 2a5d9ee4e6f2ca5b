"""From a Keras model to a family of verified files: the same network at several depths."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import artifact
from .conversion.prepare import prepare
from .errors import ExportError, MismatchError, UsageError
from .exporters import to_onnx
from .family import FILE, Family, Member
from .options import DEFAULT_OPSET, ExportOptions
from .runtime import images
from .runtime.benchmark import bench
from .runtime.prediction import scores_or_values
from .runtime.sessions import session
from .verification.inputs import load_samples, read_samples

if TYPE_CHECKING:
    import keras

    from keras_resnet.growth import DepthCurve, DepthPoint

    from .conversion.signature import Signature

BUDGETS = (1.0, 0.75, 0.5)
MOST_IMAGES = 2000
FIGURE = "family.png"
# Names of the images and labels in an .npz file, held-out ones first.
PAIRS = (("images", "labels"), ("x", "y"), ("x_test", "y_test"), ("x_val", "y_val"), ("x_train", "y_train"))
ROWS = 32


@dataclass(frozen=True)
class Samples:
    """Images for a family: arrays by input name, and class indices if they are known."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


def to_family(
    model: keras.Model,
    folder: str | os.PathLike[str],
    *,
    budgets: Sequence[float] | None = None,
    latency_ms: float | None = None,
    batch: int = 1,
    threads: int | None = None,
    data: Any = None,
    int8: bool = False,
    max_drop: float = 1.0,
    max_error: float = 0.1,
    labels: list[str] | None = None,
    opset: int = DEFAULT_OPSET,
    search_images: int = 256,
    overwrite: bool = True,
    progress: Callable[[str], object] | None = None,
) -> Family:
    """Export a Keras model as a family of verified ONNX files: the same network without some of its residual blocks.

    The blocks are chosen by `keras_resnet.depth_curve`. The folder gets one file per member, `family.json`, and a figure where
    matplotlib is installed. It appears as a whole or not at all.

    Args:
        model: A built Keras model with residual blocks. It is not changed.
        folder: Folder to write.
        budgets: Shares of the multiply-adds, one member each. Default: 1, 0.75 and 0.5, or 1 alone with `latency_ms`.
        latency_ms: Add the deepest member whose median latency on this machine's CPU is at most that many milliseconds.
        batch: Batch size at which latencies are measured.
        threads: Threads with which latencies are measured; onnxruntime's choice by default.
        data: Held-out images: a folder (with one folder of images per class, they are labelled; at most 2,000 are read), an
            `.npz` file (`x` and `y`, `images` and `labels`, or `x_test` and `y_test`), `(images, labels)`, or images alone.
            At most 2,000 images choose the blocks; members are measured on all. Without data, blocks are ranked by drift on
            random inputs, and batch-norm statistics stay as they are.
        int8: Also write every member in int8, calibrated on `data`.
        max_drop, max_error: How much int8 may change; see `to_int8`.
        labels: Class names in the order of the classes; by default the card's.
        opset: ONNX opset, 13 to 23.
        search_images: Number of images that the search uses; see `depth_curve`.
        overwrite: Whether `folder` may contain a family already, which is replaced at the end.
        progress: Callback that gets the name of each step.

    Returns:
        `Family`, as `family.json` holds it.

    Raises:
        UsageError: An option, the model or the data do not fit, or no member meets a budget.
        MismatchError: A file does not compute what its network computes; nothing is written.
    """
    step = progress or (lambda name: None)
    artifact.check_target(folder, overwrite, FILE)
    budgets = _checked_budgets(budgets, latency_ms)
    if int8 and data is None:
        raise UsageError("int8 needs images to calibrate on; give `data` (--data)")
    prepared = prepare(model, ExportOptions(opset=opset), labels)
    names = labels if labels is not None else _card_labels(model)
    samples = None if data is None else read_data(data, prepared.signature, names)
    curve = _curve(model, samples, None if latency_ms is not None else budgets, search_images, step)
    points = {f"{budget:g}": (budget, _point(curve, budget)) for budget in budgets}
    with artifact.publishing(folder, overwrite, mark=FILE) as work, _final_names(work, folder):
        work.mkdir()
        writer = _Writer(work, model, curve, samples, labels, opset, step)
        clock = _Clock(batch, threads)
        notes = []
        if latency_ms is not None:
            point = _deepest_within(curve, writer, clock, latency_ms, step)
            points[f"{latency_ms:g}ms"] = (None, point)
        members, notes = _written(writer, clock, points, int8 and (max_drop, max_error))
        family = Family(
            name=model.name,
            members=tuple(members),
            ranked_by=curve.ranked_by,
            images=len(samples) if samples else 0,
            calibration_images=curve.calibration_images,
            measured=clock.described(),
            notes=tuple(dict.fromkeys([*_notes(curve, samples), *notes, *_late(members, latency_ms), *writer.notes])),
        )
        family = _with_figure(family, curve, work)
        (work / FILE).write_text(json.dumps(family.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")
    return family


@contextlib.contextmanager
def _final_names(work: Path, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Errors that name a file in the temporary folder name the one that it would have become."""
    try:
        yield
    except ExportError as error:
        named = type(error)(str(error).replace(str(work), str(folder)))
        if isinstance(named, MismatchError):
            named.report = getattr(error, "report", None)
        raise named from error


def file_stem(name: str) -> str:
    """Return a model's name as part of the name of a file or of a model of a server."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".") or "model"


def _checked_budgets(budgets, latency_ms):
    if latency_ms is not None and not 0 < latency_ms < float("inf"):
        raise UsageError(f"the latency must be a positive number of milliseconds, got {latency_ms}")
    if budgets is None:
        budgets = BUDGETS if latency_ms is None else (1.0,)
    if not len(budgets) or not all(0 < budget <= 1 for budget in budgets):
        shown = ", ".join(f"{budget:g}" for budget in budgets) or "none"
        raise UsageError(f"budgets must be shares of the multiply-adds, above 0 and at most 1, got {shown}")
    return sorted(set(map(float, budgets)), reverse=True)


def _card_labels(model):
    from keras_resnet.modelcard import card

    known = card(model)
    return known.labels if known else None


def _curve(
    model: keras.Model, samples: Samples | None, budgets: Sequence[float] | None, search_images: int, step: Callable
) -> DepthCurve:
    """The curve of a model, with messages for the command line."""
    import keras_resnet as kr

    data = None
    if samples is not None:
        rows = np.random.default_rng(0).permutation(len(samples))[:MOST_IMAGES]
        inputs = [array[rows] for array in samples.inputs.values()]
        data = inputs[0] if len(inputs) == 1 else inputs
        data = (data, samples.labels[rows]) if samples.labels is not None else data
    try:
        return kr.depth_curve(model, data, budgets=budgets, search_images=search_images, compare_drift=False, progress=step)
    except ValueError as error:
        raise UsageError(_in_commands(error)) from error


def _in_commands(error):
    return str(error).replace("pass `data`", "give images (--data)").replace("`data` must hold", "the data must hold")


def _point(curve: DepthCurve, budget: float) -> DepthPoint:
    try:
        return curve.point(budget)
    except ValueError as error:
        raise UsageError(str(error).replace("no network of the curve", "no member")) from error


def _notes(curve, samples):
    if samples is None:
        yield "no data: blocks were ranked by their drift on random inputs, and batch-norm statistics are the whole network's"
    elif samples.labels is None:
        yield "the images have no labels: members are compared with the whole network"


def _late(members: Sequence[Member], latency_ms: float | None) -> Iterator[str]:
    """Notes on a member that was chosen for its latency and did not keep it when all members were measured in turns."""
    for member in members:
        if latency_ms is not None and member.budget is None and member.precision == "float32" and member.latency_ms > latency_ms:
            yield f"{member.name} took {member.latency_ms:.2f} ms when it was measured again; other work disturbs this machine"


# ---------------------------------------------------------------- files


class _Writer:
    """Writes members into the folder of a family, each network once.

    Args:
        folder: The folder.
        model: The whole network.
        curve: Where its smaller networks come from.
        samples: Images to verify on, or None.
        labels, opset: As for `to_onnx`.
        step: Progress callback.
    """

    def __init__(
        self, folder: Path, model: keras.Model, curve: DepthCurve, samples: Samples | None, labels: list[str] | None, opset: int,
        step: Callable[[str], object],
    ) -> None:  # fmt: skip
        self.folder, self.samples, self.step = folder, samples, step
        self.notes: list[str] = []
        self._model, self._curve, self._options = model, curve, {"labels": labels, "opset": opset}
        self._written: dict[tuple[str, ...], Path] = {}

    def write(self, point: DepthPoint) -> Path:
        """Return the verified float32 file of a point, under some name."""
        if point.removed not in self._written:
            self._export(point, f"candidate{len(self._written)}")
        return self._written[point.removed]

    def place(self, point: DepthPoint, name: str) -> Path:
        """Return the verified float32 file of a point, under its final name."""
        path = self._written.pop(point.removed, None)
        files = [] if path is None else artifact.companions(path)
        if len(files) == 1:
            self._written[point.removed] = path.rename(self._path(name))
            return self._written[point.removed]
        # An ONNX file names the file of its external data, so that the two cannot be renamed.
        for file in files:
            file.unlink()
        return self._export(point, name)

    def _path(self, name):
        return self.folder / f"{file_stem(self._model.name)}-{name}.onnx"

    def _export(self, point, name):
        self.step(f"export {name}")
        network = self._curve.network(point) if point.removed else self._model
        few = None if self.samples is None else {key: array[:8] for key, array in self.samples.inputs.items()}
        path = self._path(name)
        self.notes += to_onnx(network, path, samples=few, **self._options).notes
        self._written[point.removed] = path
        return path

    @property
    def whole(self) -> DepthPoint:
        """The point of the whole network."""
        return self._curve.points[0]

    def keep(self, kept: Sequence[DepthPoint]) -> None:
        """Delete the files of all other points."""
        for removed in set(self._written) - {point.removed for point in kept}:
            for file in artifact.companions(self._written.pop(removed)):
                file.unlink()


class _Clock:
    """Measures latencies on the CPU, for one batch size and number of threads."""

    def __init__(self, batch: int, threads: int | None) -> None:
        self.batch, self.threads = batch, threads

    def milliseconds(self, files: Sequence[Path]) -> list[float]:
        """Median latency of each file, in turns."""
        found = bench(files, devices=("cpu",), batches=(self.batch,), threads=(self.threads or 0,))
        return [timing.p50 for timing in found]

    def described(self) -> dict[str, Any]:
        import onnxruntime

        return {
            "device": "cpu",
            "batch": self.batch,
            "threads": self.threads,
            "onnxruntime": onnxruntime.__version__,
            "processor": platform.processor() or platform.machine(),
        }


def _deepest_within(curve: DepthCurve, writer: _Writer, clock: _Clock, latency_ms: float, step: Callable) -> DepthPoint:
    """The most expensive point whose file is fast enough, by bisection: less work never takes longer, but for noise."""
    low, high, best, seen = 0, len(curve.points) - 1, None, {}
    while low <= high:
        middle = (low + high) // 2
        point = curve.points[middle]
        seen[middle] = clock.milliseconds([writer.write(point)])[0]
        step(f"{seen[middle]:.2f} ms at {point.share:.2f} of the multiply-adds")
        if seen[middle] <= latency_ms:
            best, high = point, middle - 1
        else:
            low = middle + 1
    if best is None:
        least = seen[len(curve.points) - 1]
        raise UsageError(
            f"no member meets {latency_ms:g} ms: the smallest, with {curve.points[-1].share:.3f} of the multiply-adds, takes "
            f"{least:.2f} ms (batch {clock.batch}, {clock.threads or 'default'} threads)"
        )
    return best


def _written(writer, clock, points, budget):
    """The members of all points, and notes."""
    chosen, notes = {}, []
    for name, (asked, point) in points.items():
        same = next((other for other, (_, known) in chosen.items() if known.removed == point.removed), None)
        if same is None:
            chosen[name] = (asked, point)
        else:
            notes.append(f"{name} is the same network as {same} and is left out")
    placed = [
        (name, asked, point, writer.place(point, name))
        for name, (asked, point) in sorted(chosen.items(), key=lambda item: -item[1][1].macs)
    ]
    whole = _outputs(writer.write(writer.whole), writer.samples) if writer.samples else None
    writer.keep([point for _, _, point, _ in placed])
    files = []
    for name, asked, point, path in placed:
        files.append((name, asked, point, "float32", path))
        if budget:
            files.append((f"{name}-int8", asked, point, "int8", _int8(writer, path, name, budget)))
    latencies = clock.milliseconds([path for *_, path in files])
    members = [
        Member(
            name=name,
            file=path.name,
            sha256=artifact.digest(path),
            size=artifact.disk_size(path),
            precision=precision,
            budget=asked,
            share=point.share,
            macs=point.macs,
            removed=point.removed,
            latency_ms=latency,
            **_quality(path, writer.samples, whole),
        )
        for (name, asked, point, precision, path), latency in zip(files, latencies, strict=True)
    ]
    return members, notes


def _int8(writer, path, name, budget):
    from .quantization.int8 import to_int8

    writer.step(f"int8 of {name}")
    target = path.with_name(f"{path.stem}-int8.onnx")
    inputs = {key: array[:512] for key, array in writer.samples.inputs.items()}
    result = to_int8(path, target, calibration=inputs, max_drop=budget[0], max_error=budget[1])
    writer.notes += [f"{name}-int8: {note}" for note in result.notes]
    return target


def _outputs(path, samples):
    """The scores of a file for all samples, and what they mean; None for a file that scores no classes."""
    opened = session(path, "cpu")
    scores = scores_or_values(opened)
    if scores is None:
        return None
    count = len(samples)
    parts = [
        opened.run({name: array[start : start + ROWS] for name, array in samples.inputs.items()}, [scores.output])
        for start in range(0, count, ROWS)
    ]
    return np.concatenate([part[scores.output] for part in parts]), scores


def _quality(path, samples, whole):
    """Agreement with the whole network, and accuracy, as far as they have a meaning."""
    if samples is None or whole is None:
        return {}
    (got, scores), (reference, _) = _outputs(path, samples), whole
    found = {"agreement": scores.agreement(reference, got)}
    if samples.labels is not None and scores.kind != "multilabel":
        best = scores.probabilities(got).argmax(-1)
        found["accuracy"] = float((best == samples.labels).mean())
    return found


def _with_figure(family, curve, folder):
    """Draw accuracy, or agreement, over latency, if matplotlib is installed and there is something to draw."""
    name = next((n for n in ("accuracy", "agreement") if all(getattr(m, n) is not None for m in family.members)), None)
    if name is None:
        return family
    try:
        draw(family, name, folder / FIGURE)
    except ImportError:
        note = "no figure: matplotlib is not installed (pip install 'keras-resnet-export[demo]')"
        return dataclasses.replace(family, notes=(*family.notes, note))
    return family


def draw(family: Family, name: str, path: str | os.PathLike[str]) -> None:
    """Draw `"accuracy"` or `"agreement"` of a family's members over their latency.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axis = figure.subplots()
    for precision, colour, marker in (("float32", "#0072b2", "o"), ("int8", "#d55e00", "s")):
        found = sorted((m for m in family.members if m.precision == precision), key=lambda m: m.latency_ms)
        if not found:
            continue
        values = [100 * getattr(member, name) for member in found]
        axis.plot([member.latency_ms for member in found], values, color=colour, marker=marker, label=precision)
        for member, value in zip(found, values, strict=True):
            axis.annotate(member.name, (member.latency_ms, value), textcoords="offset points", xytext=(6, -10), fontsize="small")
    measured = family.measured
    threads = {None: "default threads", 1: "1 thread"}.get(measured["threads"], f"{measured['threads']} threads")
    axis.set(
        title=family.name,
        xlabel=f"median latency in ms (batch {measured['batch']}, {threads}, {measured['device']})",
        ylabel=f"{name} on {family.images:,} images, in percent",
    )
    axis.margins(0.15)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------- data


def read_data(data: Any, signature: Signature, labels: Sequence[str] | None = None) -> Samples:
    """Read images and their classes.

    Args:
        data: What `to_family` takes.
        signature: The inputs of the model.
        labels: Class names, to which the folders of a folder of images are matched.

    Raises:
        UsageError: Nothing is there, or it does not fit the model.
    """
    classes = None
    if isinstance(data, str | os.PathLike) and os.path.isdir(data):
        return _read_folder(Path(data), signature, labels)
    if isinstance(data, tuple) and len(data) == 2:
        data, classes = data
    data = load_samples(data)
    if isinstance(data, dict):
        pair = next((pair for pair in PAIRS if set(pair) <= set(data)), None)
        if pair and len(signature.inputs) == 1:
            data, classes = data[pair[0]], data[pair[1]]
        elif len(signature.inputs) > 1:
            classes = next((data[name] for name in ("labels", "y") if name in data), None)
            data = {spec.name: data[spec.name] for spec in signature.inputs if spec.name in data}
    inputs = read_samples(data, signature)
    return Samples(inputs, None if classes is None else _classes(classes, len(next(iter(inputs.values()))), signature))


def _classes(given, rows, signature):
    """Class indices from indices or one-hot rows."""
    units = signature.model.outputs[0].shape[-1] if signature.model.outputs else None
    array = np.asarray(given)
    if array.ndim == 2 and array.shape[1] == units and units > 1:
        array = array.argmax(-1)
    array = array.reshape(-1)
    if len(array) != rows or array.dtype.kind not in "iub":
        raise UsageError(
            f"labels must be one class number per image ({rows} images), got {np.shape(given)} of {np.asarray(given).dtype}"
        )
    most = 2 if units == 1 else units
    if len(array) and (array.min() < 0 or array.max() >= most):
        raise UsageError(f"labels must be from 0 to {most - 1}, the classes of the model, got {array.min()} to {array.max()}")
    return array.astype("int32")


def _read_folder(folder, signature, labels):
    """Images of a folder; those in folders of classes are labelled."""
    groups = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not groups:
        return Samples(read_samples(folder, signature, MOST_IMAGES), None)
    if [path for path in folder.iterdir() if path.suffix.lower() in images.SUFFIXES]:
        raise UsageError(f"{folder} holds images next to folders of classes; put each image into the folder of its class")
    names = [path.name for path in groups]
    numbers = _matched(folder, names, labels, signature)
    each = max(1, MOST_IMAGES // len(groups))
    parts = [read_samples(path, signature, each) for path in groups]
    inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    counts = [len(next(iter(part.values()))) for part in parts]
    return Samples(inputs, np.repeat(numbers, counts).astype("int32"))


def _matched(folder: Path, names: list[str], labels: Sequence[str] | None, signature: Signature) -> list[int]:
    """The class of each folder: by the model's labels, or in order where it has none."""
    if labels:
        if unknown := [name for name in names if name not in labels]:
            from keras_resnet.checks import nearest

            raise UsageError(f"the folder {folder / unknown[0]} names no class of the model{nearest(unknown[0], labels)}")
        return [labels.index(name) for name in names]
    units = signature.model.outputs[0].shape[-1]
    if len(names) != (2 if units == 1 else units):
        raise UsageError(
            f"{folder} has {len(names)} folders of classes, and the model {units} classes; give their names (--labels)"
        )
    return list(range(len(names)))


def members_text(family: Family) -> Iterator[tuple[str, ...]]:
    """Yield a family as the rows of a table, the header first."""
    yield ("member", "multiply-adds", "share", "blocks left out", "latency", "agreement", "accuracy", "file")
    for member in family.members:
        yield (
            member.name,
            f"{member.macs / 1e6:,.1f} M",
            f"{member.share:.3f}",
            str(len(member.removed)),
            f"{member.latency_ms:.2f} ms",
            *("-" if value is None else f"{value:.2%}" for value in (member.agreement, member.accuracy)),
            member.file,
        )
