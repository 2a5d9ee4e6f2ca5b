"""The request path that every front end shares: find a model, admit, decode, enqueue, count, and translate errors.

Nothing here knows a web framework. HTTP (`app`) and gRPC call a `Service` and only turn its values, and its `ProtocolError`s,
into messages of their own.
"""

import contextlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import protocol
from .codec import INLINE_BYTES, Codec, Tensors
from .models import RETRY, ServedModel
from .protocol import InferRequest, ProtocolError, RequestedOutput
from .repository import Repository
from .statistics import RequestCounts, render_metrics

NAME = "resnet-export"
EXTENSIONS = ("binary_tensor_data", "classification", "statistics", "model_repository", "model_configuration", "metrics")
MAX_TOP = 1000


@dataclass(frozen=True)
class ServiceOptions:
    """What clients may do and how much they may use, whatever the front end.

    Args:
        max_body: Largest request, in bytes, also after decompression.
        max_json: Largest JSON part of a request or an answer, in bytes; larger ones must be binary.
        max_buffered: Memory that all requests and their answers may hold together, in bytes.
        body_timeout: Time in which the body of a request must arrive, and in which the client must read the answer, in seconds.
        allow_control: Whether clients may load and unload models.
        api_keys: Keys, one of which every request must name (`Authorization: Bearer KEY`) except for the page and the health
            checks. Empty: no key is needed.
        decoders: Number of threads that decode images and compressed bodies.
    """

    max_body: int = 64 * 2**20
    max_json: int = 64 * 2**20
    max_buffered: int = 2**30
    body_timeout: float = 30.0
    allow_control: bool = False
    api_keys: tuple[str, ...] = ()
    decoders: int = 2


DEFAULTS = ServiceOptions()


class Keys:
    """The API keys in force; they can be exchanged while requests are being answered.

    Args:
        keys: Keys as strings; empty means that no key is needed.
    """

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self.replace(keys)

    def replace(self, keys: tuple[str, ...]) -> None:
        """Put other keys in force."""
        self._keys = tuple(key.encode() for key in keys)

    def accept(self, authorization: bytes) -> bool:
        """Check the value of an `Authorization` header (or of the gRPC metadata entry `authorization`).

        Args:
            authorization: The raw value, `b""` if there is none.

        Returns:
            Whether it is `Bearer` and a key in force, or no key is needed.
        """
        if not self._keys:
            return True
        scheme, _, key = authorization.partition(b" ")
        # All keys are compared, each in constant time, so that the time of the answer reveals nothing.
        return scheme.lower() == b"bearer" and any([hmac.compare_digest(key.strip(), known) for known in self._keys])


class Admission:
    """The memory that one request and its answer hold; made by `Service.admit`, which gives it back at the end."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self.taken = 0

    def take(self, size: int) -> None:
        """Count `size` more bytes (fewer, if negative).

        Raises:
            ProtocolError: All requests together then hold more than they may (503).
        """
        self.taken += size
        self._service.buffered += size
        if size > 0 and self._service.buffered > self._service.options.max_buffered:
            raise ProtocolError("too many requests at once; try again later", 503, RETRY, "out_of_memory")

    def settle(self, size: int) -> None:
        """Count `size` bytes instead of what was counted so far, once the request has been exchanged for its answer.

        Raises:
            ProtocolError: As `take`.
        """
        self.take(size - self.taken)


class Service:
    """Everything a front end needs to answer requests.

    Args:
        repository: The models, opened. They are warmed up by `warm_up` and closed by `close`.
        options: `ServiceOptions`.
        version: The server's version, as its metadata reports it.
    """

    def __init__(self, repository: Repository, options: ServiceOptions = DEFAULTS, version: str = "0") -> None:
        self.repository, self.options, self.version = repository, options, version
        self.keys = Keys(options.api_keys)
        self.buffered = 0
        self.is_draining = False
        self.requests = RequestCounts()
        self.codec = Codec(options.decoders, options.max_json)

    @property
    def ready(self) -> bool:
        """Whether all models are ready and the server is not about to stop."""
        return self.repository.ready and not self.is_draining

    def drain(self) -> None:
        """Report that the server is not ready from now on, because it is about to stop; requests are still answered."""
        self.is_draining = True

    def metrics(self) -> tuple[bytes, str]:
        """Return the metrics for Prometheus and their content type."""
        parts = (part for model in self.repository.models() for part in model.parts())
        found = (
            ({"model": m.source.name, "version": m.source.version, **m.parameters}, m.statistics, m.batcher.pending)
            for m in parts
        )
        return render_metrics(found, self.requests)

    async def warm_up(self) -> list[str]:
        """Warm up all models; returns the reasons why some did not become ready."""
        return await self.repository.warm_up()

    async def close(self) -> None:
        """Finish what the models have taken and let go of them."""
        await self.repository.close()
        self.codec.close()

    @contextlib.contextmanager
    def admit(self) -> Iterator[Admission]:
        """Account for the memory of one request until the block ends.

        A front end keeps the block open until the client has taken the answer.
        """
        admission = Admission(self)
        try:
            yield admission
        finally:
            admission.take(-admission.taken)

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """Look up a model that is ready; the newest version if none is named.

        Only for what is answered at once. Whatever awaits anything must `hold` the model.

        Raises:
            ProtocolError: There is none (404), or it is still being loaded (503).
        """
        return self.repository.get(name, version)

    @contextlib.contextmanager
    def hold(self, name: str, version: str | None = None) -> Iterator[ServedModel]:
        """Look up a model and keep it open until the block ends, even if it is unloaded or replaced meanwhile.

        Raises:
            ProtocolError: See `find`.
        """
        with self.find(name, version).held() as model:
            yield model

    @contextlib.contextmanager
    def announced(self, name: str, version: str | None = None) -> Iterator[None]:
        """Tell a model's batcher that a request for it is arriving; wrap the reading of the body in it.

        Raises:
            ProtocolError: See `find`.
        """
        with self.find(name, version).announced():
            yield

    def choose(self, model: ServedModel, asked: InferRequest) -> ServedModel:
        """Choose the member of a family that is to answer a request; any other model is its only member.

        Args:
            model: What `hold` gave.
            asked: The request.

        Raises:
            ProtocolError: There is no member as it asks for (400), or too many requests wait (503).
        """
        rows = max((len(array) for array in asked.inputs.values() if array.ndim), default=1) if model.batched else 1
        return model.choose(asked.parameters, rows, asked.timeout)

    async def infer(self, model: ServedModel, asked: InferRequest, admission: Admission) -> Tensors:
        """Run a decoded request.

        Args:
            model: What `choose` gave.
            asked: The request.
            admission: Where the answer is accounted for, in place of the request.

        Returns:
            `(name, array, whether the client wants raw bytes)` for every output that was asked for, in that order.

        Raises:
            ProtocolError: The request does not fit the model (400, 413), the queue is full or its time is over (503), or the
                model failed (500).
        """
        wanted = wanted_outputs(asked, model)
        answer = await model.infer(model.prepare(asked.inputs), asked.timeout)
        admission.settle(sum(answer.outputs[output.name].nbytes for output in wanted))
        if sum(answer.outputs[output.name].nbytes for output in wanted if output.classes) > INLINE_BYTES:
            return await self.codec.in_thread(_converted, wanted, answer.outputs, model)
        return _converted(wanted, answer.outputs, model)

    async def classify(self, model: ServedModel, body: bytes, top: int, admission: Admission) -> list[dict[str, Any]]:
        """Classify one encoded image.

        Args:
            model: What `choose` of that which `hold` gave has chosen.
            body: The image file.
            top: How many classes to return, best first.
            admission: Where the decoded image is accounted for; a small file may be a large picture.

        Returns:
            List of `{"class", "label", "probability"}`.

        Raises:
            ProtocolError: The body is not an image or the model does not take one (400), or as in `infer`.
        """
        if not body:
            raise ProtocolError("the body must be an image, it is empty")
        inputs = await self.codec.in_thread(model.read_image, body)
        admission.take(sum(array.nbytes for array in inputs.values()))
        answer = await model.infer(model.prepare(inputs))
        return model.ranking(answer.outputs, top)

    def statistics(self, name: str | None = None, version: str | None = None) -> list[dict[str, Any]]:
        """Return the statistics extension's entries for one version, all versions of one model, or all models.

        Raises:
            ProtocolError: See `find`.
        """
        models = self.repository.models()
        if name is not None:
            found = self.find(name, version)
            models = [found] if version is not None else [model for model in models if model.source.name == name]
        return [model.total_statistics().to_json(model.source.name, model.source.version) for model in models]

    async def load(self, name: str, parameters: dict[str, Any] | None = None) -> None:
        """Load a model on behalf of a client.

        Raises:
            ProtocolError: Clients may not (403), there is none (404), or it does not open (400).
        """
        self._check_control()
        if parameters:
            raise ProtocolError("a model's files and configuration cannot be sent; load it as it is in the repository")
        await self.repository.load(name)

    async def unload(self, name: str) -> None:
        """Unload a model on behalf of a client.

        Raises:
            ProtocolError: Clients may not (403), or there is none (404).
        """
        self._check_control()
        await self.repository.unload(name)

    def _check_control(self) -> None:
        if not self.options.allow_control:
            raise ProtocolError("loading and unloading is off; start the server with --allow-control", 403)


def decode_raw(body: bytes, model: ServedModel) -> InferRequest:
    """Decode a raw binary request: the body is one row of the model's only input.

    Raises:
        ProtocolError: The model has several inputs, or the body does not fit.
    """
    if len(model.inputs) != 1:
        raise ProtocolError(f"a raw binary request needs a model with one input, {model.source.name!r} has {len(model.inputs)}")
    return protocol.decode_raw_request(body, model.inputs[0])


def wanted_outputs(asked: InferRequest, model: ServedModel) -> tuple[RequestedOutput, ...]:
    """List the outputs to be sent: those named, or all.

    Raises:
        ProtocolError: The model has no output of that name.
    """
    known = [spec.name for spec in model.outputs]
    if asked.outputs is None:
        return tuple(RequestedOutput(name, asked.binary) for name in known)
    if unknown := [output.name for output in asked.outputs if output.name not in known]:
        raise ProtocolError(f"model {model.source.name!r} has no output {unknown[0][:80]!r}; it has {', '.join(known)}")
    return asked.outputs


def _converted(wanted: tuple[RequestedOutput, ...], arrays: dict[str, np.ndarray], model: ServedModel) -> Tensors:
    """The values of every output, or its best classes if the client asked for those."""
    return [(output.name, _values(output, arrays[output.name], model), output.binary) for output in wanted]


def _values(output: RequestedOutput, array: np.ndarray, model: ServedModel) -> np.ndarray:
    if not output.classes:
        return array
    if not np.issubdtype(array.dtype, np.number) or not array.size:
        raise ProtocolError(f"output {output.name!r} holds no scores to be classified")
    labels = model.labels if model.labels and array.shape[-1] == len(model.labels) else None
    return protocol.classify(array, output.classes, labels, model.batched)
