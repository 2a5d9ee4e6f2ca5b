"""Find damaged images before a training, with the decoder that the training uses, and say which they are."""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

MANY = 1_000  # images whose check takes long enough to be announced


def damaged_files(paths, channels, report=None):
    """`{position: reason}` of the files that TensorFlow cannot decode; files that have not changed are not read again.

    Args:
        paths: file names.
        channels: as for decoding.
        report: called with a line where there is much to read.
    """
    store = Checked(paths)
    todo = [i for i, path in enumerate(paths) if store.known(path) is None]
    if report and len(todo) > MANY:
        report(f"checking {len(todo):,} images")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, reason in zip(todo, pool.map(lambda i: reason_against(paths[i], channels), todo), strict=True):
            store.set(paths[i], reason)
    store.save()
    return {i: reason for i, path in enumerate(paths) if (reason := store.known(path))}


def reason_against(path, channels):
    """Why a file is no image, in a few words; an empty text if it is one."""
    try:
        str(path).encode()
        with open(path, "rb") as file:
            data = file.read()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    except OSError as error:
        return error.strerror or str(error)
    return reason_against_bytes(data, channels)


def reason_against_bytes(data, channels):
    """As `reason_against`, for the content of a file."""
    if not data:
        return "empty file"
    try:
        image = tf.io.decode_image(data, channels=channels, expand_animations=False)
    except (tf.errors.OpError, ValueError) as error:
        text = re.sub(r"\{\{.*?\}\}", "", str(getattr(error, "message", error)))
        return text.split("[Op:")[0].split("\n")[0].strip().rstrip(".") or "not an image"
    return "" if image.shape.rank == 3 and np.prod(image.shape) else "no pixels"


def damaged_elements(stream, channels, files=(), size=0, report=None):
    """`[[number, reason], …]` of the elements that TensorFlow cannot decode; files that have not changed are not read again.

    Args:
        stream: dataset of `(number, encoded bytes, label)`.
        channels: as for decoding.
        files: where it comes from; without them it is read every time.
        size: how many elements there are.
        report: called with a line where there is much to read.
    """
    store = Checked(files)
    known = [store.known(path) for path in files]
    if known and None not in known:
        return known[0]
    if report and size > MANY:
        report(f"checking {size:,} images")
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for numbers, images, _ in stream.batch(256).as_numpy_iterator():
            reasons = pool.map(lambda data: reason_against_bytes(data, channels), images)
            found += [[int(number), reason] for number, reason in zip(numbers, reasons, strict=True) if reason]
    for path in files:
        store.set(path, found)
    if files:
        store.save()
    return found


class Checked:
    """What is known of files by path, size and time of change, in Keras' folder; a value is plain JSON."""

    def __init__(self, paths):
        name = hashlib.sha256("\n".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()[:24]
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

    def known(self, path):
        entry = self.entries.get(str(path))
        return entry[1] if entry and entry[0] == self._stamp(path) else None

    def set(self, path, value):
        self.entries[str(path)] = [self._stamp(path), value]

    def save(self):
        # Only a memory of work done; where it cannot be kept, the next run checks again.
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial = self.file.with_suffix(".part")
            partial.write_text(json.dumps(self.entries), encoding="utf-8")
            partial.replace(self.file)
        except OSError:
            pass
