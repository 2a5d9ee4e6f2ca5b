"""Models that are served: loaded from files, warmed up, fed in batches, replaced while requests go on."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact import Scores, first_line, output_kinds
from ..errors import UsageError
from ..runtime.images import MAX_PIXELS
from ..runtime.prediction import image_input, load_pixels, ranked, scores_output, stacked
from ..runtime.sessions import ON_GPU, Session, gpu_count, session
from .batcher import Batcher, BatchOptions, DeadlineExceeded, QueueFull
from .protocol import DTYPES, ProtocolError, TensorSpec, datatype_of
from .statistics import Statistics

if TYPE_CHECKING:
    from .batcher import Answer

RETRY = {"Retry-After": "1"}
# The longest side that a JPEG can have; what a graph that resizes needs grows with it.
MAX_SIDE = 65_535


@dataclass(frozen=True)
class Source:
    """Where one version of a model comes from."""

    name: str
    version: str
    path: Path


@dataclass(frozen=True)
class ModelOptions:
    """How models are run.

    Args:
        device: See `resnet_export.runtime.session`.
        threads: Threads within an operator; onnxruntime's choice by default.
        batch: `BatchOptions`.
        max_request_rows: Rows that one request may have.
        max_pixels: Width × height that an encoded image may have.
        max_open_pixels: Width × height that a model of dynamic size is run at.
        timeout: Seconds for which a request may wait and run.
        warm_up: Run every batch size once before a model is ready.
        scores: Name of the output that scores classes, for files that do not state it and have such an output.
        output_kind: Kind of that output (one of `options.KINDS`), for the same files.
        adaptive: Send requests to shallower members of a family while others wait.
    """

    device: str = "auto"
    threads: int | None = None
    batch: BatchOptions = BatchOptions()
    max_request_rows: int = 256
    max_pixels: int = MAX_PIXELS
    max_open_pixels: int = 2**22
    timeout: float = 60.0
    warm_up: bool = True
    scores: str | None = None
    output_kind: str | None = None
    adaptive: bool = False


class ServedModel:
    """One version of a model, opened; `infer` may be called once `warm_up` has ended.

    Args:
        source: `Source`.
        options: `ModelOptions`.
        depth: Name of the member of a family that this is, or None.
        threads: Threads to run in, shared with other models; by default the model has its own.

    Raises:
        UsageError: The file is missing or damaged, or has tensors that the protocol has no datatype for.
        DeviceError: The device does not start.
    """

    def __init__(
        self, source: Source, options: ModelOptions, depth: str | None = None, threads: ThreadPoolExecutor | None = None
    ) -> None:
        self.source, self.options, self.depth = source, options, depth
        # One session per instance; instances on one device share theirs.
        self.sessions = _opened(source.path, options)
        self._free: SimpleQueue[Session] = SimpleQueue()
        for opened in self.sessions:
            self._free.put(opened)
        self.session = self.sessions[0]
        self.inputs = tuple(_spec(value, source) for value in self.session.inputs)
        self.outputs = tuple(_spec(value, source) for value in self.session.outputs)
        self.batched = all(isinstance(v.shape[0], str) if v.shape else False for v in self.session.inputs + self.session.outputs)
        self.scores = self._declared_scores()
        self.statistics = Statistics()
        self.batcher = Batcher(self._run, options.batch, self.statistics.executed, self.batched, threads)
        self._holders = 0
        self._released: asyncio.Future[None] | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[ServedModel]:
        """Keep the model open until the block ends: `close` waits for it."""
        self._holders += 1
        try:
            yield self
        finally:
            self._holders -= 1
            if self._released and not self._holders and not self._released.done():
                self._released.set_result(None)

    def choose(self, parameters: dict[str, Any], rows: int = 1, timeout: float | None = None) -> ServedModel:
        """Choose the model that answers a request: this one, because only families have several.

        Args:
            parameters: Parameters of the request.
            rows: Its rows.
            timeout: Seconds after which the client no longer wants an answer.

        Raises:
            ProtocolError: The request asks for a depth.
        """
        if parameters.get("depth") is not None:
            raise ProtocolError(f"model {self.source.name!r} is not a family and has a single depth; leave `depth` out")
        return self

    def announced(self) -> contextlib.AbstractContextManager[None]:
        """Around the reading of a request; see `Batcher.announced`."""
        return self.batcher.announced()

    def parts(self) -> list[ServedModel]:
        """Return the models that answer requests, each with statistics of its own."""
        return [self]

    def total_statistics(self) -> Statistics:
        """Return the statistics of all `parts`."""
        return self.statistics

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters of an answer that describe the model, beyond its name and version."""
        return {} if self.depth is None else {"depth": self.depth}

    @property
    def labels(self) -> list[str] | None:
        return self.session.labels

    def _declared_scores(self) -> Scores | UsageError:
        """The output that scores classes, by the file or else by the options, or the reason why there is none."""
        stated = output_kinds(self.session.metadata, {spec.name: list(spec.shape) for spec in self.outputs})
        name = self.options.scores if self.options.scores in {spec.name for spec in self.outputs} else None
        declared = not stated and self.options.scores in (None, name)
        try:
            return scores_output(self.session, name, self.options.output_kind if declared else None)
        except UsageError as error:
            return error.with_traceback(None)

    def card(self) -> dict[str, Any]:
        """Return what the file says about itself, with the kind of the output that the options declare.

        A file without metadata states no kinds, so that no client takes its outputs for those of a file of version 0.1.
        """
        metadata = self.session.metadata or {"outputs": {}}
        if isinstance(self.scores, UsageError):
            return metadata
        return {**metadata, "outputs": {**metadata.get("outputs", {}), self.scores.output: self.scores.kind}}

    def metadata(self, versions: Iterable[str]) -> dict[str, Any]:
        """Return the protocol's model metadata."""
        return {
            "name": self.source.name,
            "versions": list(versions),
            "platform": "onnxruntime_onnx",
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
        }

    def warm_up(self) -> None:
        """Run every batch size that may come once, with zeros; sizes left open come from the card, without one it is skipped."""
        if not self.options.warm_up:
            return
        for _, inputs in self.warm_inputs():
            for opened in dict.fromkeys(self.sessions):
                self._run_on(opened, inputs)

    def warm_inputs(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield zeros for every batch size that may occur, with its rows; nothing if the size of an input is unknown."""
        shapes = [self.warm_shape(spec) for spec in self.inputs]
        if None in shapes:
            return
        for rows in buckets(self.options.batch.max_rows) if self.batched else [1]:
            lead = [rows] if self.batched else []
            yield rows, {spec.name: _zeros(spec, lead + shape) for spec, shape in zip(self.inputs, shapes, strict=True)}

    def run_once(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model outside of the queue, to measure it."""
        return self._run_on(self.session, inputs)

    def prepare(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Decoded inputs as the session takes them; what it cannot take is refused here, before it shares a batch with others.

        Args:
            inputs: `{name: array}`.

        Returns:
            `{name: array}`: aligned and contiguous, BYTES as strings.

        Raises:
            ProtocolError: A wrong name, datatype, shape or number of rows.
        """
        if set(inputs) != {spec.name for spec in self.inputs}:
            wanted, got = ", ".join(spec.name for spec in self.inputs), ", ".join(name[:80] for name in inputs)
            raise ProtocolError(f"the inputs of model {self.source.name!r} are {wanted}; got {got}")
        for spec in self.inputs:
            self._check_input(spec, inputs[spec.name])
        if self.batched and len(rows := {len(array) for array in inputs.values()}) > 1:
            raise ProtocolError(f"all inputs must have the same number of rows, got {sorted(rows)}")
        return {name: _native(name, array) for name, array in inputs.items()}

    async def infer(self, inputs: dict[str, np.ndarray], timeout: float | None = None) -> Answer:
        """Return outputs of the model.

        Args:
            inputs: What `prepare` or `read_image` returned.
            timeout: Seconds; the server's own limit holds as well.

        Returns:
            `batcher.Answer`

        Raises:
            ProtocolError: The queue is full or the time is over (503), or the model failed (500).
        """
        started = time.monotonic_ns()
        limit = min(timeout or math.inf, self.options.timeout)
        try:
            answer = await self.batcher.submit(inputs, limit)
        except BaseException as error:
            self.statistics.failed(time.monotonic_ns() - started)
            if isinstance(error, QueueFull | DeadlineExceeded):
                raise self.busy(error) from error
            if isinstance(error, Exception):
                raise ProtocolError(f"model {self.source.name!r} failed: {first_line(error)}", 500) from error
            raise
        self.statistics.succeeded(time.monotonic_ns() - started, answer)
        return answer

    def busy(self, error: QueueFull | DeadlineExceeded) -> ProtocolError:
        """Return the error for a request that the model has no time for (503)."""
        reason = "queue_full" if isinstance(error, QueueFull) else "deadline"
        return ProtocolError(f"model {self.source.name!r} is busy: {error}; try again later", 503, RETRY, reason)

    def read_image(self, body: bytes) -> dict[str, np.ndarray]:
        """Return an encoded image as input arrays (to be called in a thread: decoding takes its time).

        Raises:
            ProtocolError: Not an image, or the model takes none.
        """
        try:
            spec = image_input(self.session)
            if isinstance(self.scores, UsageError):
                raise ProtocolError(str(self.scores))
            return {spec.name: stacked([load_pixels(body, self.session.card, spec, self.options.max_pixels)], spec)}
        except UsageError as error:
            raise ProtocolError(str(error)) from error

    @property
    def classifies_images(self) -> bool:
        """Whether `read_image` and `ranking` work: one image input and an output that ranks classes."""
        try:
            image_input(self.session)
        except UsageError:
            return False
        return isinstance(self.scores, Scores)

    def ranking(self, outputs: dict[str, np.ndarray], top: int) -> list[dict[str, Any]]:
        """Return the best classes of one answer to `read_image`: a list of `{"class", "label", "probability"}`.

        Raises:
            ProtocolError: The model gave NaN.
        """
        scores = outputs[self.scores.output][:1]
        if not np.isfinite(scores).all():
            raise ProtocolError(f"model {self.source.name!r} returned NaN or infinity for this image", 500)
        best = ranked("", self.scores.probabilities(scores)[0], self.labels, top)
        found = zip(best.classes, best.labels, best.probabilities, strict=True)
        return [{"class": index, "label": label, "probability": probability} for index, label, probability in found]

    def warm_shape(self, spec: TensorSpec) -> list[int] | None:
        """Return an input's shape without the batch axis, with the card's size for dynamic sizes; None if the card has none."""
        size = (self.session.card.get("preprocessing") or {}).get("size") or ()
        shape = list(spec.shape[1:] if self.batched else spec.shape)
        places = [index for index, dim in enumerate(shape) if dim < 0]
        if len(places) != len(size) and places:
            return None
        for index, dim in zip(places, size, strict=False):
            shape[index] = dim
        return shape

    async def close(self) -> None:
        """Wait for those who hold the model, finish what was submitted, then let go."""
        if self._holders:
            self._released = self._released or asyncio.get_running_loop().create_future()
            await self._released
        await self.batcher.close()

    def _check_input(self, spec, array):
        if datatype_of(array.dtype) != spec.datatype:
            raise ProtocolError(f"input {spec.name!r} must be {spec.datatype}, got {datatype_of(array.dtype)}")
        same_rank = array.ndim == len(spec.shape)
        fits = same_rank and all(want in (-1, have) for want, have in zip(spec.shape, array.shape, strict=True))
        if self.batched and fits and not len(array):
            raise ProtocolError(f"input {spec.name!r} has no rows; send at least one row")
        if not fits or not array.size:
            raise ProtocolError(f"input {spec.name!r} must have shape {list(spec.shape)}, got {list(array.shape)}")
        if self.batched and len(array) > self.options.max_request_rows:
            raise ProtocolError(
                f"a request may have {self.options.max_request_rows} rows, got {len(array)}; send them in parts", 413
            )
        # Four channels at most; a larger input would take the memory of all requests together, inside the model.
        if -1 in spec.shape[1:] and math.prod(array.shape[1:]) > 4 * self.options.max_open_pixels:
            limit = f"{self.options.max_open_pixels:,} pixels"
            raise ProtocolError(f"input {spec.name!r} of shape {list(array.shape)} has more than {limit}", 413)
        if -1 in spec.shape[1:] and array.ndim == 4 and max(array.shape[1:]) > MAX_SIDE:
            raise ProtocolError(f"input {spec.name!r} of shape {list(array.shape)} has a side of more than {MAX_SIDE:,}", 413)

    def _run(self, inputs):
        """The model itself, on the device that has been idle for longest."""
        opened = self._free.get()
        try:
            return self._run_on(opened, inputs)
        finally:
            self._free.put(opened)

    def _run_on(self, opened: Session, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a batch; on a GPU, batches are filled up to sizes it has seen, because each new one is planned again."""
        if not self.batched or opened.device == "cpu" or opened.buckets:
            return opened.run(inputs)
        rows = len(next(iter(inputs.values())))
        size = next(size for size in buckets(self.options.batch.max_rows) if size >= rows)
        outputs = opened.run({name: _filled(array, size) for name, array in inputs.items()})
        return {name: array[:rows] for name, array in outputs.items()}


def _opened(path: Path, options: ModelOptions) -> list[Session]:
    """The session of every instance: all the same one, except on several GPUs, over which the instances are spread evenly.

    On a GPU that runs one instance, a model of fixed sizes gets buffers of its own for every batch size that will come. Those
    serve one run at a time, so that several instances on one GPU do without.
    """
    instances = options.batch.instances
    first = session(path, options.device, threads=options.threads, detached=True)
    if first.device not in ON_GPU:
        return [first] * instances
    used = min(instances, max(1, gpu_count()))
    settings: dict[str, Any] = {"threads": options.threads, "detached": True}
    if instances == used and all(map(_bindable, first.inputs + first.outputs)):
        settings["batches"] = buckets(options.batch.max_rows)
    elif used == 1:
        return [first] * instances
    opened = [session(path, first.device, device_id=number, **settings) for number in range(used)]
    return [opened[number % used] for number in range(instances)]


def _bindable(value):
    """Whether a buffer can be laid out for it: numbers, of which only the batch is dynamic."""
    open_dims = [isinstance(dim, str) for dim in value.shape]
    return value.dtype != "object" and open_dims[:1] == [True] and not any(open_dims[1:])


def buckets(max_rows: int) -> list[int]:
    """Return the batch sizes that are warmed up, and to which a GPU's batches are filled: powers of two and the limit itself."""
    return [2**power for power in range(max_rows.bit_length()) if 2**power < max_rows] + [max_rows]


def _spec(value, source):
    try:
        datatype = datatype_of(value.dtype)
    except (TypeError, ProtocolError) as error:
        raise UsageError(f"{source.path.name} cannot be served: {value.name!r} is {value.dtype}") from error
    return TensorSpec(value.name, datatype, tuple(-1 if isinstance(dim, str) else dim for dim in value.shape))


def _zeros(spec, shape):
    return np.full(shape, "", object) if spec.datatype == "BYTES" else np.zeros(shape, DTYPES[spec.datatype])


def _native(name, array):
    if array.dtype.kind != "O":
        return np.require(array, requirements=("C", "A"))
    strings = np.empty(array.shape, object)
    try:
        strings.flat = [item.decode() for item in array.flat]
    except UnicodeDecodeError as error:
        raise ProtocolError(f"input {name!r} must hold UTF-8 strings") from error
    return strings


def _filled(array, rows):
    missing = rows - len(array)
    return np.concatenate([array, np.repeat(array[:1], missing, 0)]) if missing else array
