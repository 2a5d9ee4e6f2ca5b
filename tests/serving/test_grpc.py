"""gRPC: the codec by itself, and a server in this process with good, bad and hostile clients."""

import itertools
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from urllib.request import urlopen

import numpy as np
import pytest

grpc = pytest.importorskip("grpc", reason="needs the extra `grpc`")
for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason="needs the extra `serve`")
from grpc_running import PREFACE, SETTINGS, Client, GrpcRunner, answer_pings, connected, data_frames, frame, grpc_running, opening
from hypothesis import given, settings
from hypothesis import strategies as st
from running import self_signed, serving
from tiny_models import LABELS, classifier, classifier_logits, doubler, identity

from resnet_export.cli import main
from resnet_export.errors import UsageError
from resnet_export.runtime.sessions import Session
from resnet_export.serving import grpc_codec as codec
from resnet_export.serving import grpc_messages as messages
from resnet_export.serving.protocol import DTYPES, ProtocolError, to_bytes, wire_datatype

Request = messages.ModelInferRequest
CODE = grpc.StatusCode
TYPED = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    **{"INT64": "int64_contents", "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents"},
    "BYTES": "bytes_contents",
}


def request(model, inputs, raw=True, outputs=(), version="", **parameters):
    """A `ModelInferRequest` with `{name: array}`; `outputs` are `(name, {parameter: value})`."""
    message = Request(model_name=model, model_version=version, id="abc")
    for name, array in inputs.items():
        array = np.asarray(array)
        datatype = wire_datatype(array)
        entry = message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if raw:
            message.raw_input_contents.append(bytes(to_bytes(array)))
        else:
            getattr(entry.contents, TYPED[datatype]).extend(array.ravel().tolist())
    for name, values in outputs:
        set_parameters(message.outputs.add(name=name).parameters, values)
    set_parameters(message.parameters, parameters)
    return message


def set_parameters(target, values):
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in values.items():
        setattr(target[name], kinds[type(value)], value)


def outputs_of(answer):
    """`{name: array}` of a `ModelInferResponse`, raw or typed."""
    found = {}
    for index, entry in enumerate(answer.outputs):
        if entry.datatype == "BYTES":
            values = list(entry.contents.bytes_contents)
            data = answer.raw_output_contents[index] if answer.raw_output_contents else b""
            while data:
                size = int.from_bytes(data[:4], "little")
                values.append(data[4 : 4 + size])
                data = data[4 + size :]
            array = np.array(values, dtype=object)
        elif answer.raw_output_contents:
            array = np.frombuffer(answer.raw_output_contents[index], DTYPES[entry.datatype])
        else:
            array = np.array(getattr(entry.contents, TYPED[entry.datatype]), DTYPES[entry.datatype])
        found[entry.name] = array.reshape(tuple(entry.shape))
    return found


def assert_refused(call, code, text=""):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() == code and text in caught.value.details(), (caught.value.code(), caught.value.details())
    return caught.value


@pytest.fixture(scope="module")
def running(models):
    with grpc_running(models, options={"max_body": 2**20}) as server:
        yield server


@pytest.fixture(scope="module")
def client(running):
    with Client(running.address) as client:
        yield client


@pytest.fixture
def blocked(monkeypatch):
    """Models wait until the event is set; `blocked.entered` says that one does."""
    release, run = threading.Event(), Session.run
    release.entered = threading.Event()

    def waiting(self, inputs):
        release.entered.set()
        assert release.wait(20)
        return run(self, inputs)

    yield lambda: (monkeypatch.setattr(Session, "run", waiting), release)[1]
    release.set()


# The codec.


def decoded(message):
    rest, raw = codec.split(message)
    return codec.decode_request(codec.parse(rest), raw)


def example(draw_raw=True):
    inputs = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.array([[b"x", b"yz"]], dtype=object)}
    return request("net", inputs, draw_raw, [("c", {"classification": 2})], "7", priority=3, text="t", part=0.5, flag=True)


@pytest.mark.parametrize("raw", [False, True])
def test_a_request_is_decoded(raw):
    message = example(raw).SerializeToString()
    name, version, asked = decoded(message)
    assert (name, version, asked.id) == ("net", "7", "abc")
    assert asked.parameters == {"priority": 3, "text": "t", "part": 0.5, "flag": True}
    assert np.array_equal(asked.inputs["a"], np.arange(6, dtype="f4").reshape(2, 3)) and asked.inputs["a"].dtype == np.float32
    assert asked.inputs["b"].tolist() == [[b"x", b"yz"]]
    (output,) = asked.outputs
    assert (output.name, output.binary, output.classes) == ("c", True, 2)


def test_raw_tensors_are_views_of_the_message():
    message = request("net", {"x": np.zeros(1000)}).SerializeToString()
    array = decoded(message)[2].inputs["x"]
    assert np.shares_memory(array, np.frombuffer(message, "u1"))


@given(st.data())
def test_splitting_changes_nothing(data):
    """Whatever the message: parsing what `split` returns gives what parsing the message gives."""
    blobs = st.binary(max_size=300)
    message = Request(model_name=data.draw(st.text(max_size=9)), id=data.draw(st.text(max_size=200)))
    for name in data.draw(st.lists(st.text(max_size=3), max_size=4)):
        entry = message.inputs.add(name=name, shape=data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)))
        entry.contents.bytes_contents.extend(data.draw(st.lists(blobs, max_size=3)))
    message.raw_input_contents.extend(data.draw(st.lists(blobs, max_size=4)))
    rest, raw = codec.split(message.SerializeToString())
    found = Request.FromString(rest)
    found.raw_input_contents.extend(map(bytes, raw))
    assert found == message


@settings(max_examples=400)
@given(st.data())
def test_damaged_requests_are_refused_and_nothing_else_happens(data):
    """Bytes that are changed, lost or made up: a request, or one clear refusal."""
    message = bytearray(example(data.draw(st.booleans())).SerializeToString())
    if data.draw(st.booleans()):
        message = bytearray(data.draw(st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 4)) if message else 0):
        position = data.draw(st.integers(0, len(message) - 1))
        message[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not message:
            break
    try:
        name, version, asked = decoded(bytes(message))
    except ProtocolError as error:
        assert error.status in (400, 413) and str(error)
    else:
        assert isinstance(name, str) and asked.inputs


def nested(tag, payload):
    return bytes([tag << 3 | 2]) + codec._varint(len(payload)) + payload


HOSTILE = {
    "empty inputs": (b"\x2a\x00" * 2**21, "fields"),
    "raw tensors without bytes": (b"\x3a\x00" * 2**21, "fields"),
    "parameters of one input": (nested(5, b"\x22\x00" * 2**21), "fields"),
    "parameters of one output": (nested(6, b"\x12\x00" * 2**21), "fields"),
    "unknown numbers": (b"\xc8\x3e\x01" * 2**21, "fields"),
    "typed contents": (nested(5, nested(5, nested(1, b"\1" * (8 * 2**20 + 1)))), "raw_input_contents"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_would_swell_when_parsed_is_not_parsed(kind, monkeypatch):
    message, text = HOSTILE[kind]
    monkeypatch.setattr(codec, "ModelInferRequest", None)
    with pytest.raises(ProtocolError, match=text) as caught:
        decoded(message)
    assert caught.value.status == 413


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("binary", [False, True])
def test_answers_are_what_the_library_would_write(binary, streamed):
    arrays = {
        "a": np.array([[1.5, np.nan], [np.inf, -0.0]], "f4"),
        "b": np.array(["ü", b"\xff"], dtype=object),
        "c": np.array([True]),
    }
    encoded = codec.encode_response("net", "2", [(n, a, binary) for n, a in arrays.items()], "i", streamed)
    answer = messages.ModelStreamInferResponse.FromString(encoded).infer_response if streamed else None
    answer = answer or messages.ModelInferResponse.FromString(encoded)
    assert (answer.model_name, answer.model_version, answer.id) == ("net", "2", "i")
    assert bool(answer.raw_output_contents) == binary and len(answer.outputs) == 3
    found = outputs_of(answer)
    assert found["a"].tobytes() == arrays["a"].tobytes() and found["c"].tolist() == [True]
    assert found["b"].tolist() == ["ü".encode(), b"\xff"]


def test_typed_answers_are_bounded():
    with pytest.raises(ProtocolError, match="ask for binary") as caught:
        codec.encode_response("net", "1", [("y", np.zeros(2**20 + 1), False)])
    assert caught.value.status == 413
    assert len(codec.encode_response("net", "1", [("y", np.zeros(2**20 + 1), True)])) > 2**23


def test_fp16_has_no_typed_form():
    with pytest.raises(ProtocolError, match="FP16"):
        codec.encode_response("net", "1", [("y", np.zeros(1, "f2"), False)])
    message = Request(model_name="net")
    message.inputs.add(name="x", datatype="FP16", shape=[1])
    with pytest.raises(ProtocolError, match="raw_input_contents"):
        decoded(message.SerializeToString())


def test_messages_of_tritonclient_are_read():
    """Bytes that tritonclient wrote, with something in every field, so that the numbers in our tables have to be right."""
    asked = Request.FromString(
        bytes.fromhex(
            "0a016d1201321a016922070a0161120208012a670a01781204465033321a0b01ffffffffffffffffff0122100a0162120b10ffffffffffffffffff01"
            "2a3d0a0101120afeffffffffffffffff011a0afdffffffffffffffff012201042a0affffffffffffffffff0132040000003f3a08000000000000d03f"
            "42017a320d0a017912080a016312031a01733a03726177"
        )
    )
    expected = Request(model_name="m", model_version="2", id="i", raw_input_contents=[b"raw"])
    expected.parameters["a"].bool_param = True
    entry = expected.inputs.add(name="x", datatype="FP32", shape=[1, -1])
    entry.parameters["b"].int64_param = -1
    values = {"bool": True, "int": -2, "int64": -3, "uint": 4, "uint64": 2**64 - 1, "fp32": 0.5, "fp64": 0.25, "bytes": b"z"}
    for name, value in values.items():
        getattr(entry.contents, f"{name}_contents").append(value)
    expected.outputs.add(name="y").parameters["c"].string_param = "s"
    assert asked == expected
    answer = messages.ModelStreamInferResponse.FromString(
        bytes.fromhex(
            "0a016512330a016d1201321a0169220e0a0164120921000000000000f83f2a150a01791204424f4f4c1a010122070a016512022807320172"
        )
    )
    expected = messages.ModelInferResponse(model_name="m", model_version="2", id="i", raw_output_contents=[b"r"])
    expected.parameters["d"].double_param = 1.5
    expected.outputs.add(name="y", datatype="BOOL", shape=[1]).parameters["e"].uint64_param = 7
    assert answer == messages.ModelStreamInferResponse(error_message="e", infer_response=expected)


# Questions about the server and its models.


def test_health_metadata_and_configuration(client):
    assert client("ServerLive").live and client("ServerReady").ready
    assert client("/grpc.health.v1.Health/Check").status == 1
    named = messages.METHODS["/grpc.health.v1.Health/Check"].request(service="other")
    assert_refused(lambda: client("/grpc.health.v1.Health/Check", named), CODE.NOT_FOUND, "other")
    found = client("ServerMetadata")
    assert found.version == "9.9" and {"classification", "statistics"} <= set(found.extensions)
    for asked, ready in (
        (("tiny", ""), True),
        (("tiny", "1"), True),
        (("tiny", "2"), False),
        (("none", ""), False),
        (("", "x"), False),
    ):
        message = of("ModelReady", name=asked[0], version=asked[1])
        assert client("ModelReady", message).ready == ready
    found = client("ModelMetadata", of("ModelMetadata", name="echo"))
    assert [(entry.name, entry.datatype, list(entry.shape)) for entry in found.inputs] == [
        ("a", "BYTES", [-1, 2]),
        ("b", "FP32", [-1, -1]),
    ]
    assert (
        list(found.versions) == ["1"]
        and found.platform == "onnxruntime_onnx"
        and [entry.name for entry in found.outputs] == ["c", "d"]
    )
    config = client("ModelConfig", of("ModelConfig", name="bytes")).config
    assert config.max_batch_size == 4 and list(config.input[0].dims) == [8, 8, 3]
    assert config.input[0].data_type == 2 and config.WhichOneof("scheduling_choice") == "dynamic_batching"
    for method in ("ModelMetadata", "ModelConfig", "ModelStatistics"):
        assert_refused(lambda method=method: client(method, of(method, name="none")), CODE.NOT_FOUND, "no model 'none'")
        assert_refused(
            lambda method=method: client(method, of(method, name="tiny", version="7")), CODE.NOT_FOUND, "no version '7'"
        )


def of(method, **fields):
    return messages.METHODS[f"/{messages.TRITON_SERVICE}/{method}"].request(**fields)


def test_statistics_count_grpc_requests(client, pixels):
    def counted():
        return client("ModelStatistics", of("ModelStatistics", name="bytes")).model_stats[0]

    before = counted()
    client("ModelInfer", request("bytes", {"images": pixels}))
    assert_refused(lambda: client("ModelInfer", request("bytes", {"images": pixels.astype("f4")})), CODE.INVALID_ARGUMENT)
    after = counted()
    assert after.inference_count - before.inference_count == len(pixels)
    assert after.inference_stats.success.count - before.inference_stats.success.count == 1
    assert after.batch_stats and after.last_inference
    assert {entry.name for entry in client("ModelStatistics").model_stats} >= {"tiny", "bytes", "echo"}


def test_calls_are_counted_and_logged(running, client, pixels, caplog):
    def counted(**labels):
        labels = {"grpc_type": "unary", "grpc_service": messages.TRITON_SERVICE, "grpc_method": "ModelInfer"} | labels
        return running.service.requests.registry.get_sample_value("grpc_server_handled_total", labels) or 0

    good = {"grpc_code": "OK", "reason": "ok"}
    missing = {"grpc_code": "NOT_FOUND", "reason": "not_found"}
    before = counted(**good), counted(**missing)
    with caplog.at_level("INFO", "resnet_export.access"):
        client("ModelInfer", request("bytes", {"images": pixels}))
        assert_refused(lambda: client("ModelInfer", request("none", {"images": pixels})), CODE.NOT_FOUND)
        running.eventually(lambda: len(caplog.records) == 2)
    assert (counted(**good), counted(**missing)) == (before[0] + 1, before[1] + 1)
    lines = [record.getMessage() for record in caplog.records]
    path = f"/{messages.TRITON_SERVICE}/ModelInfer"
    assert f'"gRPC {path}" OK ok' in lines[0] and f'"gRPC {path}" NOT_FOUND not_found' in lines[1], lines
    assert lines[0].startswith("ipv4:127.0.0.1:") and caplog.records[0].fields["bytes_sent"] > 120


def test_what_triton_has_and_this_server_has_not(client):
    for method in ("SystemSharedMemoryStatus", "TraceSetting", "LogSettings", "Nonsense", "/other.Service/Method"):
        assert_refused(lambda method=method: client.start(method).result(), CODE.UNIMPLEMENTED, "no such method")


# Inference.


@pytest.mark.parametrize("typed_in", [False, True])
@pytest.mark.parametrize("typed_out", [False, True])
def test_infer(client, pixels, typed_in, typed_out):
    wanted = {"binary_data_output": False} if typed_out else {}
    answer = client("ModelInfer", request("bytes", {"images": pixels}, raw=not typed_in, **wanted))
    assert (answer.model_name, answer.model_version, answer.id) == ("bytes", "1", "abc")
    assert bool(answer.raw_output_contents) != typed_out
    (found,) = outputs_of(answer).values()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, classifier_logits(pixels), rtol=1e-5, atol=1e-6)


def values_of(datatype):
    dtype = DTYPES[datatype]
    if datatype == "BOOL":
        return np.array([[True, False, True, True], [False, False, True, False]])
    if datatype == "BYTES":
        return np.array([[b"", b"a"], ["ü".encode(), b"long" * 100]], dtype=object)
    if dtype.kind == "f":
        limits = np.finfo(dtype)
        return np.array([[0.1, -0.0, np.inf, limits.max], [np.nan, limits.tiny, limits.min, 1]], dtype)
    limits = np.iinfo(dtype)
    return np.array([[0, 1, 2, 3], [limits.max, limits.min, limits.max - 1, 1]], dtype)


@pytest.fixture(scope="module")
def identities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identities")
    paths = {name: identity(folder / f"{name}.onnx", dtype.name) for name, dtype in DTYPES.items() if dtype.kind != "O"}
    with grpc_running(paths) as server, Client(server.address) as client:
        yield client


@pytest.mark.parametrize("datatype", [name for name in DTYPES if name != "BYTES"])
def test_every_datatype_raw_and_typed(identities, datatype):
    array = values_of(datatype)
    for typed_in, typed_out in itertools.product((False, True), repeat=2):
        if datatype == "FP16" and (typed_in or typed_out):
            continue
        asked = request(datatype, {"x": array}, not typed_in, outputs=[("n", {}), ("y", {})], binary_data_output=not typed_out)
        answer = identities("ModelInfer", asked)
        assert [entry.name for entry in answer.outputs] == ["n", "y"] and {entry.datatype for entry in answer.outputs} == {
            datatype
        }
        found = outputs_of(answer)
        assert found["y"].tobytes() == array.tobytes() and found["n"].tobytes() == array[:, :1].tobytes()


@pytest.mark.parametrize("typed", [False, True])
def test_bytes(client, typed):
    array = values_of("BYTES")
    inputs = {"a": array, "b": np.ones((2, 3), "f4")}
    found = outputs_of(client("ModelInfer", request("echo", inputs, not typed, binary_data_output=not typed)))
    assert found["c"].tolist() == array.tolist() and found["d"].tolist() == [[1] * 3] * 2


def test_classification(client, pixels):
    asked = request("bytes", {"images": pixels}, outputs=[("logits", {"classification": 2})])
    found = outputs_of(client("ModelInfer", asked))["logits"]
    assert found.shape == (len(pixels), 2)
    for row, scores in zip(found, classifier_logits(pixels), strict=True):
        for text, index in zip(row, np.argsort(-scores), strict=False):
            value, number, label = text.decode().split(":", 2)
            assert int(number) == index and label == LABELS[index] and abs(float(value) - scores[index]) < 1e-5


def test_requests_at_once_share_batches(client, running, pixels):
    statistics = running.service.find("bytes").statistics
    before = statistics.executions
    calls = [client.start("ModelInfer", request("bytes", {"images": pixels[i % 6 : i % 6 + 1]})) for i in range(48)]
    for index, call in enumerate(calls):
        found = outputs_of(messages.ModelInferResponse.FromString(call.result()))["logits"]
        np.testing.assert_allclose(found[0], classifier_logits(pixels[index % 6 : index % 6 + 1])[0], rtol=1e-5, atol=1e-6)
    assert statistics.executions - before < 48


def changed(change):
    """A good request for `tiny` with something changed."""
    message = request("tiny", {"images": np.ones((1, 8, 8, 3), "f4")})
    change(message)
    return message


def clear_raw(message, **contents):
    message.ClearField("raw_input_contents")
    for name, values in contents.items():
        getattr(message.inputs[0].contents, name).extend(values)


BAD = {
    "no model": (lambda m: m.ClearField("model_name"), CODE.NOT_FOUND, "no model ''"),
    "unknown model": (lambda m: setattr(m, "model_name", "x" * 5000), CODE.NOT_FOUND, "no model"),
    "name beyond ASCII": (lambda m: setattr(m, "model_name", "grün\n"), CODE.NOT_FOUND, r"no model 'grün\n'"),
    "unknown version": (lambda m: setattr(m, "model_version", "2"), CODE.NOT_FOUND, "no version '2'"),
    "no input": (lambda m: (m.ClearField("inputs"), clear_raw(m)), CODE.INVALID_ARGUMENT, "at least one tensor"),
    "input without a name": (lambda m: m.inputs[0].ClearField("name"), CODE.INVALID_ARGUMENT, "name"),
    "other name": (lambda m: setattr(m.inputs[0], "name", "pictures"), CODE.INVALID_ARGUMENT, "got pictures"),
    "input twice": (lambda m: (m.inputs.append(m.inputs[0]), m.raw_input_contents.append(b"")), CODE.INVALID_ARGUMENT, "twice"),
    "no datatype": (lambda m: m.inputs[0].ClearField("datatype"), CODE.INVALID_ARGUMENT, "datatype"),
    "unknown datatype": (lambda m: setattr(m.inputs[0], "datatype", "BF16"), CODE.INVALID_ARGUMENT, "'BF16'"),
    "other datatype": (lambda m: setattr(m.inputs[0], "datatype", "INT32"), CODE.INVALID_ARGUMENT, "must be FP32"),
    "other shape": (lambda m: m.inputs[0].shape.__setitem__(1, 4), CODE.INVALID_ARGUMENT, "takes 384 bytes"),
    "negative dimension": (lambda m: m.inputs[0].shape.__setitem__(0, -1), CODE.INVALID_ARGUMENT, "at least 0"),
    "huge dimension": (lambda m: m.inputs[0].shape.__setitem__(0, 2**62), CODE.INVALID_ARGUMENT, "elements"),
    "many dimensions": (lambda m: m.inputs[0].shape.extend([1] * 60), CODE.INVALID_ARGUMENT, "at most 32"),
    "no rows": (
        lambda m: (m.inputs[0].shape.__setitem__(0, 0), m.raw_input_contents.__setitem__(0, b"")),
        CODE.INVALID_ARGUMENT,
        "",
    ),
    "short": (lambda m: m.raw_input_contents.__setitem__(0, b"abc"), CODE.INVALID_ARGUMENT, "got 3"),
    "one tensor too many": (lambda m: m.raw_input_contents.append(b""), CODE.INVALID_ARGUMENT, "2 entries for 1 inputs"),
    "raw and typed": (lambda m: m.inputs[0].contents.fp32_contents.append(1), CODE.INVALID_ARGUMENT, "use one of them"),
    "no data": (clear_raw, CODE.INVALID_ARGUMENT, "192 values in `fp32_contents`"),
    "too few values": (lambda m: clear_raw(m, fp32_contents=[1.0]), CODE.INVALID_ARGUMENT, "got 1"),
    "wrong field": (lambda m: clear_raw(m, fp64_contents=[1.0] * 192), CODE.INVALID_ARGUMENT, "got `fp64_contents`"),
    "unknown output": (lambda m: m.outputs.add(name="z"), CODE.INVALID_ARGUMENT, "no output 'z'"),
    "output twice": (lambda m: [m.outputs.add(name="logits") for _ in "12"], CODE.INVALID_ARGUMENT, "twice"),
    "classes": (
        lambda m: set_parameters(m.outputs.add(name="logits").parameters, {"classification": "two"}),
        CODE.INVALID_ARGUMENT,
        "classification",
    ),
    "shared memory": (
        lambda m: set_parameters(m.inputs[0].parameters, {"shared_memory_region": "r"}),
        CODE.INVALID_ARGUMENT,
        "shared memory",
    ),
    "negative timeout": (lambda m: set_parameters(m.parameters, {"timeout": -1}), CODE.INVALID_ARGUMENT, "timeout"),
    "timeout as a string": (lambda m: set_parameters(m.parameters, {"timeout": "1"}), CODE.INVALID_ARGUMENT, "timeout"),
    "rows": (
        lambda m: (m.inputs[0].shape.__setitem__(0, 300), m.raw_input_contents.__setitem__(0, bytes(300 * 768))),
        CODE.RESOURCE_EXHAUSTED,
        "256 rows",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests(client, kind, caplog):
    change, code, text = BAD[kind]
    assert_refused(lambda: client("ModelInfer", changed(change)), code, text)
    (answer,) = client.stream([changed(change)])
    assert text in answer.error_message and answer.error_message and answer.infer_response.id == "abc"
    assert not caplog.records


@pytest.mark.parametrize("datatype, value", [("INT8", 128), ("INT16", -32769), ("UINT8", 256), ("UINT16", 65536)])
def test_typed_values_beyond_their_datatype(client, datatype, value):
    message = Request(model_name="tiny")
    entry = message.inputs.add(name="images", datatype=datatype, shape=[1])
    getattr(entry.contents, TYPED[datatype]).append(value)
    assert_refused(lambda: client("ModelInfer", message), CODE.INVALID_ARGUMENT, f"beyond {datatype}")


@pytest.mark.parametrize("method", [*messages.TRITON_METHODS, "ModelStreamInfer"])
def test_bytes_that_are_no_message(client, method, caplog):
    if method in ("ServerLive", "ServerReady", "ServerMetadata"):
        data = b"\xff"
    else:
        data = b"\x0a\x05abc"
    if method == "ModelStreamInfer":
        (answer,) = client.channel.stream_stream(messages.STREAM_METHOD)(iter([data]))
        assert "not a valid" in messages.ModelStreamInferResponse.FromString(answer).error_message
    else:
        assert_refused(lambda: client(method, data), CODE.INVALID_ARGUMENT, "not a valid")
    assert not caplog.records


def test_messages_that_are_too_large(client):
    assert_refused(lambda: client("ModelInfer", bytes(2**20 + 1)), CODE.RESOURCE_EXHAUSTED, "larger than max")
    assert_refused(lambda: client("ModelMetadata", b"\x0a" + bytes(2**17)), CODE.RESOURCE_EXHAUSTED, "at most 65,536")
    assert_refused(
        lambda: client("ModelInfer", bytes(50 * 2**20), compression=grpc.Compression.Gzip),
        CODE.RESOURCE_EXHAUSTED,
        "larger than max",
    )
    assert client("ServerLive").live


def test_compressed_requests(client, pixels):
    for packing in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        answer = client("ModelInfer", request("bytes", {"images": pixels}), compression=packing)
        np.testing.assert_allclose(outputs_of(answer)["logits"], classifier_logits(pixels), rtol=1e-5, atol=1e-6)


def test_a_call_without_a_message(client):
    call = client.channel.stream_unary(f"/{messages.TRITON_SERVICE}/ModelInfer")
    assert_refused(lambda: call(iter([])), CODE.INVALID_ARGUMENT, "no request message")


def test_a_failing_model(client, monkeypatch, caplog):
    def fail(self, inputs):
        raise RuntimeError("out of order\nsecond line")

    monkeypatch.setattr(Session, "run", fail)
    good = changed(lambda m: None)
    assert_refused(lambda: client("ModelInfer", good), CODE.INTERNAL, "'tiny' failed")
    (answer,) = client.stream([good])
    assert "'tiny' failed" in answer.error_message


def test_an_internal_error_is_named_but_not_shown(client, running, monkeypatch, caplog):
    def fail(*arguments):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(running.service, "find", fail)
    good = changed(lambda m: None)
    caught = assert_refused(lambda: client("ModelInfer", good), CODE.INTERNAL, "internal error (ZeroDivisionError)")
    assert "secret" not in caught.details()
    (answer,) = client.stream([good])
    assert answer.error_message == "internal error (ZeroDivisionError)"
    assert "secret" in caplog.text


# Streams.


def test_a_stream_answers_in_order_and_survives_errors(client, pixels):
    rows = [pixels[i % 6 : i % 6 + 1 + i % 2] for i in range(40)]
    asked = [request("bytes" if i % 7 else "none", {"images": row}) for i, row in enumerate(rows)]
    for index, message in enumerate(asked):
        message.id = str(index)
    answers = list(client.stream(asked))
    assert [answer.infer_response.id for answer in answers] == [str(index) for index in range(40)]
    for index, (answer, row) in enumerate(zip(answers, rows, strict=True)):
        assert bool(answer.error_message) == (index % 7 == 0)
        if index % 7:
            assert answer.infer_response.parameters["triton_final_response"].bool_param
            found = outputs_of(answer.infer_response)["logits"]
            np.testing.assert_allclose(found, classifier_logits(row), rtol=1e-5, atol=1e-6)


def test_a_stream_can_end_with_the_status_of_its_first_error(client, pixels):
    asked = [request(name, {"images": pixels[:1]}) for name in ("bytes", "none", "bytes")]
    answers = client.stream(asked, metadata=(("triton_grpc_error", "true"),))
    assert next(answers).infer_response.outputs
    assert_refused(lambda: next(answers), CODE.NOT_FOUND, "no model 'none'")


def test_a_cancelled_stream_takes_its_requests_along(running, client, blocked, pixels):
    release = blocked()
    answers = client.channel.stream_stream(messages.STREAM_METHOD)(
        request("bytes", {"images": pixels}).SerializeToString() for _ in range(20)
    )
    running.eventually(lambda: running.service.find("bytes").batcher.waiting >= 40)
    answers.cancel()
    running.eventually(lambda: running.service.find("bytes").batcher.waiting == 0)
    release.set()
    running.eventually(lambda: running.service.buffered == 0)


# Limits.


def test_memory_is_given_back(running, client, pixels):
    for change, *_ in BAD.values():
        with pytest.raises(grpc.RpcError):
            client("ModelInfer", changed(change))
    client("ModelInfer", request("bytes", {"images": pixels}))
    list(client.stream([request("bytes", {"images": pixels})] * 3))
    running.eventually(lambda: running.service.buffered == 0)


def test_requests_and_answers_count_against_the_memory_of_all(models, blocked):
    one = np.zeros((4, 8, 8, 3), "f4")
    with grpc_running(models, options={"max_buffered": 3 * one.nbytes}) as server, Client(server.address) as client:
        release = blocked()
        calls = [client.start("ModelInfer", request("tiny", {"images": one})) for _ in range(2)]
        server.eventually(lambda: server.service.buffered > 2 * one.nbytes)
        caught = assert_refused(
            lambda: client("ModelInfer", request("tiny", {"images": one})), CODE.UNAVAILABLE, "too many requests"
        )
        assert ("grpc-retry-pushback-ms", "1000") in caught.trailing_metadata()
        assert "too many requests" in next(client.stream([request("tiny", {"images": one})])).error_message
        release.set()
        assert all(call.result() for call in calls)
        server.eventually(lambda: server.service.buffered == 0)


def test_a_full_queue_and_a_time_that_is_over(models, blocked, pixels):
    one = pixels[:1]
    with grpc_running(models, batch={"queue_rows": 2}) as server, Client(server.address) as client:
        release = blocked()
        first = client.start("ModelInfer", request("bytes", {"images": one}))
        assert release.entered.wait(10)
        waiting = [client.start("ModelInfer", request("bytes", {"images": one})) for _ in range(2)]
        batcher = server.service.find("bytes").batcher
        server.eventually(lambda: batcher.waiting == 2)
        assert_refused(lambda: client("ModelInfer", request("bytes", {"images": one})), CODE.UNAVAILABLE, "is busy")
        waiting.pop().cancel()
        server.eventually(lambda: batcher.waiting == 1)
        soon = request("bytes", {"images": one}, timeout=20_000)
        assert_refused(lambda: client("ModelInfer", soon), CODE.DEADLINE_EXCEEDED, "no answer within 0.02 s")
        assert_refused(lambda: client("ModelInfer", request("bytes", {"images": one}), timeout=0.05), CODE.DEADLINE_EXCEEDED)
        server.eventually(lambda: batcher.waiting == 1)
        release.set()
        assert first.result() and waiting[0].result()


def test_keys(models, pixels):
    with grpc_running(models, options={"api_keys": ("one", "two")}) as server, Client(server.address) as client:
        good = request("bytes", {"images": pixels})
        assert client("ServerLive").live and client("ServerReady").ready and client("/grpc.health.v1.Health/Check").status == 1
        for metadata in ((), (("authorization", "Bearer three"),), (("authorization", "one"),), (("x", "Bearer one"),)):
            for method in set(messages.TRITON_METHODS) - {"ServerLive", "ServerReady"}:
                assert_refused(
                    lambda method=method, metadata=metadata: client(method, metadata=metadata), CODE.UNAUTHENTICATED, "Bearer KEY"
                )
            assert_refused(lambda metadata=metadata: next(client.stream([good], metadata=metadata)), CODE.UNAUTHENTICATED)
        for key in ("Bearer one", "bearer two"):
            assert client("ModelInfer", good, metadata=(("authorization", key),)).outputs
            assert next(client.stream([good], metadata=(("authorization", key),))).infer_response.outputs
        server.service.keys.replace(("three",))
        assert_refused(lambda: client("ModelInfer", good, metadata=(("authorization", "Bearer one"),)), CODE.UNAUTHENTICATED)
        assert client("ModelInfer", good, metadata=(("authorization", "Bearer three"),)).outputs


def test_loading_and_unloading(tmp_path, pixels):
    classifier(tmp_path / "net" / "1" / "model.onnx", dtype="uint8")
    classifier(tmp_path / "other.onnx")
    good = request("net", {"images": pixels})
    with grpc_running(folder=tmp_path) as server, Client(server.address) as client:
        for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
            assert_refused(
                lambda method=method: client(method, of(method, model_name="net")), CODE.PERMISSION_DENIED, "--allow-control"
            )
    with grpc_running(folder=tmp_path, options={"allow_control": True}) as server, Client(server.address) as client:
        client("RepositoryModelUnload", of("RepositoryModelUnload", model_name="net"))
        assert_refused(lambda: client("ModelInfer", good), CODE.NOT_FOUND, "not loaded")
        index = client("RepositoryIndex").models
        assert [(entry.name, entry.version, entry.state) for entry in index] == [
            ("net", "1", "UNAVAILABLE"),
            ("other", "1", "READY"),
        ]
        assert [entry.name for entry in client("RepositoryIndex", of("RepositoryIndex", ready=True)).models] == ["other"]
        classifier(tmp_path / "net" / "3" / "model.onnx", dtype="uint8", bias=np.zeros(5))
        client("RepositoryModelLoad", of("RepositoryModelLoad", model_name="net"))
        assert client("ModelInfer", good).model_version == "3"
        old = client("ModelInfer", request("net", {"images": pixels}, version="1"))
        np.testing.assert_allclose(outputs_of(old)["logits"], classifier_logits(pixels), rtol=1e-5, atol=1e-6)
        sent = of("RepositoryModelLoad", model_name="net")
        sent.parameters["config"].string_param = "{}"
        assert_refused(lambda: client("RepositoryModelLoad", sent), CODE.INVALID_ARGUMENT, "cannot be sent")
        for name in ("none", "../etc", ""):
            for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
                assert_refused(
                    lambda name=name, method=method: client(method, of(method, model_name=name)), CODE.NOT_FOUND, "no model"
                )


def test_no_request_fails_while_its_model_is_reloaded(tmp_path, pixels):
    path = tmp_path / "net" / "1" / "model.onnx"
    classifier(path, dtype="uint8")
    done, failed = threading.Event(), []
    with grpc_running(folder=tmp_path, options={"allow_control": True}) as server:

        def ask(number):
            with Client(server.address) as client:
                while not done.is_set():
                    rows = pixels[number : number + 1 + number % 2]
                    try:
                        answer = client("ModelInfer", request("net", {"images": rows}, outputs=[("logits", {})]))
                        np.testing.assert_allclose(outputs_of(answer)["logits"], classifier_logits(rows), rtol=1e-5, atol=1e-5)
                    except Exception as error:
                        failed.append(error)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        with Client(server.address) as client:
            for _ in range(30):
                client("RepositoryModelLoad", of("RepositoryModelLoad", model_name="net"))
        done.set()
        for thread in threads:
            thread.join(20)
    assert not failed, failed[:3]


@pytest.mark.parametrize("typed", [False, True])
def test_requests_that_are_decoded_in_a_thread(models, typed):
    """Many strings, and many typed values: their memory is accounted for, and the answer is right."""
    words = np.array([[b"ab%d" % (number % 7), b""] for number in range(20_000)], dtype=object)
    inputs = {"a": words, "b": np.ones((len(words), 1), "f4")}
    with grpc_running(models, max_request_rows=len(words)) as server, Client(server.address) as client:
        peak = []
        take = server.service.codec.in_thread

        async def watched(function, *arguments):
            peak.append(server.service.buffered)
            return await take(function, *arguments)

        server.service.codec.in_thread = watched
        found = outputs_of(client("ModelInfer", request("echo", inputs, raw=not typed)))
        assert found["c"].tolist() == words.tolist()
        assert max(peak) > 64 * words.size
        server.eventually(lambda: server.service.buffered == 0)
        many = request("echo", {"a": words[:1], "b": inputs["b"][:1]})
        many.raw_input_contents[0] = bytes(2**20)
        assert_refused(lambda: client("ModelInfer", many), CODE.INVALID_ARGUMENT, "takes 2 BYTES elements, got more")
        many.inputs[0].shape[0] = -(2**40)
        assert_refused(lambda: client("ModelInfer", many), CODE.INVALID_ARGUMENT, "at least 0")
        many.inputs[0].shape[0] = 2**40
        assert_refused(lambda: client("ModelInfer", many), CODE.INVALID_ARGUMENT, "elements")
        server.eventually(lambda: server.service.buffered == 0)


# Clients that stop half-way.


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    folder = tmp_path_factory.mktemp("impatient")
    with grpc_running({"wide": doubler(folder / "wide.onnx", "float32")}, options={"body_timeout": 0.5}) as server:
        yield server


def wide(rows):
    return request("wide", {"x": np.ones((rows, 4), "f4")}).SerializeToString()


def test_a_client_that_does_not_send_its_request(impatient):
    with connected(impatient.address) as connection:
        connection.sendall(opening("ModelInfer") + data_frames(wide(200))[:-100])
        time.sleep(0.2)
        with Client(impatient.address) as client:
            assert client("ServerLive").live
        data = b""
        connection.settimeout(5)
        while b"grpc-status" not in data:
            data += connection.recv(65536)
        assert b"did%20not%20arrive" in data or b"did not arrive" in data, data
    with Client(impatient.address) as client:
        call = client.channel.stream_unary(f"/{messages.TRITON_SERVICE}/ModelInfer")
        never = threading.Event()
        assert_refused(lambda: call(iter(never.wait, True)), CODE.DEADLINE_EXCEEDED, "within 0.5 s")


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_a_client_that_does_not_take_its_answer(impatient, method, caplog):
    """The answer is larger than the window that the client grants; it answers pings, but never grants more."""
    model = impatient.service.find("wide")
    rows = model.options.max_request_rows
    one = np.ones((rows * 40, 4), "f4")
    model_infer, impatient.service.infer = impatient.service.infer, answer_with([("y", one, True)] * 4)
    try:
        with connected(impatient.address) as connection:
            connection.sendall(opening(method) + data_frames(wide(rows)))
            impatient.eventually(lambda: impatient.service.buffered > 4 * one.nbytes)
            assert answer_pings(connection, 5)
    finally:
        impatient.service.infer = model_infer
    impatient.eventually(lambda: impatient.service.buffered == 0)
    assert "does not read its answer" in caplog.text
    with Client(impatient.address) as client:
        assert client("ModelInfer", wide(3)).outputs


def answer_with(tensors):
    async def infer(model, asked, admission):
        return tensors

    return infer


def test_other_connections_stay_when_one_is_closed(impatient, caplog):
    rows = impatient.service.find("wide").options.max_request_rows
    with Client(impatient.address) as client:
        assert client("ServerLive").live
        test_a_client_that_does_not_take_its_answer(impatient, "ModelInfer", caplog)
        assert client("ModelInfer", wide(rows)).outputs


def test_connections_are_bounded_and_silent_ones_end(models):
    with grpc_running(models, options={"body_timeout": 0.5}, listen={"max_connections": 3}) as server:
        silent = [connected(server.address) for _ in range(3)]
        server.eventually(lambda: not opens(server.address))
        # Without HTTP/2 settings within the time that a request has, a connection is closed.
        server.eventually(lambda: opens(server.address))
        for connection in silent:
            connection.close()
        with Client(server.address) as client:
            assert client("ServerLive").live


def opens(address):
    """Whether the server takes a connection, and says so."""
    with connected(address) as connection:
        connection.sendall(PREFACE + frame(SETTINGS, 0, 0))
        try:
            return bool(connection.recv(100))
        except OSError:
            return False


def test_nonsense_on_the_port(impatient):
    for data in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(5000), b"\x16\x03\x01" + bytes(100), opening("ModelInfer")[:30]):
        with connected(impatient.address) as connection:
            connection.sendall(data)
    with Client(impatient.address) as client:
        assert client("ServerLive").live


def test_length_prefixes_that_lie(impatient):
    for prefix in (b"\0" + struct.pack(">I", 2**32 - 1), b"\7\0\0\0\1x", b"\1\0\0\0\5notgz"):
        with connected(impatient.address) as connection:
            connection.sendall(
                opening("ModelInfer") + b"".join([len(prefix).to_bytes(3, "big"), b"\0\1", (1).to_bytes(4, "big"), prefix])
            )
            connection.settimeout(5)
            data = b""
            while b"grpc-status" not in data and (chunk := connection.recv(65536)):
                data += chunk
    with Client(impatient.address) as client:
        assert client("ModelInfer", wide(3)).outputs


# The end.


def stays_open(message, until):
    """The requests of a stream whose client has no more to ask for now."""
    yield message
    until.wait(20)


def test_a_shutdown_finishes_calls_and_ends_streams(models, blocked, pixels):
    server = GrpcRunner(models)
    closed = False
    try:
        with Client(server.address) as client:
            more = threading.Event()
            good = request("bytes", {"images": pixels})

            answers = client.stream(stays_open(good, more))
            assert next(answers).infer_response.outputs
            release = blocked()
            call = client.start("ModelInfer", good)
            assert release.entered.wait(10)
            stopping = threading.Thread(target=server.close)
            stopping.start()
            assert_refused(lambda: next(answers), CODE.UNAVAILABLE, "shutting down")
            release.set()
            found = outputs_of(messages.ModelInferResponse.FromString(call.result()))
            np.testing.assert_allclose(found["logits"], classifier_logits(pixels), rtol=1e-5, atol=1e-6)
            stopping.join(20)
            closed = not stopping.is_alive()
            more.set()
            assert closed
            assert_refused(lambda: client("ServerLive", timeout=2), CODE.UNAVAILABLE)
    finally:
        if not closed:
            server.close()


# The command.


def test_the_command_serves_both_and_finishes_what_is_in_flight(models, pixels):
    with serving(models["bytes"], "--grpc-port", "0") as server, Client(server.grpc) as client:
        good = request("bytes", {"images": pixels})
        np.testing.assert_allclose(
            outputs_of(client("ModelInfer", good))["logits"], classifier_logits(pixels), rtol=1e-5, atol=1e-6
        )
        assert_refused(lambda: client("ModelInfer", request("none", {"images": pixels})), CODE.NOT_FOUND)
        metrics = urlopen(f"{server.url}/metrics").read().decode()
        assert 'nv_inference_request_success{model="bytes",version="1"} 1' in metrics
        more = threading.Event()
        answers = client.stream(stays_open(good, more))
        assert next(answers).infer_response.outputs
        calls = [client.start("ModelInfer", request("bytes", {"images": np.repeat(pixels, 40, 0)})) for _ in range(5)]
        time.sleep(0.05)
        assert server.stop() == 0
        codes = {call.code() for call in calls}
        assert codes <= {CODE.OK, CODE.UNAVAILABLE} and CODE.OK in codes, codes
        more.set()


def test_a_second_interrupt_does_not_wait_for_calls(models):
    with serving(models["bytes"], "--grpc-port", "0", "--grace", "60") as server, connected(server.grpc) as connection:
        # No window for the answer, so that the call cannot end.
        connection.sendall(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))
        connection.sendall(opening("ServerLive").removeprefix(PREFACE) + data_frames(b""))
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.process.poll() is None
        assert server.stop(signal.SIGINT) == 130


def test_the_command_serves_grpc_next_to_a_unix_socket(models, tmp_path):
    with serving(models["bytes"], "--uds", tmp_path / "s", "--grpc-port", "0") as server, Client(server.grpc) as client:
        assert client("ServerReady").ready and stat.S_ISSOCK((tmp_path / "s").stat().st_mode)


def test_the_command_refuses_what_cannot_be(models, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, text in (
            (["--port", "0", "--grpc-port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--grpc-port", "7", "--port", "7"], "choose two ports"),
            (["--grpc-port", "0", "--engine", "ray"], "--grpc-port cannot be combined with --engine ray"),
        ):
            assert main(["serve", str(models["bytes"]), "--device", "cpu", *arguments]) == 2
            output, errors = capsys.readouterr()
            assert text in errors and "Traceback" not in errors and "serving" not in output, (arguments, errors)


def test_the_command_names_the_extra(models, capsys, monkeypatch):
    for name in ("grpc_server", "grpc_calls"):
        monkeypatch.delitem(sys.modules, f"resnet_export.serving.{name}")
        monkeypatch.delattr(f"resnet_export.serving.{name}")
    monkeypatch.setitem(sys.modules, "grpc", None)
    assert main(["serve", str(models["bytes"]), "--device", "cpu", "--port", "0", "--grpc-port", "0"]) == 4
    assert "grpc is not installed; pip install 'keras-resnet-export[grpc]'" in capsys.readouterr().err


def test_grpc_needs_neither_keras_nor_tensorflow():
    code = (
        "import sys, resnet_export.serving.grpc_server; print(sorted({'keras', 'tensorflow', 'keras_resnet'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_certificate_is_read_again(models, tmp_path):
    certificate, key = self_signed(tmp_path)
    with grpc_running({"bytes": models["bytes"]}, listen={"certificate": str(certificate), "key": str(key)}) as server:

        def trusts(path):
            with Client(server.address, grpc.ssl_channel_credentials(path.read_bytes())) as client:
                try:
                    return client("ServerLive", timeout=5).live
                except grpc.RpcError as error:
                    assert error.code() == CODE.UNAVAILABLE
                    return False

        assert trusts(certificate)
        other, other_key = self_signed(tmp_path, "other")
        assert not trusts(other)
        other.rename(certificate)
        other_key.rename(key)
        server.server.reload_certificate()
        assert trusts(certificate)
        key.unlink()
        with pytest.raises(UsageError, match="cannot be used"):
            server.server.reload_certificate()
        assert trusts(certificate)
