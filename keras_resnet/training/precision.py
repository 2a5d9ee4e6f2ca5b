"""The precision of a run whose `precision` is "auto": what the hardware computes fast, which CPUs confirm by a measurement."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from .run import Run, TrainingError
from .strategies import Placement

FLOAT32, BFLOAT16, FLOAT16 = "float32", "mixed_bfloat16", "mixed_float16"
# Flags of CPUs that multiply bfloat16: AVX-512 and AMX of x86, and SVE or NEON of Arm.
CPU_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
# How much faster bfloat16 must be on a CPU, and how long each of the two is measured, in seconds.
GAIN, SECONDS = 1.1, 0.4


def chosen_precision(run: Run, placement: Placement, out: str | os.PathLike[str] | None, report: Callable[[str], None]) -> str:
    """Decide the precision of a run; every process must call it, and all get the same answer.

    A run that resumes keeps what its `run.yaml` says.

    Args:
        run: The run.
        placement: Where its replicas are.
        out: Folder of the results.
        report: Called with a line that says what was chosen and why.

    Returns:
        The run's own precision, or the one that "auto" stands for: "mixed_bfloat16", "mixed_float16" or "float32".
    """
    if run.precision != "auto":
        return run.precision
    found, reason = _recorded(out) or _of_hardware()
    names = (FLOAT32, FLOAT16, BFLOAT16)
    if placement.multi_worker:
        votes = [placement.sum(float(found == name)) / placement.replicas for name in names]
        if max(votes) < 1:
            found, reason = FLOAT32, "the workers do not agree on another"
    report(f"precision {found}: {reason}")
    return found


def _recorded(out: str | os.PathLike[str] | None) -> tuple[str, str] | None:
    """What was chosen when the run began."""
    if out is None or not (Path(out) / "checkpoint.safetensors").exists():
        return None
    try:
        known = Run.load(Path(out) / "run.yaml").precision
    except TrainingError:
        return None
    return None if known == "auto" else (known, "chosen when this run began")


def _of_hardware() -> tuple[str, str]:
    if gpus := tf.config.list_physical_devices("GPU"):
        major = min(tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0))[0] for gpu in gpus)
        reason = f"what GPUs of compute capability {major} compute fast"
        return (BFLOAT16 if major >= 8 else FLOAT16 if major == 7 else FLOAT32), reason
    if not CPU_FLAGS & cpu_flags():
        return FLOAT32, "this CPU has no bfloat16 units"
    gain = measured_gain()
    told = f"a convolution takes {1 / gain:.2f} of its float32 time in bfloat16 on this CPU"
    return (BFLOAT16 if gain >= GAIN else FLOAT32), told


def cpu_flags() -> frozenset[str]:
    """Return the CPU's features as Linux names them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "").split())


def measured_gain() -> float:
    """Time of a convolution with its gradients in float32, divided by that in bfloat16; takes about a second."""
    seconds = {dtype: _seconds(dtype) for dtype in (tf.float32, tf.bfloat16)}
    return seconds[tf.float32] / seconds[tf.bfloat16]


def _seconds(dtype: tf.DType) -> float:
    """The shortest of several times."""
    with tf.device("CPU:0"):
        x, kernel = tf.ones((32, 14, 14, 128), dtype), tf.ones((3, 3, 128, 128), dtype)

    @tf.function
    def step(x: tf.Tensor, kernel: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = tf.nn.conv2d(x, kernel, 1, "SAME")
        return tape.gradient(y, [x, kernel])

    step(x, kernel)
    shortest, end = float("inf"), time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        step(x, kernel)[1].numpy()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest
