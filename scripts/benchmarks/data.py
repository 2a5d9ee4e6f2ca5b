"""Images per second of each input pipeline, and whether it keeps ahead of the model it feeds."""

import tempfile
import time
from pathlib import Path

import click
import numpy as np


def speed(dataset, batch, seconds):
    """Images per second of a dataset of batches, after eight batches to warm up."""
    iterator = iter(dataset)
    for _ in range(8):
        next(iterator)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(iterator)
        count += batch
    return count / (time.perf_counter() - started)


def sources(folder, size, count):
    """The same photographs as arrays, image folder, cached image folder and TFRecord shards."""
    import tensorflow as tf

    from keras_resnet import data

    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "photos" / name).mkdir(parents=True)
    for i in range(count):
        # Smooth noise: JPEG files of the size that photographs have.
        small = rng.integers(0, 256, (size // 16, size // 16, 3)).astype("uint8")
        pixels = tf.cast(tf.image.resize(small, (size, size), "bicubic"), tf.int32)
        pixels = tf.saturate_cast(pixels + rng.integers(-12, 12, (size, size, 3)), tf.uint8)
        tf.io.write_file(str(folder / "photos" / "ab"[i % 2] / f"{i}.jpg"), tf.io.encode_jpeg(pixels, quality=90))
    files = data.load(str(folder / "photos")).train
    data.write_tfrecords(files, folder / "records", "train", classes="ab", shards=4)
    return {
        "image folder": files,
        "image folder, cached": data.load(str(folder / "photos"), cache=True).train,
        "TFRecord shards": data.load(str(folder / "records")).train,
    }


@click.command()
@click.option("--seconds", default=5.0, show_default=True, help="Seconds to measure each pipeline.")
@click.option("--model/--no-model", default=True, show_default=True, help="Also measure training steps of the models.")
def data(seconds, model):
    """Measure the input pipelines in images per second, each with its usual augmentation.

    Example: scripts/benchmark.py data --seconds 10
    """
    from keras_resnet import data as datasets
    from keras_resnet import training

    rng = np.random.default_rng(0)
    cifar = datasets.Images(rng.integers(0, 256, (10_000, 32, 32, 3)).astype("uint8"), rng.integers(0, 10, 10_000))
    crops = datasets.Augmentation(crop_padding=4, flip=True)
    photos = datasets.Augmentation(random_area=0.08, flip=True)
    rich = datasets.Augmentation(random_area=0.08, flip=True, randaugment=2, erasing=0.25)
    digits = datasets.load("digits").train
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            ("digits, as they are", digits, 128, (8, 8), 10, None, {}),
            ("CIFAR arrays, crop and flip", cifar, 128, (32, 32), 10, crops, {}),
            ("CIFAR arrays, MixUp and CutMix", cifar, 128, (32, 32), 10, crops, {"mixup": 0.2, "cutmix": 1.0}),
        ]
        for name, split in sources(Path(folder), 400, 256).items():
            rows += [(f"{name}, 224 px", split, 64, (224, 224), 2, photos, {})]
            if name == "image folder, cached":
                rows += [(f"{name}, 224 px, RandAugment", split, 64, (224, 224), 2, rich, {})]
        found = {}
        for name, split, batch, size, classes, augmentation, options in rows:
            dataset = datasets.training_batches(
                split, batch=batch, size=size, num_classes=classes, augmentation=augmentation, fill=0.0, **options
            )
            found[name] = speed(dataset, batch, seconds)
            click.echo(f"{name:44} {found[name]:9.0f} images/s")
        if not model:
            return
        for name, label, size, batch in (
            ("resnet20", "CIFAR arrays, crop and flip", 32, 128),
            ("resnet50", "image folder, 224 px", 224, 8),
        ):
            own = step_speed(training, name, size, batch, seconds)
            ahead = found[label] / own
            click.echo(
                f"{name} trains at {own:.0f} images/s; the input is {ahead:.1f} × as fast: {'ahead' if ahead > 1 else 'BEHIND'}"
            )


def step_speed(training, name, size, batch, seconds):
    """Images per second of training steps on images that are there already."""
    import keras_resnet as kr

    from .train import steps_of

    step = steps_of(kr.create_model(name, weights=None, input_shape=(size, size, 3)), size, batch)
    step()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        step()
        count += batch
    return count / (time.perf_counter() - started)
