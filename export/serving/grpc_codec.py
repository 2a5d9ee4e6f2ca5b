"""Inference requests and answers as gRPC carries them: bytes to numpy arrays and back. No server, no session, no state.

Raw tensors never pass through the protocol-buffer library: they are views of the message that was received and are written
straight into the one that is sent. What is left for the library is small, or is bounded here before it is parsed: some
messages take forty times their size in memory, and seconds, to parse.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from . import protocol
from .codec import INLINE_BYTES, Tensors
from .grpc_messages import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from .protocol import DTYPES, InferRequest, ProtocolError

# Of a request, all but raw tensors: names, parameters and typed contents. Beyond this, parsing would hold up other requests.
MAX_TYPED = 8 * 2**20
# Tensors, parameters and other fields of a request, all together.
MAX_FIELDS = 4096
# Memory that parsing takes per byte of typed contents, at worst (64-bit integers of one byte each).
PARSED_FACTOR = 16
# Memory that one element of a BYTES tensor takes, in addition to its bytes.
STRING_SIZE = 64
# Elements that are turned into numpy values at a time; between, other threads may run.
CHUNK = 16_384

# Protocol buffers: a field begins with (number << 3 | wire type).
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
INPUTS, OUTPUTS, RAW_INPUTS = 5 << 3 | LENGTH, 6 << 3 | LENGTH, 7 << 3 | LENGTH
RAW_OUTPUTS = bytes([6 << 3 | LENGTH])
STREAMED_ANSWER = bytes([2 << 3 | LENGTH])

# The field of `InferTensorContents` that holds a datatype, and the type of its elements there.
TYPED = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "<i4"),
    "INT16": ("int_contents", "<i4"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u4"),
    "UINT16": ("uint_contents", "<u4"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "BYTES": ("bytes_contents", "O"),
}


def split(message: bytes) -> tuple[bytes, list[memoryview]]:
    """Take the raw tensors out of an encoded `ModelInferRequest`.

    Args:
        message: The encoded message.

    Returns:
        `(rest, raw)`: the message without its raw tensors, and these as views of `message`, in order.

    Raises:
        ProtocolError: The message is damaged (400), or has more fields or typed contents than may be parsed at once (413).
    """
    view, rest, raw = memoryview(message), [], []
    for count, (tag, start, payload, end) in enumerate(_fields(message, 0, len(message))):
        if count >= MAX_FIELDS:
            raise _too_many_fields()
        if tag == RAW_INPUTS:
            raw.append(view[payload:end])
        else:
            rest.append(view[start:end])
    head = b"".join(rest)
    if len(head) > MAX_TYPED:
        size = f"{MAX_TYPED // 2**20} MiB"
        raise ProtocolError(f"the request has more than {size} without its raw tensors; use `raw_input_contents`", 413)
    if len(head) > INLINE_BYTES:
        _check_field_count(head)
    return head, raw


def parsed_size(rest: bytes) -> int:
    """Return the memory that `parse` may take for what `split` has left of a request; 0 for a request that is parsed at once."""
    return PARSED_FACTOR * len(rest) if len(rest) > INLINE_BYTES else 0


def strings_size(message: Any, raw: list[memoryview]) -> int:
    """Return the memory that `decode_request` takes for elements of BYTES tensors; 0 for a request that is decoded at once."""
    size = sum(len(data) for entry, data in zip(message.inputs, raw, strict=False) if entry.datatype == "BYTES")
    if size <= INLINE_BYTES:
        return 0
    # Every element has its length in front, of four bytes; reading stops where there are more elements than the shape has.
    most = sum(math.prod(max(dim, 0) for dim in entry.shape) for entry in message.inputs if entry.datatype == "BYTES")
    return STRING_SIZE * (1 + min(size // 4, most))


def parse(rest: bytes) -> Any:
    """Parse what `split` has left of a request.

    Returns:
        `ModelInferRequest`, without its raw tensors.

    Raises:
        ProtocolError: The message is damaged.
    """
    try:
        return ModelInferRequest.FromString(rest)
    except DecodeError as error:
        raise _damaged() from error


def decode_request(message: Any, raw: list[memoryview]) -> tuple[str, str | None, InferRequest]:
    """Decode an inference request.

    Args:
        message: What `parse` returned.
        raw: The raw tensors that `split` returned.

    Returns:
        `(model name, version or None, request)`. Raw tensors are read-only views of the message that was received.

    Raises:
        ProtocolError: The message is not an inference request.
    """
    if raw and len(raw) != len(message.inputs):
        raise ProtocolError(
            f"`raw_input_contents` has {len(raw)} entries for {len(message.inputs)} inputs; it must have one for each"
        )
    contents = iter(raw or [entry.contents for entry in message.inputs])

    def read(entry: dict[str, Any], datatype: str, shape: tuple[int, ...], label: str) -> np.ndarray:
        if not raw:
            return _typed_values(next(contents), datatype, shape, label)
        if entry["has_contents"]:
            raise ProtocolError(f"{label} has `contents`, but the request has `raw_input_contents`; use one of them")
        return protocol.from_bytes(next(contents), datatype, shape, label)

    form = {
        "id": message.id or None,
        "parameters": _parameters(message.parameters),
        "inputs": [_input_form(entry) for entry in message.inputs],
        "outputs": [{"name": entry.name, "parameters": _parameters(entry.parameters)} for entry in message.outputs] or None,
    }
    return message.model_name, message.model_version or None, protocol.build_request(form, read, binary=True)


def encode_response(
    model_name: str,
    model_version: str,
    tensors: Tensors,
    request_id: str | None = None,
    streamed: bool = False,
    parameters: dict[str, str] | None = None,
) -> bytes:
    """Encode the answer to an inference request.

    Args:
        model_name: Name of the model that answered.
        model_version: Its version.
        tensors: `(name, array, whether the client wants raw bytes)` for every output. All are sent raw unless one is not wanted
            raw.
        request_id: The request's id, which is repeated.
        streamed: Whether the answer is one of a stream: a `ModelStreamInferResponse`.
        parameters: Parameters of the answer.

    Raises:
        ProtocolError: The client does not want the outputs raw, but one is FP16, which has no typed form (400), or they are too
            large for it (413).
    """
    message = ModelInferResponse(model_name=model_name, model_version=model_version, id=request_id or "")
    is_raw = all(binary for _, _, binary in tensors)
    if not is_raw and sum(array.nbytes for _, array, _ in tensors) > MAX_TYPED:
        raise ProtocolError(f"the outputs have more than {MAX_TYPED // 2**20} MiB; ask for binary data", 413)
    raw = []
    for name, array, _ in tensors:
        datatype = protocol.wire_datatype(array)
        entry = message.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if is_raw:
            raw.append(protocol.to_bytes(array))
        else:
            _set_typed(entry.contents, array, datatype, name)
    for name, value in (parameters or {}).items():
        message.parameters[name].string_param = value
    if streamed:
        # Triton's clients of models that answer several times look for the last answer; here each is the only one.
        message.parameters["triton_final_response"].bool_param = True
    parts = [message.SerializeToString()]
    for data in raw:
        parts += [RAW_OUTPUTS, _varint(len(data)), data]
    if streamed:
        parts = [STREAMED_ANSWER, _varint(sum(map(len, parts))), *parts]
    return b"".join(parts)


def encode_stream_error(message: str, request_id: str) -> bytes:
    """Encode what a stream carries in place of an answer."""
    return ModelStreamInferResponse(error_message=message, infer_response=ModelInferResponse(id=request_id)).SerializeToString()


def _damaged() -> ProtocolError:
    return ProtocolError("the message is not a valid ModelInferRequest")


def _too_many_fields() -> ProtocolError:
    return ProtocolError(f"the request has more than {MAX_FIELDS:,} tensors, parameters and other fields", 413)


def _check_field_count(head: bytes) -> None:
    """Count the fields in the request and in its inputs and outputs, of which each takes memory and time when it is parsed."""
    count = 0
    for tag, _, payload, end in _fields(head, 0, len(head)):
        count += 1
        for _ in _fields(head, payload, end) if tag in (INPUTS, OUTPUTS) else ():
            count += 1
            if count > MAX_FIELDS:
                raise _too_many_fields()


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield `(tag, start, start of the payload, end)` of every field of an encoded message."""
    while position < end:
        start = position
        tag, position = _read_varint(data, position, end)
        kind = tag & 7
        if kind == LENGTH:
            size, position = _read_varint(data, position, end)
            stop = position + size
        elif kind == VARINT:
            stop = _read_varint(data, position, end)[1]
        elif kind in (FIXED32, FIXED64):
            stop = position + (4 if kind == FIXED32 else 8)
        else:
            raise _damaged()
        if stop > end:
            raise _damaged()
        yield tag, start, position, stop
        position = stop


def _read_varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """`(value, position after it)`."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise _damaged()


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _parameters(entries: Any) -> dict[str, Any]:
    """A map of parameters as Python values; None for one that is not set."""
    return {
        name: getattr(entry, choice) if (choice := entry.WhichOneof("parameter_choice")) else None
        for name, entry in entries.items()
    }


def _input_form(entry: Any) -> dict[str, Any]:
    return {
        "name": entry.name,
        "datatype": entry.datatype,
        "shape": list(entry.shape),
        "parameters": _parameters(entry.parameters),
        "has_contents": entry.HasField("contents"),
    }


def _typed_values(contents: Any, datatype: str, shape: tuple[int, ...], label: str) -> np.ndarray:
    if datatype == "FP16":
        raise ProtocolError(f"{label} is FP16, which has no typed form; send it in `raw_input_contents`")
    field, kind = TYPED[datatype]
    if wrong := [descriptor.name for descriptor, _ in contents.ListFields() if descriptor.name != field]:
        raise ProtocolError(f"{label} is {datatype}, whose values belong in `{field}`; got `{wrong[0]}`")
    values, count = getattr(contents, field), math.prod(shape)
    if len(values) != count:
        raise ProtocolError(f"{label} takes {count} values in `{field}` (shape {list(shape)}), got {len(values)}")
    array = np.empty(count, kind)
    for start in range(0, count, CHUNK):
        array[start : start + CHUNK] = values[start : start + CHUNK]
    dtype = DTYPES[datatype]
    if dtype.itemsize < array.itemsize and array.size:
        limits = np.iinfo(dtype)  # type: ignore[type-var]
        if array.min() < limits.min or array.max() > limits.max:
            raise ProtocolError(f"{label} holds values beyond {datatype} ({limits.min} to {limits.max})")
    return array.astype(dtype, copy=False).reshape(shape)


def _set_typed(contents: Any, array: np.ndarray, datatype: str, name: str) -> None:
    if datatype == "FP16":
        raise ProtocolError(f"output {name!r} is FP16, which has no typed form; ask for binary data")
    field, flat = getattr(contents, TYPED[datatype][0]), array.ravel()
    for start in range(0, flat.size, CHUNK):
        values = flat[start : start + CHUNK].tolist()
        if datatype == "BYTES":
            values = [value.encode() if isinstance(value, str) else bytes(value) for value in values]
        field.extend(values)
