"""Input pipelines: the same images in any order, on any workers, after any start; damaged files by name."""

import os
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from keras_resnet import data
from keras_resnet.data import mixing, randaugment
from keras_resnet.data.order import Share

RICH = data.Augmentation(crop_padding=2, flip=True, randaugment=2, erasing=0.5)


@pytest.fixture(autouse=True)
def keras_home(tmp_path, monkeypatch):
    monkeypatch.setattr(keras.config, "keras_home", lambda: str(tmp_path / "home"), raising=False)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return data.Images(rng.integers(0, 256, (50, 12, 10, 3)).astype("uint8"), np.arange(50) % 7)


@pytest.fixture
def folder(tmp_path):
    """Two classes of photographs of several sizes and formats, train and test."""
    rng = np.random.default_rng(1)
    for split, count in (("train", 9), ("test", 3)):
        for name in ("bird", "cat"):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (40 + i, 60 - i, 3)).astype("uint8"))
                image.resize((60 - i, 40 + i), Image.BICUBIC).save(place / f"{i}.{('jpg', 'png')[i % 3 == 0]}")
    return tmp_path / "photos"


def collect(split, **changes):
    options = {
        "batch": 10,
        "size": (10, 10),
        "num_classes": 7,
        "augmentation": RICH,
        "fill": [1.0, 2.0, 3.0],
        "seed": 3,
        "last": 12,
    }
    return [(x.numpy(), y.numpy()) for x, y in data.training_batches(split, **{**options, **changes})]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_any_start_gives_the_same_images(arrays):
    whole = collect(arrays)
    assert_same(collect(arrays, first=7), whole[7:])
    assert not np.array_equal(whole[0][0], collect(arrays, seed=4)[0][0])


def test_mixing_goes_on_as_well(arrays):
    whole = collect(arrays, mixup=0.4, cutmix=1.0)
    assert_same(collect(arrays, mixup=0.4, cutmix=1.0, first=5), whole[5:])


def test_workers_and_replicas_share_a_batch(arrays):
    whole = collect(arrays)
    parts = [collect(arrays, share=Share(offset, 5)) for offset in (0, 5)]
    assert_same([tuple(np.concatenate(pair) for pair in zip(*both, strict=True)) for both in zip(*parts, strict=True)], whole)
    replicas = collect(arrays, replicas=2)
    assert_same([tuple(np.concatenate(pair) for pair in zip(*replicas[i : i + 2], strict=True)) for i in (0, 2)], whole[:2])


def test_nothing_tunes_itself(arrays):
    """The end of an autotuned pipeline can wait for the tuner's next turn, for as long as the pipeline has run."""
    tables = [
        data.training_batches(arrays, batch=10, size=(10, 10), num_classes=7),
        data.evaluation_batches(arrays, batch=10, size=(10, 10), num_classes=7),
    ]
    assert [table.options().autotune.enabled for table in tables] == [False, False]


def test_an_epoch_sees_every_image_once_in_an_order_of_its_own(arrays):
    plain = collect(arrays, augmentation=None, size=(12, 10))
    epochs = [np.concatenate([x for x, _ in plain[i : i + 5]]) for i in (0, 5)]
    key = lambda images: sorted(image.tobytes() for image in images)  # noqa: E731
    assert key(epochs[0]) == key(epochs[1]) == key(arrays.images.astype("float32"))
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], arrays.images)


def crops(image, source):
    """All `(top, left, whether it is mirrored)` at which an image of 12 × 10 pixels is part of a larger one."""
    return [
        (y, x, flip)
        for flip in (False, True)
        for y in range(5)
        for x in range(5)
        if np.array_equal(image[:, ::-1] if flip else image, source[y : y + 12, x : x + 10])
    ]


def test_crop_and_flip_are_windows_of_the_padded_image(arrays):
    augmentation = data.Augmentation(crop_padding=2, flip=True)
    split = arrays.take(np.arange(10))
    fill = np.array([10.0, 20.0, 30.0], "float32")
    padded = np.full((10, 16, 14, 3), fill, "float32")
    padded[:, 2:-2, 2:-2] = split.images
    seen = set()
    for images, _ in collect(split, augmentation=augmentation, size=(12, 10), fill=fill, last=12, shuffle=False):
        for image, source in zip(images, padded, strict=True):
            found = crops(image, source)
            assert found
            seen |= set(found)
    assert {flip for *_, flip in seen} == {False, True} and len({(y, x) for y, x, _ in seen}) == 25


def test_reflected_borders_and_flips_in_turn(arrays):
    augmentation = data.Augmentation(crop_padding=2, crop_border="reflect", flip=True, alternate_flips=True)
    split = arrays.take(np.arange(10))
    padded = np.pad(split.images.astype("float32"), ((0, 0), (2, 2), (2, 2), (0, 0)), "reflect")
    sides, corners = [], set()
    for images, _ in collect(split, augmentation=augmentation, size=(12, 10), last=12, shuffle=False):
        sides.append([])
        for image, source in zip(images, padded, strict=True):
            found = crops(image, source)
            # The middle of an image is not its own mirror image, so the side is certain.
            assert len({flip for *_, flip in found}) == 1
            sides[-1].append(found[0][2])
            corners |= {(y, x) for y, x, _ in found}
    sides = np.array(sides)
    assert len(sides) == 12 and 0 < sides[0].sum() < 10 and len(corners) == 25
    assert np.array_equal(sides[::2], sides[[0] * 6]) and np.array_equal(sides[1::2], ~sides[[0] * 6])
    # Another run has other sides.
    other = collect(
        split, augmentation=data.Augmentation(flip=True, alternate_flips=True), size=(12, 10), last=1, shuffle=False, seed=4
    )
    flipped = [np.array_equal(image, source[:, ::-1]) for image, source in zip(other[0][0], split.images, strict=True)]
    assert flipped != list(sides[0]) and 0 < sum(flipped) < 10


@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_randaugment_operations_change_images_as_named(name, arrays):
    # Below 256 pixels the histogram has no steps to equalise.
    image = tf.constant(np.tile(arrays.images[0], (2, 2, 1)))
    fill = tf.constant([0.0, 128.0, 255.0])
    strong, none = (randaugment.OPERATIONS[name](image, level, 1.0, fill).numpy() for level in (1.0, 0.0))
    assert strong.dtype == np.uint8 and strong.shape == image.shape
    unchanging = ("autocontrast", "equalize")
    if name not in unchanging:
        np.testing.assert_array_equal(none, image)
    assert (name == "identity") == np.array_equal(strong, image)
    pixels = image.numpy().astype(float)
    expected = {
        "solarize": 255 - pixels, "brightness": np.minimum(np.round(pixels * 1.9), 255), "posterize": pixels // 16 * 16,
        "translate_x": np.concatenate([pixels[:, 9:], np.full_like(pixels[:, :9], [0, 128, 255])], 1),
    }  # fmt: skip
    if name in expected:
        np.testing.assert_array_equal(strong, expected[name])


@pytest.mark.parametrize("name", ["equalize", "autocontrast"])
def test_histogram_operations_are_those_of_pillow(name):
    image = np.random.default_rng(3).gamma(2.0, 20.0, (32, 32, 3)).clip(5, 250).astype("uint8")
    found = randaugment.OPERATIONS[name](tf.constant(image), 1.0, 1.0, tf.constant([0.0])).numpy()
    expected = np.asarray(getattr(ImageOps, name)(Image.fromarray(image)))
    assert np.abs(found.astype(int) - expected).max() <= (0 if name == "equalize" else 1) and not np.array_equal(found, image)


def test_mixup_and_cutmix_keep_the_mass_of_labels():
    images = tf.random.stateless_uniform((6, 8, 8, 3), [1, 2])
    labels = tf.eye(6)
    for seed in range(5):
        mixed, soft = mixing.mix(images, labels, 0.5, 0.0, tf.constant([seed, 1], tf.int64))
        share = float(soft[0, 0])
        np.testing.assert_allclose(mixed, share * images + (1 - share) * images[::-1], rtol=1e-5, atol=1e-6)
        cut, soft = mixing.mix(images, labels, 0.0, 1.0, tf.constant([seed, 1], tf.int64))
        own = np.all(cut.numpy() == images.numpy(), -1)
        np.testing.assert_allclose(own.mean((1, 2)), [float(soft[i, i]) for i in range(6)], atol=1e-6)
        assert np.all(own | np.all(cut.numpy() == images.numpy()[::-1], -1))
        np.testing.assert_allclose(soft.numpy().sum(1), 1, rtol=1e-6)


def test_evaluation_sees_every_image_once_whatever_the_batch(arrays):
    for share, replicas in ((None, 1), (Share(0, 8), 2)):
        batches = list(data.evaluation_batches(arrays, batch=16, size=(12, 10), num_classes=7, share=share, replicas=replicas))
        weights = np.concatenate([w for *_, w in batches])
        kept = np.concatenate([x for x, *_ in batches])[weights > 0]
        places = [i for i in range(50) if share is None or i % 16 < 8]
        np.testing.assert_array_equal(kept, arrays.images[places])
        assert all(len(w) == (16 if share is None else 4) for *_, w in batches)


def test_held_out_images_are_no_training_images(arrays):
    rest, held = data.hold_out(arrays, 12, seed=1)
    assert rest.size == 38 and held.size == 12
    key = lambda split: {image.tobytes() for image in split.images}  # noqa: E731
    assert not key(rest) & key(held) and len(key(rest) | key(held)) == 50
    with pytest.raises(ValueError, match="between 1 and the number of training images"):
        data.hold_out(arrays, 50)


def test_folder_reads_jpeg_windows_and_caches(folder):
    source = data.load(str(folder))
    assert source.classes == ("bird", "cat") and source.train.size == 18 and source.test.size == 6 and source.crop
    options = {
        "batch": 6,
        "size": (24, 24),
        "num_classes": 2,
        "augmentation": data.Augmentation(random_area=0.2, flip=True),
        "last": 6,
    }
    read = collect(source.train, **options)
    cached = collect(data.load(str(folder), cache=True).train, **options)
    assert_same(cached, read)
    assert 20 < np.mean([x.mean() for x, _ in read]) < 235 and read[0][0].std() > 5
    whole = collect(source.train, **{**options, "augmentation": data.Augmentation(random_area=1.0)}, shuffle=False)
    first = np.asarray(Image.open(source.train.paths[0]).convert("RGB"), "float32")
    np.testing.assert_allclose(whole[0][0][0].mean(), first.mean(), rtol=0.05)
    (images, labels, _), *_ = data.evaluation_batches(source.test, batch=6, size=(24, 24), num_classes=2, crop=True)
    assert images.shape == (6, 24, 24, 3) and labels.numpy().argmax(1).tolist() == [0, 0, 0, 1, 1, 1]


def test_cached_files_are_read_once_for_all_segments(folder):
    split = data.load(str(folder), cache=True).train
    first = collect(split, num_classes=2, batch=6, last=3)
    for path in split.paths:
        path.unlink()
    assert_same(collect(split, num_classes=2, batch=6, last=3), first)
    assert len(list(split.in_order())) == 18


def test_damaged_files_are_named_counted_and_skipped_or_fatal(folder):
    bird = folder / "train" / "bird"
    whole = (bird / "1.jpg").read_bytes()
    (bird / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (bird / "2.jpg").write_bytes(b"")
    (bird / "x.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1\.jpg and 2 more cannot be decoded"):
        data.load(str(folder), report=lambda line: None)
    lines = []
    for _ in range(2):
        lines.clear()
        source = data.load(str(folder), corrupt="skip", report=lines.append)
        assert source.train.size == 16 and len(source.damaged) == 3
        assert lines[-1] == "3 damaged images left out" and all(name in " ".join(lines) for name in ("1.jpg", "2.jpg", "x.png"))
    assert "{{" not in " ".join(lines)
    (bird / "1.jpg").write_bytes(whole)
    assert data.load(str(folder), corrupt="skip", report=lines.append).train.size == 17


def test_links_to_nothing_and_names_that_are_no_text_count_as_damaged(folder):
    bird = folder / "train" / "bird"
    (bird / "link.jpg").symlink_to(folder / "gone.jpg")
    with open(os.fsencode(bird) + b"/caf\xe9.jpg", "wb") as file:
        file.write((bird / "1.jpg").read_bytes())
    lines = []
    (bird / "linked").symlink_to(folder / "test")
    source = data.load(str(folder), corrupt="skip", report=lines.append)
    assert source.train.size == 18 and len(lines) == 3 and lines[-1] == "2 damaged images left out"
    assert any("link.jpg: No such file" in line for line in lines) and any("its name is not UTF-8" in line for line in lines)


@pytest.mark.parametrize(("part", "says"), [("train/bird", "train/bird has no images"), ("test", "test has no images")])
def test_a_class_or_a_test_set_of_damaged_images_alone_is_refused(folder, part, says):
    for path in (folder / part).rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=says + " that can be read"):
        data.load(str(folder), corrupt="skip", report=lambda line: None)
    for path in (folder / part).rglob("*.*"):
        path.unlink()
    with pytest.raises(ValueError, match=says + " that can be read"):
        data.load(str(folder), report=lambda line: None)


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_tfrecords_give_what_was_written(arrays, tmp_path, shards):
    paths = data.write_tfrecords(arrays, tmp_path, "train", classes="abcdefg", shards=shards)
    assert len(paths) == shards and not list(tmp_path.glob(".writing*"))
    split = data.load(str(tmp_path)).train
    assert split.size == 50
    plain = {"augmentation": None, "size": (12, 10), "last": 10}
    epochs = collect(split, **plain)
    key = lambda batches: sorted(x.tobytes() + y.tobytes() for xs, ys in batches for x, y in zip(xs, ys, strict=True))  # noqa: E731
    assert key(epochs[:5]) == key(epochs[5:]) == key(collect(arrays, **{**plain, "last": 5}))
    assert not np.array_equal(epochs[0][0], epochs[5][0])
    whole = collect(split)
    assert_same(collect(split, first=7), whole[7:])
    parts = [collect(split, share=Share(offset, 5)) for offset in (0, 5)]
    assert_same([tuple(np.concatenate(pair) for pair in zip(*both, strict=True)) for both in zip(*parts, strict=True)], whole)
    rest, held = data.hold_out(split, 10)
    assert (rest.size, held.size) == (40, 10) and len(list(held.in_order())) == 10


def test_tfrecords_that_are_damaged_or_missing_are_named(arrays, tmp_path):
    first, second = data.write_tfrecords(arrays, tmp_path, "train", classes="abcdefg", shards=2)
    from keras_resnet.data.tfrecord import damaged_records

    assert damaged_records(tmp_path, "train") == []
    content = bytearray(second.read_bytes())
    content[200] ^= 255
    second.write_bytes(content)
    (number, shard, reason), *_ = damaged_records(tmp_path, "train")
    assert number is None and shard == str(second) and reason
    with pytest.raises(ValueError, match="00001-of-00002.tfrecord is damaged"):
        data.load(str(tmp_path))
    second.unlink()
    with pytest.raises(ValueError, match="1 of 2 shards"):
        data.load(str(tmp_path))
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(ValueError, match="missing or damaged"):
        data.load(str(tmp_path))


def test_npz_and_its_faults(tmp_path, arrays):
    np.savez(tmp_path / "own.npz", x_train=arrays.images, y_train=arrays.labels)
    source = data.load(str(tmp_path / "own.npz"))
    assert source.test is None and len(source.classes) == 7 and source.image_size == (12, 10)
    np.testing.assert_allclose(source.mean, arrays.images.mean((0, 1, 2)), rtol=0.01)
    np.savez(tmp_path / "empty.npz", x=arrays.images)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    np.savez(tmp_path / "floats.npz", x_train=arrays.images / 255.0, y_train=arrays.labels)
    own = {"x_train": arrays.images, "y_train": arrays.labels}
    np.savez(tmp_path / "halves.npz", **own | {"y_train": arrays.labels + 0.5})
    np.savez(tmp_path / "endless.npz", **own | {"y_train": np.where(arrays.labels == 3, np.inf, arrays.labels)})
    np.savez(tmp_path / "words.npz", **own | {"y_train": arrays.labels.astype(str)})
    np.savez(tmp_path / "none.npz", x_train=arrays.images[:0], y_train=arrays.labels[:0])
    np.savez(tmp_path / "far.npz", **own | {"y_train": arrays.labels + 10**9})
    np.savez(tmp_path / "other.npz", **own, x_test=arrays.images[..., :1], y_test=arrays.labels)
    for name, says in (
        ("empty", "must hold x_train"), ("broken", "not a readable"), ("floats", "must be a uint8 array"),
        ("halves", "halves.npz, train: labels must be whole"), ("words", "words.npz, train: labels must be whole"),
        ("none", "none.npz has no images in x_train"), ("far", "to 999,999, got 10"), ("endless", "got inf"),
        ("other", "must have one shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            data.load(str(tmp_path / f"{name}.npz"))


def test_labels_of_other_types_are_taken_where_they_are_whole_numbers(arrays):
    for kind in (object, "float16", "uint8", "float64"):
        taken = data.Images(arrays.images, arrays.labels.astype(kind)).labels
        np.testing.assert_array_equal(taken, arrays.labels)
        assert taken.dtype == np.int64
    with pytest.raises(ValueError, match="whole numbers"):
        data.Images(arrays.images, np.array(["a"] * 50, object))


def test_unknown_data_are_named(tmp_path, folder):
    with pytest.raises(ValueError, match="unknown data 'cifar'.*did you mean"):
        data.load("cifar")
    with pytest.raises(FileNotFoundError, match="no data at"):
        data.load(str(tmp_path / "nowhere" / "x"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no folders of images"):
        data.load(str(tmp_path / "bare"))
    (folder / "test" / "dog").mkdir()
    with pytest.raises(ValueError, match="class that the training images lack: dog"):
        data.load(str(folder))
    with pytest.raises(ValueError, match='"fail" or "skip"'):
        data.load("digits", corrupt="ignore")


def test_cifar_comes_from_the_cache_of_keras_or_a_path(monkeypatch, tmp_path, arrays):
    x = np.zeros((6, 32, 32, 3), "uint8")
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: ((x, np.zeros((6, 1))), (x[:2], np.zeros((2, 1)))))
    source = data.load("cifar10")
    assert source.train.size == 6 and source.test.size == 2 and source.classes[0] == "airplane"

    def offline():
        raise OSError("no route to host")

    monkeypatch.setattr(keras.datasets.cifar100, "load_data", offline)
    with pytest.raises(ConnectionError, match="cannot be downloaded.*give the path"):
        data.load("cifar100")
    with pytest.raises(FileNotFoundError):
        data.load("cifar10", tmp_path / "nothing.npz")


@pytest.fixture
def tfds(monkeypatch, tmp_path):
    """The contract with TFDS, by a stand-in: a builder with two splits of encoded images, 20 and 4; gives those bytes."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3)).astype("uint8")
    encoded = [tf.io.encode_png(image).numpy() for image in images]
    info = types.SimpleNamespace(
        features={"image": types.SimpleNamespace(shape=(8, 8, 3)), "label": types.SimpleNamespace(names=["a", "b"])},
        splits={"train": types.SimpleNamespace(num_examples=20), "test": types.SimpleNamespace(num_examples=4)},
    )
    folder = tmp_path / "made_up" / "1.0.0"
    folder.mkdir(parents=True)
    for part in info.splits:
        (folder / f"made_up-{part}.tfrecord-00000-of-00001").write_bytes(b"1")

    class Builder:
        def __init__(self):
            self.info, self.data_dir = info, str(folder)

        def download_and_prepare(self):
            pass

        def as_dataset(self, split, shuffle_files, decoders, read_config):
            assert not shuffle_files and decoders["image"] == "skip" and read_config["interleave_cycle_length"] == 1
            count = info.splits[split].num_examples
            return tf.data.Dataset.from_tensor_slices({"image": encoded[:count], "label": np.arange(count, dtype="int64") % 2})

    stand_in = types.SimpleNamespace(
        builder=lambda name, data_dir: Builder(),
        ReadConfig=lambda **options: options,
        decode=types.SimpleNamespace(SkipDecoding=lambda: "skip"),
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", stand_in)
    return types.SimpleNamespace(images=images, encoded=encoded, folder=folder)


def test_tfds_by_name(monkeypatch, tfds):
    source = data.load("tfds/made_up")
    assert source.classes == ("a", "b") and source.test.size == 4 and source.image_size == (8, 8) and source.damaged == ()
    found = collect(source.train, augmentation=None, size=(8, 8), num_classes=2, last=2)
    key = lambda array: sorted(image.tobytes() for image in array)  # noqa: E731
    assert key(np.concatenate([x for x, _ in found])) == key(tfds.images.astype("float32"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"\[data\]"):
        data.load("tfds/made_up")


def test_damaged_images_of_tfds_are_named_and_skipped_or_fatal(tfds, monkeypatch):
    monkeypatch.setattr(data.corrupt, "MANY", 10)
    tfds.encoded[3], tfds.encoded[11] = tfds.encoded[3][:40], b""
    lines = []
    with pytest.raises(ValueError, match="made_up, record 3 of train and 2 more cannot be decoded"):
        data.load("tfds/made_up", report=lines.append)
    assert lines[0] == "checking 20 images" and "damaged image: tfds/made_up, record 11 of train: empty file" in lines
    source = data.load("tfds/made_up", corrupt="skip", report=lines.append)
    assert (source.train.size, source.test.size) == (18, 3) and lines[-1] == "3 damaged images left out"
    kept = [image.numpy() for _, _, image, _ in source.train.in_order()]
    assert kept == [data for i, data in enumerate(tfds.encoded) if i not in (3, 11)]
    assert len(collect(source.train, size=(8, 8), num_classes=2, batch=9, last=4)) == 4
    # What was found is remembered as long as the files stay as they are.
    tfds.encoded[3], tfds.encoded[11] = tfds.encoded[0], tfds.encoded[0]
    assert data.load("tfds/made_up", corrupt="skip", report=lines.append).train.size == 18
    for path in tfds.folder.iterdir():
        path.write_bytes(b"22")
    assert data.load("tfds/made_up", report=lines.append).train.size == 20


def test_damaged_images_in_shards_are_named_and_skipped_or_fatal(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(data.tfrecord, "MUCH", 100)
    files = []
    for i in range(10):
        encoded = tf.io.encode_png(arrays.images[i]).numpy()
        files.append(tmp_path / f"{i}.png")
        files[-1].write_bytes(encoded[: len(encoded) // 3] if i in (2, 7) else encoded)
    data.write_tfrecords(data.Encoded(np.array(files, object), np.arange(10) % 2), tmp_path / "s", "train", classes="ab")
    lines = []
    with pytest.raises(ValueError, match="record . of the split and 1 more cannot be decoded"):
        data.load(str(tmp_path / "s"), report=lines.append)
    assert lines[0].startswith("checking the shards of train")
    again = []
    source = data.load(str(tmp_path / "s"), corrupt="skip", report=again.append)
    assert not any(line.startswith("checking") for line in again)
    lines += again
    assert source.train.size == 8 and lines[-1] == "2 damaged images left out"
    assert sum(1 for _ in data.evaluation_batches(source.train, batch=4, size=(12, 10), num_classes=2)) == 2


def test_other_endings_are_named_and_empty_classes_refused(folder):
    (folder / "train" / "cat" / "note.heic").write_bytes(b"x")
    lines = []
    data.load(str(folder), report=lines.append)
    assert lines == [f"{folder / 'train' / 'cat'}: 1 file is not an image that can be read (.heic)"]
    (folder / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match="dog has no images"):
        data.load(str(folder), report=lines.append)


def test_small_images_of_a_folder_are_not_cut_for_testing(tmp_path, arrays):
    for i in range(4):
        place = tmp_path / "f" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays.images[i, :10]).save(place / f"{i}.png")
    split = data.load(str(tmp_path / "f")).train
    images = next(iter(data.evaluation_batches(split, batch=4, size=(10, 10), num_classes=2, crop=True)))[0].numpy()
    np.testing.assert_array_equal(images, arrays.images[[0, 2, 1, 3], :10].astype("float32"))
