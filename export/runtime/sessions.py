"""onnxruntime sessions that do what was asked for, or say why not."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..artifact import decode_metadata, digest, existing_file, external_files, first_line
from ..errors import DeviceError, UsageError
from . import libraries
from .buckets import Buckets, checked_sizes
from .libraries import missing
from .providers import PROVIDERS, cache_options, provider_options, shape_profiles

ON_GPU = ("cuda", "tensorrt")
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
    "tensor(string)": "object",
}


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and numpy dtype of an input or output; a dimension that may vary is its name (`"batch"`), not a number."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    @property
    def layout(self) -> str | None:
        """`"nhwc"` or `"nchw"` of an image tensor, told by the axis that has 1, 3 or 4 entries; None for other ranks."""
        if len(self.shape) != 4:
            return None
        return "nchw" if self.shape[1] in (1, 3, 4) and self.shape[3] not in (1, 3, 4) else "nhwc"


class Session:
    """An ONNX file that is ready to run. Made by `session`.

    Attributes:
        path: The file.
        device: `"cpu"`, `"cuda"`, `"tensorrt"` or `"openvino"`: what really runs it.
        note: One sentence that says which device was taken, and why.
        inputs, outputs: Tuples of `TensorInfo`.
        metadata: Decoded metadata, see `resnet_export.artifact`.
        card: The model card as a dict, `{}` if the file has none.
        labels: Class names in the order of the logits, or None.
        buckets: `buckets.Buckets` that all runs go through, or None.
    """

    def __init__(
        self, path: str | os.PathLike[str], ort_session: ort.InferenceSession, device: str, note: str, held: Sequence[object] = ()
    ) -> None:
        self._held = held
        self.buckets: Buckets | None = None
        self.path, self.ort, self.device, self.note = Path(path), ort_session, device, note
        self.inputs = tuple(_tensor_info(value) for value in ort_session.get_inputs())
        self.outputs = tuple(_tensor_info(value) for value in ort_session.get_outputs())
        self.metadata = decode_metadata(ort_session.get_modelmeta().custom_metadata_map)
        self.card = self.metadata.get("card") or {}
        self.labels = self.card.get("labels")

    def run(self, feeds: np.ndarray | dict[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            feeds: Array, for a model with one input, or `{input name: array}`; cast to the input's dtype within its kind.
            outputs: Names wanted; all by default.

        Returns:
            `{output name: array}`.

        Raises:
            UsageError: A name, shape or dtype does not fit.
        """
        feeds = self._checked(feeds)
        names = list(outputs) if outputs is not None else [value.name for value in self.outputs]
        known = {value.name for value in self.outputs}
        if unknown := [name for name in names if name not in known]:
            raise UsageError(f"{self.path.name} has no output {unknown[0]!r}; it has {', '.join(sorted(known))}")
        found = self.buckets.run(feeds, names) if self.buckets else self.ort.run(names, feeds)
        return dict(zip(names, found, strict=True))

    def _checked(self, feeds):
        if not isinstance(feeds, dict):
            if len(self.inputs) != 1:
                raise UsageError(
                    f"{self.path.name} has {len(self.inputs)} inputs; give a dict of {', '.join(v.name for v in self.inputs)}"
                )
            feeds = {self.inputs[0].name: feeds}
        if set(feeds) != {value.name for value in self.inputs}:
            raise UsageError(
                f"inputs must be {', '.join(v.name for v in self.inputs)}, got {', '.join(map(str, feeds)) or 'none'}"
            )
        return {value.name: _fitting(np.asarray(feeds[value.name]), value) for value in self.inputs}


def _tensor_info(value):
    shape = tuple(dim if dim is not None else "?" for dim in value.shape)
    return TensorInfo(value.name, shape, DTYPES.get(value.type, value.type))


def _fitting(array, value):
    fits = array.ndim == len(value.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(value.shape, array.shape, strict=True)
    )
    if not fits:
        raise UsageError(f"input `{value.name}` must have shape {_shown(value.shape)}, got {_shown(array.shape)}")
    if array.dtype == value.dtype:
        return array
    if not np.can_cast(array.dtype, value.dtype, "same_kind"):
        raise UsageError(f"input `{value.name}` must be {value.dtype}, got {array.dtype}")
    return array.astype(value.dtype)


def _shown(shape):
    return "[" + ", ".join(map(str, shape)) + "]"


def session(
    path: str | os.PathLike[str],
    device: str = "auto",
    *,
    threads: int | None = None,
    optimise: bool = True,
    batches: Sequence[int] | None = None,
    cache: str | os.PathLike[str] | None = None,
    detached: bool = False,
    **settings: Any,
) -> Session:
    """Open an ONNX file on a device; differs from `onnxruntime.InferenceSession` in that a missing device is an error.

    Args:
        path: ONNX file.
        device: `"auto"` (a GPU if one really starts, else the CPU), `"cpu"`, `"cuda"`, `"tensorrt"` or `"openvino"`.
        threads: Threads within an operator; onnxruntime's choice by default.
        optimise: False runs the graph as it is written, without onnxruntime's rewriting.
        batches: Batch sizes to run with, through fixed buffers: rows are filled up to the next one. Needed by CUDA graphs
            (`graphs=True`); gives TensorRT the shapes to build its engine for.
        cache: TensorRT only: folder for engines and timings, which take up to minutes to build.
        detached: Read external data into memory, so that the file may be changed or cut while the session is open; it is
            mapped otherwise, and cutting it would end the process.
        **settings: Of the device, see `providers.SETTINGS`: `tf32=False`, `nhwc=True`, `graphs=True`, `fp16=True` …

    Returns:
        Session

    Raises:
        UsageError: Unknown device or setting, or the file is missing or damaged.
        DeviceError: The device does not start; names the missing library where that is why.
    """
    path = existing_file(path)
    if device != "auto" and device not in PROVIDERS:
        raise UsageError(f"`device` must be one of auto, {', '.join(PROVIDERS)}, got {device!r}")
    note = f"{device}, as asked for"
    if device == "auto":
        device, note = choice()
    if device != "tensorrt" and cache is not None:
        raise UsageError(f"`cache` needs tensorrt, got {device}")
    if settings.get("graphs") and batches is None:
        raise UsageError("`graphs` needs `batches`: a CUDA graph replays one batch size")
    if device == "openvino" and threads:
        settings["threads"] = threads
    options = provider_options(device, settings)
    sizes = None if batches is None else checked_sizes(batches)
    if device == "tensorrt":
        options |= _tensorrt_options(path, sizes, cache, options)
    opening = session_options(threads, optimise, device == "cpu")
    held = _hold_external_data(path, opening) if detached else []
    opened = _open(path, device, opening, options)
    # onnxruntime may read the weights where they are held, for as long as the session lives.
    found = Session(path, opened, device, note, held)
    if sizes is not None:
        where = {"memory": "cuda" if device in ON_GPU else "cpu", "device_id": settings.get("device_id", 0)}
        graphs = settings.get("graphs", False)
        found.buckets = Buckets(opened, found.inputs, found.outputs, sizes, graphs=graphs, **where)
    return found


def _hold_external_data(path, options):
    names = external_files(path)
    try:
        held = [(path.parent / name).read_bytes() for name in names]
    except OSError as error:
        raise UsageError(f"cannot read the data of {path}: {error.strerror}") from error
    if names:
        options.add_external_initializers_from_files_in_memory(names, held, [len(data) for data in held])
    return held


def choice() -> tuple[str, str]:
    """Return the device that `auto` takes, and a sentence that says which and why."""
    if not _has_hardware(PROVIDERS["cuda"]):
        return "cpu", "cpu: onnxruntime sees no GPU here"
    if lacking := missing("cuda"):
        return "cpu", f"cpu: there is a GPU, but {lacking[0]} is missing"
    return "cuda", "cuda: a GPU is there"


def _has_hardware(provider):
    """Whether onnxruntime sees a device for a provider; `get_available_providers` only tells what was compiled in."""
    return any(entry.ep_name == provider for entry in ort.get_ep_devices())


def gpu_count() -> int:
    """Return number of GPUs that onnxruntime sees; `CUDA_VISIBLE_DEVICES` hides some."""
    return sum(entry.ep_name == PROVIDERS["cuda"] for entry in ort.get_ep_devices())


def session_options(threads: int | None = None, optimise: bool = True, fallback: bool = True) -> ort.SessionOptions:
    """onnxruntime's options as this package uses them everywhere.

    Args:
        threads: Threads within an operator.
        optimise: Whether onnxruntime may rewrite the graph.
        fallback: Whether nodes that the device cannot run may go to the CPU.
    """
    options = ort.SessionOptions()
    # What fails is raised as an exception with the same text; the line of onnxruntime would be coloured, amid JSON logs.
    options.log_severity_level = 4
    # Moves zero padding into a max pool, which pads with -inf: wrong in files that were not written by this package.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "Pad_Fusion")
    if threads:
        options.intra_op_num_threads = int(threads)
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _tensorrt_options(path, sizes, cache, options):
    found = {}
    if sizes is not None:
        described = ort.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"]).get_inputs()
        found |= shape_profiles([_tensor_info(value) for value in described], sizes)
    if cache is not None:
        gpus = [str(entry.device.metadata) for entry in ort.get_ep_devices() if entry.ep_name == PROVIDERS["cuda"]]
        versions = {
            "onnxruntime": ort.__version__,
            "tensorrt": libraries.tensorrt_version(),
            "driver": libraries.nvidia_driver(),
        }
        found |= cache_options(cache, digest(path), versions, ";".join(gpus), options | found)
        _make_folder(found["trt_engine_cache_path"])
    return found


def _make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path} for engines: {error.strerror}") from error


def _open(path, device, options, provider_settings):
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise DeviceError(f"{device}: this onnxruntime ({ort.__version__}) was built without {provider}; install one that has it")
    if device == "cpu":
        try:
            return ort.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:
            raise UsageError(f"{path} is not an ONNX file that onnxruntime can run: {first_line(error)}") from error
    options.log_severity_level = 4  # what it would say is raised
    try:
        with _silent():
            if "tensorflow" not in sys.modules:  # which may hold libraries of another CUDA
                ort.preload_dlls()
            opened = ort.InferenceSession(str(path), options, providers=_providers(device, provider_settings))
    except Exception as error:
        raise DeviceError(_why_not(device, first_line(error))) from error
    if opened.get_providers()[0] != provider:
        raise DeviceError(_why_not(device, f"onnxruntime fell back to {opened.get_providers()[0]}"))
    return opened


def _providers(device, options):
    """The providers in order; what TensorRT does not take runs on the same GPU by CUDA, never on the CPU."""
    found = [(PROVIDERS[device], options)]
    if device == "tensorrt":
        found.append((PROVIDERS["cuda"], {"device_id": options["device_id"]} if "device_id" in options else {}))
    return found


def _why_not(device, reason):
    lacking = missing(device)
    if lacking:
        reason = f"{lacking[0]} is missing"
    return f"{device} does not start: {reason}; `resnet-export doctor` says how to fix it"


@contextlib.contextmanager
def _silent():
    """Hold back onnxruntime's own messages about a device; what they say is raised."""
    ort.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ort.set_default_logger_severity(2)
