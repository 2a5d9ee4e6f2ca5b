"""What the commands print: tables and sentences, progress on a terminal, JSON for programs."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from .artifact import check_target, is_written_through, written
from .errors import UsageError

if TYPE_CHECKING:
    from .results import ExportResult, VerificationReport
    from .runtime.doctor import Diagnosis
    from .runtime.prediction import Prediction


def show(data: Any, text: str, as_json: bool) -> None:
    """Print `data` as JSON, or the text."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=_plain) if as_json else text)


def _plain(value):
    return value.item() if hasattr(value, "item") else str(value)


def write_json(path: str | os.PathLike[str] | None, report: VerificationReport | None) -> None:
    """Write a report's JSON to a file, if there are both.

    Raises:
        UsageError: The file cannot be written.
    """
    if path and report is not None:
        write_text(path, json.dumps(report.to_json(), indent=2, default=_plain))


def check_figure_files(
    paths: Iterable[str | os.PathLike[str] | None], taken: Iterable[str | os.PathLike[str] | None] = ()
) -> None:
    """Refuse, before any work, files for figures that could not be written or would take the place of another file.

    Args:
        paths: Paths that the command will write in addition to its output, replacing what is there; None where not asked for.
        taken: Paths that it reads, or writes otherwise.

    Raises:
        UsageError: A file cannot be written; the message names it.
    """
    taken = [path for path in taken if path]
    for path in paths:
        if path is None:
            continue
        check_apart(path, taken)
        if not is_written_through(path):
            check_target(path, overwrite=True)
        taken.append(path)


def files(*paths: str | os.PathLike[str] | None) -> list[str | os.PathLike[str]]:
    """Those of some options' values that are files, rather than names, folders or nothing."""
    return [path for path in paths if path and os.path.isfile(path)]


def check_apart(path: str | os.PathLike[str], taken: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse a path that is one of others.

    Raises:
        UsageError: It is, perhaps through a link.
    """
    if os.path.realpath(path) in {os.path.realpath(other) for other in taken}:
        raise UsageError(f"cannot write {path}: the command has another use for that file; choose another name")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file; see `written`."""
    with written(path) as target, open(target, "w", newline="", encoding="utf-8") as file:
        file.write(text)


def notes(sentences: Iterable[str]) -> None:
    """Warnings, one line each, on standard error."""
    for sentence in sentences:
        click.echo(f"note: {sentence}", err=True)


def chosen(devices: Sequence[str]) -> None:
    """Say what `auto` takes and why, if it is among the devices."""
    from .runtime.sessions import choice

    if "auto" in devices:
        notes([choice()[1]])


@contextlib.contextmanager
def steps(as_json: bool) -> Iterator[Callable[[str], None]]:
    """A spinner that names the current step, on a terminal; silent where output is piped or JSON.

    Yields:
        Function of a step's name.
    """
    if as_json or not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda step: status.update(f"{step} …")


def table(data: dict[str, Any]) -> str:
    """Format a dict as aligned lines, with a line for each dict in a list."""
    width = max(len(key) for key in data)
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{key if not index else '':{width}}  {_pairs(entry)}" for index, entry in enumerate(value)]
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            lines.append(f"{key:{width}}  {_pairs(shown) if isinstance(shown, dict) else shown}")
    return "\n".join(lines)


def inspection_text(entry: dict[str, Any]) -> str:
    """Format an inspected file as lines, with a summary of its card; `--json` prints all of it."""
    shown = {key: value for key, value in entry.items() if key not in ("blocks", "metadata")}
    metadata = dict(entry.get("metadata") or {})
    card = metadata.pop("card", None) or {}
    summary = {
        "model": card.get("name"),
        "labels": card.get("labels"),
        "preprocessing": (card.get("preprocessing") or {}).get("mode"),
        "weights": (card.get("weights") or {}).get("source"),
    }
    if any(value is not None for value in summary.values()):
        shown["card"] = summary
    if "outputs" in metadata:
        shown["output_kinds"] = metadata.pop("outputs")
    return table(shown | {key: value for key, value in metadata.items() if value})


def _pairs(entry):
    return ", ".join(f"{key} {value}" for key, value in entry.items() if value is not None)


def export_text(result: ExportResult) -> str:
    """Format an `ExportResult` as text."""
    lines = [f"note: {note}" for note in dict.fromkeys((*result.notes, *result.report.notes))]
    lines += [f"{result.path}  {result.size / 1e6:,.1f} MB  sha256 {result.sha256[:16]}", verification_text(result.report)]
    return "\n".join([*lines, *precision_text(result.table)])


COLUMNS = ("output", "batch", "data", "runtime", "max_abs", "mean_abs", "relative", "cosine", "top1", "top5")


def verification_text(report: VerificationReport) -> str:
    """Format a `VerificationReport` as text: a table of all comparisons, and the verdict."""
    rows = [COLUMNS] + [tuple(_cell(getattr(comparison, column)) for column in COLUMNS) for comparison in report.comparisons]
    lines = columns(rows) if report.comparisons else []
    if report.weights:
        lines.append(f"{report.weights['compared']} weights ({report.weights['elements']:,} numbers) compared element by element")
    if report.diverges:
        lines.append(f"first layer that differs: {report.diverges}")
    lines += [f"wrong: {problem}" for problem in report.problems]
    return "\n".join([*lines, report.summary()])


def _cell(value):
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.6g}"
    return str(value)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows of strings as aligned lines."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def prediction_text(predictions: Sequence[Prediction]) -> str:
    """Format predictions as text: a line per class, or the values of outputs that do not score classes."""
    if any(prediction.values is not None for prediction in predictions):
        return _values_text(predictions)
    rows = [("image", "class", "label", "probability")]
    for prediction in predictions:
        for rank, index in enumerate(prediction.classes):
            file = prediction.file if rank == 0 else ""
            rows.append((file, str(index), prediction.labels[rank] or "-", f"{prediction.probabilities[rank]:.4f}"))
    return "\n".join(columns(rows))


SHOWN_VALUES = 8
VALUES_HINT = "The file does not say that these outputs score classes. If one does, add --scores NAME --output-kind KIND."


def _values_text(predictions):
    """The first values of every output, and how to declare what they mean."""
    import numpy as np

    rows = [("image", "output", "shape", "values")]
    for prediction in predictions:
        for name, values in prediction.values.items():
            array = np.asarray(values)
            first = " ".join(f"{value:.6g}" for value in array.reshape(-1)[:SHOWN_VALUES].tolist())
            rows.append((prediction.file, name, str(list(array.shape)), first + (" …" if array.size > SHOWN_VALUES else "")))
    return "\n".join([*columns(rows), VALUES_HINT])


def write_csv(path: str | os.PathLike[str] | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write a list of equal dicts as CSV, if a path is given.

    Raises:
        UsageError: The file cannot be written.
    """
    if path:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())


def rows_text(rows: Sequence[dict[str, Any]]) -> str:
    """Format a list of dicts with the same keys as an aligned table."""
    return "\n".join(columns([tuple(rows[0]), *(tuple(_cell(value) for value in row.values()) for row in rows)]))


def precision_text(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Format size, latency and agreement of a file before and after the conversion; see `results.ExportResult.table`."""
    shown = [("precision", "size", "latency", "top-1 agreement")] if rows else []
    for row in rows:
        agreement = "-" if row["top1"] is None else f"{row['top1']:.2%}"
        shown.append((row["precision"], f"{row['size'] / 1e6:,.2f} MB", f"{row['milliseconds']:.2f} ms", agreement))
    return columns(shown) if shown else []


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """Format a `doctor.Diagnosis` as text."""
    lines = columns([*diagnosis.versions.items(), ("NVIDIA driver", diagnosis.driver or "none")])
    lines += ["", *columns(list(diagnosis.devices.items()))]
    lines += [f"{device} lacks {', '.join(names)}" for device, names in diagnosis.missing.items()]
    for finding in diagnosis.findings:
        lines += ["", f"problem: {finding.problem}", f"fix:     {finding.fix}"]
    return "\n".join(lines if diagnosis.findings else [*lines, "", "no conflicts, and nothing is missing"])
