"""The messages of Triton's gRPC service, of which the Open Inference Protocol is a part, as data and as Python classes.

The classes live in a descriptor pool of their own. The files that protoc generates register in the process-wide pool, where a
second definition of the same names is an error; with a private pool, `tritonclient` can be imported into the same process.

Source of the names and numbers: `grpc_service.proto` and `model_config.proto` of Triton, `health.proto` of gRPC.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# A field is written "NUMBER NAME TYPE", where TYPE may have `repeated` or `map` (from strings) in front and `in ONEOF` after it.
NAMED = ("1 name string", "2 version string")
PARAMETERS = "4 parameters map InferParameter"
TRITON = {
    "InferParameter": (
        "1 bool_param bool in parameter_choice",
        "2 int64_param int64 in parameter_choice",
        "3 string_param string in parameter_choice",
        "4 double_param double in parameter_choice",
        "5 uint64_param uint64 in parameter_choice",
    ),
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("1 live bool",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("1 ready bool",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("1 name string", "2 version string", "3 extensions repeated string"),
    "ModelReadyRequest": NAMED,
    "ModelReadyResponse": ("1 ready bool",),
    "ModelMetadataRequest": NAMED,
    "ModelMetadataResponse": (
        "1 name string",
        "2 versions repeated string",
        "3 platform string",
        "4 inputs repeated ModelMetadataResponse.TensorMetadata",
        "5 outputs repeated ModelMetadataResponse.TensorMetadata",
    ),
    "ModelMetadataResponse.TensorMetadata": ("1 name string", "2 datatype string", "3 shape repeated int64"),
    "InferTensorContents": (
        "1 bool_contents repeated bool",
        "2 int_contents repeated int32",
        "3 int64_contents repeated int64",
        "4 uint_contents repeated uint32",
        "5 uint64_contents repeated uint64",
        "6 fp32_contents repeated float",
        "7 fp64_contents repeated double",
        "8 bytes_contents repeated bytes",
    ),
    "ModelInferRequest": (
        "1 model_name string",
        "2 model_version string",
        "3 id string",
        PARAMETERS,
        "5 inputs repeated ModelInferRequest.InferInputTensor",
        "6 outputs repeated ModelInferRequest.InferRequestedOutputTensor",
        "7 raw_input_contents repeated bytes",
    ),
    "ModelInferRequest.InferInputTensor": (
        "1 name string",
        "2 datatype string",
        "3 shape repeated int64",
        PARAMETERS,
        "5 contents InferTensorContents",
    ),
    "ModelInferRequest.InferRequestedOutputTensor": ("1 name string", "2 parameters map InferParameter"),
    "ModelInferResponse": (
        "1 model_name string",
        "2 model_version string",
        "3 id string",
        PARAMETERS,
        "5 outputs repeated ModelInferResponse.InferOutputTensor",
        "6 raw_output_contents repeated bytes",
    ),
    "ModelInferResponse.InferOutputTensor": (
        "1 name string",
        "2 datatype string",
        "3 shape repeated int64",
        PARAMETERS,
        "5 contents InferTensorContents",
    ),
    "ModelStreamInferResponse": ("1 error_message string", "2 infer_response ModelInferResponse"),
    "ModelConfigRequest": NAMED,
    "ModelConfigResponse": ("1 config ModelConfig",),
    "ModelStatisticsRequest": NAMED,
    "StatisticDuration": ("1 count uint64", "2 ns uint64"),
    "InferStatistics": (
        "1 success StatisticDuration",
        "2 fail StatisticDuration",
        "3 queue StatisticDuration",
        "4 compute_input StatisticDuration",
        "5 compute_infer StatisticDuration",
        "6 compute_output StatisticDuration",
        "7 cache_hit StatisticDuration",
        "8 cache_miss StatisticDuration",
    ),
    "InferResponseStatistics": (
        "1 compute_infer StatisticDuration",
        "2 compute_output StatisticDuration",
        "3 success StatisticDuration",
        "4 fail StatisticDuration",
        "5 empty_response StatisticDuration",
        "6 cancel StatisticDuration",
    ),
    "InferBatchStatistics": (
        "1 batch_size uint64",
        "2 compute_input StatisticDuration",
        "3 compute_infer StatisticDuration",
        "4 compute_output StatisticDuration",
    ),
    "MemoryUsage": ("1 type string", "2 id int64", "3 byte_size uint64"),
    "ModelStatistics": (
        "1 name string",
        "2 version string",
        "3 last_inference uint64",
        "4 inference_count uint64",
        "5 execution_count uint64",
        "6 inference_stats InferStatistics",
        "7 batch_stats repeated InferBatchStatistics",
        "8 memory_usage repeated MemoryUsage",
        "9 response_stats map InferResponseStatistics",
    ),
    "ModelStatisticsResponse": ("1 model_stats repeated ModelStatistics",),
    "ModelRepositoryParameter": (
        "1 bool_param bool in parameter_choice",
        "2 int64_param int64 in parameter_choice",
        "3 string_param string in parameter_choice",
        "4 bytes_param bytes in parameter_choice",
    ),
    "RepositoryIndexRequest": ("1 repository_name string", "2 ready bool"),
    "RepositoryIndexResponse": ("1 models repeated RepositoryIndexResponse.ModelIndex",),
    "RepositoryIndexResponse.ModelIndex": ("1 name string", "2 version string", "3 state string", "4 reason string"),
    "RepositoryModelLoadRequest": (
        "1 repository_name string",
        "2 model_name string",
        "3 parameters map ModelRepositoryParameter",
    ),
    "RepositoryModelLoadResponse": (),
    "RepositoryModelUnloadRequest": (
        "1 repository_name string",
        "2 model_name string",
        "3 parameters map ModelRepositoryParameter",
    ),
    "RepositoryModelUnloadResponse": (),
    # Of a model's configuration, the part that this server can fill in; readers take what is missing as not set.
    "ModelConfig": (
        "1 name string",
        "2 platform string",
        "17 backend string",
        "4 max_batch_size int32",
        "5 input repeated ModelInput",
        "6 output repeated ModelOutput",
        "11 dynamic_batching ModelDynamicBatching in scheduling_choice",
        "7 instance_group repeated ModelInstanceGroup",
    ),
    "ModelInput": ("1 name string", "2 data_type DataType", "4 dims repeated int64"),
    "ModelOutput": ("1 name string", "2 data_type DataType", "3 dims repeated int64", "4 label_filename string"),
    "ModelDynamicBatching": ("1 preferred_batch_size repeated int32", "2 max_queue_delay_microseconds uint64"),
    "ModelInstanceGroup": ("1 name string", "4 kind ModelInstanceGroup.Kind", "2 count int32", "3 gpus repeated int32"),
}
TRITON_ENUMS = {
    "DataType": (
        "TYPE_INVALID",
        "TYPE_BOOL",
        "TYPE_UINT8",
        "TYPE_UINT16",
        "TYPE_UINT32",
        "TYPE_UINT64",
        "TYPE_INT8",
        "TYPE_INT16",
        "TYPE_INT32",
        "TYPE_INT64",
        "TYPE_FP16",
        "TYPE_FP32",
        "TYPE_FP64",
        "TYPE_STRING",
        "TYPE_BF16",
    ),
    "ModelInstanceGroup.Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
}
HEALTH = {
    "HealthCheckRequest": ("1 service string",),
    "HealthCheckResponse": ("1 status HealthCheckResponse.ServingStatus",),
}
HEALTH_ENUMS = {"HealthCheckResponse.ServingStatus": ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")}

TRITON_SERVICE = "inference.GRPCInferenceService"
TRITON_METHODS = (
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "ModelInfer",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)
HEALTH_METHOD = "/grpc.health.v1.Health/Check"
STREAM_METHOD = f"/{TRITON_SERVICE}/ModelStreamInfer"


@dataclass(frozen=True)
class Method:
    """A call with one request and one answer: its name, and the classes of the two messages."""

    name: str
    request: Any
    response: Any


_Field: TypeAlias = descriptor_pb2.FieldDescriptorProto


def _field(text: str, enums: Mapping[str, tuple[str, ...]], package: str) -> tuple[_Field, str, str]:
    """Read one line of the tables: the field, the value type if it is a map (else ""), and its oneof (else "")."""
    number, name, *words = text.split()
    oneof = words.pop() if words[-2:-1] == ["in"] else ""
    kind = words[1] if words[0] in ("repeated", "map") else words[0]
    field = _Field(name=name, number=int(number))
    field.label = _Field.LABEL_REPEATED if words[0] in ("repeated", "map") else _Field.LABEL_OPTIONAL
    if kind[0].isupper():
        field.type = _Field.TYPE_ENUM if kind in enums else _Field.TYPE_MESSAGE
        field.type_name = f".{package}.{kind}"
    else:
        field.type = getattr(_Field, f"TYPE_{kind.upper()}")
    return field, kind if words[0] == "map" else "", oneof


def file_descriptor(
    name: str, package: str, messages: Mapping[str, tuple[str, ...]], enums: Mapping[str, tuple[str, ...]]
) -> descriptor_pb2.FileDescriptorProto:
    """Turn tables into the description of a .proto file.

    Args:
        name: File name.
        package: Package name.
        messages: The fields of every message; nested messages have a dot in their names and come after the outer one.
        enums: The names of every enumeration's values, numbered from 0.

    Returns:
        FileDescriptorProto
    """
    file = descriptor_pb2.FileDescriptorProto(name=name, package=package, syntax="proto3")
    made: dict[str, Any] = {"": file}
    for path, fields in messages.items():
        outer, _, inner = path.rpartition(".")
        message = made[path] = (made[outer].nested_type if outer else file.message_type).add(name=inner)
        for text in fields:
            field, value, oneof = _field(text, enums, package)
            if value:
                _make_map(message, field, f"{package}.{path}")
            if oneof:
                names = [declared.name for declared in message.oneof_decl]
                if oneof not in names:
                    message.oneof_decl.add(name=oneof)
                field.oneof_index = names.index(oneof) if oneof in names else len(names)
            message.field.append(field)
    for path, values in enums.items():
        outer, _, inner = path.rpartition(".")
        enum = made[outer].enum_type.add(name=inner)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    return file


def _make_map(message: Any, field: _Field, path: str) -> None:
    """Make a field a map: on the wire, a list of entries, which are messages with a key and a value."""
    entry = message.nested_type.add(name="".join(part.title() for part in field.name.split("_")) + "Entry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_Field.TYPE_STRING, label=_Field.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=field.type, type_name=field.type_name, label=_Field.LABEL_OPTIONAL)
    field.type, field.type_name = _Field.TYPE_MESSAGE, f".{path}.{entry.name}"


def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    for file in (
        file_descriptor("grpc_service.proto", "inference", TRITON, TRITON_ENUMS),
        file_descriptor("grpc/health/v1/health.proto", "grpc.health.v1", HEALTH, HEALTH_ENUMS),
    ):
        pool.AddSerializedFile(file.SerializeToString())
    return pool


POOL = _pool()


def message_class(name: str) -> Any:
    """Return the class of a message.

    Args:
        name: Full name, e.g. `inference.ModelInferRequest`.
    """
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


ModelInferRequest = message_class("inference.ModelInferRequest")
ModelInferResponse = message_class("inference.ModelInferResponse")
ModelStreamInferResponse = message_class("inference.ModelStreamInferResponse")
METHODS = {
    f"/{TRITON_SERVICE}/{name}": Method(
        name, message_class(f"inference.{name}Request"), message_class(f"inference.{name}Response")
    )
    for name in TRITON_METHODS
}
METHODS[HEALTH_METHOD] = Method(
    "Check", message_class("grpc.health.v1.HealthCheckRequest"), message_class("grpc.health.v1.HealthCheckResponse")
)
