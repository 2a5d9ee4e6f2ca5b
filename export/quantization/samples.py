"""What a file in lower precision is calibrated and compared on: the user's images, and random batches that the file can take."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .. import artifact
from ..conversion.passes.common import array, attribute
from ..errors import UsageError
from ..runtime import images
from ..runtime.prediction import batches, image_input
from ..runtime.sessions import Session, TensorInfo
from ..verification.inputs import BATCHES, VALUES, full_shape, load_samples, random_array, sizes
from .source import Source

Feeds = dict[str, np.ndarray]
Outputs = dict[str, np.ndarray]

ROWS = 16
SAMPLES = "samples"  # the distribution of random numbers from the range of the user's samples
MULTIPLES = (8, 16, 32, 64, 128)
LARGEST_OUTPUT = 65504.0


@dataclass(frozen=True)
class Case:
    """One batch: what it is, `{input name: array}`, and what the float32 file computes for it."""

    data: str
    feeds: Feeds
    outputs: Outputs


def find_cases(source: Source, samples: list[Feeds] | None = None, seed: int = 0) -> list[Case]:
    """Return batches to compare on: one row and three rows of random numbers, another size each, and the samples if given.

    The float32 file itself says what it can take: where it fails or overflows, other sizes and smaller values are tried. Indices
    into a table stay below its size. With samples, random numbers are from their range.

    Args:
        source: The float32 file.
        samples: What `read_samples` returned, or None.
        seed: Seed of the random batches.

    Raises:
        UsageError: The file fails on everything that was tried.
    """
    rng, bounds, compares_pixels = np.random.default_rng(seed), index_bounds(source.model), _compares_pixels(source.model)
    found = [Case("samples", feeds, attempt(source.session, feeds)) for feeds in samples or ()]
    reasons: list[str] = []
    for data in BATCHES:
        values = ((SAMPLES, 1.0),) if samples else VALUES[data]
        case = _first_possible(source.session, data, values, rng, bounds, compares_pixels, samples, reasons)
        found += [case] if case else []
    if not found:
        raise UsageError(
            f"{source.name} fails on every random input that was tried ({reasons[0]}); give real ones with `samples` (--samples)"
        )
    return found


def attempt(model: Session, feeds: Feeds) -> Outputs:
    """Run a batch that the model may not take, without onnxruntime's messages on standard error.

    Raises:
        Exception: What onnxruntime raises; its errors have no common class.
    """
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = 4
    names = [value.name for value in model.outputs]
    return dict(zip(names, model.ort.run(names, feeds, options), strict=True))


def _first_possible(
    model: Session,
    data: str,
    values: Any,
    rng: np.random.Generator,
    bounds: Mapping[str, int],
    compares_pixels: bool,
    samples: list[Feeds] | None,
    reasons: list[str],
) -> Case | None:
    """The first batch on which the file computes numbers of an ordinary size; else the first with finite ones; else None."""
    finite = None
    dynamic = any(isinstance(axis, str) for spec in model.inputs for axis in spec.shape[1:])
    for size, (distribution, scale) in itertools.product(sizes(data, dynamic, compares_pixels), values):
        feeds = {}
        for spec in model.inputs:
            shape = full_shape(spec.shape, BATCHES[data], size)
            if distribution == SAMPLES and spec.name not in bounds:
                low, high = _range(samples, spec.name)
                feeds[spec.name] = rng.uniform(low, high, shape).astype(spec.dtype)
            else:
                feeds[spec.name] = random_array(rng, spec.dtype, shape, distribution, scale, bounds.get(spec.name))
        try:
            outputs = attempt(model, feeds)
        except Exception as error:  # onnxruntime's errors have no common class; this input is simply not one for the model
            reasons.append(artifact.first_line(error))
            continue
        largest = max((float(np.abs(value).max(initial=0)) for value in outputs.values() if value.dtype.kind == "f"), default=0.0)
        if largest <= LARGEST_OUTPUT:
            return Case(data, feeds, outputs)
        reasons.append("its outputs are not finite")
        if np.isfinite(largest) and finite is None:
            finite = Case(data, feeds, outputs)
    return finite


def _range(samples: list[Feeds], name: str) -> tuple[float, float]:
    return min(float(feeds[name].min()) for feeds in samples), max(float(feeds[name].max()) for feeds in samples)


# Time and memory of these may grow with the square of the number of pixels; products only where both factors are computed.
LOOPS, PRODUCTS = ("GRU", "LSTM", "Loop", "RNN", "Scan"), ("Attention", "Einsum", "MatMul")


def _compares_pixels(model: ir.Model) -> bool:
    """Whether a graph may compare all pixels with each other, or loop over them."""
    return any(
        node.op_type in LOOPS
        or node.op_type in PRODUCTS
        and sum(value is not None and value.const_value is None for value in node.inputs) > 1
        for node in model.graph.all_nodes()
    )


COMPUTING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather")


def index_bounds(model: ir.Model) -> dict[str, int]:
    """Return `{input name: size}` of the inputs that a `Gather` or `OneHot` takes its indices from."""
    bounds: dict[str, int] = {}
    for node in model.graph:
        if node.op_type == "Gather" and (table := node.inputs[0]).const_value is not None and len(table.const_value.shape) > 1:
            size, indices = int(table.const_value.shape[attribute(node, "axis", 0)]), node.inputs[1]
        elif node.op_type == "OneHot" and (depth := array(node.inputs[1])) is not None:
            size, indices = int(depth.item()), node.inputs[0]
        else:
            continue
        for value in _inputs_behind(indices):
            bounds[value.name] = min(size, bounds.get(value.name, size))
    return bounds


def _inputs_behind(value: ir.Value) -> Iterator[ir.Value]:
    """The graph inputs that a value is computed from, unless a layer with weights is in between."""
    seen, waiting = set(), [value]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None and value.is_graph_input():
            yield value
        if node is None or node in seen or node.op_type in COMPUTING:
            continue
        seen.add(node)
        waiting += [source for source in node.inputs if source is not None]


# ---------------------------------------------------------------- the user's samples


def read_samples(source: Any, model: Session) -> list[Feeds]:
    """Return samples as batches that a session takes.

    Args:
        source: Folder of images, `.npy` or `.npz` file, array, or `{input name: array}`. Of an `.npz` file, the arrays that are
            named after the inputs are taken, or else its first one.
        model: The session. Images for dynamic sizes go in as they are; where the model needs a multiple (of 8 to 128) of
            pixels, they are cropped to it.

    Returns:
        `{input name: array}` of up to 16 rows each, or of as many as a fixed batch has.

    Raises:
        UsageError: Nothing is there, or it does not fit the inputs.
    """
    source, fixed = load_samples(source), isinstance(model.inputs[0].shape[0], int)
    if isinstance(source, str | os.PathLike):
        spec = image_input(model)
        groups = list(batches(images.find(source), model.card, spec))
        arrays = [{spec.name: group} for group in ([np.concatenate(groups)] if fixed else groups)]
    else:
        arrays = [_checked(source, model)]
    rows = model.inputs[0].shape[0] if fixed else ROWS
    crops: dict[tuple, int] = {}
    return [_runnable(model, feeds, crops) for feeds in _in_rows(arrays, rows, fixed)]


def _checked(source: Any, model: Session) -> Feeds:
    """`{input name: array}`, in the dtype and shape of the inputs."""
    names = [spec.name for spec in model.inputs]
    if isinstance(source, Mapping) and not set(names) <= set(source):
        if len(names) > 1:
            raise UsageError(f"samples must name the inputs {', '.join(names)}, got {', '.join(source)}")
        source = next(iter(source.values()))
    if not isinstance(source, Mapping):
        if len(names) > 1:
            raise UsageError(
                f"{model.path.name} has {len(names)} inputs; give samples as an array for each of {', '.join(names)}"
            )
        source = {names[0]: source}
    feeds = {spec.name: _fitting(np.asarray(source[spec.name]), spec) for spec in model.inputs}
    if len({len(value) for value in feeds.values()}) != 1:
        raise UsageError(f"samples must have as many rows for each input, got {', '.join(str(len(v)) for v in feeds.values())}")
    return feeds


def _fitting(values: np.ndarray, spec: TensorInfo) -> np.ndarray:
    fits = values.ndim == len(spec.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(spec.shape[1:], values.shape[1:], strict=True)
    )
    if not fits or not len(values):
        raise UsageError(f"images must have the shape {list(spec.shape)} of the model's input, got {list(values.shape)}")
    if values.dtype.kind not in "fiub":
        raise UsageError(f"images must be numbers, got {values.dtype}")
    if not np.isfinite(values).all():
        raise UsageError("images contain numbers that are not finite")
    if not np.can_cast(values.dtype, spec.dtype, "same_kind") and not np.array_equal(values.astype(spec.dtype), values):
        raise UsageError(f"images must have the dtype of the model's input, {spec.dtype}, got {values.dtype} with other numbers")
    return values.astype(spec.dtype)


def _in_rows(arrays: list[Feeds], rows: int, fixed: bool) -> Iterator[Feeds]:
    """Split arrays into batches of at most `rows` rows. If the size is fixed, the last batch is filled up with the first rows."""
    for feeds in arrays:
        count = len(next(iter(feeds.values())))
        for start in range(0, count, rows):
            taken = np.arange(start, start + rows) % count if fixed else slice(start, start + rows)
            yield {name: value[taken] for name, value in feeds.items()}


def _runnable(model: Session, feeds: Feeds, crops: dict[tuple, int]) -> Feeds:
    """The batch, cropped to a multiple of some pixels where the model runs on nothing else.

    Args:
        model: The session.
        feeds: The batch.
        crops: `{shapes: multiple}` that were found so far.

    Raises:
        UsageError: The model runs on no such crop either.
    """
    shapes = tuple(value.shape[1:] for value in feeds.values())
    if shapes in crops:
        return _cropped(model, feeds, crops[shapes])
    failure = None
    for multiple in (1, *MULTIPLES) if _dynamic_axes(model) else (1,):
        fitted = _cropped(model, feeds, multiple)
        try:
            attempt(model, fitted)
        except Exception as error:  # onnxruntime's errors have no common class
            failure = failure or error
            continue
        crops[shapes] = multiple
        return fitted
    described = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
    raise UsageError(f"{model.path.name} does not run on samples of the shape {described}: {artifact.first_line(failure)}")


def _dynamic_axes(model: Session) -> list[int]:
    """The axes of an image input whose size may vary, apart from the batch."""
    spec = model.inputs[0]
    if len(model.inputs) != 1 or len(spec.shape) != 4:
        return []
    return [axis for axis in ((2, 3) if spec.layout == "nchw" else (1, 2)) if isinstance(spec.shape[axis], str)]


def _cropped(model: Session, feeds: Feeds, multiple: int) -> Feeds:
    """The centre of images whose sizes are multiples of some pixels."""
    if multiple == 1:
        return feeds
    ((name, pixels),) = feeds.items()
    for axis in _dynamic_axes(model):
        size = pixels.shape[axis] // multiple * multiple
        start = (pixels.shape[axis] - size) // 2
        pixels = pixels.take(range(start, start + size), axis)
    return {name: pixels}
