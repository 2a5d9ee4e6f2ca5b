"""From settings in plain words to the options of onnxruntime's execution providers; pure functions, testable without a GPU."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from .sessions import TensorInfo


PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
SEARCHES = {"exhaustive": "EXHAUSTIVE", "heuristic": "HEURISTIC", "default": "DEFAULT"}


def _number(low: int) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise UsageError(f"`{name}` must be a number of at least {low}, got {value!r}")
        return str(value)

    return check


def _switch(name: str, value: Any) -> str:
    if not isinstance(value, bool):
        raise UsageError(f"`{name}` must be True or False, got {value!r}")
    return str(int(value))


def _among(table: dict[str, str]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in table:
            raise UsageError(f"`{name}` must be one of {', '.join(table)}, got {value!r}")
        return table[value]

    return check


# Device -> setting -> (option of the provider, how a value is checked and written).
SETTINGS = {
    "cpu": {},
    "cuda": {
        "device_id": ("device_id", _number(0)),
        "conv_search": ("cudnn_conv_algo_search", _among(SEARCHES)),
        "tf32": ("use_tf32", _switch),
        "nhwc": ("prefer_nhwc", _switch),
        "graphs": ("enable_cuda_graph", _switch),
        "memory_limit": ("gpu_mem_limit", _number(1)),
    },
    "tensorrt": {
        "device_id": ("device_id", _number(0)),
        "fp16": ("trt_fp16_enable", _switch),
        "int8": ("trt_int8_enable", _switch),
        "graphs": ("trt_cuda_graph_enable", _switch),
        "workspace": ("trt_max_workspace_size", _number(1)),
    },
    "openvino": {
        "hardware": ("device_type", _among({"cpu": "CPU", "gpu": "GPU", "npu": "NPU"})),
        "precision": ("precision", _among({"f32": "FP32", "f16": "FP16", "accuracy": "ACCURACY"})),
        "threads": ("num_of_threads", _number(1)),
    },
}


def provider_options(device: str, settings: dict[str, Any]) -> dict[str, str]:
    """Return the option dict of a device's provider.

    Args:
        device: Key of `PROVIDERS`.
        settings: Names and values as in `SETTINGS`.

    Raises:
        UsageError: A setting that this device does not have, or a value that does not fit.
    """
    known = SETTINGS[device]
    if unknown := [name for name in settings if name not in known]:
        raise UsageError(f"{device} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return {known[name][0]: known[name][1](name, value) for name, value in settings.items()}


def shape_profiles(inputs: Sequence[TensorInfo], sizes: Sequence[int]) -> dict[str, str]:
    """TensorRT's profile options: without them an engine is built again for each new batch size, half a minute each.

    Args:
        inputs: `runtime.TensorInfo` of every input.
        sizes: Batch sizes, rising; the engine takes all between the first and the last and is tuned for the middle one.

    Raises:
        UsageError: A dimension other than the batch is dynamic.
    """
    for value in inputs:
        if any(isinstance(size, str) for size in value.shape[1:]):
            raise UsageError(
                f"input `{value.name}` has the dynamic size {list(value.shape)}; export it with a fixed size for TensorRT"
            )
    profiles = {}
    for key, batch in (("min", sizes[0]), ("opt", sizes[len(sizes) // 2]), ("max", sizes[-1])):
        shapes = (f"{value.name}:{'x'.join(map(str, (batch, *value.shape[1:])))}" for value in inputs)
        profiles[f"trt_profile_{key}_shapes"] = ",".join(shapes)
    return profiles


def cache_options(
    folder: str | os.PathLike[str], model_digest: str, versions: dict[str, str], gpu: str, options: dict[str, str]
) -> dict[str, str]:
    """TensorRT's engine and timing cache, in a folder of its own for each model, set of versions, GPU and options.

    An engine is only valid for exactly those; a stale one gives wrong results or a crash.

    Args:
        folder: Where such folders lie.
        model_digest: Hexadecimal digest of the file.
        versions: `{library: version}` of what builds and runs the engine.
        gpu: What distinguishes the GPU.
        options: Option dict of the provider: precision and shapes are baked into an engine.
    """
    key = hashlib.sha256(json.dumps([model_digest, versions, gpu, options], sort_keys=True).encode())
    cache = f"{folder}/{key.hexdigest()[:24]}"
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
    }
