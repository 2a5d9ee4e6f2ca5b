"""What a person sees of a run: progress, a CSV, TensorBoard, curves."""

from __future__ import annotations

import csv
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

import numpy as np

from .run import TrainingError

if TYPE_CHECKING:
    from rich import progress as rich_progress

FIRST, LAST = ("epoch", "step"), ("learning_rate", "images_per_second", "seconds")


def columns(rows: list[dict]) -> list[str]:
    """Return the columns of a log: those of all its rows; without rows, those of a classifier."""
    found = dict.fromkeys(name for row in rows for name in row if name not in FIRST + LAST)
    return [*FIRST, *(found or ("loss", "accuracy", "val_loss", "val_accuracy")), *LAST]


class Progress:
    """A live line on a terminal (rich), a line per epoch elsewhere.

    Args:
        total: Steps of the run.
        steps_per_epoch: Steps per epoch.
        batch: Examples per step.
        quiet: Print nothing.
        file: Where to print; None is standard error.
    """

    def __init__(self, total: int, steps_per_epoch: int, batch: int, quiet: bool = False, file: TextIO | None = None) -> None:
        self.total, self.steps_per_epoch, self.batch = total, steps_per_epoch, batch
        self.quiet, self.file = quiet, file or sys.stderr
        self._bar: rich_progress.Progress | None = None
        self._task: rich_progress.TaskID | None = None
        self._shown = 0.0

    def __enter__(self) -> Self:
        if not self.quiet and self.file.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            console = Console(file=self.file)
            # The figures come first where there is no room for both.
            bar = [BarColumn()] if console.width >= 110 else []
            self._bar = Progress(
                TextColumn("{task.description}"), *bar, TimeRemainingColumn(compact=True), console=console, transient=True
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self.total)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._bar.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.file, flush=True)

    def due(self) -> bool:
        """Return whether to show progress: at most ten times a second, because estimating the time left takes milliseconds."""
        return self._bar is not None and time.perf_counter() - self._shown >= 0.1

    def step(self, step: int, logs: dict, rate: float, speed: float) -> None:
        """Show where the run is.

        Args:
            step: Steps done.
            logs: Running means of loss and metrics.
            rate: Learning rate.
            speed: Images per second.
        """
        self._shown = time.perf_counter()
        epoch = min(step - 1, self.total - 1) // self.steps_per_epoch + 1
        where = f"epoch {epoch}/{self.total // self.steps_per_epoch}  {step}/{self.total}"
        means = "  ".join(f"{name} {np.mean(value):.3f}" for name, value in _first(logs))
        figures = f"{means}  {speed:.0f} img/s  learning rate {rate:.1e}"
        self._bar.update(self._task, completed=step, description=f"{where}  {figures}")

    def epoch(self, row: dict, epochs: int) -> None:
        """The line of an epoch that is done."""
        means = "  ".join(f"{name} {row[name]:.4f}" for name in row if name not in FIRST + LAST)
        left = (self.total - row["step"]) * self.batch / max(row["images_per_second"], 0.1)  # rounded, it can be 0
        self.line(
            f"epoch {row['epoch']}/{epochs}  {means}  "
            f"learning rate {row['learning_rate']:.2e}  {row['images_per_second']:.0f} images/s  {_duration(left)} left"
        )


def _first(logs, most=4):
    """The first few figures, the loss before all others."""
    names = sorted(logs, key=lambda name: name != "loss")
    return [(name, logs[name]) for name in names[:most]]


def _duration(seconds):
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {int(seconds % 60):02d} s"


def write_csv(rows: list[dict], path: Path) -> None:
    """Write all rows, so that a run that was interrupted records nothing twice."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns(rows), restval="")
            writer.writeheader()
            writer.writerows(rows)

    replace(path, write)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file next to its target, then rename it. Both have the same ending, because Keras takes the format from it.

    Args:
        path: The file.
        write: Function of the path to write to.

    Raises:
        TrainingError: It cannot be written; what was there stays.
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written ({error.strerror or error}); fix that and give the same command again"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


class TensorBoardLog:
    """TensorBoard scalars per epoch. A run that resumes writes all its rows again."""

    def __init__(self, folder: Path, rows: list[dict]) -> None:
        import importlib.util

        import tensorflow as tf

        if importlib.util.find_spec("tensorboard") is None:
            raise TrainingError("TensorBoard is not installed: pip install 'keras-resnet-export[tensorboard]'")
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = tf.summary.create_file_writer(str(folder))
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> None:
        """Write the scalars of an epoch."""
        import tensorflow as tf

        with self._writer.as_default(step=row["epoch"]):
            for name in row:
                if name not in FIRST:
                    tf.summary.scalar(name, row[name])
        self._writer.flush()


def curves(rows: list[dict], path: Path, title: str = "") -> object:
    """Draw loss and accuracy over epochs (extra `demo`).

    Args:
        rows: Rows of the log.
        path: Picture to write.
        title: Above it.
    """
    from matplotlib.figure import Figure

    metrics = [name for name in columns(rows) if name not in FIRST + LAST and not name.startswith("val_") and name != "loss"]
    names = ["loss", *metrics[:1]]
    figure = Figure(figsize=(5 * len(names), 4))
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "validation")):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
        axis.set(xlabel="epoch", ylabel=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    if title:
        figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return figure
