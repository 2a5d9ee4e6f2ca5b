"""The Open Inference Protocol v2 as plain functions: bytes to numpy arrays and back. No server, no session, no state.

A message is a JSON object, behind which raw little-endian tensors may follow; the header `Inference-Header-Content-Length`
then gives the length of the JSON. Whatever the bytes are, a reader returns a value or raises `ProtocolError`.

Source: kserve/open-inference-protocol, `inference_rest.md`; Triton's `extension_binary_data.md`, `extension_classification.md`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import json_text

if TYPE_CHECKING:
    from numpy.typing import DTypeLike


HEADER_LENGTH = "Inference-Header-Content-Length"
DTYPES = {
    "BOOL": np.dtype("bool"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype("object"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_DIMENSIONS = 32
MAX_ELEMENTS = 2**40


# Numbers that are written as JSON at a time.
PIECE = 65_536
REASONS = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "slow_body",
    413: "too_large",
    415: "unsupported_encoding",
    499: "client_gone",
    500: "model_failed",
    501: "unsupported_datatype",
    503: "unavailable",
}


class ProtocolError(Exception):
    """A message that cannot be answered as asked.

    Args:
        message: One sentence for the client.
        status: HTTP status of the answer.
        headers: Further headers of the answer.
        reason: One word for metrics and logs; by default the usual one of the status.
    """

    def __init__(self, message: str, status: int = 400, headers: dict[str, str] | None = None, reason: str | None = None) -> None:
        super().__init__(message)
        self.status, self.headers, self.reason = status, headers or {}, reason or REASONS.get(status, "other")


@dataclass(frozen=True)
class TensorSpec:
    """Name, datatype and shape (-1 where it may vary) of a tensor, as model metadata gives them."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class RequestedOutput:
    """One entry of a request's `outputs`: name, binary or JSON, and how many classes (0: the tensor itself)."""

    name: str
    binary: bool = False
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """A decoded inference request; `outputs` is None where the client named none, `binary` is what then holds for all."""

    inputs: dict[str, np.ndarray]
    id: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[RequestedOutput, ...] | None = None
    binary: bool = False

    @property
    def timeout(self) -> float | None:
        """Seconds after which the client no longer wants an answer (`parameters.timeout` is in microseconds), or None."""
        return self.parameters["timeout"] / 1e6 if self.parameters.get("timeout") else None


@dataclass(frozen=True)
class InferResponse:
    """A decoded inference response."""

    model_name: str
    model_version: str | None
    id: str | None
    outputs: dict[str, np.ndarray]
    parameters: dict[str, Any] = field(default_factory=dict)


def datatype_of(dtype: DTypeLike) -> str:
    """Return the protocol's name of a numpy dtype.

    Raises:
        ProtocolError: The protocol has none.
    """
    dtype = np.dtype(dtype)
    name = NAMES.get(dtype.newbyteorder("<"))
    if name is None:
        raise ProtocolError(f"the protocol has no datatype for numpy's {dtype}", 501)
    return name


def parse_json(text: bytes | memoryview) -> dict[str, Any]:
    """Parse the JSON object in `text`. NaN and infinity, which Python would accept, are refused.

    Args:
        text: The JSON as bytes.

    Returns:
        Dict

    Raises:
        ProtocolError: Anything else.
    """
    try:
        value = json_text.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the body is not valid JSON: {str(error) or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"the body must be a JSON object, got {_kind(value)}")
    return value


def header_length(value: str | None, size: int) -> int | None:
    """Return the length of the JSON part, from the header's text (None: no header, all of the body is JSON).

    Raises:
        ProtocolError: Not a number, or more than the body has.
    """
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) < 20):
        raise ProtocolError(f"`{HEADER_LENGTH}` must be a number of bytes, got {value[:40]!r}")
    if int(value) > size:
        raise ProtocolError(f"`{HEADER_LENGTH}` is {int(value)}, but the body has only {size} bytes")
    return int(value)


def decompress(body: bytes | bytearray, encoding: str | None, limit: int) -> bytes | bytearray:
    """Undo the `Content-Encoding` of a body, without ever unpacking more than `limit` bytes.

    Args:
        body: The body of the request, as bytes.
        encoding: The header's text, or None.
        limit: Maximum size, in bytes.

    Raises:
        ProtocolError: Unknown encoding (415), damaged data (400), more than the limit (413).
    """
    encoding = (encoding or "identity").strip().lower()
    if encoding == "identity":
        return body
    windows = {"gzip": 31, "x-gzip": 31, "deflate": 15}
    if encoding not in windows:
        raise ProtocolError(f"`Content-Encoding` must be gzip or deflate, got {encoding[:40]!r}", 415)
    unpacker = zlib.decompressobj(windows[encoding])
    try:
        data = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise ProtocolError(f"the body is not valid {encoding} data: {error}") from error
    if len(data) > limit:
        raise ProtocolError(f"the body unpacks to more than {limit:,} bytes", 413)
    if not unpacker.eof or unpacker.unused_data:
        raise ProtocolError(f"the body is not one complete {encoding} stream")
    return data


def compress(parts: Iterable[bytes | memoryview], encoding: str) -> bytes:
    """Compress buffers as one gzip or (zlib-wrapped) deflate stream, at the fastest level: tensors hardly shrink further."""
    packer = zlib.compressobj(1, zlib.DEFLATED, {"gzip": 31, "deflate": 15}[encoding])
    return b"".join([*map(packer.compress, parts), packer.flush()])


def accepted_encoding(header: str) -> str | None:
    """Choose how to compress an answer from the value of `Accept-Encoding`.

    Args:
        header: The value; empty for none.

    Returns:
        `"gzip"` or `"deflate"`, whichever the client prefers (gzip among equals), or None if it takes neither, or
        prefers the answer uncompressed.
    """
    weights = {}
    for entry in header.lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        weights[name] = next((_weight(text[2:]) for text in parameters if text.startswith("q=")), 1.0)
    rest = weights.get("*", 0.0)
    offered = {name: weights.get(name, rest) for name in ("gzip", "deflate")}
    best = max(offered, key=offered.get)
    return best if offered[best] > 0 and offered[best] >= weights.get("identity", 0.0) else None


def _weight(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 0.0


def decode_request(body: bytes | bytearray | memoryview, json_length: int | None = None) -> InferRequest:
    """Decode an inference request.

    Args:
        body: The body of the request, not compressed.
        json_length: Length of the JSON part, see `header_length`.

    Returns:
        InferRequest; binary tensors are read-only views of `body`.

    Raises:
        ProtocolError: The body is not an inference request.
    """
    head, tail = _split(body, json_length)
    read = _Tail(tail)
    request = build_request(parse_json(head), read)
    read.check_end()
    return request


def build_request(
    message: dict[str, Any], read: Callable[[dict[str, Any], str, tuple[int, ...], str], np.ndarray], binary: bool = False
) -> InferRequest:
    """Check a request that has been taken out of its encoding, JSON or protocol buffers, and read its tensors.

    Args:
        message: Dict in the protocol's JSON form; the tensors' data need not be in it.
        read: Function `(entry, datatype, shape, label) -> array` that gives the data of one entry of `inputs`. It is called once
            per input, in order; `label` names the tensor in error messages.
        binary: Whether outputs are sent as raw bytes unless the request says otherwise.

    Returns:
        InferRequest

    Raises:
        ProtocolError: The message is not an inference request.
    """
    parameters = _parameters(message)
    _check_timeout(parameters)
    inputs = _read_tensors(_entries(message, "inputs"), read, "input")
    if not inputs:
        raise ProtocolError("`inputs` must name at least one tensor")
    binary = _flag(parameters, "binary_data_output", binary)
    wanted = [] if message.get("outputs") is None else _entries(message, "outputs")
    outputs = tuple(_requested_output(entry, binary) for entry in wanted)
    _check_unique([output.name for output in outputs], "output")
    return InferRequest(inputs, _identifier(message), parameters, outputs or None, binary)


def decode_raw_request(body: bytes | bytearray | memoryview, spec: TensorSpec) -> InferRequest:
    """Decode a raw binary request: its body is one row of the model's only input, and all outputs are returned in binary.

    Args:
        body: The body of the request, as bytes.
        spec: The `TensorSpec` of that input.

    Raises:
        ProtocolError: The shape is not fixed, or the body does not fit.
    """
    if any(dim < 0 for dim in spec.shape[1:]):
        raise ProtocolError(f"a raw binary request needs an input of fixed size; {spec.name!r} has shape {list(spec.shape)}")
    shape = (1, *spec.shape[1:])
    if spec.datatype == "BYTES":
        array = np.array([bytes(body)] * math.prod(shape), dtype=object).reshape(shape)
        if array.size != 1:
            raise ProtocolError(f"a raw binary request holds one element, {spec.name!r} takes {array.size}")
    else:
        array = from_bytes(memoryview(body), spec.datatype, shape, f"input {spec.name!r}")
    return InferRequest({spec.name: array}, binary=True)


def encode_response(
    model_name: str,
    model_version: str,
    outputs: list[tuple[str, np.ndarray, bool]],
    request_id: str | None = None,
    max_json: int | None = None,
    parameters: dict[str, str] | None = None,
) -> tuple[bytes, int | None]:
    """Encode an inference response; see `response_parts`, of which this is the concatenation."""
    parts, length = response_parts(model_name, model_version, outputs, request_id, max_json, parameters)
    return b"".join(parts), length


def response_parts(
    model_name: str,
    model_version: str,
    outputs: list[tuple[str, np.ndarray, bool]],
    request_id: str | None = None,
    max_json: int | None = None,
    parameters: dict[str, str] | None = None,
) -> tuple[list[bytes | memoryview], int | None]:
    """Encode an inference response as buffers that follow each other; binary tensors are not copied.

    Args:
        model_name, model_version: Names of the model.
        outputs: List of `(name, array, binary)`.
        request_id: The request's id, echoed.
        max_json: Largest JSON part, in bytes.
        parameters: Parameters of the answer; the member of a family that gave it is `depth`.

    Returns:
        `(buffers, length of the JSON part)`; the length is None where all outputs are JSON.

    Raises:
        ProtocolError: JSON cannot express an output (FP16, NaN, infinity, bytes that are not UTF-8), or needs too many bytes.
    """
    message: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if parameters:
        message["parameters"] = parameters
    if request_id is not None:
        message["id"] = request_id
    return _encoded(message, "outputs", outputs, max_json)


def encode_request(
    inputs: dict[str, np.ndarray],
    outputs: Sequence[RequestedOutput] | None = None,
    request_id: str | None = None,
    binary: bool = True,
    parameters: dict[str, Any] | None = None,
) -> tuple[bytes, int | None]:
    """Encode an inference request, for clients.

    Args:
        inputs: `{name: array}`.
        outputs: List of `RequestedOutput`; None asks for all.
        request_id: String.
        binary: Send tensors, and have unnamed outputs sent back, as raw bytes.
        parameters: Further request parameters.

    Returns:
        `(body, length of the JSON part)` as in `encode_response`.

    Raises:
        ProtocolError: An array the protocol, or JSON, has no form for.
    """
    message: dict[str, Any] = {"parameters": {**(parameters or {}), "binary_data_output": binary}}
    if request_id is not None:
        message["id"] = request_id
    if outputs is not None:
        message["outputs"] = [_output_entry(output) for output in outputs]
    parts, length = _encoded(message, "inputs", [(name, array, binary) for name, array in inputs.items()])
    return b"".join(parts), length


def _output_entry(output):
    parameters = {"binary_data": output.binary} | ({"classification": output.classes} if output.classes else {})
    return {"name": output.name, "parameters": parameters}


def decode_response(body: bytes | memoryview, json_length: int | None = None) -> InferResponse:
    """Decode an inference response, for clients.

    Returns:
        InferResponse

    Raises:
        ProtocolError: The body is not an inference response.
    """
    head, tail = _split(body, json_length)
    message = parse_json(head)
    name, version = message.get("model_name"), message.get("model_version")
    if not isinstance(name, str) or not isinstance(version, str | None):
        raise ProtocolError("`model_name` and `model_version` must be strings")
    read = _Tail(tail)
    outputs = _read_tensors(_entries(message, "outputs"), read, "output")
    read.check_end()
    return InferResponse(name, version, _identifier(message), outputs, _parameters(message))


def classify(array: np.ndarray, classes: int, labels: Sequence[str] | None = None, batched: bool = True) -> np.ndarray:
    """Turn scores into the strings of the classification extension, `"value:index[:label]"`, best first, equal ones by index.

    Args:
        array: Scores; [rows, …] if `batched`.
        classes: How many per row; at most as many as there are.
        labels: Class names, or None.
        batched: Whether the first axis counts rows.

    Returns:
        Object array of bytes, [rows, classes] or [classes].
    """
    rows = array.reshape(array.shape[0], -1) if batched else array.reshape(1, -1)
    order = np.argsort(-rows.astype("float64"), axis=1, kind="stable")[:, :classes]
    strings = np.empty(order.shape, dtype=object)
    for row, column in np.ndindex(*order.shape):
        index = int(order[row, column])
        label = f":{labels[index]}" if labels and index < len(labels) else ""
        strings[row, column] = f"{float(rows[row, index]):f}:{index}{label}".encode()
    return strings if batched else strings[0]


def _split(body, json_length):
    view = memoryview(body)
    return (view, view[:0]) if json_length is None else (view[:json_length], view[json_length:])


def _kind(value):
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _entries(message, key):
    entries = message.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ProtocolError(f"`{key}` must be an array of objects")
    return entries


def _identifier(message):
    identifier = message.get("id")
    if not isinstance(identifier, str | None):
        raise ProtocolError(f"`id` must be a string, got {_kind(identifier)}")
    return identifier


def _parameters(message):
    parameters = message.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ProtocolError(f"`parameters` must be an object, got {_kind(parameters)}")
    return parameters


def _tensor_parameters(entry, label):
    """The parameters of a tensor; what names memory that is not ours is refused, or its client would read nothing there."""
    parameters = _parameters(entry)
    if "shared_memory_region" in parameters:
        raise ProtocolError(
            f"{label} is in shared memory, which this server does not support; send and receive tensors in the body"
        )
    return parameters


def _flag(parameters, name, default):
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise ProtocolError(f"parameter `{name}` must be true or false, got {_kind(value)}")
    return value


def _count(value, what):
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ProtocolError(f"{what} must be a whole number of at least 0, got {_shown(value)}")
    return value


def _shown(value):
    return repr(value)[:40] if isinstance(value, str | int | float) else _kind(value)


def _check_timeout(parameters):
    # Beyond an hour is as good as never, and keeps the sum with the clock finite.
    if "timeout" in parameters and _count(parameters["timeout"], "parameter `timeout` (microseconds)") > 3_600_000_000:
        raise ProtocolError("parameter `timeout` (microseconds) must be at most 3600000000, an hour")


def _name(entry, what):
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ProtocolError(f"every {what} must have a `name`, a string that is not empty")
    return name


def _check_unique(names, what):
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ProtocolError(f"{what} {twice[:80]!r} is given twice")


def _requested_output(entry, binary):
    name = _name(entry, "output")
    parameters = _tensor_parameters(entry, f"output {name[:80]!r}")
    classes = _count(parameters.get("classification", 0), f"`classification` of output {name[:80]!r}")
    return RequestedOutput(name, _flag(parameters, "binary_data", binary), classes)


class _Tail:
    """Reads tensors that are given as JSON, or as bytes that follow the JSON in the order of the tensors."""

    def __init__(self, raw: memoryview) -> None:
        self._left = raw

    def __call__(self, entry: dict[str, Any], datatype: str, shape: tuple[int, ...], label: str) -> np.ndarray:
        parameters = entry.get("parameters") or {}
        if "binary_data_size" not in parameters:
            return _from_json(entry.get("data"), datatype, shape, label)
        if "data" in entry:
            raise ProtocolError(f"{label} has both `data` and `binary_data_size`")
        size = _count(parameters["binary_data_size"], f"`binary_data_size` of {label}")
        if size > len(self._left):
            raise ProtocolError(f"{label} has `binary_data_size` {size}, but only {len(self._left)} bytes are left in the body")
        raw, self._left = self._left[:size], self._left[size:]
        return from_bytes(raw, datatype, shape, label)

    def check_end(self) -> None:
        if len(self._left):
            raise ProtocolError(f"{len(self._left)} bytes are left in the body after the last tensor")


def _read_tensors(entries, read, what):
    _check_unique([_name(entry, what) for entry in entries], what)
    tensors = {}
    for entry in entries:
        label = f"{what} {entry['name'][:80]!r}"
        datatype, shape = _datatype(entry, label), _shape(entry, label)
        _tensor_parameters(entry, label)
        tensors[entry["name"]] = read(entry, datatype, shape, label)
    return tensors


def _datatype(entry, label):
    datatype = entry.get("datatype")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise ProtocolError(f"`datatype` of {label} must be one of {', '.join(DTYPES)}, got {_shown(datatype)}")
    return datatype


def _shape(entry, label):
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"`shape` of {label} must be an array of at most {MAX_DIMENSIONS} numbers")
    shape = tuple(_count(dim, f"a dimension of {label}") for dim in shape)
    # Empty tensors count as well: numpy refuses what would overflow if the empty dimension were not there.
    if math.prod(max(dim, 1) for dim in shape) > MAX_ELEMENTS:
        raise ProtocolError(f"`shape` of {label} stands for more than {MAX_ELEMENTS:,} elements")
    return shape


def from_bytes(raw: bytes | memoryview, datatype: str, shape: tuple[int, ...], label: str) -> np.ndarray:
    """Read one tensor from its raw little-endian bytes.

    Args:
        raw: The bytes, or a memoryview of them, which the array then refers to.
        datatype: The protocol's name of the datatype.
        shape: Tuple of dimensions.
        label: How error messages name the tensor, e.g. `input 'x'`.

    Returns:
        Read-only array; BYTES elements as an object array of `bytes`.

    Raises:
        ProtocolError: The bytes do not have the length of such a tensor.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _object_array(_length_prefixed(raw, count, label), shape)
    dtype = DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        wanted = f"{count * dtype.itemsize} bytes ({datatype}, shape {list(shape)})"
        raise ProtocolError(f"{label} takes {wanted}, got {len(raw)}")
    if datatype == "BOOL":
        # Any byte may come; a numpy boolean that is neither 0 nor 1 would not behave.
        return (np.frombuffer(raw, "u1") != 0).reshape(shape)
    return np.frombuffer(raw, dtype).reshape(shape)


def _length_prefixed(raw, count, label):
    elements, position = [], 0
    while position < len(raw):
        start = position + 4
        end = start + int.from_bytes(raw[position:start], "little")
        if start > len(raw) or end > len(raw):
            raise ProtocolError(f"{label}: element {len(elements)} of the BYTES data is cut short")
        if len(elements) == count:
            raise ProtocolError(f"{label} takes {count} BYTES elements, got more")
        elements.append(bytes(raw[start:end]))
        position = end
    if len(elements) != count:
        raise ProtocolError(f"{label} takes {count} BYTES elements, got {len(elements)}")
    return elements


def _object_array(elements, shape):
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array.reshape(shape)


def _from_json(data, datatype, shape, label):
    if not isinstance(data, list):
        raise ProtocolError(f"{label} must have `data`, an array, or `binary_data_size`")
    if datatype == "FP16":
        raise ProtocolError(f"{label} is FP16, which has no JSON form; send it as binary data")
    if datatype == "BYTES":
        return _object_array(_strings(data, shape, label), shape)
    try:
        # Numpy would turn a list with large and small unsigned numbers into floats.
        array = np.asarray(data, dtype=object if datatype == "UINT64" else None)
    except (ValueError, OverflowError) as error:
        raise ProtocolError(f"`data` of {label} is ragged, or holds numbers that are too large") from error
    _check_layout(array.shape, shape, label)
    if datatype == "UINT64" and all(type(item) is int and 0 <= item < 2**64 for item in array.ravel()):
        array = array.astype("u8")
    return _cast(array, datatype, label).reshape(shape)


def _check_layout(have, shape, label):
    if have != shape and (len(have) != 1 or have[0] != math.prod(shape)):
        wanted = f"{list(shape)}, or flat with {math.prod(shape)} values"
        raise ProtocolError(f"`data` of {label} has shape {list(have)}; it must be {wanted}")


def _cast(array, datatype, label):
    dtype = DTYPES[datatype]
    allowed = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[dtype.kind]
    if array.size and array.dtype.kind not in allowed:
        raise ProtocolError(f"`data` of {label} holds values that are not {datatype}")
    if dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise ProtocolError(f"`data` of {label} holds values beyond {datatype} ({limits.min} to {limits.max})")
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype.kind == "f" and not np.isfinite(result).all():
        raise ProtocolError(f"`data` of {label} holds values beyond {datatype}")
    return result


def _strings(data, shape, label):
    flat, have = data, [len(data)]
    while flat and isinstance(flat[0], list):
        if not all(isinstance(part, list) and len(part) == len(flat[0]) for part in flat):
            raise ProtocolError(f"`data` of {label} is ragged")
        have.append(len(flat[0]))
        flat = [item for part in flat for item in part]
    _check_layout(tuple(have), shape, label)
    if not all(isinstance(item, str) for item in flat):
        raise ProtocolError(f"`data` of {label} holds values that are not strings")
    try:
        return [item.encode() for item in flat]
    except UnicodeEncodeError as error:
        raise ProtocolError(f"`data` of {label} has a string that is not valid Unicode") from error


def _encoded(
    message: dict, key: str, tensors: list[tuple[str, np.ndarray, bool]], max_json: int | None = None
) -> tuple[list[bytes | memoryview], int | None]:
    entries, raw = [], []
    for name, array, binary in tensors:
        array = np.asarray(array)
        datatype = wire_datatype(array)
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            raw.append(to_bytes(array))
            entry["parameters"] = {"binary_data_size": len(raw[-1])}
            entries.append(json_text.dumps(entry))
        else:
            pieces = _bounded(_json_data(array, datatype, name), max_json, name)
            entries.append(json_text.dumps(entry)[:-1] + b',"data":[' + b",".join(pieces) + b"]}")
    head = json_text.dumps(message)[:-1] + f',"{key}":['.encode() + b",".join(entries) + b"]}"
    return [head, *raw], (len(head) if raw else None)


def wire_datatype(array: np.ndarray) -> str:
    """Name the datatype with which an array is sent: as `datatype_of`, but fixed-width strings of NumPy go as BYTES."""
    return "BYTES" if array.dtype.kind in "SU" else datatype_of(array.dtype)


def to_bytes(array: np.ndarray) -> bytes | memoryview:
    """Write an array as raw little-endian bytes, without a copy where it has that form; strings with their lengths in front.

    The inverse of `from_bytes`.
    """
    datatype = wire_datatype(array)
    if datatype == "BYTES":
        return _bytes_data(array)
    array = np.ascontiguousarray(array, DTYPES[datatype])
    return array.reshape(-1).view("u1").data if array.size else b""


def _bytes_data(array):
    elements = (item.encode() if isinstance(item, str) else bytes(item) for item in array.ravel())
    return b"".join(len(item).to_bytes(4, "little") + item for item in elements)


def _json_data(array: np.ndarray, datatype: str, name: str) -> Iterator[bytes]:
    """The elements as JSON, in pieces."""
    if datatype == "FP16":
        raise ProtocolError(f"{name!r} is FP16, which has no JSON form; ask for binary data")
    flat = array.ravel()
    if datatype != "BYTES" and flat.dtype.kind == "f" and not np.isfinite(flat).all():
        raise ProtocolError(f"{name!r} holds NaN or infinity, which JSON cannot express; ask for binary data")
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        yield json_text.dumps(_texts(piece, name))[1:-1] if datatype == "BYTES" else json_text.dump_numbers(piece)


def _texts(elements: np.ndarray, name: str) -> list[str]:
    try:
        return [item if isinstance(item, str) else bytes(item).decode() for item in elements]
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{name!r} holds bytes that are not UTF-8; ask for binary data") from error


def _bounded(pieces: Iterator[bytes], limit: int | None, name: str) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if limit is not None and size > limit:
            raise ProtocolError(f"{name!r} has more than {limit:,} bytes as JSON; ask for binary data", 413)
        yield piece
