#!/usr/bin/env python
"""What each part of the recipe `cifar-speed` is worth: the recipe without one part at a time, on held-out training images."""

import functools
import sys
from dataclasses import dataclass

import contest
import lab
from lab import Cell, markdown, panels, pick, plus_minus, size

NAME = "speed"
BASE = "recipe"
# `(label, fields of the network, options of the run)` of each arm; the first is the recipe as it is.
ARMS = {
    BASE: ("recipe", {}, {}),
    "sgd": ("Nesterov SGD instead of Muon", {}, {"optimizer": "sgd", "warmup_epochs": 0.23}),
    "muon-low": ("Muon at 0.1 instead of 0.24", {}, {"muon_rate": 0.1}),
    "muon-high": ("Muon at 0.4 instead of 0.24", {}, {"muon_rate": 0.4}),
    "float32": ("float32", {"dtype": "float32"}, {}),
    "relu": ("ReLU", {"activation": "relu"}, {}),
    "gelu": ("GELU", {"activation": "gelu"}, {}),
    "he": ("random kernels instead of Dirac", {"initializer": "he"}, {}),
    "random-stem": ("random fixed stem instead of whitening", {}, {}),
    "scale": ("norms with γ", {"norm_scale": True}, {}),
    "average": ("average pool in the head", {"head_pool": "average"}, {}),
    "unscaled": (
        "logits not scaled",
        {"head_scale": 1.0},
        {"learning_rate": 0.8 / 81, "beta_lr_multiplier": 64.0 * 81, "weight_decay": 1e-3 * 81},
    ),
    "beta": ("β at the learning rate of the rest", {}, {"beta_lr_multiplier": 1.0, "beta_decay_multiplier": 1.0}),
    "beta-decay": ("β without weight decay", {}, {"beta_decay_multiplier": 0.0}),
    "hard-labels": ("no label smoothing", {}, {"label_smoothing": 0.0}),
    "random-flips": ("flips at random", {}, {"alternate_flips": False}),
    "mean-border": ("borders of the mean colour", {}, {"crop_border": "mean"}),
    "small-crops": ("crops of 24 pixels in the first half", {}, {"small_crops": 0.75, "small_epochs": 0.5}),
    "ema": ("average of weights, momentum 0.9", {}, {"ema": 0.9}),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    images: int = size(20_000, "Training images, held-out ones included.")
    test_images: int = size(10, "Test images; none is looked at.")
    held_out: int = size(5_000, "Training images to hold out.")
    epochs: int = size(4, "Epochs.")
    width: int = size(25, "Width of the network, in per cent.")
    batch: int = size(500, "Images per step.")
    arms: tuple = size(tuple(ARMS), "Arms to run.", plan=True)


QUICK = Sizes(600, held_out=100, epochs=1, width=13, batch=50, arms=(BASE, "sgd", "random-stem"))


@lab.experiment(lambda flags: (NAME, QUICK if flags["quick"] else Sizes()), Sizes)
def main(lab_):
    """Train `cifar_speed` with its recipe and with one part of it changed, and measure held-out training images.

    The test set is never read. `seconds` are those of training and of the validation of the process that runs alone.

    \b
    Examples:
      scripts/experiments/speed.py --quick
      scripts/experiments/speed.py --arms recipe,sgd --seeds 3,4,5
    """
    from keras_resnet.training import TrainingError

    if unknown := [arm for arm in lab_.sizes.arms if arm not in ARMS]:
        raise TrainingError(f"unknown arm {unknown[0]!r}; choose from {', '.join(ARMS)}")
    cells = [
        Cell({"arm": arm, "seed": seed}, functools.partial(train_arm, lab_, arm, seed), lab_.sizes.epochs)
        for seed in lab_.seeds
        for arm in lab_.sizes.arms
    ]
    lab_.write(lab_.run(cells))
    lab_.publish(sys.modules[__name__])


def train_arm(lab_, arm, seed, folder):
    """The function of a cell: one row."""
    import keras

    import keras_resnet as kr
    from keras_resnet.training import fit

    sizes, (_, fields, changes) = lab_.sizes, ARMS[arm]
    source, _ = contest.split(lab_.source(), sizes.held_out)
    channels = source.train.channels
    config = {
        "dtype": "mixed_bfloat16",
        "widths": tuple(round(width * sizes.width / 100) for width in (64, 256, 256)),
        "stem_widths": (8 * channels,),
        **fields,
    }
    keras.utils.set_random_seed(seed)
    with lab.sentences():
        model = kr.create_model(
            "cifar_speed", num_classes=len(source.classes), input_shape=(*source.image_size, channels),
            preprocessing=source.preprocessing, **config,
        )  # fmt: skip
        if arm != "random-stem":
            kr.whiten_stem(model, source.train.images[:5_000])
    options = {"batch_size": sizes.batch, "base_batch": sizes.batch, "epochs": sizes.epochs, "seed": seed, **changes}
    if "warmup_epochs" in options:  # A share of the run.
        options["warmup_epochs"] *= sizes.epochs
    summary = fit(model, source, recipe="cifar-speed", out=folder, validate="none", **options).summary
    return [
        {
            "accuracy": summary["test_accuracy"], "accuracy_tta": summary["test_accuracy_tta"], "loss": summary["test_loss"],
            "train_accuracy": summary["train_accuracy"], "seconds": summary["seconds"],
        }
    ]  # fmt: skip


# ---------------------------------------------------------------- what the tables say


def arms_of(results):
    """The arms that were run, in the order of `ARMS`."""
    there = {row["arm"] for row in results.rows}
    return [arm for arm in ARMS if arm in there]


def figures(results):
    """Held-out accuracy of every arm."""
    figure, axes = panels(1, 1, width=6.4, height=4.6)
    axis, arms = axes[0, 0], arms_of(results)[::-1]
    for place, arm in enumerate(arms):
        values = [100 * row["accuracy"] for row in pick(results.rows, arm=arm)]
        axis.plot(values, [place] * len(values), "o", color=lab.COLOURS[arm == BASE], alpha=0.7)
    axis.set(xlabel="held-out accuracy, %", yticks=range(len(arms)), yticklabels=[ARMS[arm][0] for arm in arms])
    return {"": figure}


def facts(results):
    """The table: accuracy without and with test-time augmentation, difference to the recipe seed by seed, and time."""
    base = {row["seed"]: row for row in pick(results.rows, arm=BASE)}
    body = []
    for arm in arms_of(results):
        rows = pick(results.rows, arm=arm)
        gains = [100 * (row["accuracy"] - base[row["seed"]]["accuracy"]) for row in rows if row["seed"] in base]
        times = [row["seconds"] / base[row["seed"]]["seconds"] for row in rows if row["seed"] in base]
        body.append(
            [
                ARMS[arm][0], plus_minus([row["accuracy"] for row in rows], ".2f", 100),
                plus_minus([row["accuracy_tta"] for row in rows], ".2f", 100),
                "" if arm == BASE or not gains else plus_minus(gains, "+.2f"),
                plus_minus(times, ".2f") if times else "", len(rows),
            ]
        )  # fmt: skip
    header = ["changed", "accuracy, %", "with TTA, %", "difference", "time", "seeds"]
    return {"table": markdown(header, body)}


if __name__ == "__main__":
    main()
