"""Find damaged images before a training, with the decoder that the training uses, and say which they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ..checks import first_line
from .formats import facts_of, to_plain

MANY = 1_000  # images whose check takes long enough to be announced


def check_files(paths: list, channels: int, report: Callable[[str], None] | None = None) -> list[FileCheck]:
    """Look at every image file; files that have not changed since an earlier call are not read again.

    Args:
        paths: File names.
        channels: Channels of the pixels, 1 or 3.
        report: Called with a line where there is much to read.

    Returns:
        One `FileCheck` per file.
    """
    store = Checked([f"channels {channels}", *paths])
    todo = [i for i, path in enumerate(paths) if store.known(path) is None]
    if report and len(todo) > MANY:
        report(f"checking {len(todo):,} images")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, check in zip(todo, pool.map(lambda i: check_file(paths[i], channels), todo), strict=True):
            store.set(paths[i], dataclasses.asdict(check))
    store.save()
    # A file that went away while it was read has no entry.
    return [FileCheck(**known) if (known := store.known(path)) else check_file(path, channels) for path in paths]


@dataclass(frozen=True)
class FileCheck:
    """What is known about an image file.

    Attributes:
        reason: Why it cannot be decoded, in a few words; empty if it can.
        facts: The fields of `ImageFacts`.
    """

    reason: str = ""
    facts: dict = dataclasses.field(default_factory=dict)


def check_file(path: str | os.PathLike[str], channels: int) -> FileCheck:
    """Decode an image file as a training would. Args as `check_files`."""
    try:
        str(path).encode()
        with open(path, "rb") as file:
            data = file.read()
    except UnicodeEncodeError:
        return FileCheck("its name is not UTF-8")
    except OSError as error:
        return FileCheck(error.strerror or str(error))
    try:
        facts = facts_of(data)
    except Exception as error:  # Pillow's readers raise all kinds for damaged headers.
        return FileCheck(reason_against_bytes(data, channels) or first_line(error))
    if not facts.needs_pillow:
        return FileCheck(reason_against_bytes(data, channels), dataclasses.asdict(facts))
    try:
        to_plain(data, channels)
    except Exception as error:
        return FileCheck(first_line(error))
    return FileCheck("", dataclasses.asdict(facts))


def reason_against(path: str | os.PathLike[str], channels: int) -> str:
    """Return why a file is not an image, in a few words; an empty string if it is one."""
    return check_file(path, channels).reason


def reason_against_bytes(data: bytes, channels: int) -> str:
    """Return why TensorFlow cannot decode the content of a file, in a few words; an empty string if it can."""
    if not data:
        return "empty file"
    try:
        image = tf.io.decode_image(data, channels=channels, expand_animations=False)
    except (tf.errors.OpError, ValueError) as error:
        return reason_of(error) or "not an image"
    return "" if image.shape.rank == 3 and np.prod(image.shape) else "no pixels"


def reason_of(error: Exception) -> str:
    """Return what an error of a TensorFlow operation says, without the names of operations around it."""
    text = re.sub(r"\{\{.*?\}\}", "", str(getattr(error, "message", error)))
    return text.split("[Op:")[0].split("\n")[0].strip().rstrip(".")


@dataclass(frozen=True)
class StreamCheck:
    """What reading a stream of images from first to last found.

    Attributes:
        count: Elements that were read.
        unlabelled: Elements whose label is negative, which is how data sets mark a hidden label.
        damaged: `[[number, reason], …]` of the elements that TensorFlow cannot decode.
    """

    count: int
    unlabelled: int
    damaged: list


def check_stream(
    stream: tf.data.Dataset, channels: int, files: tuple | list = (), size: int = 0, report: Callable | None = None
) -> StreamCheck:
    """Read a stream of images from first to last; files that have not changed are not read again.

    Args:
        stream: Dataset of `(number, encoded bytes, label)`.
        channels: Channels of the pixels.
        files: Where the stream comes from; without them it is read every time.
        size: How many elements there should be, for the message.
        report: Called with a line where there is much to read.

    Returns:
        `StreamCheck`.
    """
    store = Checked(files)
    known = [store.known(path) for path in files]
    if known and None not in known:
        return StreamCheck(**known[0])
    if report and size > MANY:
        report(f"checking {size:,} images")
    count, unlabelled, damaged = 0, 0, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for numbers, images, labels in stream.batch(256).as_numpy_iterator():
            reasons = pool.map(lambda data: reason_against_bytes(data, channels), images)
            damaged += [[int(number), reason] for number, reason in zip(numbers, reasons, strict=True) if reason]
            count, unlabelled = count + len(numbers), unlabelled + int((labels < 0).sum())
    found = StreamCheck(count, unlabelled, damaged)
    for path in files:
        store.set(path, dataclasses.asdict(found))
    if files:
        store.save()
    return found


class Checked:
    """What is known of files by path, size and time of change, in Keras' folder; a value is plain JSON."""

    VERSION = "3"  # of the values

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        name = hashlib.sha256("\n".join([self.VERSION, *map(str, paths)]).encode(errors="surrogateescape")).hexdigest()[:24]
        self.file = Path(keras.config.keras_home() if hasattr(keras.config, "keras_home") else Path.home() / ".keras")
        self.file = self.file / "keras_resnet" / "checked" / f"{name}.json"
        try:
            self.entries = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.entries = {}

    def _stamp(self, path):
        try:
            state = os.stat(path)
        except OSError:
            return None
        return f"{state.st_size} {state.st_mtime_ns}"

    def known(self, path: str | os.PathLike[str]) -> Any:
        entry = self.entries.get(str(path))
        return entry[1] if entry and entry[0] == self._stamp(path) else None

    def set(self, path: str | os.PathLike[str], value: Any) -> None:
        self.entries[str(path)] = [self._stamp(path), value]

    def save(self) -> None:
        # Only a memory of work done; where it cannot be kept, the next run checks again.
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_suffix(".part")
            partial.write_text(json.dumps(self.entries), encoding="utf-8")
            partial.replace(self.file)
        except OSError:
            pass
