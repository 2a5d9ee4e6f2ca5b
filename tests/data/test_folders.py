"""Folders of images: which layouts are understood, which are refused, and that images are read as `predict` reads them."""

import io
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_resnet import data
from keras_resnet.data import formats
from keras_resnet.data.order import Order, Share
from keras_resnet.data.tfrecord import example_of
from resnet_export.runtime import images as export_images


@pytest.fixture(autouse=True)
def keras_home(tmp_path, monkeypatch):
    monkeypatch.setattr(keras.config, "keras_home", lambda: str(tmp_path / "home"), raising=False)


PNG = tf.io.encode_png(np.full((4, 4, 3), 9, "uint8")).numpy()


def make(root, tree):
    """Write images: `{"train/cat": 3}` puts three into that folder; a string is a file with that content."""
    for name, content in tree.items():
        place = root / name
        if isinstance(content, str):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content)
            continue
        place.mkdir(parents=True, exist_ok=True)
        for number in range(content):
            (place / f"{number}.png").write_bytes(PNG)
    return root


def sizes(source):
    return {name: split.size for name, split in source.splits.items()}


CLASSES = {"cat": 3, "dog": 2}


def split(name, count=1):
    return {f"{name}/cat": 2 * count, f"{name}/dog": count}


UNDERSTOOD = {
    "classes alone": (CLASSES, {"train": 5}),
    "train, val, test": (split("train", 3) | split("val", 2) | split("test"), {"train": 9, "validation": 6, "test": 3}),
    "capitals": (split("Train", 2) | split("Test"), {"train": 6, "test": 3}),
    "long names": (split("training") | split("VALIDATION") | split("Testing"), {"train": 3, "validation": 3, "test": 3}),
    "valid": (split("train", 2) | split("valid"), {"train": 6, "validation": 3}),
    "dev": (split("train", 2) | split("dev"), {"train": 6, "validation": 3}),
    "eval": (split("train", 2) | split("eval") | split("test"), {"train": 6, "validation": 3, "test": 3}),
    "with endings": (split("training_set", 2) | split("test_set"), {"train": 6, "test": 3}),
    "with beginnings, folder in a folder": (
        split("seg_train/seg_train", 2) | split("seg_test/seg_test"),
        {"train": 6, "test": 3},
    ),
    "hidden folders and leftovers": (
        split("train", 2)
        | split("val")
        | split("__MACOSX")
        | {"train/.ipynb_checkpoints": 2, "train/cat/.ipynb_checkpoints": 4, ".git": 1, "train/cat/Thumbs.db": "", "val/.x": 1},
        {"train": 6, "validation": 3},
    ),
    "a class called train": ({"bus": 2, "car": 3, "train": 4}, {"train": 9}),
    "classes called valid and invalid": ({"valid": 2, "invalid": 3}, {"train": 5}),
    "folders within classes": ({"cat/may": 2, "cat/june": 1, "dog/may": 2}, {"train": 5}),
    "a class missing in val": (split("train", 2) | {"val/dog": 1}, {"train": 6, "validation": 1}),
    "a json file of the same name": (split("train") | {"train.json": "{}"}, {"train": 3}),
}


@pytest.mark.parametrize("case", UNDERSTOOD)
def test_layouts_that_are_understood(tmp_path, case):
    tree, expected = UNDERSTOOD[case]
    lines = []
    source = data.load(str(make(tmp_path / "photos", tree)), report=lines.append)
    assert sizes(source) == expected and lines == []
    told = source.describe()
    assert all(f"{count} images for" in told for count in expected.values()) and all(name in told for name in source.classes)
    assert all(place in told for place in source.places.values())
    assert not any("." in path.parts[-2] or "MACOSX" in str(path) for part in source.splits.values() for path in part.paths)


REFUSED = {
    "one class": ({"cat": 3}, "a single class, 'cat' (3 images)"),
    "one class to train on": ({"train/cat": 3, "val/cat": 1}, "train has a single class, 'cat'"),
    "one level too high": ({"images/cat": 3, "images/dog": 2}, "folders of images ('cat', 'dog'); did you mean {root}/images?"),
    "splits one level down": (
        {f"photos/{name}": count for name, count in (split("train") | split("test")).items()},
        "did you mean {root}/photos?",
    ),
    "two sets of the same classes": (split("fold1") | split("fold2"), "holds the same folders ('cat', 'dog')"),
    "no training folder": (split("test") | split("val"), "no folder of training images"),
    "classes next to a split": (CLASSES | split("test"), "'test' next to 'cat', 'dog'"),
    "vehicles with folders": (
        {"bus/red": 1, "bus/blue": 1, "train/red": 1, "train/blue": 1},
        "'train' next to 'bus', so it is unclear",
    ),
    "two validation sets": (
        split("train") | split("val") | split("dev"),
        "two folders for the validation split, 'dev' and 'val'",
    ),
    "train twice": (split("train") | split("Training"), "two folders for the train split"),
    "no classes in the splits": ({"train": 3, "test": 2}, "not sorted into classes"),
    "another spelling of a class": (split("train") | {"test/Dog": 1}, "lack: Dog; did you mean 'dog'"),
    "an empty test set": (split("train") | {"test/cat": 0}, "test has no images that can be read"),
    "no images": ({"cat": 0, "dog": 0}, "cat has no images that can be read"),
    "nothing": ({}, "no folders of images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layouts_that_are_refused(tmp_path, case):
    tree, message = REFUSED[case]
    root = make(tmp_path / "root", tree)
    root.mkdir(exist_ok=True)
    with pytest.raises(ValueError) as raised:
        data.load(str(root), report=lambda line: None)
    assert message.format(root=root) in str(raised.value)


def test_a_class_folder_alone_names_the_one_above(tmp_path):
    root = make(tmp_path / "photos", CLASSES)
    with pytest.raises(ValueError, match=f"has images, but no folders.*did you mean the folder above it, {root}"):
        data.load(str(root / "cat"))


def test_folders_that_are_not_read_are_named(tmp_path):
    root = make(tmp_path / "photos", split("train", 2) | split("test") | {"unlabelled": 5, "val": 2})
    lines = []
    assert sizes(data.load(str(root), report=lines.append)) == {"train": 6, "test": 3}
    assert [line.split(" is not read: ") for line in lines] == [
        [f"{root}/unlabelled", "it is neither a split nor a class"],
        [f"{root}/val", "its images are not sorted into class folders"],
    ]


# ---------------------------------------------------------------- formats


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def kinds():
    """One image in every format and mode that people have; what is not upright, opaque or still is named."""
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (5, 7, 3)).astype("uint8"))
    colour, other = rough.resize((28, 20), Image.BICUBIC), Image.new("RGB", (28, 20), "red")
    holes = colour.copy()
    holes.putalpha(Image.fromarray(rng.integers(0, 256, (20, 28)).astype("uint8")))
    gray = colour.convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = colour.quantize(16)
    return {
        "a.jpg": encoded(colour, "JPEG"),
        "gray.jpg": encoded(gray, "JPEG"),
        "turned.jpg": encoded(colour, "JPEG", exif=turned),
        "cmyk.jpg": encoded(colour.convert("CMYK"), "JPEG"),
        "a.png": encoded(colour, "PNG"),
        "gray.png": encoded(gray, "PNG"),
        "bit.png": encoded(gray.convert("1"), "PNG"),
        "deep.png": encoded(Image.fromarray(np.asarray(gray).astype("uint16") * 257), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "holes.png": encoded(holes, "PNG"),
        "gray_holes.png": encoded(holes.convert("LA"), "PNG"),
        "turned.png": encoded(colour, "PNG", exif=turned),
        "moving.png": encoded(colour, "PNG", save_all=True, append_images=[other]),
        "a.webp": encoded(colour, "WEBP", quality=80),
        "turned.webp": encoded(colour, "WEBP", lossless=True, exif=turned),
        "holes.webp": encoded(holes, "WEBP", lossless=True, exact=True),
        "moving.webp": encoded(colour, "WEBP", lossless=True, save_all=True, append_images=[other]),
        "a.gif": encoded(palette, "GIF"),
        "moving.gif": encoded(palette, "GIF", save_all=True, append_images=[other]),
        "a.bmp": encoded(colour, "BMP"),
        "gray.bmp": encoded(gray, "BMP"),
        "a.tiff": encoded(colour, "TIFF"),
        "a.ppm": encoded(colour, "PPM"),
        "webp_inside.jpg": encoded(colour, "WEBP", lossless=True),
        "jpeg_inside.png": encoded(colour, "JPEG"),
    }


@pytest.fixture(scope="module")
def zoo_of_files(tmp_path_factory):
    root = tmp_path_factory.mktemp("formats")
    for name, content in kinds().items():
        for place in ("first", "second"):
            (root / place).mkdir(exist_ok=True)
            (root / place / name).write_bytes(content)
    return root


@pytest.mark.parametrize(("channels", "cache"), [(3, False), (3, True), (1, False)])
def test_every_format_is_read_as_predict_reads_it(zoo_of_files, channels, cache):
    source = data.load(str(zoo_of_files), cache=cache, report=lambda line: None).with_channels(channels)
    assert source.damaged == () and source.train.size == 2 * len(kinds()) and source.mean.shape == (channels,)
    order = Order(source.train.size, source.train.size, 0, 0, 1, Share(0, source.train.size))
    for _, index, content, label in source.train.read(order):
        path = source.train.paths[index]
        expected = export_images.decode(path, channels)
        found = tf.io.decode_image(content, channels=channels, expand_animations=False).numpy()
        assert found.shape == expected.shape, path
        # Two JPEG decoders, and two formulas for gray, differ by roundings.
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 8 and difference.mean() <= 1.5, path
        assert label == (path.parent.name == "second")
    held = source.train.take(np.flatnonzero([path.name == "turned.jpg" for path in source.train.paths]))
    (images, _, weights), *_ = data.evaluation_batches(held, batch=2, size=(28, 20), num_classes=2)
    assert images.shape == (2, 28, 20, channels) and weights.numpy().all()


def test_shards_of_a_folder_hold_the_same_pixels(zoo_of_files, tmp_path):
    split = data.load(str(zoo_of_files), report=lambda line: None).train
    data.write_tfrecords(split, tmp_path, "train", classes=("first", "second"))
    read = data.load(str(tmp_path)).train

    def pixels(split):
        return sorted(
            tf.io.decode_image(image, 3, expand_animations=False).numpy().tobytes() for *_, image, _ in split.in_order()
        )

    assert pixels(read) == pixels(split)
    assert not any(image.numpy().startswith(b"BM") for *_, image, _ in read.in_order())


def test_what_is_read_in_an_unexpected_way_is_said(zoo_of_files):
    lines = []
    for _ in range(2):  # The second time from what is remembered.
        lines.clear()
        data.load(str(zoo_of_files), report=lines.append)
        assert len(lines) == 2 and "6 images have transparent pixels" in lines[0] and "6 images are animations" in lines[1]


def test_formats_are_those_of_predict():
    assert formats.FORMATS == export_images.FORMATS and formats.IMAGE_ENDINGS == export_images.SUFFIXES


@pytest.mark.parametrize("name", ["a.webp", "holes.webp", "turned.jpg", "a.tiff", "moving.gif", "turned.png"])
def test_damaged_files_of_every_format_are_named(tmp_path, name):
    content, root = kinds()[name], make(tmp_path / "photos", {"cat": 1, "dog": 1})
    (root / "cat" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"cat/{name} cannot be decoded"):
        data.load(str(root), report=lambda line: None)
    source = data.load(str(root), corrupt="skip", report=lambda line: None)
    assert source.train.size == 2 and "1 damaged left out" in source.describe()


def test_arrays_of_other_channels_are_refused():
    source = data.Source("a", data.Images(np.zeros((4, 8, 8, 3), "uint8"), np.arange(4) % 2), None, ("a", "b"), (8, 8))
    assert source.with_channels(3) is source
    with pytest.raises(ValueError, match="have 3 channels, the model takes 1"):
        source.with_channels(1)


# ---------------------------------------------------------------- shards and arrays


@pytest.fixture
def shards(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 12), ("val", 6), ("test", 8)):
        split = data.Images(rng.integers(0, 256, (count, 4, 4, 3)).astype("uint8"), np.arange(count) % 2)
        data.write_tfrecords(split, tmp_path / "shards", name, classes="ab", shards=2)
    return tmp_path / "shards"


def records(path):
    return [record.numpy() for record in tf.data.TFRecordDataset(str(path))]


def write(path, content):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in content:
            writer.write(record)


@pytest.mark.parametrize("part", ["train", "val", "test"])
@pytest.mark.parametrize("change", ["shorter", "empty", "longer"])
def test_shards_of_another_size_than_the_index_says_are_refused(shards, part, change):
    assert sizes(data.load(str(shards))) == {"train": 12, "validation": 6, "test": 8}
    path = shards / f"{part}-00001-of-00002.tfrecord"
    held = records(path)
    write(path, {"shorter": held[:-1], "empty": [], "longer": held + held[:1]}[change])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged \(it holds \d+ records, {part}.json says {len(held)}\)"):
        data.load(str(shards))


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (lambda image: example_of(image, 7), "it holds the label 7, test.json has 2 classes"),
        (lambda image: example_of(image, -1), "it holds the label -1, test.json has 2 classes"),
        (lambda image: b"no example", "Could not parse example input, value: 'no example'"),
    ],
    ids=("label too large", "negative label", "no example"),
)
def test_shards_with_unusable_records_are_refused(shards, record, says):
    path = shards / "test-00000-of-00002.tfrecord"
    held = records(path)
    write(path, [*held[:-1], record(PNG)])
    for corrupt in ("fail", "skip"):
        with pytest.raises(ValueError) as refused:
            data.load(str(shards), corrupt=corrupt)
        assert str(refused.value) == f"{path} is damaged ({says}); copy or write the shards again"


@pytest.mark.parametrize("change", [{"records": 8}, {"records": ["4", 4]}, {"classes": "ab"}])
def test_a_damaged_index_is_named(shards, change):
    index = json.loads((shards / "test.json").read_text())
    (shards / "test.json").write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match="test.json is missing or damaged; write the shards again"):
        data.load(str(shards))


def test_one_class_is_refused_in_shards_and_archives(shards, tmp_path):
    for name in ("train", "val", "test"):
        index = json.loads((shards / f"{name}.json").read_text())
        (shards / f"{name}.json").write_text(json.dumps(index | {"classes": ["a"]}))
        for path in shards.glob(f"{name}-*.tfrecord"):
            write(path, [example_of(PNG, 0)] * len(records(path)))
    with pytest.raises(ValueError, match=r"the shards have one class \(a\)"):
        data.load(str(shards))
    x, y = np.zeros((6, 4, 4, 3), "uint8"), np.zeros(6, int)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y)
    with pytest.raises(ValueError, match="has one class"):
        data.load(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(6) % 2, x_test=x)
    with pytest.raises(ValueError, match="holds x_test without its labels or images; it must have both x_test and y_test"):
        data.load(str(tmp_path / "a.npz"))


def test_shards_with_other_classes_are_refused(shards):
    index = json.loads((shards / "test.json").read_text())
    (shards / "test.json").write_text(json.dumps(index | {"classes": ["b", "a"]}))
    with pytest.raises(ValueError, match="train and test were written with different classes"):
        data.load(str(shards))


def test_validation_images_of_an_archive(tmp_path):
    x, y = np.zeros((6, 4, 4, 3), "uint8"), np.arange(6)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y % 2, x_val=x[:4], y_val=y[:4], x_test=x[:2], y_test=y[:2])
    source = data.load(str(tmp_path / "a.npz"))
    assert sizes(source) == {"train": 6, "validation": 4, "test": 2} and len(source.classes) == 4
