"""The codec alone: what it writes it reads back, and any bytes give a value or a `ProtocolError`."""

import gzip
import json
import zlib

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from resnet_export.serving import protocol
from resnet_export.serving.protocol import ProtocolError, RequestedOutput, TensorSpec

NUMERIC = [dtype for name, dtype in protocol.DTYPES.items() if name != "BYTES"]
shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)
any_array = st.sampled_from(NUMERIC).flatmap(lambda dtype: hnp.arrays(dtype, shapes))
byte_arrays = hnp.arrays(object, shapes, elements=st.binary(max_size=20))
json_array = st.sampled_from([dtype for dtype in NUMERIC if dtype != np.float16]).flatmap(
    lambda dtype: hnp.arrays(dtype, shapes, elements={"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else None)
)
text_arrays = hnp.arrays(object, shapes, elements=st.text(st.characters(codec="utf-8"), max_size=8).map(str.encode))


def same(a, b):
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes()


def body(message):
    return json.dumps(message).encode()


def tensor(**changes):
    return {"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2]} | changes


@given(st.dictionaries(st.text(min_size=1), st.one_of(any_array, byte_arrays), min_size=1, max_size=3), st.text())
def test_binary_request_comes_back(inputs, identifier):
    data, length = protocol.encode_request(inputs, request_id=identifier)
    request = protocol.decode_request(data, length)
    assert request.id == identifier and request.binary and request.outputs is None
    assert list(request.inputs) == list(inputs)
    assert all(same(request.inputs[name], inputs[name]) for name in inputs)


@given(st.dictionaries(st.text(min_size=1), st.one_of(json_array, text_arrays), min_size=1, max_size=3))
def test_json_request_comes_back(inputs):
    data, length = protocol.encode_request(inputs, [RequestedOutput("y", True, 3), RequestedOutput("z")], binary=False)
    assert length is None
    request = protocol.decode_request(data)
    assert request.outputs == (RequestedOutput("y", True, 3), RequestedOutput("z"))
    assert all(same(request.inputs[name], inputs[name]) for name in inputs)


@given(any_array, json_array, byte_arrays, text_arrays)
def test_mixed_response_comes_back(a, b, c, d):
    outputs = [("a", a, True), ("b", b, False), ("c", c, True), ("d", d, False)]
    response = protocol.decode_response(*protocol.encode_response("m", "3", outputs, "id"))
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "id")
    assert all(same(response.outputs[name], array) for name, array, _ in outputs)


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(0, 200)))
def test_any_bytes_give_a_value_or_a_protocol_error(data, length):
    for decode in (protocol.decode_request, protocol.decode_response):
        try:
            decode(data, length)
        except ProtocolError as error:
            assert str(error)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-(2**80), 2**80), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
parameters = st.dictionaries(st.sampled_from(["binary_data_size", "binary_data", "classification"]), json_values)
entry = st.fixed_dictionaries(
    {},
    optional={
        "name": st.one_of(st.sampled_from(["x", "y"]), json_values),
        "datatype": st.one_of(st.sampled_from(sorted(protocol.DTYPES)), json_values),
        "shape": st.one_of(st.lists(st.integers(-1, 2**64), max_size=4), st.just([2]), json_values),
        "data": st.one_of(st.lists(st.one_of(st.integers(-1, 300), st.floats()), max_size=4), json_values),
        "parameters": st.one_of(parameters, json_values),
    },
)
message = st.fixed_dictionaries(
    {},
    optional={
        "id": json_values,
        "model_name": json_values,
        "model_version": json_values,
        "parameters": st.one_of(st.dictionaries(st.sampled_from(["timeout", "binary_data_output"]), json_values), json_values),
        "inputs": st.one_of(st.lists(entry, max_size=3), json_values),
        "outputs": st.one_of(st.lists(entry, max_size=3), json_values),
    },
)


@settings(max_examples=400)
@given(message, st.binary(max_size=16))
def test_any_json_gives_a_value_or_a_protocol_error(value, tail):
    head = json.dumps(value).encode()
    for decode in (protocol.decode_request, protocol.decode_response):
        try:
            decode(head + tail, len(head))
        except ProtocolError as error:
            assert str(error)


@given(st.binary(max_size=2000), st.sampled_from(["gzip", "deflate"]))
def test_compression_comes_back_and_any_bytes_are_survived(data, encoding):
    packed = protocol.compress([data], encoding)
    assert protocol.decompress(packed, encoding, 2000) == data
    assert (gzip.decompress(packed) if encoding == "gzip" else zlib.decompress(packed)) == data
    for damaged in (data, packed[:-1], packed + b"x"):
        try:
            protocol.decompress(damaged, encoding, 2000)
        except ProtocolError as error:
            assert error.status in (400, 413)


def test_decompression_stops_at_the_limit():
    bomb = gzip.compress(bytes(50_000_000))
    with pytest.raises(ProtocolError, match="more than 1,000 bytes") as caught:
        protocol.decompress(bomb, "gzip", 1000)
    assert caught.value.status == 413
    with pytest.raises(ProtocolError, match="must be gzip or deflate, got 'br'") as caught:
        protocol.decompress(b"", "br", 10)
    assert caught.value.status == 415
    assert protocol.decompress(b"abc", "identity", 1) == b"abc"


@pytest.mark.parametrize(
    "entry, text",
    [
        (tensor(name=""), "must have a `name`"),
        (tensor(datatype="FP8"), "`datatype` of input 'x' must be one of"),
        (tensor(shape=[2, -1]), "a dimension of input 'x' must be a whole number"),
        (tensor(shape=[True, 2]), "a dimension of input 'x' must be a whole number"),
        (tensor(shape=[3]), r"has shape \[2\]; it must be \[3\], or flat with 3 values"),
        (tensor(shape=[2, 3], data=[[1, 2], [3, 4], [5, 6]]), r"has shape \[3, 2\]; it must be \[2, 3\]"),
        (tensor(shape=[2**33, 2**33]), "stands for more than"),
        (tensor(shape=[0, 2**62, 2**62], data=[]), "stands for more than"),
        (tensor(shape=[10**4000] * 32), "stands for more than"),
        (tensor(data=[[1], [2, 3]]), "is ragged"),
        (tensor(data=[1e39, 1]), "beyond FP32"),
        (tensor(data=["1", "2"]), "not FP32"),
        (tensor(datatype="UINT8", data=[256, 1]), r"beyond UINT8 \(0 to 255\)"),
        (tensor(datatype="UINT8", data=[-1, 1]), r"beyond UINT8 \(0 to 255\)"),
        (tensor(datatype="INT32", data=[1.5, 1]), "not INT32"),
        (tensor(datatype="BOOL", data=[1, 0]), "not BOOL"),
        (tensor(datatype="UINT64", data=[2**64, 0]), "not UINT64"),
        (tensor(datatype="UINT64", data=[-1, 0]), "not UINT64"),
        (tensor(datatype="FP16"), "FP16, which has no JSON form"),
        (tensor(datatype="BYTES", data=["a", 1]), "not strings"),
        (tensor(datatype="BYTES", data=["a", "\ud800"]), "not valid Unicode"),
        (tensor(data=None), "must have `data`, an array"),
        (tensor(parameters={"binary_data_size": 8}), "both `data` and `binary_data_size`"),
    ],
)
def test_wrong_tensor_is_named(entry, text):
    with pytest.raises(ProtocolError, match=text) as caught:
        protocol.decode_request(body({"inputs": [entry]}))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "data, length, text",
    [
        (b"{", None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b"\xff", None, "not valid JSON"),
        (b"[]", None, "must be a JSON object, got an array"),
        (b"{}", None, "`inputs` must be an array of objects"),
        (body({"inputs": []}), None, "at least one tensor"),
        (body({"inputs": [tensor(), tensor()]}), None, "input 'x' is given twice"),
        (body({"inputs": [tensor(parameters={"shared_memory_region": "r"})]}), None, "input 'x' is in shared memory"),
        (
            body({"inputs": [tensor()], "outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]}),
            None,
            "output 'y' is in shared memory",
        ),
        (body({"inputs": [tensor()], "id": 1}), None, "`id` must be a string, got a number"),
        (body({"inputs": [tensor()], "outputs": {}}), None, "`outputs` must be an array"),
        (body({"inputs": [tensor()], "outputs": [{"name": "y"}] * 2}), None, "output 'y' is given twice"),
        (body({"inputs": [tensor()], "parameters": {"timeout": -1}}), None, "`timeout`"),
        (body({"inputs": [tensor()], "parameters": {"binary_data_output": 1}}), None, "must be true or false"),
        (b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}', None, "NaN is not JSON"),
        (body({"inputs": [tensor()]}) + b"xyz", len(body({"inputs": [tensor()]})), "3 bytes are left"),
    ],
)
def test_wrong_request_is_named(data, length, text):
    with pytest.raises(ProtocolError, match=text):
        protocol.decode_request(data, length)


def test_binary_sizes_are_checked():
    def request(size, tail, datatype="FP32", shape=(2,)):
        head = body({"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}]})
        return protocol.decode_request(head + tail, len(head)).inputs["x"]

    assert request(8, np.array([1, 2], "<f4").tobytes()).tolist() == [1, 2]
    assert request(2, b"\x02\x00", "BOOL").tolist() == [True, False]
    with pytest.raises(ProtocolError, match=r"takes 8 bytes \(FP32, shape \[2\]\), got 4"):
        request(4, bytes(4))
    with pytest.raises(ProtocolError, match="`binary_data_size` 8, but only 7 bytes are left"):
        request(8, bytes(7))
    with pytest.raises(ProtocolError, match="element 0 of the BYTES data is cut short"):
        request(4, b"\x05\0\0\0", "BYTES")
    with pytest.raises(ProtocolError, match="takes 2 BYTES elements, got 1"):
        request(4, b"\0\0\0\0", "BYTES")


def test_header_length():
    assert protocol.header_length(None, 5) is None
    assert protocol.header_length("5", 5) == 5
    for value in ("6", "-1", "1.0", "٣", "", "9" * 400, "0x1"):
        with pytest.raises(ProtocolError, match=protocol.HEADER_LENGTH):
            protocol.header_length(value, 5)


def test_raw_binary_request_is_one_row():
    pixels = np.arange(12, dtype="u1")
    request = protocol.decode_raw_request(pixels.tobytes(), TensorSpec("images", "UINT8", (-1, 2, 2, 3)))
    assert np.array_equal(request.inputs["images"], pixels.reshape(1, 2, 2, 3)) and request.binary
    with pytest.raises(ProtocolError, match="takes 12 bytes"):
        protocol.decode_raw_request(bytes(11), TensorSpec("images", "UINT8", (-1, 2, 2, 3)))
    with pytest.raises(ProtocolError, match="needs an input of fixed size"):
        protocol.decode_raw_request(bytes(12), TensorSpec("images", "UINT8", (-1, -1, 2, 3)))
    assert protocol.decode_raw_request(b"ab", TensorSpec("text", "BYTES", (-1, 1))).inputs["text"].tolist() == [[b"ab"]]


def test_what_json_cannot_express_is_refused():
    for array, text in (
        (np.array([1], "f2"), "FP16"),
        (np.array([np.nan], "f4"), "NaN or infinity"),
        (np.array([b"\xff"], object), "not UTF-8"),
    ):
        with pytest.raises(ProtocolError, match=text):
            protocol.encode_response("m", "1", [("y", array, False)])
    with pytest.raises(ProtocolError, match="no datatype for numpy's complex64") as caught:
        protocol.encode_response("m", "1", [("y", np.array([1j], "c8"), True)])
    assert caught.value.status == 501


def test_classification_orders_scores_and_keeps_ties_in_order():
    scores = np.array([[0.5, 2.0, 0.5], [np.nan, -1.0, 3.0]], "f4")
    named = protocol.classify(scores, 2, ["a", "b", "c"])
    assert named.tolist() == [[b"2.000000:1:b", b"0.500000:0:a"], [b"3.000000:2:c", b"-1.000000:1:b"]]
    assert protocol.classify(scores, 9)[1].tolist() == [b"3.000000:2", b"-1.000000:1", b"nan:0"]
    assert protocol.classify(scores[0], 1, batched=False).tolist() == [b"2.000000:1"]


def test_timeout_is_in_microseconds():
    request = protocol.decode_request(body({"inputs": [tensor()], "parameters": {"timeout": 250_000}}))
    assert request.timeout == 0.25
    assert protocol.decode_request(body({"inputs": [tensor()]})).timeout is None
