"""Runs through buffers that stay where they are, one set per batch size: what a CUDA graph needs, and an engine likes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from ..errors import UsageError

if TYPE_CHECKING:
    from .sessions import TensorInfo


class Buckets:
    """Runs an onnxruntime session with a few batch sizes only: rows are filled up to the next one, or split at the largest.

    A GPU benchmarks its convolutions again for every batch size that it meets, and a CUDA graph replays one size, from and to
    the addresses it was captured with; each size therefore has input and output buffers of its own on the device.

    Args:
        session: `onnxruntime.InferenceSession`.
        inputs, outputs: `runtime.TensorInfo` of all of them.
        sizes: Batch sizes.
        memory: Where the buffers lie: `"cpu"` or `"cuda"`.
        device_id: Index of the GPU.
        graphs: Whether the session captures CUDA graphs; each size is then one of its own.

    Raises:
        UsageError: No sizes or one below 1, or an input or output in which a size other than the batch is dynamic.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Sequence[TensorInfo],
        outputs: Sequence[TensorInfo],
        sizes: Iterable[int],
        *,
        memory: str = "cpu",
        device_id: int = 0,
        graphs: bool = False,
    ) -> None:
        self.sizes = checked_sizes(sizes)
        for value in (*inputs, *outputs):
            if not isinstance(value.shape[0], str) or any(isinstance(size, str) for size in value.shape[1:]):
                raise UsageError(
                    f"`batches` needs a dynamic batch size and fixed other sizes, `{value.name}` has {list(value.shape)}; "
                    "export the file again"
                )
        self._session, self._inputs, self._outputs = session, inputs, outputs
        self._memory, self._device_id, self._graphs = memory, device_id, graphs
        self._bound = {}
        self._lock = threading.Lock()  # the buffers are shared between callers

    def run(self, feeds: dict[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
        """Return outputs as arrays of the caller's own, in the order of `names`.

        Args:
            feeds: `{input name: array}`, of the right dtypes.
            names: Output names.

        Raises:
            UsageError: No rows, or inputs of different numbers of rows.
        """
        counts = {len(array) for array in feeds.values()}
        if len(counts) != 1 or 0 in counts:
            raise UsageError(f"all inputs need the same number of rows, at least one; got {sorted(counts)}")
        (rows,), most = counts, self.sizes[-1]
        with self._lock:
            parts = [
                self._run_part({name: array[start : start + most] for name, array in feeds.items()}, names)
                for start in range(0, rows, most)
            ]
        return parts[0] if len(parts) == 1 else [np.concatenate(pieces) for pieces in zip(*parts, strict=True)]

    def _run_part(self, feeds, names):
        rows = len(next(iter(feeds.values())))
        size = next(size for size in self.sizes if size >= rows)
        if size not in self._bound:
            self._bound[size] = self._bind(size)
        binding, buffers, options = self._bound[size]
        for name, array in feeds.items():
            buffers[name].update_inplace(_filled_up(array, size))
        self._session.run_with_iobinding(binding, options)
        # A view of the buffer on the CPU, a copy from the GPU; the next run overwrites the buffer.
        return [np.array(buffers[name].numpy()[:rows]) for name in names]

    def _bind(self, size):
        """`(io-binding, {name: buffer}, run options)` for one batch size."""
        binding, buffers = self._session.io_binding(), {}
        for values, bind in ((self._inputs, binding.bind_ortvalue_input), (self._outputs, binding.bind_ortvalue_output)):
            for value in values:
                shape, dtype = [size, *value.shape[1:]], np.dtype(value.dtype)
                buffer = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._memory, self._device_id)
                buffers[value.name] = buffer
                bind(value.name, buffer)
        options = ort.RunOptions()
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(size))
        return binding, buffers, options


def checked_sizes(sizes: Iterable[int]) -> tuple[int, ...]:
    """Batch sizes as a rising tuple without repetitions.

    Raises:
        UsageError: There is no size, or one is not an integer of at least 1.
    """
    sizes = tuple(sizes)
    if not sizes or any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in sizes):
        raise UsageError(f"`batches` must be batch sizes of at least 1, got {list(sizes)}")
    return tuple(sorted(set(sizes)))


def _filled_up(array, size):
    if len(array) == size:
        return np.ascontiguousarray(array)
    full = np.zeros((size, *array.shape[1:]), array.dtype)
    full[: len(array)] = array
    return full
