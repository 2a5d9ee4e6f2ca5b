"""TFRecord shards of images: written from any split, read back one after the other."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from .corrupt import Checked, reason_against_bytes, reason_of
from .formats import to_plain
from .order import permuted
from .splits import Records

if TYPE_CHECKING:
    from .splits import Encoded, Images


MUCH = 50e6  # bytes whose check takes long enough to be announced
FEATURES = {
    "image/encoded": tf.io.FixedLenFeature([], tf.string),
    "image/class/label": tf.io.FixedLenFeature([], tf.int64),
}


def write_tfrecords(
    split: Images | Encoded,
    folder: str | os.PathLike[str],
    name: str,
    *,
    classes: Sequence[str],
    shards: int = 1,
    preprocessing: str | dict[str, Any] | None = None,
) -> list[Path]:
    """Write a split as TFRecord shards with the features `image/encoded` and `image/class/label`.

    JPEG and PNG files that TensorFlow reads itself keep their bytes; all else becomes PNG, which loses nothing. They are written
    in a random order, always the same, since reading shuffles within windows only and a folder of images is sorted by class.

    Args:
        split: `Images` or `Encoded`.
        folder: Made if missing; shards are written under other names first and renamed when all are complete.
        name: Name of the split: `"train"`, `"validation"` or `"test"`.
        classes: Class names, kept in `NAME.json` next to the shards, with the number of records of each shard.
        shards: Number of files `NAME-00000-of-00008.tfrecord`.
        preprocessing: What a model for these images takes (a mode or numbers), kept in `NAME.json`; None is ImageNet's for
            three channels.

    Returns:
        Paths of the shards.

    Raises:
        ValueError: More shards than images, or none.
    """
    if not 1 <= shards <= split.size:
        raise ValueError(f"`shards` must be between 1 and the number of images ({split.size}), got {shards}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{i:05d}-of-{shards:05d}.tfrecord" for i in range(shards)]
    counts = [0] * shards
    order = np.random.default_rng(0).permutation(split.size)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as partial:
        for i, path in enumerate(paths):
            own = split.take(order[i::shards])
            with tf.io.TFRecordWriter(str(Path(partial) / path.name)) as writer:
                for _, _, image, label in own.in_order():
                    data = (image if split.encoded else tf.io.encode_png(image)).numpy()
                    if data.startswith(b"BM"):  # A BMP, as files come that TensorFlow does not read itself.
                        data = to_plain(data, split.channels, compact=True)
                    writer.write(example_of(data, int(label)))
                    counts[i] += 1
        size = None if split.encoded else list(split.images.shape[1:3])
        meta = {"classes": list(map(str, classes)), "channels": split.channels, "image_size": size, "records": counts}
        meta["preprocessing"] = preprocessing or default_preprocessing(split.channels)
        (Path(partial) / f"{name}.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in [*paths, folder / f"{name}.json"]:
            os.replace(Path(partial) / path.name, path)
    return paths


def default_preprocessing(channels: int) -> str | dict[str, float]:
    """Return what a model for images of unknown statistics takes."""
    return "torch" if channels == 3 else {"mean": 0.5, "std": 0.25}


def example_of(data: bytes, label: int) -> bytes:
    """Return a record of an encoded image and its class number."""
    feature = {
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[data])),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def read_tfrecords(folder: str | os.PathLike[str], name: str, seed: int = 0) -> tuple[Records, dict] | None:
    """Open the split that `write_tfrecords` wrote.

    Args:
        folder: Where the shards are.
        name: Name of the split.
        seed: Seed of the order of the shards.

    Returns:
        `(Records, what NAME.json says)`, or None where the folder has no such split.

    Raises:
        ValueError: Shards are missing, or `NAME.json` is damaged; names it.
    """
    shards = sorted(Path(folder).glob(f"{name}-*-of-*.tfrecord"))
    if not shards and not (Path(folder) / f"{name}.json").exists():
        return None
    index = _read_index(folder, name)
    counts, meta = index["records"], {key: index[key] for key in ("classes", "image_size", "preprocessing")}
    if len(shards) != len(counts):
        raise ValueError(f"{folder} has {len(shards)} of {len(counts)} shards of {name!r}; copy the missing ones")
    return Records(_stream(shards, counts, seed), sum(counts), index["channels"]), meta


def _read_index(folder: str | os.PathLike[str], name: str) -> dict:
    """The content of `NAME.json`."""
    path = Path(folder) / f"{name}.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        index = {key: index[key] for key in ("records", "channels", "classes", "image_size", "preprocessing")}
        if not (isinstance(index["classes"], list) and all(isinstance(count, int) for count in index["records"])):
            raise TypeError
        return index
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is missing or damaged; write the shards again with `write_tfrecords`") from error


def _stream(shards, counts, seed):
    """Records of all shards, one shard after the other; the order of the shards is a function of the epoch."""
    paths = tf.constant([str(path) for path in shards])
    firsts = tf.constant(np.concatenate([[0], np.cumsum(counts)[:-1]]), tf.int64)

    def of_shard(shard: tf.Tensor) -> Any:
        def parse(at: tf.Tensor, record: tf.Tensor) -> Any:
            parsed = tf.io.parse_single_example(record, FEATURES)
            return firsts[shard] + at, parsed["image/encoded"], parsed["image/class/label"]

        return tf.data.TFRecordDataset(paths[shard]).enumerate().map(parse)

    def stream(epoch: tf.Tensor) -> Any:
        numbers = tf.data.Dataset.range(len(shards))
        if epoch is not None:
            numbers = numbers.map(lambda i: permuted(i, seed, epoch, len(shards)))
        return numbers.flat_map(of_shard)

    return stream


def damaged_records(folder: str | os.PathLike[str], name: str, report: Callable[[str], None] | None = None) -> list[tuple]:
    """Check a split's shards by reading every record; shards that have not changed are not read again.

    Args:
        folder: Where the shards are.
        name: Name of the split.
        report: Called with a line where there is much to read.

    Returns:
        List of `(number of the record in the split, shard, reason)` of the images that cannot be decoded; the number is None
        where the rest of a shard is lost, or where its records or labels are not those that `NAME.json` says.
    """
    found, first = [], 0
    paths = sorted(Path(folder).glob(f"{name}-*-of-*.tfrecord"))
    store = Checked(paths)
    todo = [path for path in paths if store.known(path) is None]
    if report and (size := sum(path.stat().st_size for path in todo)) > MUCH:
        report(f"checking the shards of {name}, {size / 1e6:,.0f} MB")
    index = _read_index(folder, name)
    classes = len(index["classes"])
    for path, records in zip(paths, index["records"], strict=False):
        if store.known(path) is None:
            store.set(path, _damage(path))
        count, damage, labels = store.known(path)
        found += [(None if at is None else first + at, str(path), reason) for at, reason in damage]
        if count != records and all(at is not None for at, _ in damage):
            found.append((None, str(path), f"it holds {count:,} records, {name}.json says {records:,}"))
        if strange := [label for label in labels if not 0 <= label < classes]:
            found.append((None, str(path), f"it holds the label {strange[0]}, {name}.json has {classes} classes"))
        first += count
    store.save()
    return found


def _damage(path):
    """`[number of records, [[place or None, reason], …], [smallest and largest label]]` of a shard."""
    count, damage, labels = 0, [], set()
    try:
        for record in tf.data.TFRecordDataset(str(path)):
            parsed = tf.io.parse_single_example(record, FEATURES)
            data, labels = parsed["image/encoded"].numpy(), labels | {int(parsed["image/class/label"])}
            if reason := reason_against_bytes(data, 0):
                damage.append([count, reason])
            count += 1
    except tf.errors.OpError as error:
        damage.append([None, reason_of(error)])
    return [count, damage, [min(labels), max(labels)] if labels else []]
