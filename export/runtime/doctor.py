"""Diagnosis of an installation: versions, devices that start, missing libraries, conflicts, and how to fix each problem."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DeviceError
from . import installation as clash
from .libraries import missing, nvidia_driver
from .providers import PROVIDERS

INTERESTING = ("keras-resnet-export", "keras", "tensorflow", "tf2onnx", "onnx", "onnx-ir", "numpy", "pillow")
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
WHEELS = {"libcud": "pip install 'keras-resnet-export[gpu]'", "libnvinfer": "pip install 'tensorrt-cu13>=10.13,<11'"}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, and what to do about it."""

    problem: str
    fix: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        versions: `{distribution: version}` of what matters here, with Python and the platform.
        driver: The NVIDIA driver's version, or None.
        devices: `{device: "starts" | reason why not}`.
        missing: `{device: [library, …]}`.
        findings: Tuple of `Finding`.
    """

    versions: dict[str, str]
    driver: str | None
    devices: dict[str, str]
    missing: dict[str, list[str]]
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this installation. Starts each device once; imports neither Keras nor TensorFlow.

    Returns:
        Diagnosis
    """
    found = installed()
    devices = {device: start(device) for device in PROVIDERS}
    lacking = {device: names for device in PROVIDERS if (names := missing(device))}
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: found[name] for name in (*INTERESTING, *RUNTIMES) if name in found}
    driver = nvidia_driver()
    findings = [*clashes(found), *(library_finding(device, names, driver) for device, names in lacking.items())]
    return Diagnosis(versions, driver, devices, lacking, tuple(findings))


def installed() -> dict[str, str]:
    """Return `{distribution name in lower case: version}`."""
    return {
        entry.metadata["Name"].lower(): entry.version for entry in importlib.metadata.distributions() if entry.metadata["Name"]
    }


def start(device: str) -> str:
    """Return `"starts"`, or the reason why a session on a device does not."""
    from .sessions import session

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        _write_probe(path)
        try:
            session(path, device)
        except DeviceError as error:
            return str(error).removesuffix("; `resnet-export doctor` says how to fix it")
    return "starts"


def _write_probe(path):
    """A file with one convolution: what a classifier needs of a device."""
    import numpy as np
    import onnx
    from onnx import helper

    kernel = onnx.numpy_helper.from_array(np.ones((4, 3, 3, 3), "float32"), "kernel")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")]
    values[0].type.tensor_type.shape.CopyFrom(helper.make_tensor_type_proto(1, [1, 3, 8, 8]).tensor_type.shape)
    graph = helper.make_graph([helper.make_node("Conv", ["x", "kernel"], ["y"])], "probe", values[:1], values[1:], [kernel])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def clashes(found: dict[str, str]) -> list[Finding]:
    """Return the conflicts between installed distributions.

    Args:
        found: `{distribution name: version}`.

    Returns:
        List of `Finding`.
    """
    findings = []
    runtimes = [name for name in RUNTIMES if name in found]
    if len(runtimes) > 1:
        keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found else runtimes[0]
        findings.append(
            Finding(
                f"{' and '.join(runtimes)} are both installed and overwrite each other's files",
                f"pip uninstall -y {' '.join(runtimes)} && pip install {keep}",
            )
        )
    if not runtimes:
        findings.append(Finding("no onnxruntime is installed", "pip install onnxruntime-gpu"))
    if clash.RIVAL in found:
        findings.append(Finding(clash.sentence(found[clash.RIVAL]), clash.FIX))
    if "nvidia-cudnn-cu12" in found and "nvidia-cudnn-cu13" in found:
        findings.append(
            Finding(
                "nvidia-cudnn-cu12 and -cu13 write the same files: TensorFlow (CUDA 12) or onnxruntime (CUDA 13) breaks",
                "two environments, or pip install 'keras-resnet-export[train-gpu]' for one with CUDA 12 only",
            )
        )
    if found.get("onnxruntime-gpu", "").startswith("1.27."):
        findings.append(Finding("onnxruntime-gpu 1.27 does not import without CUDA 13", "pip install 'onnxruntime-gpu>=1.28'"))
    return findings


def library_finding(device: str, names: Sequence[str], driver: str | None) -> Finding:
    """Return a `Finding` on the libraries that a device lacks."""
    if driver is None:
        return Finding(f"{device}: there is no NVIDIA driver", "install one (580 or later for CUDA 13), or use the CPU")
    fixes = [fix for start, fix in WHEELS.items() if any(name.startswith(start) for name in names)]
    return Finding(f"{device}: {', '.join(names)} missing", fixes[-1] if fixes else WHEELS["libcud"])
