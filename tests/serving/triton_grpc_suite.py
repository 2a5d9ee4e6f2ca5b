"""What tritonclient must be able to do with a server over gRPC: `python triton_grpc_suite.py PART HOST:PORT [KEY]`.

The part `descriptors` needs no server: it compares our messages with those that tritonclient was generated from, in one process.
"""

import asyncio
import importlib.util
import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

LABELS = ["red", "green", "blue", "dark: night", "grün"]
# Of the configuration, our file has only the fields that the server fills in.
PARTIAL = {"ModelConfig", "ModelInput", "ModelOutput", "ModelDynamicBatching", "ModelInstanceGroup"}


def tensor(name, array, datatype):
    item = triton.InferInput(name, list(array.shape), datatype)
    item.set_data_from_numpy(array)
    return item


def refused(call, text, status):
    try:
        call()
    except InferenceServerException as error:
        assert text in str(error) and error.status() == f"StatusCode.{status}", error
        return
    raise AssertionError(f"not refused: {text}")


def models(client, address):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype("u1")
    floats = images.astype("f4")
    sent = [tensor("images", floats, "FP32")]

    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1") and not client.is_model_ready("tiny", "2") and not client.is_model_ready("none")
    assert "statistics" in client.get_server_metadata().extensions
    metadata = client.get_model_metadata("tiny", as_json=True)
    assert metadata["inputs"] == [{"name": "images", "datatype": "FP32", "shape": ["-1", "8", "8", "3"]}]
    config = client.get_model_config("tiny").config
    assert config.max_batch_size == 16 and config.input[0].data_type == model_config_pb2.TYPE_FP32
    assert {entry.name: entry.state for entry in client.get_model_repository_index().models}["tiny"] == "READY"

    plain = client.infer("tiny", sent).as_numpy("logits")
    assert plain.shape == (3, 5) and plain.dtype == np.float32
    for packing in (None, "gzip", "deflate"):
        answer = client.infer("tiny", sent, request_id="abc", model_version="1", compression_algorithm=packing)
        assert np.array_equal(answer.as_numpy("logits"), plain)
        assert answer.get_response().id == "abc" and answer.get_response().model_version == "1"

    half = np.arange(8, dtype="f2").reshape(2, 4)
    swapped = [triton.InferRequestedOutput("n"), triton.InferRequestedOutput("y")]
    answer = client.infer("half", [tensor("x", half, "FP16")], outputs=swapped)
    assert np.array_equal(answer.as_numpy("y"), 2 * half) and answer.as_numpy("n").dtype == np.float16
    assert [output.name for output in answer.get_response().outputs] == ["n", "y"]

    words = np.array([[b"a", "grün".encode()]], dtype=object)
    answer = client.infer("echo", [tensor("a", words, "BYTES"), tensor("b", np.ones((1, 2), "f4"), "FP32")])
    assert answer.as_numpy("c").tolist() == words.tolist() and answer.as_numpy("d").tolist() == [[1, 1]]

    wanted = [triton.InferRequestedOutput("logits", class_count=2)]
    found = client.infer("bytes", [tensor("images", images, "UINT8")], outputs=wanted).as_numpy("logits")
    assert found.shape == (3, 2)
    for row, scores in zip(found, plain, strict=True):
        value, index, label = row[0].decode().split(":", 2)
        assert int(index) == scores.argmax() and label == LABELS[int(index)] and abs(float(value) - scores.max()) < 1e-5

    before = client.get_inference_statistics("bytes").model_stats[0]
    done = queue.Queue()
    for index in range(64):
        call = [tensor("images", images[:1] + index, "UINT8")]
        client.async_infer("bytes", call, lambda result, error: done.put((result, error)), request_id=str(index))
    found = {}
    for _ in range(64):
        result, error = done.get(timeout=30)
        assert error is None, error
        found[int(result.get_response().id)] = result.as_numpy("logits")
    for index in range(64):
        alone = client.infer("bytes", [tensor("images", images[:1] + index, "UINT8")]).as_numpy("logits")
        np.testing.assert_allclose(found[index], alone, rtol=1e-5, atol=1e-5)
    after = client.get_inference_statistics("bytes", "1").model_stats[0]
    assert after.inference_count - before.inference_count == 128
    print(f"{after.execution_count - before.execution_count - 64} executions for 64 requests at once")
    assert after.inference_stats.success.count >= 128 and after.batch_stats[0].compute_infer.ns > 0

    more = {"priority": 3, "timeout": 10_000_000, "client_timeout": 10, "headers": {"x-y": "1"}}
    more |= {"sequence_id": 7, "sequence_start": True, "sequence_end": True}
    more |= {"parameters": {"text": "x", "whole": 1, "flag": True}}
    answer = client.infer("tiny", sent, **more)
    assert np.array_equal(answer.as_numpy("logits"), plain) and answer.get_response().id == ""

    explicit(client, images, plain)
    stream(client, images, plain)
    refusals(client, images, floats, sent)
    asyncio.run(conforms_async(address, floats, plain))


def explicit(client, images, plain):
    """Typed contents, which tritonclient's own classes never send."""
    asked = service_pb2.ModelInferRequest(model_name="bytes")
    asked.inputs.add(name="images", datatype="UINT8", shape=images.shape).contents.uint_contents.extend(images.ravel().tolist())
    answer = triton.InferResult(client._client_stub.ModelInfer(asked))
    assert np.array_equal(answer.as_numpy("logits"), plain)
    asked.parameters["binary_data_output"].bool_param = False
    answer = client._client_stub.ModelInfer(asked)
    # Its `as_numpy` knows raw contents only.
    assert not answer.raw_output_contents and np.array_equal(answer.outputs[0].contents.fp32_contents, plain.ravel())


def stream(client, images, plain):
    found = queue.Queue()
    for final in (False, True):
        client.start_stream(lambda result, error: found.put((result, error)))
        for index in range(30):
            name = "bytes" if index % 10 else "none"
            row = [tensor("images", images[index % 3 : index % 3 + 1], "UINT8")]
            client.async_stream_infer(name, row, request_id=str(index), enable_empty_final_response=final)
        for index in range(30):
            result, error = found.get(timeout=30)
            if index % 10:
                assert result.get_response().id == str(index)
                np.testing.assert_allclose(result.as_numpy("logits")[0], plain[index % 3], rtol=1e-5, atol=1e-5)
            else:
                assert "no model 'none'" in str(error)
        client.stop_stream()


def refusals(client, images, floats, sent):
    refused(lambda: client.infer("none", sent), "no model", "NOT_FOUND")
    refused(lambda: client.infer("tiny", sent, model_version="9"), "no version", "NOT_FOUND")
    invalid = "INVALID_ARGUMENT"
    refused(lambda: client.infer("tiny", [tensor("pictures", floats, "FP32")]), "got pictures", invalid)
    refused(lambda: client.infer("tiny", [tensor("images", images, "UINT8")]), "must be FP32", invalid)
    refused(lambda: client.infer("tiny", [tensor("images", floats[:, :4], "FP32")]), "must have shape", invalid)
    refused(lambda: client.infer("tiny", []), "at least one tensor", invalid)
    refused(lambda: client.infer("tiny", sent * 2), "given twice", invalid)
    refused(lambda: client.infer("tiny", sent, outputs=[triton.InferRequestedOutput("x")]), "has no output 'x'", invalid)
    elsewhere = triton.InferInput("images", [3, 8, 8, 3], "FP32")
    elsewhere.set_shared_memory("region", floats.nbytes)
    refused(lambda: client.infer("tiny", [elsewhere]), "shared memory", invalid)
    elsewhere = triton.InferRequestedOutput("logits")
    elsewhere.set_shared_memory("region", 60)
    refused(lambda: client.infer("tiny", sent, outputs=[elsewhere]), "shared memory", invalid)
    many = tensor("images", np.zeros((300, 8, 8, 3), "u1"), "UINT8")
    refused(lambda: client.infer("bytes", [many]), "256 rows", "RESOURCE_EXHAUSTED")
    refused(lambda: client.get_model_metadata("none"), "no model", "NOT_FOUND")
    refused(lambda: client.get_model_config("tiny", "7"), "no version", "NOT_FOUND")
    refused(lambda: client.load_model("tiny"), "--allow-control", "PERMISSION_DENIED")
    refused(lambda: client.unload_model("tiny"), "--allow-control", "PERMISSION_DENIED")
    for missing in (client.get_system_shared_memory_status, client.get_trace_settings, client.get_log_settings):
        refused(missing, "no such method", "UNIMPLEMENTED")


def datatypes(client, address):
    names = {"float64": "FP64"}
    for model in sorted(entry.name for entry in client.get_model_repository_index().models):
        if model == "bool":
            array = np.array([[True, False, True, True], [False, False, True, False]])
        elif model == "float64":
            array = np.array([[1e300, -1e-300, 0.1, np.nan], [1, 2, 3, 4]])
        else:
            limits = np.iinfo(model)
            array = np.array([[0, 1, 2, 3], [limits.max, limits.min, limits.max - 1, 1]], model)
        answer = client.infer(model, [tensor("x", array, names.get(model, model.upper()))])
        for name, expected in (("y", array), ("n", array[:, :1])):
            found = answer.as_numpy(name)
            assert found.dtype == array.dtype and found.tobytes() == expected.tobytes(), (model, name, found)


def control(client, address):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype("u1")
    sent = [tensor("images", images, "UINT8")]
    assert list(client.get_model_metadata("net").versions) == ["1", "3"]
    old, new = (client.infer("net", sent, model_version=version).as_numpy("logits") for version in ("1", "3"))
    newest = client.infer("net", sent)
    assert np.array_equal(newest.as_numpy("logits"), new) and not np.allclose(old, new)
    for dependents in (False, True):
        client.unload_model("net", unload_dependents=dependents)
        assert not client.is_model_ready("net") and client.is_model_ready("other") and client.is_server_ready()
        states = {(entry.name, entry.version): entry.state for entry in client.get_model_repository_index().models}
        assert states == {("net", "1"): "UNAVAILABLE", ("net", "3"): "UNAVAILABLE", ("other", "1"): "READY"}
        refused(lambda: client.infer("net", sent), "not loaded", "NOT_FOUND")
        client.load_model("net")
        assert np.array_equal(client.infer("net", sent, model_version="1").as_numpy("logits"), old)
    for name in ("none", "../etc"):
        refused(lambda name=name: client.load_model(name), "no model", "NOT_FOUND")
    refused(lambda: client.load_model("net", config='{"name": "net"}'), "cannot be sent", "INVALID_ARGUMENT")
    files = {"file:1/model.onnx": b"x"}
    refused(lambda: client.load_model("net", config="{}", files=files), "cannot be sent", "INVALID_ARGUMENT")


def secure(client, address):
    """A server with a certificate and keys: `client` has been made with both."""
    images = np.zeros((1, 8, 8, 3), "u1")
    sent = [tensor("images", images, "UINT8")]
    key = {"authorization": f"Bearer {sys.argv[3]}"}
    assert client.is_server_ready() and client.infer("bytes", sent, headers=key).as_numpy("logits").shape == (1, 5)
    refused(lambda: client.infer("bytes", sent), "Bearer KEY", "UNAUTHENTICATED")
    found = queue.Queue()
    client.start_stream(lambda result, error: found.put(error), headers=key)
    client.async_stream_infer("bytes", sent)
    assert found.get(timeout=30) is None
    client.stop_stream()


async def conforms_async(address, floats, plain):
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_server_ready() and not await client.is_model_ready("none")
        rows = [[tensor("images", floats[i % 3 : i % 3 + 1], "FP32")] for i in range(24)]
        answers = await asyncio.gather(*(client.infer("tiny", row, request_id=str(i)) for i, row in enumerate(rows)))
        assert [answer.get_response().id for answer in answers] == [str(i) for i in range(24)]
        found = np.concatenate([answer.as_numpy("logits") for answer in answers])
        np.testing.assert_allclose(found, np.tile(plain, (8, 1)), rtol=1e-5, atol=1e-5)

        async def asked():
            for index, row in enumerate(rows):
                yield {"model_name": "tiny" if index % 5 else "none", "inputs": row, "request_id": str(index)}

        index = 0
        async for result, error in client.stream_infer(asked()):
            assert (error is None) == bool(index % 5)
            if not error:
                assert result.get_response().id == str(index)
                np.testing.assert_allclose(result.as_numpy("logits")[0], plain[index % 3], rtol=1e-5, atol=1e-5)
            index += 1
        assert index == len(rows)
        try:
            await client.infer("none", rows[0])
        except InferenceServerException as error:
            assert error.status() == "StatusCode.NOT_FOUND", error
        else:
            raise AssertionError("not refused")


def descriptors():
    """Our tables against the generated files: the same names, numbers, types and methods. Both are loaded in this process."""
    path = Path(__file__).resolve().parents[2] / "export" / "serving" / "grpc_messages.py"
    spec = importlib.util.spec_from_file_location("grpc_messages", path)
    ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)
    theirs = {**service_pb2.DESCRIPTOR.message_types_by_name, **model_config_pb2.DESCRIPTOR.message_types_by_name}
    enums = model_config_pb2.DESCRIPTOR.enum_types_by_name
    names = [name for name in ours.TRITON if "." not in name]
    for name in names:
        same_message(ours.POOL.FindMessageTypeByName(f"inference.{name}"), theirs[name])
    same_enum(ours.POOL.FindEnumTypeByName("inference.DataType"), enums["DataType"])
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for name in ours.TRITON_METHODS:
        method = ours.METHODS[f"/inference.GRPCInferenceService/{name}"]
        assert method.request.DESCRIPTOR.full_name == methods[name].input_type.full_name
        assert method.response.DESCRIPTOR.full_name == methods[name].output_type.full_name
        assert not methods[name].client_streaming and not methods[name].server_streaming
    stream_method = methods[ours.STREAM_METHOD.rsplit("/", 1)[1]]
    assert stream_method.client_streaming and stream_method.server_streaming
    assert stream_method.output_type.full_name == ours.ModelStreamInferResponse.DESCRIPTOR.full_name
    unsupported = ("SharedMemory", "TraceSetting", "LogSettings")
    missing = set(methods) - set(ours.TRITON_METHODS) - {stream_method.name}
    assert all(any(word in name for word in unsupported) for name in missing), missing
    print(f"{len(names)} messages and {len(ours.TRITON_METHODS) + 1} methods compared")


def same_message(ours, theirs):
    mine, other = ours.fields_by_name, theirs.fields_by_name
    assert set(mine) == set(other) or (ours.name in PARTIAL and set(mine) < set(other)), (ours.full_name, set(mine) ^ set(other))
    for name, field in mine.items():
        wanted = other[name]
        for quality in ("number", "type", "is_repeated", "is_packed", "has_presence"):
            assert getattr(field, quality) == getattr(wanted, quality), (ours.full_name, name, quality)
        oneof, wanted_oneof = field.containing_oneof, wanted.containing_oneof
        assert (oneof and oneof.name) == (wanted_oneof and wanted_oneof.name), (ours.full_name, name)
        if field.message_type:
            assert field.message_type.full_name == wanted.message_type.full_name
            assert field.message_type.GetOptions().map_entry == wanted.message_type.GetOptions().map_entry
            if field.message_type.containing_type is ours:
                same_message(field.message_type, wanted.message_type)
        if field.enum_type:
            same_enum(field.enum_type, wanted.enum_type)


def same_enum(ours, theirs):
    assert ours.full_name == theirs.full_name
    assert [(value.name, value.number) for value in ours.values] == [(value.name, value.number) for value in theirs.values]


def main():
    part, *where = sys.argv[1:]
    if part == "descriptors":
        descriptors()
    else:
        more = {"ssl": True, "root_certificates": where[2]} if part == "secure" else {}
        with triton.InferenceServerClient(where[0], **more) as client:
            {"models": models, "datatypes": datatypes, "control": control, "secure": secure}[part](client, where[0])
    print("conforms")


if __name__ == "__main__":
    main()
