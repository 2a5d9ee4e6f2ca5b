"""Classifying images through a server that speaks the Open Inference Protocol v2: ours, Triton, KServe, MLServer."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import numpy as np

from ..artifact import find_scores_or_values
from ..errors import UsageError
from ..runtime.prediction import load_pixels, stacked
from ..runtime.sessions import TensorInfo
from . import protocol
from .bulk import error_row, result_row
from .protocol import DTYPES, HEADER_LENGTH, ProtocolError

if TYPE_CHECKING:
    from .bulk import Item


# What may be over in a moment: too many requests, a replica that died, a server that restarts.
TRANSIENT = (408, 429, 500, 502, 503, 504)
LONGEST_PAUSE = 20.0


@dataclass(frozen=True)
class RemoteOptions:
    """How a server is asked.

    Args:
        top: Classes per image.
        concurrency: Requests at a time.
        retries: Further tries after an answer that may be over in a moment.
        api_key: Sent as `Authorization: Bearer`.
        timeout: Seconds for one request.
        scores: Name of the output that scores classes, for a model whose server does not state it.
        output_kind: Kind of that output; by default the file's.
    """

    top: int = 5
    concurrency: int = 8
    retries: int = 6
    api_key: str | None = None
    timeout: float = 60.0
    scores: str | None = None
    output_kind: str | None = None


class RemoteClassifier:
    """Images to rows of the result, through a server; pictures are brought to the model's size here, pixels are sent.

    Args:
        url: The server's address, e.g. `http://127.0.0.1:8000`; `http://` may be left out. Certificates beyond the usual ones are
            named by `SSL_CERT_FILE`.
        model: Model name; may be left out where the server lists a single one.
        options: `RemoteOptions`.

    Raises:
        UsageError: The server does not answer, or has no such model, or the model does not classify images.
    """

    def __init__(self, url: str, model: str | None = None, options: RemoteOptions = RemoteOptions()) -> None:
        self.url, self.options = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}", options
        with self._client(httpx.Client) as client:
            self.model = model or self._only_model(client)
            self.path = f"v2/models/{quote(self.model, safe='')}"
            metadata = self._get(client, self.path)
            extensions = self._get(client, "v2").get("extensions") or []
            self.binary = {"binary_tensor_data", "binary_data"} & set(extensions)
            stated = self._stated(client)
            self.card = stated.get("card") or {}
            self.spec, outputs = _tensors(metadata, self.model)
            self.outputs = list(outputs)
            # Servers of other makers state no kinds; `logits` and `probabilities` are then a softmax classifier's.
            self.scores = find_scores_or_values(
                stated or {"card": {}}, outputs, scores=options.scores, kind=options.output_kind, file=f"model {self.model!r}"
            )
            self.top = options.top if self.scores else None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in which a run must agree with the one that it resumes."""
        scores = self.scores and [self.scores.output, self.scores.kind]
        return {"model": f"{self.url} {self.model}", "top": self.top, "scores": scores}

    def rows(self, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
        """Yield one row per item, in order; an image that cannot be read, or that the server refuses, is a row with an `error`.

        Raises:
            UsageError: The server has gone, or refuses the key.
        """
        with asyncio.Runner() as runner:
            stream = self._stream(items)
            try:
                while (row := runner.run(anext(stream, None))) is not None:
                    yield row
            finally:
                runner.run(stream.aclose())

    async def _stream(self, items):
        items, waiting = iter(items), deque()
        async with self._client(httpx.AsyncClient) as client:
            try:
                for item in itertools.islice(items, self.options.concurrency):
                    waiting.append(asyncio.create_task(self._row(client, item)))
                while waiting:
                    row = await waiting.popleft()
                    waiting.extend(asyncio.create_task(self._row(client, item)) for item in itertools.islice(items, 1))
                    yield row
            finally:
                for task in waiting:
                    task.cancel()

    async def _row(self, client, item):
        try:
            pixels = await asyncio.to_thread(load_pixels, item.source, self.card, self.spec)
        except UsageError as error:
            return error_row(item.name, str(error))
        try:
            values = await self._values(client, stacked([pixels], self.spec))
        except ProtocolError as error:
            if error.status in (401, 403, 404):
                raise UsageError(f"{self.url} refuses: {error}") from error
            return error_row(item.name, str(error))
        return result_row(item.name, values, self.scores, self.card.get("labels"), self.top)

    async def _values(self, client, array):
        """`{output name: array}` of one image, without the batch axis."""
        names = [self.scores.output] if self.scores else self.outputs
        wanted = [protocol.RequestedOutput(name, bool(self.binary)) for name in names]
        body, length = protocol.encode_request({self.spec.name: array}, wanted, binary=bool(self.binary))
        headers = {} if length is None else {HEADER_LENGTH: str(length)}
        answer = await self._patiently(lambda: client.post(f"{self.path}/infer", content=body, headers=headers))
        try:
            length = protocol.header_length(answer.headers.get(HEADER_LENGTH), len(answer.content))
            outputs = protocol.decode_response(answer.content, length).outputs
            return {name: outputs[name][0] for name in names}
        except (ProtocolError, KeyError, IndexError) as error:
            raise UsageError(f"{self.url} gave no answer in the protocol: {error}") from error

    async def _patiently(self, send):
        """The answer of a server that may be busy or restarting: tries again, each time after a longer pause."""
        for attempt in itertools.count():
            try:
                answer = await send()
                if answer.status_code == 200:
                    return answer
                reason, transient = _reason(answer), answer.status_code in TRANSIENT
            except httpx.TransportError as error:
                answer, reason, transient = None, str(error) or type(error).__name__, True
            if not transient:
                raise ProtocolError(reason, answer.status_code)
            if attempt >= self.options.retries:
                # A model that fails for one image does not end the run; a server that has gone does.
                if answer is not None and answer.status_code == 500:
                    raise ProtocolError(reason, 500)
                raise UsageError(f"{self.url} gave no answer after {attempt + 1} tries: {reason}")
            await asyncio.sleep(_pause(attempt, answer))

    def _client(self, kind):
        key = self.options.api_key
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        limits = httpx.Limits(max_connections=self.options.concurrency)
        trusted = httpx.create_ssl_context(trust_env=True)
        settings = {"base_url": self.url + "/", "headers": headers, "timeout": self.options.timeout, "limits": limits}
        # Proxies of the environment are for the way out; a server is named by its address.
        return kind(**settings, verify=trusted, trust_env=False)

    def _ask(self, client, method, path, content=None):
        """An answer; a server that is busy or restarting is asked again, after pauses that grow."""
        for attempt in itertools.count():
            answer = None
            try:
                answer = client.request(method, path, content=content)
                if answer.status_code not in TRANSIENT or attempt >= self.options.retries:
                    return answer
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                # A certificate that is not trusted will not be trusted in a moment.
                for_good = isinstance(error, httpx.UnsupportedProtocol) or "CERTIFICATE" in str(error)
                transient = isinstance(error, httpx.TransportError) and not for_good
                if not transient or attempt >= self.options.retries:
                    raise UsageError(f"{self.url} does not answer: {error}") from error
            time.sleep(_pause(attempt, answer))

    def _get(self, client, path):
        answer = self._ask(client, "GET", path)
        if answer.status_code != 200:
            raise UsageError(f"{self.url} refuses: {_reason(answer)}")
        try:
            return protocol.parse_json(answer.content)
        except ProtocolError as error:
            raise UsageError(f"{self.url} does not speak the Open Inference Protocol v2: {error}") from error

    def _stated(self, client):
        """The metadata of the model's file, from `resnet-export serve`; `{}` elsewhere, and images are then stretched to size."""
        answer = self._ask(client, "GET", f"{self.path}/card")
        return protocol.parse_json(answer.content) if answer.status_code == 200 else {}

    def _only_model(self, client):
        answer = self._ask(client, "POST", "v2/repository/index", b"{}")
        if answer.status_code in (401, 403):
            raise UsageError(f"{self.url} refuses: {_reason(answer)}")
        names = sorted({entry["name"] for entry in answer.json()}) if answer.status_code == 200 else []
        if len(names) != 1:
            raise UsageError(f"name the model with --model; {self.url} has {', '.join(names) or 'no list of models'}")
        return names[0]


def _tensors(metadata, model):
    """The image input, and `{name: shape}` of the outputs, from a model's metadata."""
    try:
        inputs = [_info(entry) for entry in metadata["inputs"]]
        outputs = [_info(entry) for entry in metadata["outputs"]]
    except (KeyError, TypeError) as error:
        raise UsageError(f"the metadata of {model!r} do not follow the protocol: {error}") from error
    if len(inputs) != 1 or inputs[0].layout is None:
        raise UsageError(f"{model!r} does not take one batch of images; its inputs are {', '.join(info.name for info in inputs)}")
    return inputs[0], {info.name: list(info.shape) for info in outputs}


def _info(entry):
    shape = tuple("?" if dim < 0 else dim for dim in entry["shape"])
    return TensorInfo(entry["name"], shape, str(np.dtype(DTYPES[entry["datatype"]]).name))


def _reason(answer):
    try:
        return protocol.parse_json(answer.content)["error"]
    except (ProtocolError, KeyError):
        return f"status {answer.status_code}"


def _pause(attempt, answer):
    """Seconds: what the server asks for, or twice as long each time, spread so that clients do not come back together."""
    asked = answer.headers.get("retry-after", "") if answer is not None else ""
    if asked.isdigit():
        return min(int(asked), LONGEST_PAUSE) * (1 + 0.25 * random.random())
    return min(0.1 * 2**attempt, LONGEST_PAUSE) * (0.5 + random.random())
