"""Where a run's replicas are: one device, several of one process, or several processes."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from ..data.order import Share
from .run import Run, TrainingError, check_addresses


class DeviceError(TrainingError):
    """A device that was asked for is not there.

    `resnet_export.DeviceError` is another class, because its runtime imports neither Keras nor TensorFlow nor this package.
    """

    exit_code = 4


@dataclass(frozen=True, eq=False)
class Placement:
    """A strategy, and which part of every global batch this process reads.

    Args:
        strategy: `tf.distribute.Strategy`.
        index: Number of this process.
        processes: How many there are.
    """

    strategy: tf.distribute.Strategy
    index: int = 0
    processes: int = 1

    @property
    def replicas(self) -> int:
        return self.strategy.num_replicas_in_sync

    @property
    def local_replicas(self) -> int:
        return self.replicas // self.processes

    @property
    def chief(self) -> bool:
        """Whether this process writes files."""
        return self.index == 0

    @property
    def multi_worker(self) -> bool:
        return self.processes > 1

    def share(self, batch: int) -> Share:
        """This process's part of a global batch.

        Raises:
            TrainingError: The batch cannot be divided evenly.
        """
        if batch % self.replicas:
            near = max(1, batch // self.replicas) * self.replicas
            raise TrainingError(
                f"`batch_size` must be a multiple of the {self.replicas} replicas, got {batch}; "
                f"the nearest are {near} and {near + self.replicas}"
            )
        own = batch // self.processes
        return Share(self.index * own, own)

    def distribute(self, dataset: tf.data.Dataset) -> Any:
        """Return a dataset of this process's batches, one per replica, as the strategy takes it."""
        if self.replicas == 1:
            return dataset
        return self.strategy.distribute_datasets_from_function(lambda context: dataset)

    def any(self, value: bool) -> bool:
        """Return whether a value is true in any process; every process must call it."""
        if not self.multi_worker:
            return value
        return self.sum(float(value)) > 0

    def sum(self, value: float) -> float:
        """Return the sum of a value over all replicas; every process must call it."""

        @tf.function
        def total() -> tf.Tensor:
            return self.strategy.reduce("SUM", self.strategy.run(lambda: tf.constant(value, tf.float64)), axis=None)

        return float(total())

    def of_chief(self, value: float) -> float:
        """Return the chief's value, in every process; every process must call it."""
        return self.sum(value if self.chief else 0.0) / self.local_replicas if self.multi_worker else value

    def describe(self) -> str:
        """Return one line for the log."""
        # The class of the multi-worker strategy has another name than the public one.
        name = "one device" if self.replicas == 1 else "MultiWorkerMirroredStrategy" if self.multi_worker else "MirroredStrategy"
        where = f"process {self.index + 1} of {self.processes}, " if self.multi_worker else ""
        return f"{name}, {where}{self.replicas} replica{'s' if self.replicas > 1 else ''}"


def place(run: Run, quiet: bool = False) -> Placement:
    """Decide where a `Run` is placed. Call it before any other use of TensorFlow's devices.

    With several workers it waits for all of them to start; meanwhile Ctrl-C ends the process (a notebook's kernel as well).

    Args:
        run: `Run`; its `workers`, or the environment variable `TF_CONFIG`, make a multi-worker run.
        quiet: Do not say which workers are waited for.

    Raises:
        DeviceError: A device that is asked for is not there.
        TrainingError: `TF_CONFIG` cannot be read, its own address cannot be listened on, or Keras runs on another backend.
    """
    if keras.backend.backend() != "tensorflow":
        raise TrainingError(f"training needs KERAS_BACKEND=tensorflow, it is {keras.backend.backend()}")
    if run.workers:
        os.environ["TF_CONFIG"] = tf_config(run.workers, run.index)
    if os.environ.get("TF_CONFIG"):
        cluster, index = _cluster()
        if len(cluster) > 1:
            _use(run.devices)
            if not quiet:
                others = ", ".join(address for i, address in enumerate(cluster) if i != index)
                print(f"worker {index} on {cluster[index]} waits for {others}", file=sys.stderr, flush=True)
            try:
                with _interruptible():
                    strategy = tf.distribute.MultiWorkerMirroredStrategy()
            except RuntimeError as error:
                raise TrainingError(
                    "a run with several workers must start before TensorFlow does anything else: "
                    "call `placement = training.place(run)` first, and give it to `fit`"
                ) from error
            except tf.errors.UnknownError as error:
                raise TrainingError(
                    f"worker {index} cannot listen on {cluster[index]} ({error.message.rstrip('.')}); "
                    "is the port in use, or --index given twice?"
                ) from error
            return Placement(strategy, index, len(cluster))
    names = _use(run.devices)
    if len(names) > 1:
        # NCCL is for GPUs; logical CPUs, for trials, reduce to one of them.
        ops = None if all(name.startswith("GPU") for name in names) else tf.distribute.ReductionToOneDevice()
        return Placement(tf.distribute.MirroredStrategy(names, cross_device_ops=ops))
    if run.devices:
        return Placement(tf.distribute.OneDeviceStrategy(f"/{names[0]}"))
    return Placement(tf.distribute.get_strategy())


@contextlib.contextmanager
def _interruptible():
    """Let Ctrl-C end the process where TensorFlow waits and Python's handler would have to wait as well."""
    former = signal.getsignal(signal.SIGINT)
    if former is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def tf_config(workers: Sequence[str], index: int) -> str:
    """Return the string of `TF_CONFIG` for one of several workers."""
    return json.dumps({"cluster": {"worker": list(workers)}, "task": {"type": "worker", "index": index}})


def is_chief() -> bool:
    """Return whether this process is the one of a run that writes."""
    return not os.environ.get("TF_CONFIG") or _cluster()[1] == 0


def _cluster():
    try:
        config = json.loads(os.environ["TF_CONFIG"])
        cluster, task = config["cluster"], config["task"]
        addresses = [*cluster.get("chief", []), *cluster.get("worker", [])]
        index = task["index"] + (len(cluster.get("chief", [])) if task["type"] == "worker" else 0)
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            "TF_CONFIG cannot be read; it must be JSON with `cluster` and `task`, or use --workers and --index"
        ) from error
    check_addresses(addresses, "addresses of TF_CONFIG")
    if not 0 <= index < len(addresses):
        raise TrainingError(f"TF_CONFIG has task {index} but {len(addresses)} workers")
    return addresses, index


def _use(devices):
    """Names of the devices to train on; splits the CPU where several are asked for."""
    gpus = tf.config.list_physical_devices("GPU")
    if not devices:
        return [f"GPU:{i}" for i in range(len(gpus))] or ["CPU:0"]
    names = [name.upper() for name in devices]
    logical = sum(name.startswith("CPU") for name in names)
    if logical > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * logical
        try:
            tf.config.set_logical_device_configuration(cpu, parts)
        except RuntimeError as error:
            if len(tf.config.list_logical_devices("CPU")) < logical:
                raise DeviceError("TensorFlow has started already, so the CPU cannot be split; ask for devices first") from error
    there = {f"{device.device_type}:{device.name.rsplit(':', 1)[1]}" for device in tf.config.list_logical_devices()}
    if missing := [name for name in names if name not in there]:
        raise DeviceError(f"no device {missing[0]}; there are {', '.join(sorted(there))}")
    return names
