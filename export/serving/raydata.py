"""`bulk` on Ray Data: the same rows in the same order, from a pool of workers on one machine or many."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.data import DataContext

from ..errors import UsageError
from .bulk import Item, LocalClassifier, batched

if TYPE_CHECKING:
    import numpy as np


# Items whose names and bytes are handed to Ray at a time; each such window has its own pool of workers.
WINDOW = 100_000


@dataclass(frozen=True)
class PoolOptions:
    """The workers of a cluster.

    Args:
        workers: How many.
        cpus: Cores, and threads of onnxruntime, of each.
        gpus: GPUs of each; a fraction shares one.
        address: A running cluster (`auto`, `ray://HOST:PORT`); None starts one on this machine.
        batch: Images per run.
        scores: Name of the output that scores classes, for a file that does not state it.
        output_kind: Kind of that output; by default the file's.
    """

    workers: int = 1
    cpus: int = 1
    gpus: float = 0.0
    address: str | None = None
    batch: int = 16
    scores: str | None = None
    output_kind: str | None = None


def join(address: str | None) -> None:
    """Connect to a running cluster, or start one on this machine (None), without its dashboard and without usage statistics.

    Raises:
        UsageError: There is no cluster at that address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        # Without "local" Ray would look for the last cluster that was started here, be it gone or not.
        ray.init(address=address or "local", include_dashboard=False if address is None else None, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise UsageError(f"cannot join the cluster at {address}: {error}") from error


class RayClassifier:
    """Images to rows of the result, on a cluster; see `bulk.LocalClassifier`, of which every worker has one.

    Args:
        path: ONNX file, under the same path on every machine; images that are given as paths, too.
        device: See `resnet_export.runtime.session`.
        top: Classes per image.
        options: `PoolOptions`.

    Raises:
        UsageError: No such file, no classifier, or no cluster at that address.
    """

    def __init__(
        self, path: str | os.PathLike[str], device: str = "auto", top: int = 5, options: PoolOptions = PoolOptions()
    ) -> None:
        self.options = options
        # Opened here once on the CPU, for the settings, and so that mistakes are told before anything starts.
        declared: dict[str, Any] = {"scores": options.scores, "output_kind": options.output_kind}
        opened = LocalClassifier(path, "cpu", top, threads=1, **declared)
        self.settings, self.top = opened.settings, opened.top
        self.worker = {"path": str(Path(path).absolute()), "device": device, "top": top, "batch": options.batch, **declared}
        if not ray.is_initialized():
            join(options.address)

    def rows(self, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
        """Yield one row per item, in order; an image that cannot be read is a row with an `error`."""
        context = DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        for window in batched(items, WINDOW):
            data = ray.data.from_items([_packed(item) for item in window], override_num_blocks=self._blocks(len(window)))
            found = data.map_batches(
                _Worker,
                fn_constructor_kwargs={**self.worker, "threads": self.options.cpus},
                concurrency=self.options.workers,
                batch_size=4 * self.options.batch,
                num_cpus=self.options.cpus,
                num_gpus=self.options.gpus,
            )
            for row in found.iter_rows():
                yield json.loads(row["row"])

    def _blocks(self, count):
        """Enough blocks that all workers have something to do until the end, but none smaller than a batch."""
        return max(1, min(8 * self.options.workers, count // (4 * self.options.batch)))


class _Worker:
    """A model, opened once per worker."""

    def __init__(self, **options: Any) -> None:
        self.classifier = LocalClassifier(**options, workers=options["threads"])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        fields = zip(batch["name"], batch["path"], batch["image"], strict=True)
        items = [Item(str(name), bytes(image) if path == b"" else Path(os.fsdecode(path))) for name, path, image in fields]
        return {"row": [json.dumps(row) for row in self.classifier.rows(items)]}


def _packed(item):
    """An item as a row of a table, in which every column has one type."""
    if isinstance(item.source, bytes):
        return {"name": item.name, "path": b"", "image": item.source}
    return {"name": item.name, "path": os.fsencode(Path(item.source).absolute()), "image": b""}
