"""Data sets by name or path: digits, CIFAR, `.npz`, image folders, TFRecord shards, TFDS."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from ..hints import first_line
from .corrupt import damaged_elements, damaged_files
from .splits import Encoded, Images, Records
from .tfrecord import damaged_records, default_preprocessing, read_tfrecords

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".bmp")


@dataclass(frozen=True, eq=False)
class Source:
    """A data set.

    Args:
        name: as it was asked for.
        train: training split.
        test: test split, or None.
        classes: class names, in the order of the labels.
        image_size: `(height, width)`, or None where images differ.
        preprocessing: what a model for it takes: a mode's name, or a dict of mean and std of pixels / 255.
        crop: whether test images are cropped in the middle and resized (photographs), or taken as they are.
        damaged: files left out, with the reason.
    """

    name: str
    train: object
    test: object
    classes: tuple
    image_size: tuple | None
    preprocessing: object = "torch"
    crop: bool = False
    damaged: tuple = ()

    @property
    def mean(self):
        """Mean colour, 0–255: what lies around an image."""
        from ..preprocessing import Preprocessing

        return 255 * np.broadcast_to(Preprocessing.of(self.preprocessing).numbers.get("mean", 0.0), [self.train.channels])


def load(data, path=None, *, corrupt="fail", cache=False, report=None):
    """Open a data set.

    Args:
        data: `"digits"` (scikit-learn's 8×8, extra `demo`), `"cifar10"`, `"cifar100"`, `"tfds/NAME"` (extra `data`), a path
            (to an `.npz` with `x_train`, `y_train` and perhaps `x_test`, `y_test`; to a folder with one folder of images per
            class, perhaps below `train/` and `test/` or `val/`; to a folder of TFRecord shards by `write_tfrecords`), or a
            `Source`, which passes.
        path: for CIFAR: the `.npz`; for TFDS: the data folder. None lets Keras (TFDS) download to its cache.
        corrupt: `"fail"` names damaged images (of folders, shards, TFDS) and stops; `"skip"` names them, counts them and leaves
            them out.
        cache: hold the files of an image folder in memory.
        report: called with a line of text for each thing to say; None prints to standard error.

    Returns:
        `Source`.

    Raises:
        ValueError: unknown name, unusable content, damaged images.
        FileNotFoundError: no such path.
        ImportError: the extra for it is not installed.
    """
    if isinstance(data, Source):
        return data
    if corrupt not in ("fail", "skip"):
        raise ValueError(f'`corrupt` must be "fail" or "skip", got {corrupt!r}')
    report = report or (lambda line: print(line, file=sys.stderr))
    name = str(data)
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
        return _npz(place)
    if place.suffix or place.parent != Path("."):
        raise FileNotFoundError(f"no data at {place}; give an .npz, a folder of images or of TFRecord shards")
    from ..registry import nearest

    known = ("digits", "cifar10", "cifar100")
    raise ValueError(f"unknown data {name!r}{nearest(name, known)}; there are {', '.join(known)}, tfds/NAME and paths")


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
        x, y, test = source.train.images, source.train.labels, source.test
        return _cifar_source(name, Images(x, y), test)
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
    try:
        with np.load(path, allow_pickle=False) as arrays:
            held = {key: arrays[key] for key in ("x_train", "y_train", "x_test", "y_test") if key in arrays}
    except Exception as error:
        raise ValueError(f"{path} is no readable .npz ({first_line(error)})") from error
    if not {"x_train", "y_train"} <= set(held):
        raise ValueError(f"{path} must hold x_train and y_train, it has {', '.join(sorted(held)) or 'neither'}")

    def images(part):
        x = held[f"x_{part}"]
        try:
            return Images(x if x.ndim == 4 else x[..., None], held[f"y_{part}"].ravel())
        except ValueError as error:
            raise ValueError(f"{path}, {part}: {error}") from error

    train = images("train")
    test = images("test") if {"x_test", "y_test"} <= set(held) else None
    for part, split in (("train", train), ("test", test)):
        if split and not split.size:
            raise ValueError(f"{path} has no images in x_{part}")
        if split and split.images.shape[1:] != train.images.shape[1:]:
            shapes = f"{split.images.shape[1:]} and {train.images.shape[1:]}"
            raise ValueError(f"{path}: images in x_test and x_train must have one shape, they have {shapes}")
    number = 1 + int(max(split.labels.max() for split in (train, test) if split))
    # One pass over a sample is enough for two digits; the numbers travel with the model.
    sample = train.images[:: max(1, train.size // 2000)].reshape(-1, train.channels) / 255.0
    numbers = {"mean": np.round(sample.mean(0), 4).tolist(), "std": np.maximum(np.round(sample.std(0), 4), 1e-3).tolist()}
    return Source(str(path), train, test, tuple(map(str, range(number))), train.images.shape[1:3], numbers)


def _folder(folder, corrupt, cache, report):
    if records := read_tfrecords(folder, "train"):
        return _shards(folder, *records, corrupt, report)
    train_folder = folder / "train" if (folder / "train").is_dir() else folder
    test_folder = next((folder / name for name in ("test", "val") if train_folder != folder and (folder / name).is_dir()), None)
    classes = sorted(child.name for child in train_folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not classes:
        raise ValueError(f"{train_folder} has no folders of images; put the images of each class into a folder of its own")
    damaged, splits = [], []
    for place in filter(None, (train_folder, test_folder)):
        paths, labels = _listing(place, classes, report)
        _check_classes(place, classes, labels, place is train_folder)
        found = damaged_files(paths, 3, report)
        damaged += [(str(paths[i]), reason) for i, reason in found.items()]
        kept = np.array([i for i in range(len(paths)) if i not in found], int)
        splits.append(Encoded(np.array(paths, object)[kept], np.array(labels, "int64")[kept], 3, cache))
    if damaged:
        _say_damaged(damaged, corrupt, report)
    for place, split in zip((train_folder, test_folder), splits, strict=False):
        _check_classes(place, classes, split.labels, place is train_folder)
    test = splits[1] if len(splits) > 1 else None
    return Source(str(folder), splits[0], test, tuple(classes), None, crop=True, damaged=tuple(damaged))


def _check_classes(place, classes, labels, every):
    """Refuse a split without images, and one to train on where a class has none."""
    without = sorted(set(range(len(classes))) - set(labels))
    if without and (every or not len(labels)):
        where = place / classes[without[0]] if every else place
        raise ValueError(f"{where} has no images that can be read ({', '.join(IMAGE_ENDINGS)}); add some, or remove the folder")


def _shards(folder, train, meta, corrupt, report):
    test, damaged, splits = read_tfrecords(folder, "test"), [], []
    for name, split in (("train", train), ("test", test and test[0])):
        if split is None:
            continue
        found = damaged_records(folder, name, report)
        for number, shard, reason in found:
            if number is None:
                raise ValueError(f"{shard} is damaged ({reason}); write the shards again")
        damaged += [(f"{shard}, record {number} of the split", reason) for number, shard, reason in found]
        splits.append(_without(split, [number for number, *_ in found]))
    if damaged:
        _say_damaged(damaged, corrupt, report)
    size = meta["image_size"] and tuple(meta["image_size"])
    test = splits[1] if len(splits) > 1 else None
    return Source(str(folder), splits[0], test, tuple(meta["classes"]), size, meta["preprocessing"], size is None, tuple(damaged))


def _without(split, numbers):
    return split.take(np.setdiff1d(np.arange(split.size), numbers)) if numbers else split


def _listing(folder, classes, report):
    strangers = sorted({child.name for child in folder.iterdir() if child.is_dir()} - set(classes))
    if strangers:
        raise ValueError(f"{folder} has a class that the training images lack: {', '.join(strangers)}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(
            path
            for path in (folder / name).rglob("*")
            if (path.is_file() or (path.is_symlink() and not path.exists())) and not path.name.startswith(".")
        )
        found = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
        if len(found) < len(files):
            others = sorted({path.suffix or path.name for path in files} - {path.suffix for path in found})
            report(f"{folder / name}: {len(files) - len(found)} files are no images that can be read ({', '.join(others)})")
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
            f'{path}{more} cannot be decoded ({reason}); mend or remove, or skip with corrupt="skip" (--corrupt skip)'
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

    def split(part):
        def stream(epoch):
            # No shuffling of files: their order is the same in every process; the buffer behind shuffles.
            config = tfds.ReadConfig(interleave_cycle_length=1)
            read = builder.as_dataset(
                split=part, shuffle_files=False, decoders={"image": tfds.decode.SkipDecoding()}, read_config=config
            )
            return read.enumerate().map(lambda at, example: (at, example["image"], example["label"]))

        return Records(stream, builder.info.splits[part].num_examples, features["image"].shape[-1])

    parts = ["train", *[part for part in ("test", "validation") if part in builder.info.splits][:1]]
    damaged, splits = [], []
    for part in parts:
        records = split(part)
        # As TFDS names its files; those of a bucket are read anew every time.
        files = sorted(Path(builder.data_dir).glob(f"*-{part}.*"))
        try:
            found = damaged_elements(records.stream(None), records.channels, files, records.size, report)
        except tf.errors.OpError as error:
            raise ValueError(
                f"{name} is damaged ({error.message.split(';')[0]}); remove {builder.data_dir} to prepare it anew"
            ) from error
        damaged += [(f"{name}, record {number} of {part}", reason) for number, reason in found]
        splits.append(_without(records, [number for number, _ in found]))
    if damaged:
        _say_damaged(damaged, corrupt, report)
    train, test = splits[0], splits[1] if len(splits) > 1 else None
    shape = features["image"].shape[:2]
    size = None if None in shape else tuple(shape)
    classes, preprocessing = tuple(features["label"].names), default_preprocessing(train.channels)
    return Source(name, train, test, classes, size, preprocessing, size is None, tuple(damaged))
