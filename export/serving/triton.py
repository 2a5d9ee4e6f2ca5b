"""A model as other servers want it: Triton's configuration and repository, KServe's YAML, TensorFlow Serving's command.

Source: triton-inference-server/server, `docs/user_guide/model_configuration.md` and `model_repository.md`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact import external_files, output_kinds, publishing
from ..errors import UsageError
from .models import ModelOptions, ServedModel
from .protocol import TensorSpec
from .repository import check_name

if TYPE_CHECKING:
    from .models import Source


# Fields of the configuration whose values are names of an enumeration, and fields that are maps.
ENUMERATIONS = ("data_type", "kind")
MAPS = ("parameters", "inputs")


@dataclass(frozen=True)
class TritonOptions:
    """How Triton is to run a model.

    Args:
        max_batch: Rows per batch; None: 16, or 0 for a model without a batch axis.
        max_delay: Seconds that a request may wait for others.
        instances: Copies that run side by side.
        gpu: Whether they run on GPUs.
        tensorrt: `"fp32"` or `"fp16"` to run through TensorRT, which needs `gpu`; None not to.
        engine_cache: Folder in which TensorRT keeps what it has built; None for none.
        warm_up: Have Triton run the smallest and the largest batch before the model is ready.
    """

    max_batch: int | None = None
    max_delay: float = 0.0001
    instances: int = 1
    gpu: bool = False
    tensorrt: str | None = None
    engine_cache: str | None = None
    warm_up: bool = True

    def __post_init__(self) -> None:
        if self.tensorrt not in (None, "fp32", "fp16"):
            raise UsageError(f"`tensorrt` must be fp32 or fp16, got {self.tensorrt!r}")
        if self.tensorrt and not self.gpu:
            raise UsageError("TensorRT runs on GPUs only; ask for --gpu as well")


def model_config(
    name: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    max_batch_size: int,
    max_delay: float = 0.0,
    instances: int = 1,
    gpu: bool = False,
) -> dict[str, Any]:
    """Return a Triton `ModelConfig` in its JSON form.

    Args:
        name: Model name.
        inputs, outputs: Sequences of `protocol.TensorSpec`, batch axis included.
        max_batch_size: Rows per batch; 0 for models without a batch axis.
        max_delay: Seconds that a request may wait for others.
        instances: Copies that run side by side.
        gpu: Whether they run on GPUs.

    Returns:
        Dict
    """
    config = {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": max_batch_size,
        "input": [_tensor(spec, max_batch_size) for spec in inputs],
        "output": [_tensor(spec, max_batch_size) for spec in outputs],
        "instance_group": [{"count": instances, "kind": "KIND_GPU" if gpu else "KIND_CPU"}],
    }
    if max_batch_size:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": round(max_delay * 1e6)}
    return config


def served_config(model: ServedModel) -> dict[str, Any]:
    """Return the configuration with which this server runs a model, as Triton would describe it.

    Args:
        model: The model that is served.
    """
    batch = model.options.batch
    return model_config(
        model.source.name,
        model.inputs,
        model.outputs,
        max_batch_size=batch.max_rows if model.batched else 0,
        max_delay=batch.max_delay,
        instances=batch.instances,
        gpu=model.session.device != "cpu",
    )


def write_repository(
    sources: Sequence[Source],
    folder: str | os.PathLike[str],
    options: TritonOptions = TritonOptions(),
    *,
    overwrite: bool = False,
    add: bool = False,
) -> list[Path]:
    """Write ONNX files as a repository that Triton serves as it is.

    Args:
        sources: List of `repository.Source`; several of one name are its versions.
        folder: The repository; made if it is missing. Every model's folder is replaced as a whole or not at all.
        options: `TritonOptions`.
        overwrite: Replace models that are there already.
        add: Add the files as the next versions of models that are there already.

    Returns:
        List of the files written.

    Raises:
        UsageError: Triton would refuse the model, or a file exists already.
    """
    folder = Path(folder)
    by_name = {}
    for source in sources:
        check_name(source)
        # Opening it here tells whether onnxruntime takes it at all.
        by_name.setdefault(source.name, []).append(ServedModel(source, ModelOptions(device="cpu", threads=1)))
    plans = [_plan(name, models, folder, options, add) for name, models in by_name.items()]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for target, writers in plans:
        with publishing(target, overwrite, mark="config.pbtxt") as place:
            place.mkdir()
            for write in writers:
                write(place)
        written += sorted(path for path in target.rglob("*") if path.is_file())
    return written


def render(config: dict[str, Any]) -> str:
    """Return a configuration in the text form of protocol buffers, as `config.pbtxt` holds it."""
    return "".join(_lines(config, ""))


def kserve_yaml(name: str, storage_uri: str, gpu: bool = False) -> str:
    """Return a KServe `InferenceService` that serves a Triton repository.

    Args:
        name: Service name: lower case letters, digits and hyphens.
        storage_uri: Where the repository folder lies, e.g. `s3://bucket/repository` or `pvc://claim/repository`.
        gpu: Ask for one GPU.

    Returns:
        YAML text.

    Raises:
        UsageError: Kubernetes would refuse the name.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise UsageError(f"the name of a service may contain lower-case letters, digits and hyphens, got {name!r}")
    limits = '\n      resources:\n        limits:\n          nvidia.com/gpu: "1"' if gpu else ""
    return f"""apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {json.dumps(name)}
spec:
  predictor:
    model:
      modelFormat:
        name: triton
      protocolVersion: v2
      storageUri: {json.dumps(storage_uri)}{limits}
"""


def tf_serving_command(folder: str | os.PathLike[str], name: str | None = None, port: int = 8501) -> str:
    """Return the command that serves a SavedModel with TensorFlow Serving's image.

    Args:
        folder: SavedModel folder.
        name: Model name; the folder's by default.
        port: Port of the REST interface.

    Returns:
        A shell command.

    Raises:
        UsageError: The folder holds no SavedModel.
    """
    folder = Path(folder).absolute()
    if not (folder / "saved_model.pb").is_file():
        raise UsageError(f"{folder} holds no SavedModel (saved_model.pb)")
    name = name or folder.name
    # TensorFlow Serving wants numbered folders below the model's; the mount gives it number 1.
    mount = f"type=bind,source={folder},target=/models/{name}/1,readonly"
    return shlex.join(
        ["docker", "run", "--rm", "-p", f"{port}:8501", "--mount", mount, "-e", f"MODEL_NAME={name}", "tensorflow/serving"]
    )


def _plan(name, models, folder, options, add):
    """`(target, writers)`: what is replaced as a whole, and the functions that fill it."""
    first = models[0]
    for model in models[1:]:
        if (model.inputs, model.outputs) != (first.inputs, first.outputs):
            raise UsageError(f"all versions of {name!r} must have the same inputs and outputs; {model.source.path.name} differs")
    config = _config(name, first, options)
    there = folder / name
    if add and there.is_dir():
        if len(models) != 1:
            raise UsageError(f"versions are added one by one; {name!r} is given {len(models)} times")
        if (there / "config.pbtxt").read_text(encoding="utf-8") != render(config):
            raise UsageError(f"{there} has another configuration; write all its versions again with --force")
        numbers = [int(path.name) for path in there.iterdir() if path.is_dir() and path.name.isdigit()]
        return there / str(max(numbers, default=0) + 1), [lambda place: _write_version(first, place)]
    writers = [lambda place: (place / "config.pbtxt").write_text(render(config), encoding="utf-8")]
    if any("label_filename" in output for output in config["output"]):
        writers.append(lambda place: (place / "labels.txt").write_text("\n".join(first.labels) + "\n", encoding="utf-8"))
    for model in models:
        writers.append(lambda place, model=model: _write_version(model, place / model.source.version, make=True))
    return there, writers


def _config(name, model, options):
    size = _batch_size(model, options.max_batch)
    config = model_config(
        name,
        model.inputs,
        model.outputs,
        max_batch_size=size,
        max_delay=options.max_delay,
        instances=options.instances,
        gpu=options.gpu,
    )
    kinds = output_kinds(model.card(), {spec.name: list(spec.shape) for spec in model.outputs})
    for output in config["output"]:
        is_scored = kinds.get(output["name"], "other") != "other"
        if is_scored and model.labels and output["dims"] and output["dims"][-1] == len(model.labels):
            output["label_filename"] = "labels.txt"
    if any("label_filename" in output for output in config["output"]) and any("\n" in label for label in model.labels):
        raise UsageError(f"a label of {name!r} has more than one line; Triton reads one label per line")
    if options.tensorrt:
        config["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [_tensorrt(options)]}}
    shapes = [model.warm_shape(spec) for spec in model.inputs]
    if options.warm_up and None not in shapes:
        config["model_warmup"] = [_warm_up(rows, config["input"], shapes) for rows in sorted({1, size} if size else {0})]
    return config


def _batch_size(model: ServedModel, wanted: int | None) -> int:
    if wanted and not model.batched:
        shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in model.inputs + model.outputs)
        raise UsageError(
            f"{model.source.path.name} cannot be batched: the first dimension of all inputs and outputs must be dynamic, "
            f"got {shapes}"
        )
    return (16 if model.batched else 0) if wanted is None else wanted


def _tensor(spec: TensorSpec, max_batch_size: int) -> dict[str, Any]:
    datatype = {"BYTES": "STRING"}.get(spec.datatype, spec.datatype)
    return {"name": spec.name, "data_type": f"TYPE_{datatype}", "dims": list(spec.shape[1:] if max_batch_size else spec.shape)}


def _tensorrt(options):
    parameters = {"precision_mode": options.tensorrt.upper()}
    if options.engine_cache:
        parameters |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": options.engine_cache}
    return {"name": "tensorrt", "parameters": parameters}


def _warm_up(rows, tensors, shapes):
    inputs = {
        tensor["name"]: {"data_type": tensor["data_type"], "dims": shape, "zero_data": True}
        for tensor, shape in zip(tensors, shapes, strict=True)
    }
    return {"name": f"batch_{rows}", "batch_size": rows, "inputs": inputs}


def _write_version(model, place, make=False):
    """One version's folder: the file as `model.onnx`, or, with external data, a folder of that name."""
    if make:
        place.mkdir()
    path = model.source.path
    locations = external_files(path)
    if not locations:
        shutil.copyfile(path, place / "model.onnx")
        return
    inner = place / "model.onnx"
    inner.mkdir()
    shutil.copyfile(path, inner / "model.onnx")
    for location in locations:
        shutil.copyfile(path.parent / location, inner / location)


def _lines(message, indent):
    for key, value in message.items():
        if key in MAPS:
            entries = [{"key": name, "value": item} for name, item in value.items()]
        else:
            entries = value if isinstance(value, list) else [value]
        if key == "dims":
            yield f"{indent}{key}: [{', '.join(map(str, value))}]\n"
            continue
        for entry in entries:
            if isinstance(entry, dict):
                yield f"{indent}{key} {{\n"
                yield from _lines(entry, indent + "  ")
                yield f"{indent}}}\n"
            else:
                yield f"{indent}{key}: {_scalar(key, entry)}\n"


def _scalar(key, value):
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if key in ENUMERATIONS or isinstance(value, int) else json.dumps(value)
