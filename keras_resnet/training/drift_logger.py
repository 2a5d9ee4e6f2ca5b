"""Watch the blocks drift away from the identity while a model trains: CSV, TensorBoard and a heat map."""

from __future__ import annotations

import csv
import importlib.util
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from ..growth import drift

COLUMNS = ("epoch", "block", "gate", "mean", "max", "gate_value", "variance_share")


class DriftLogger(keras.callbacks.Callback):
    """Measure `kr.drift` before the first epoch and after every epoch.

    Args:
        data: What `kr.drift` takes; a batch or two are enough.
        csv_path: File that gets a row per epoch and block (columns `COLUMNS`); None writes none. A row of an epoch
            that is already there, from an interrupted run that resumes, is not written again.
        tensorboard: Folder for TensorBoard scalars `drift/{block}` and `gate/{block}`; None writes none.
        every: Epochs between two measurements. Default 1.
        batch_size: For arrays. Default 32.

    Attributes:
        history: List of `(epoch, DriftReport)`; epoch 0 is the state before training.

    Raises:
        ValueError: `every` below 1, or a CSV file with other columns.
        ImportError: `tensorboard` is given and TensorBoard is not installed.
    """

    def __init__(
        self,
        data: Any,
        csv_path: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        every: int = 1,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"`every` must be at least 1, got {every}")
        if tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "TensorBoard is not installed: pip install 'keras-resnet-export[tensorboard]', or leave out `tensorboard`"
            )
        self.data, self.every, self.batch_size = data, every, batch_size
        self.csv_path = None if csv_path is None else Path(csv_path)
        self.tensorboard, self._writer = tensorboard, None
        self.history = []
        self._written = set() if self.csv_path is None else _epochs_in(self.csv_path)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if not self.history:
            self._measure(epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if (epoch + 1) % self.every == 0:
            self._measure(epoch + 1)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _measure(self, epoch):
        report = drift(self.model, self.data, self.batch_size)
        self.history.append((epoch, report))
        if self.csv_path is not None and epoch not in self._written:
            _append(self.csv_path, epoch, report)
            self._written.add(epoch)
        if self.tensorboard is not None:
            self._to_tensorboard(epoch, report)

    def _to_tensorboard(self, epoch, report):
        import tensorflow as tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self.tensorboard))
        with self._writer.as_default(step=epoch):
            for block in report:
                tf.summary.scalar(f"drift/{block.block}", block.mean)
                if block.gate_value is not None:
                    tf.summary.scalar(f"gate/{block.block}", block.gate_value)
        self._writer.flush()


def _epochs_in(path):
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or COLUMNS) != COLUMNS:
            raise ValueError(f"{path} is not a drift log (columns {', '.join(rows.fieldnames)}); give another `csv_path`")
        return {int(row["epoch"]) for row in rows}


def _append(path, epoch, report):
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for block in report:
            writer.writerow([epoch, *(getattr(block, column) for column in COLUMNS[1:])])


def drift_figure(log: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """Draw a drift log as a heat map: blocks from input to output × epochs, colour ‖F(x)‖/‖x‖ (mean over images).

    Args:
        log: CSV file of a `DriftLogger`, or the `DriftLogger`.
        path: Picture to write; None writes none.

    Returns:
        Matplotlib Figure (extra `demo`).

    Raises:
        ValueError: The log is empty.
    """
    from matplotlib.figure import Figure

    rows = _rows(log)
    if not rows:
        raise ValueError("the drift log is empty: nothing was measured yet")
    counts = [len({row[i] for row in rows}) for i in (0, 1)]
    figure = Figure(figsize=(max(4, min(12, 2.5 + 0.3 * counts[0])), max(2, 0.8 + 0.24 * counts[1])))
    heat_map(rows, figure.subplots())
    if path is not None:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return figure


def heat_map(rows: Any, axis: Any, norm: Any = None) -> None:
    """Draw drift into axes of matplotlib.

    Args:
        rows: `(epoch, block, ‖F(x)‖/‖x‖)`, blocks in order of execution; a block that an epoch lacks stays white there.
        axis: Where to; a colour bar is put next to it.
        norm: Of matplotlib, for a scale of colours that several maps share; None for a linear one from 0.
    """
    epochs = sorted({epoch for epoch, _, _ in rows})
    # A model that grew has more blocks later, and their order there is the one that holds.
    blocks = list(dict.fromkeys(block for epoch, block, _ in sorted(rows, key=lambda row: -row[0])))
    values = np.full((len(blocks), len(epochs)), np.nan)
    for epoch, block, ratio in rows:
        values[blocks.index(block), epochs.index(epoch)] = ratio
    scale = {"vmin": 0} if norm is None else {"norm": norm}
    image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest", **scale)
    axis.set_yticks(range(len(blocks)), blocks, fontsize=8)
    ticks = sorted({int(i) for i in np.linspace(0, len(epochs) - 1, min(len(epochs), 12))})
    axis.set_xticks(ticks, [epochs[i] for i in ticks])
    axis.set(xlabel="epoch (0: before training)", ylabel="block, from input to output")
    axis.figure.colorbar(image, ax=axis, label="‖F(x)‖ / ‖x‖")


def _rows(log):
    if isinstance(log, DriftLogger):
        return [(epoch, block.block, block.mean) for epoch, report in log.history for block in report]
    with Path(log).open(newline="", encoding="utf-8") as file:
        return [(int(row["epoch"]), row["block"], float(row["mean"])) for row in csv.DictReader(file)]
