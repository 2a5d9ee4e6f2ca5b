"""Data sets by name or path: digits, CIFAR, `.npz`, image folders, TFRecord shards, TFDS."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from ..checks import first_line
from .corrupt import check_files, check_stream, reason_of
from .folders import list_files, read_layout, split_of, visible_folders
from .formats import IMAGE_ENDINGS
from .splits import Encoded, Images, Records
from .tfrecord import damaged_records, default_preprocessing, read_tfrecords

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
SHOWN = 10  # class names in a description
USES = {"train": "training", "validation": "validation", "test": "the test"}
# What is said about images that are read in a way a user may not expect.
FACTS = {
    "is_transparent": "{} images have transparent pixels, whose hidden colour is used, as `resnet-export predict` does",
    "is_animated": "{} images are animations, of which the first frame is used",
}


@dataclass(frozen=True, eq=False)
class Source:
    """A data set.

    Args:
        name: As it was asked for.
        train: Training split.
        test: Test split, measured once at the end, or None.
        classes: Class names, in the order of the labels.
        image_size: `(height, width)`, or None where images differ.
        preprocessing: What a model for it takes: a mode's name, or a dict of mean and std of pixels / 255.
        crop: Whether test images are cropped in the middle and resized (photographs), or taken as they are.
        damaged: Files left out, with the reason.
        validation: Validation split, measured after every epoch, or None.
        places: Where each split was found, by `"train"`, `"validation"` and `"test"`; empty for a data set that is one file.
    """

    name: str
    train: Images | Encoded | Records
    test: Images | Encoded | Records | None
    classes: tuple[str, ...]
    image_size: tuple[int, int] | None
    preprocessing: str | dict[str, Any] = "torch"
    crop: bool = False
    damaged: tuple[str, ...] = ()
    validation: Images | Encoded | Records | None = None
    places: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def mean(self) -> np.ndarray:
        """Mean colour, 0–255: the padding around an image."""
        from ..preprocessing import Preprocessing

        return 255 * np.broadcast_to(Preprocessing.of(self.preprocessing).numbers.get("mean", 0.0), [self.train.channels])

    @property
    def splits(self) -> dict:
        """The splits that exist, by `"train"`, `"validation"` and `"test"`."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}

    def describe(self) -> str:
        """Describe in one line how the data were understood: classes, and the number and folder of each split's images."""
        names = ", ".join(map(str, self.classes[:SHOWN]))
        more = f" and {len(self.classes) - SHOWN} more" if len(self.classes) > SHOWN else ""
        parts = [
            f"{split.size:,} images for {USES[name]}" + (f" ({self.places[name]})" if name in self.places else "")
            for name, split in self.splits.items()
        ]
        damaged = f"; {len(self.damaged)} damaged left out" if self.damaged else ""
        return f"{self.name}: {len(self.classes)} classes ({names}{more}); {', '.join(parts)}{damaged}"

    def with_channels(self, channels: int) -> Source:
        """Return the same data set with images of that many channels, for a model that takes them.

        Args:
            channels: 3 for RGB, 1 for grayscale.

        Returns:
            This source, or a new one whose preprocessing is the default for that many channels.

        Raises:
            ValueError: The images are arrays of another number of channels, or `channels` is neither 1 nor 3.
        """
        if channels == self.train.channels:
            return self
        if channels not in (1, 3) or not all(split.encoded for split in self.splits.values()):
            raise ValueError(f"the images of {self.name} have {self.train.channels} channels, the model takes {channels}")
        splits = {name: dataclasses.replace(split, channels=channels) for name, split in self.splits.items()}
        return dataclasses.replace(self, **splits, preprocessing=default_preprocessing(channels))


def load(
    data: str | os.PathLike[str] | Source,
    path: str | os.PathLike[str] | None = None,
    *,
    corrupt: str = "fail",
    cache: bool = False,
    report: Callable[[str], object] | None = None,
) -> Source:
    """Open a data set.

    Args:
        data: `"digits"` (scikit-learn's 8×8, extra `demo`), `"cifar10"`, `"cifar100"`, `"tfds/NAME"` (extra `data`), a path
            (to an `.npz` with `x_train`, `y_train` and perhaps `x_val`, `y_val`, `x_test`, `y_test`; to a folder with one
            folder of images per class, perhaps below `train/`, `val/` and `test/`, see `read_layout`; to a folder of TFRecord
            shards by `write_tfrecords`), or a `Source`, which passes.
        path: For CIFAR: the `.npz`; for TFDS: the data folder. None lets Keras (TFDS) download to its cache.
        corrupt: `"fail"` names damaged images (of folders, shards, TFDS) and stops; `"skip"` names them, counts them and leaves
            them out.
        cache: Hold the files of an image folder in memory.
        report: Called with a line of text for each thing to say; None prints to standard error.

    Returns:
        `Source`.

    Raises:
        ValueError: Unknown name, unusable content, damaged images.
        FileNotFoundError: No such path.
        ImportError: The extra for it is not installed.
    """
    if isinstance(data, Source):
        return data
    if corrupt not in ("fail", "skip"):
        raise ValueError(f'`corrupt` must be "fail" or "skip", got {corrupt!r}')
    report = report or (lambda line: print(line, file=sys.stderr))
    name = str(data)
    if not name.strip():
        raise ValueError("`data` is empty; give a name or a path")
    if name == "digits":
        return _digits()
    if name in ("cifar10", "cifar100"):
        return _cifar(name, path)
    if name.startswith("tfds/"):
        return _tfds(name, path, corrupt, report)
    place = Path(name)
    if place.is_dir():
        return _folder(place, corrupt, cache, report)
    if place.is_file():
        if place.suffix.lower() != ".npz":
            how = "unpack it, and give the folder" if place.suffix.lower() in ARCHIVES else "give a folder of images"
            raise ValueError(f"{place} is a file, but not an .npz; {how}, in which each class has a folder of its own")
        return _npz(place)
    if place.suffix or place.parent != Path("."):
        raise FileNotFoundError(f"no data at {place}; give an .npz, a folder of images or of TFRecord shards")
    from ..checks import nearest

    known = ("digits", "cifar10", "cifar100", "tfds/NAME", "the path of a folder or an .npz")
    raise ValueError(f"unknown data {name!r}{nearest(name, known)}")


def _digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("scikit-learn has the digits: pip install 'keras-resnet-export[demo]'") from error
    bunch = load_digits()
    images = np.round(bunch.images * 255 / 16).astype("uint8")[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], bunch.target[order]
    numbers = {"mean": 0.3053, "std": 0.3763}
    train, test = Images(images[:1437], labels[:1437]), Images(images[1437:], labels[1437:])
    return Source("digits", train, test, tuple("0123456789"), (8, 8), numbers)


def _cifar(name, path):
    if path is not None:
        source = _npz(Path(path))
        return dataclasses.replace(_cifar_source(name, source.train, source.test), validation=source.validation)
    import keras

    try:
        (x, y), (x_test, y_test) = getattr(keras.datasets, name).load_data()
    except Exception as error:
        raise ConnectionError(
            f"{name} cannot be downloaded ({first_line(error)}); give the path of an .npz with x_train, y_train, x_test, y_test"
        ) from error
    return _cifar_source(name, Images(x, y.ravel()), Images(x_test, y_test.ravel()))


def _cifar_source(name, train, test):
    classes = CIFAR10_CLASSES if name == "cifar10" else tuple(map(str, range(100)))
    return Source(name, train, test, classes, (32, 32), "cifar10")


def _npz(path):
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    parts = ("train", "val", "test")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            held = {key: arrays[key] for part in parts for key in (f"x_{part}", f"y_{part}") if key in arrays}
    except Exception as error:
        raise ValueError(f"{path} is not a readable .npz file ({first_line(error)})") from error
    if not {"x_train", "y_train"} <= set(held):
        raise ValueError(f"{path} must hold x_train and y_train, it has {', '.join(sorted(held)) or 'neither'}")

    for part in parts[1:]:
        if len(lone := {f"x_{part}", f"y_{part}"} & set(held)) == 1:
            raise ValueError(f"{path} holds {lone.pop()} without its labels or images; it must have both x_{part} and y_{part}")

    def images(part: str) -> Any:
        x = held[f"x_{part}"]
        try:
            return Images(x if x.ndim == 4 else x[..., None], held[f"y_{part}"].ravel())
        except ValueError as error:
            raise ValueError(f"{path}, {part}: {error}") from error

    splits = {part: images(part) for part in parts if {f"x_{part}", f"y_{part}"} <= set(held)}
    train = splits["train"]
    for part, split in splits.items():
        if not split.size:
            raise ValueError(f"{path} has no images in x_{part}")
        if split.images.shape[1:] != train.images.shape[1:]:
            shapes = f"{split.images.shape[1:]} and {train.images.shape[1:]}"
            raise ValueError(f"{path}: images in x_{part} and x_train must have one shape, they have {shapes}")
    number = 1 + int(max(split.labels.max() for split in splits.values()))
    if number < 2:
        raise ValueError(f"{path} has one class (all labels are 0); a classifier needs two or more")
    # One pass over a sample is enough for two digits; the numbers travel with the model.
    sample = train.images[:: max(1, train.size // 2000)].reshape(-1, train.channels) / 255.0
    numbers = {"mean": np.round(sample.mean(0), 4).tolist(), "std": np.maximum(np.round(sample.std(0), 4), 1e-3).tolist()}
    classes, size = tuple(map(str, range(number))), train.images.shape[1:3]
    return Source(str(path), train, splits.get("test"), classes, size, numbers, validation=splits.get("val"))


def _folder(folder, corrupt, cache, report):
    if names := shard_names(folder):
        return _shards(folder, names, corrupt, report)
    layout = read_layout(folder)
    for line in layout.unused:
        report(line)
    damaged, splits, facts = [], {}, Counter()
    for name, place in layout.splits.items():
        paths, labels = _listing(place, layout.classes, report)
        _check_classes(place, layout.classes, labels, name == "train")
        checks = check_files(paths, 3, report)
        damaged += [(str(path), check.reason) for path, check in zip(paths, checks, strict=True) if check.reason]
        kept = np.array([i for i, check in enumerate(checks) if not check.reason], int)
        facts.update(fact for i in kept for fact, is_so in checks[i].facts.items() if is_so)
        flags = np.array([bool(check.facts.get("needs_pillow")) for check in checks], bool)[kept]
        splits[name] = Encoded(np.array(paths, object)[kept], np.array(labels, "int64")[kept], 3, cache, flags)
    if damaged:
        _say_damaged(damaged, corrupt, report)
    for name, split in splits.items():
        _check_classes(layout.splits[name], layout.classes, split.labels, name == "train")
    for fact, message in FACTS.items():
        if facts[fact]:
            report(f"{folder}: {message.format(facts[fact])}")
    places = {name: str(place) for name, place in layout.splits.items()}
    return Source(
        str(folder), splits["train"], splits.get("test"), layout.classes, None, crop=True, damaged=tuple(damaged),
        validation=splits.get("validation"), places=places,
    )  # fmt: skip


def _check_classes(place, classes, labels, every):
    """Refuse a split without images, and one to train on where a class has none."""
    without = sorted(set(range(len(classes))) - set(labels))
    if without and (every or not len(labels)):
        where = place / classes[without[0]] if every else place
        raise ValueError(f"{where} has no images that can be read ({', '.join(IMAGE_ENDINGS)}); add some, or remove the folder")


def shard_names(folder: Path) -> dict[str, str]:
    """Return the name of each split's shards, by `"train"`, `"validation"` and `"test"`; empty where the folder has none."""
    shards = {path.name.rsplit("-", 3)[0] for path in folder.glob("*-*-of-*.tfrecord")}
    indices = {path.stem for path in folder.glob("*.json") if path.stem in shards or not visible_folders(folder)}
    named = {}
    for name in sorted(shards | indices):
        if (split := split_of(name)) is None:
            continue
        if split in named:
            raise ValueError(f"{folder} has two sets of shards for the {split} split, {named[split]!r} and {name!r}; move one")
        named[split] = name
    return named if "train" in named else {}


def _shards(folder, names, corrupt, report):
    damaged, splits, metas = [], {}, {}
    for split, name in names.items():
        records, metas[split] = read_tfrecords(folder, name)
        found = damaged_records(folder, name, report)
        for number, shard, reason in found:
            if number is None:
                raise ValueError(f"{shard} is damaged ({reason}); copy or write the shards again")
        damaged += [(f"{shard}, record {number} of the split", reason) for number, shard, reason in found]
        splits[split] = _without(records, [number for number, *_ in found])
    meta = metas["train"]
    for split, other in metas.items():
        if other["classes"] != meta["classes"]:
            raise ValueError(f"{folder}: the shards of train and {split} were written with different classes; write them again")
    if damaged:
        _say_damaged(damaged, corrupt, report)
    if len(meta["classes"]) < 2:
        raise ValueError(f"{folder}: the shards have one class ({', '.join(meta['classes'])}); a classifier needs two or more")
    size = meta["image_size"] and tuple(meta["image_size"])
    return Source(
        str(folder), splits["train"], splits.get("test"), tuple(meta["classes"]), size, meta["preprocessing"], size is None,
        tuple(damaged), splits.get("validation"),
    )  # fmt: skip


def _without(split, numbers):
    return split.take(np.setdiff1d(np.arange(split.size), numbers)) if numbers else split


def _listing(folder, classes, report):
    strangers = sorted({child.name for child in visible_folders(folder)} - set(classes))
    if strangers:
        similar = {name.casefold(): name for name in classes}
        near = similar.get(strangers[0].casefold())
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"{folder} has a class that the training images lack: {', '.join(strangers)}{hint}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found, others = list_files(folder / name) if (folder / name).is_dir() else ([], [])
        if others:
            endings = sorted({path.suffix or path.name for path in others})
            count = f"{len(others)} file{'s are not images' if len(others) > 1 else ' is not an image'}"
            report(f"{folder / name}: {count} that can be read ({', '.join(endings)})")
        paths += found
        labels += [label] * len(found)
    return paths, labels


def _say_damaged(damaged, corrupt, report):
    for path, reason in damaged:
        report(f"damaged image: {path}: {reason}")
    if corrupt == "fail":
        path, reason = damaged[0]
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise ValueError(
            f'{path}{more} cannot be decoded ({reason}); repair or remove it, or leave it out: corrupt="skip" (--corrupt skip)'
        )
    report(f"{len(damaged)} damaged image{'s' if len(damaged) > 1 else ''} left out")


def _tfds(name, path, corrupt, report):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError("TFDS is not installed: pip install 'keras-resnet-export[data]'") from error
    builder = tfds.builder(name.removeprefix("tfds/"), data_dir=path)
    builder.download_and_prepare()
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise ValueError(f"{name} has no features `image` and `label`; it has {', '.join(features)}")

    def split(part: str) -> Any:
        def stream(epoch: tf.Tensor) -> Any:
            # No shuffling of files: their order is the same in every process; the buffer shuffles examples.
            config = tfds.ReadConfig(interleave_cycle_length=1)
            read = builder.as_dataset(
                split=part, shuffle_files=False, decoders={"image": tfds.decode.SkipDecoding()}, read_config=config
            )
            return read.enumerate().map(lambda at, example: (at, example["image"], example["label"]))

        return Records(stream, builder.info.splits[part].num_examples, features["image"].shape[-1])

    damaged, splits = [], {}
    for part in ("train", "validation", "test"):
        if part not in builder.info.splits:
            continue
        records = split(part)
        # As TFDS names its files; those of a bucket are read again every time.
        files = sorted(Path(builder.data_dir).glob(f"*-{part}.*"))
        try:
            found = check_stream(records.stream(None), records.channels, files, records.size, report)
        except tf.errors.OpError as error:
            raise ValueError(f"{name} is damaged ({reason_of(error)}); remove {builder.data_dir} to prepare it again") from error
        if found.count != records.size:
            raise ValueError(
                f"{name} is damaged: its {part} split holds {found.count:,} of {records.size:,} records; "
                f"remove {builder.data_dir} to prepare it again"
            )
        if found.unlabelled:
            if part == "train":
                raise ValueError(f"{name} has {found.unlabelled:,} training images without a label")
            report(f"{name}: {part} is not read: {found.unlabelled:,} of its images have no label")
            continue
        damaged += [(f"{name}, record {number} of {part}", reason) for number, reason in found.damaged]
        splits[part] = _without(records, [number for number, _ in found.damaged])
    if damaged:
        _say_damaged(damaged, corrupt, report)
    train = splits["train"]
    shape = features["image"].shape[:2]
    size = None if None in shape else tuple(shape)
    classes, preprocessing = tuple(features["label"].names), default_preprocessing(train.channels)
    return Source(
        name, train, splits.get("test"), classes, size, preprocessing, size is None, tuple(damaged), splits.get("validation")
    )
