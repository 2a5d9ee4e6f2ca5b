"""Classifying millions of images: streamed in, streamed out, in order, and gone on with after an interruption.

What is done is kept in numbered parts next to the output (`OUT.partial/`), each of which is there whole or not at all; they are
put together at the end.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

from ..artifact import Scores, check_target, publishing
from ..errors import UsageError
from ..runtime.images import SUFFIXES
from ..runtime.prediction import image_input, load_pixels, ranked, scores_or_values, stacked
from ..runtime.sessions import session

PART_ROWS = 1000
FORMATS = (".csv", ".parquet", ".jsonl")


@dataclass(frozen=True)
class Item:
    """One image: what it is called, and its path or its encoded bytes."""

    name: str
    source: object


def read_items(arguments: Iterable[str | os.PathLike[str]]) -> Iterator[Item]:
    """Yield the images that arguments stand for, one by one, in an order that does not change.

    Args:
        arguments: Image files; folders (searched through, sorted); `.txt` files with a path a line; `.parquet` files with a
            column `image` (encoded bytes, or the struct `{bytes, path}` of Hugging Face) or `path`.

    Yields:
        Item

    Raises:
        UsageError: A list or Parquet file that cannot be read, or a folder without images.
    """
    for argument in map(Path, arguments):
        if argument.is_dir():
            paths = _walk(argument)
            if (first := next(paths, None)) is None:
                raise UsageError(f"{argument} holds no images; give a folder that does")
            yield from (Item(printable(path), path) for path in itertools.chain([first], paths))
        elif argument.suffix == ".txt":
            yield from _listed(argument)
        elif argument.suffix == ".parquet":
            yield from _tabulated(argument)
        else:
            yield Item(printable(argument), argument)


def printable(path: str | os.PathLike[str]) -> str:
    """Write a path as text that every output can hold: bytes of a file name that are not UTF-8 become `\\xNN`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class LocalClassifier:
    """Images to rows of the result, with an ONNX file. A file whose outputs do not score classes gives their values.

    Args:
        path: ONNX file that takes images.
        device: See `resnet_export.runtime.session`.
        top: Classes per image.
        batch: Images per run.
        workers: Threads that decode; one per core by default.
        threads: Threads of onnxruntime; its own choice by default.
        scores: Name of the output that scores classes, for a file that does not state it.
        output_kind: Kind of that output; by default the file's.

    Raises:
        UsageError: No such file, or several outputs score classes.
        DeviceError: The device does not start.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        device: str = "auto",
        top: int = 5,
        batch: int = 16,
        workers: int | None = None,
        threads: int | None = None,
        scores: str | None = None,
        output_kind: str | None = None,
    ) -> None:
        self.session = session(path, device, threads=threads)
        self.spec = image_input(self.session)
        self.scores = scores_or_values(self.session, scores, output_kind)
        self.top = top if self.scores else None
        self.batch = self.spec.shape[0] if isinstance(self.spec.shape[0], int) else batch
        self.workers = workers or os.cpu_count() or 1

    @property
    def settings(self) -> dict[str, Any]:
        """The settings in which a run must agree with the one that it resumes."""
        file = self.session.metadata.get("sha256") or str(self.session.path)
        return {"model": file, "top": self.top, "scores": self.scores and [self.scores.output, self.scores.kind]}

    def rows(self, items: Iterable[Item]) -> Iterator[dict[str, Any]]:
        """Yield one row per item, in order; an image that cannot be read is a row with an `error`."""
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            waiting = deque()
            items = iter(items)
            # Decoding goes on while the model runs; four batches ahead is enough, and bounded.
            for item in itertools.islice(items, 4 * self.batch):
                waiting.append((item, pool.submit(self._pixels, item)))
            while waiting:
                group = [waiting.popleft() for _ in range(min(self.batch, len(waiting)))]
                for item in itertools.islice(items, len(group)):
                    waiting.append((item, pool.submit(self._pixels, item)))
                yield from self._classified([(item.name, future.result()) for item, future in group])

    def _pixels(self, item):
        """The pixels, or the reason why there are none."""
        try:
            return load_pixels(item.source, self.session.card, self.spec)
        except UsageError as error:
            return str(error)

    def _classified(self, group):
        rows = [error_row(name, found) if isinstance(found, str) else None for name, found in group]
        by_shape = {}
        for index, (_, found) in enumerate(group):
            if rows[index] is None:
                by_shape.setdefault(found.shape, []).append(index)
        for indices in by_shape.values():
            for part in _parts(indices, self.batch):
                pixels = stacked([group[index][1] for index in part], self.spec)
                outputs = self.session.run(pixels, self.scores and [self.scores.output])
                for row, index in enumerate(part):
                    values = {name: array[row] for name, array in outputs.items()}
                    rows[index] = result_row(group[index][0], values, self.scores, self.session.labels, self.top)
        return rows


def error_row(name: str, error: str) -> dict[str, Any]:
    """Return the row of an image that could not be classified."""
    return {"file": name, "error": error, "classes": [], "labels": [], "probabilities": []}


def result_row(
    name: str, values: Mapping[str, np.ndarray], scores: Scores | None, labels: Sequence[str] | None, top: int | None
) -> dict[str, Any]:
    """Return the row of an image: its best classes or, of a model whose outputs do not score classes, the values of its outputs.

    Args:
        name: How the row names the image.
        values: `{output name: array}` of this image, without the batch axis; with `scores`, that output is enough.
        scores: The output that scores classes, or None.
        labels: Class names, or None.
        top: Number of classes.
    """
    if scores is None:
        listed = {output: array.tolist() for output, array in values.items()}
        return {"file": name, "error": None, "classes": [], "labels": [], "probabilities": [], "values": listed}
    best = ranked(name, scores.probabilities(values[scores.output]), labels, top)
    found = {"classes": list(best.classes), "labels": list(best.labels), "probabilities": list(best.probabilities)}
    return {"file": name, "error": None, **found}


def run(
    items: Iterable[Item],
    classifier: Any,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_rows: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
) -> dict[str, Any]:
    """Classify items and write the rows, in order, to a file.

    Args:
        items: Iterable of `Item`; the same ones again when a run is resumed.
        classifier: Has `settings`, `rows(items)` and `top`, which is None where no classes are ranked.
        out: `.csv`, `.parquet` or `.jsonl` file.
        resume: Go on where an interrupted run stopped.
        overwrite: Replace `out`, and restart even if there is an interrupted run.
        on_rows: Called with every list of rows that has been kept.

    Returns:
        `{"file", "images", "errors", "resumed"}`.

    Raises:
        UsageError: `out` cannot be written, or the interrupted run is of other images or another model.
    """
    out = Path(out)
    if out.suffix not in FORMATS:
        raise UsageError(f"the name of the output must end in {', '.join(FORMATS)}, got {out.name}")
    target = check_target(out, overwrite)
    folder = target.with_name(target.name + ".partial")
    settings = {**classifier.settings, "top": classifier.top}
    with _locked(folder, resume or overwrite):
        done, last = _begin(folder, settings, resume)
        items = iter(items)
        for index, item in enumerate(itertools.islice(items, done), 1):
            if index == done and item.name != last:
                raise UsageError(f"image {done} is now {item.name}, but was {last} in {folder}; restart with --force")
        kept = itertools.count(len(list(_part_files(folder))))
        for rows in batched(classifier.rows(items), PART_ROWS):
            _keep(folder / f"part-{next(kept):08d}.jsonl", rows)
            on_rows(rows)
        counted = {"images": 0, "errors": 0}
        with publishing(target, overwrite) as place:
            _WRITERS[out.suffix](place, _counting(_kept_rows(folder), counted), classifier.top)
        shutil.rmtree(folder)
    return {"file": str(out), **counted, "resumed": done}


@contextlib.contextmanager
def _locked(folder: Path, may_exist: bool) -> Iterator[None]:
    """Make the folder of parts, or take the one that is there, for this process alone (where the system has `flock`).

    Raises:
        UsageError: Another process is working in it, or it holds a run that was to be neither resumed nor replaced.
    """
    if (folder / "settings.json").exists() and not may_exist:
        raise UsageError(f"{folder} holds an interrupted run; resume it with --resume, or restart with --force")
    folder.mkdir(exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another process is writing to {folder}; wait for it, or choose another --out") from error
        if not folder.exists() or os.fstat(handle).st_ino != folder.stat().st_ino:
            raise UsageError(f"another process has just finished {folder}; run the command again if you want another output")
        yield
    finally:
        os.close(handle)


def _begin(folder: Path, settings: dict, resume: bool) -> tuple[int, str | None]:
    """Return the number of rows kept and the name of the last, after writing or checking the settings of the run.

    A folder without settings is that of a run that ended before it began.
    """
    if not resume or not (folder / "settings.json").exists():
        for path in folder.iterdir():
            path.unlink()
        _keep(folder / "settings.json", [settings])
        return 0, None
    before = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    if before != settings:
        raise UsageError(f"the run in {folder} was started with {before}, not {settings}; restart with --force")
    done, last = 0, None
    for row in _kept_rows(folder):
        done, last = done + 1, row["file"]
    return done, last


def _keep(path, rows):
    partial = path.with_suffix(".tmp")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; continue with --resume once that is fixed") from error


def _part_files(folder):
    return sorted(folder.glob("part-*.jsonl"))


def _kept_rows(folder):
    for path in _part_files(folder):
        with open(path, encoding="utf-8") as file:
            yield from map(json.loads, file)


def _counting(rows, counted):
    for row in rows:
        counted["images"] += 1
        counted["errors"] += row["error"] is not None
        yield row


def _parts(sequence, size):
    return [sequence[start : start + size] for start in range(0, len(sequence), size)]


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` rows, the last one shorter, without reading ahead."""
    rows = iter(rows)
    while part := list(itertools.islice(rows, size)):
        yield part


def _walk(folder):
    """Image files below a folder, in sorted order, without listing all of it first."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file():
            yield Path(entry.path)


def _listed(path):
    """The paths in a text file; relative ones are meant from the file's folder."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                if line := line.strip():
                    yield Item(printable(line), path.parent / line)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the list {path}: {error}") from error


def _tabulated(path):
    parquet = _parquet()
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable Parquet file: {error}") from error
    columns = [name for name in ("image", "path") if name in file.schema_arrow.names]
    if not columns:
        raise UsageError(f"{path} has neither a column `image` nor `path`; it has {', '.join(file.schema_arrow.names)}")
    number = 0
    for batch in file.iter_batches(64, columns=columns):
        for row in batch.to_pylist():
            yield _tabulated_item(path, row, number)
            number += 1


def _tabulated_item(path, row, number):
    image = row.get("image")
    named = row.get("path")
    if isinstance(image, dict):
        named, image = named or image.get("path"), image.get("bytes")
    name = named or f"{path.name}#{number}"
    if isinstance(image, bytes):
        return Item(name, image)
    return Item(name, path.parent / named if named else b"")


def _parquet():
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        from ..errors import DeviceError

        raise DeviceError("Parquet needs pyarrow; pip install 'keras-resnet-export[batch]'") from error
    return pyarrow.parquet


def _write_jsonl(place, rows, top):
    with open(place, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_csv(place, rows, top):
    """A row per image; `top` is None for a model that does not score classes, whose values are one column of JSON."""
    with open(place, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if top is None:
            writer.writerow(["file", "error", "values"])
            writer.writerows([row["file"], row["error"] or "", _values_json(row)] for row in rows)
            return
        fields = [f"{field}{number}" for number in range(1, top + 1) for field in ("class", "label", "probability")]
        writer.writerow(["file", "error", *fields])
        for row in rows:
            found = zip(row["classes"], row["labels"], row["probabilities"], strict=True)
            writer.writerow([row["file"], row["error"] or "", *itertools.chain.from_iterable(found)])


def _values_json(row):
    return json.dumps(row["values"]) if "values" in row else ""


def _write_parquet(place, rows, top):
    parquet = _parquet()
    import pyarrow

    schema = pyarrow.schema(
        {
            "file": pyarrow.string(),
            "error": pyarrow.string(),
            "classes": pyarrow.list_(pyarrow.int32()),
            "labels": pyarrow.list_(pyarrow.string()),
            "probabilities": pyarrow.list_(pyarrow.float64()),
        }
        | ({"values": pyarrow.string()} if top is None else {})
    )
    rows = rows if top is not None else ({**row, "values": _values_json(row)} for row in rows)
    with parquet.ParquetWriter(place, schema) as writer:
        for part in batched(rows, 10 * PART_ROWS):
            writer.write_table(pyarrow.Table.from_pylist(part, schema))


_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".jsonl": _write_jsonl}
