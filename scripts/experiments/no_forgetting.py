#!/usr/bin/env python
"""Experiment C: a network learns new classes without forgetting the old ones, by grown blocks on a frozen backbone."""

import dataclasses
import functools
import sys
from dataclasses import dataclass

import click
import contest
import lab
import numpy as np
from lab import Cell, markdown, panels, pick, plus_minus, size

LABELS = {
    "everything": "fine-tune everything, new head",
    "head": "new head only",
    "grown": "frozen backbone, grown blocks, new head",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    network: str = size("resnet20", "Residual network of the zoo.")
    widths: tuple = size((4, 8, 16), "Filters of its stages.")
    stem_stride: int = size(2, "Stride of its first convolution.")
    images: int = size(50_000, "Training images of all ten classes, the held-out ones included.")
    held_out: int = size(5_000, "Training images held out to choose the recipes.")
    test_images: int = size(5_000, "Test images of all ten classes.")
    backbone_epochs: int = size(10, "Epochs on the classes 0 to 4.")
    trial_epochs: int = size(2, "Epochs of a trial on the classes 5 to 9.")
    epochs: int = size(6, "Epochs on the classes 5 to 9 that are compared.")
    rates: tuple = size((0.05, 0.2), "Peak learning rates that every arm tries.")
    gate_rate: float = size(8.0, "Factor on the learning rate of the gates of the grown arm.")
    blocks: int = size(13, "Blocks that are grown.")
    block: str = size("postact", "Kind of the grown blocks.")
    batch: int = size(256, "Images per step.")


QUICK = Sizes(
    images=128, held_out=64, test_images=64, backbone_epochs=1, trial_epochs=1, epochs=1, rates=(0.05,), blocks=3, batch=16
)  # fmt: skip


@lab.experiment(
    lambda flags: ("no_forgetting", QUICK if flags["quick"] else Sizes()),
    Sizes,
    click.option(
        "--backbone",
        type=click.Path(exists=True, dir_okay=False, path_type=lab.Path),
        help="Backbone (.keras) trained on the classes 0 to 4 without the held-out images; it replaces that training.",
    ),
)
def main(lab_, backbone):
    """Train on the classes 0 to 4, then on 5 to 9 without the old images, with one head per task.

    With the grown blocks switched off, the old network must be there bit by bit; the run stops if it is not.

    \b
    Examples:
      scripts/experiments/no_forgetting.py --quick
      scripts/experiments/no_forgetting.py --seeds 0,1,2,3,4
    """
    study = Study(lab_, backbone)
    sizes, seeds = lab_.sizes, lab_.seeds
    backbones = [
        Cell(backbone_key(seed), functools.partial(study.train_backbone, seed), sizes.backbone_epochs, ("model.keras",))
        for seed in seeds
    ]
    trials = [
        Cell(
            {"phase": "trial", "arm": arm, "rate": rate, "seed": seeds[0]},
            functools.partial(study.train, arm, seeds[0], rate, sizes.trial_epochs, False),
            sizes.trial_epochs,
        )
        for arm in LABELS
        for rate in sizes.rates
    ]
    rows = lab_.run([*backbones, *trials])
    best = {}
    for arm in LABELS:
        best[arm] = max(pick(rows, phase="trial", arm=arm), key=lambda row: row["mean_accuracy"])["rate"]
    rows += lab_.run(
        [
            Cell(
                {"phase": "final", "arm": arm, "rate": best[arm], "seed": seed},
                functools.partial(study.train, arm, seed, best[arm], sizes.epochs, True),
                sizes.epochs,
            )
            for seed in seeds
            for arm in LABELS
        ]
    )
    lab_.write(rows)
    lab_.publish(sys.modules[__name__])


def backbone_key(seed):
    """Key of the cell of a backbone."""
    return {"phase": "backbone", "arm": "backbone", "rate": 0, "seed": seed}


class Study:
    """The two tasks and the arms of the second.

    Args:
        lab_: `Lab`.
        given: Path of a backbone trained on the first task, or None.
    """

    def __init__(self, lab_, given):
        self.lab, self.given = lab_, given
        self._tasks = None

    def tasks(self):
        """`(training source, test images)` of the classes 0 to 4, and of 5 to 9; labels start at 0."""
        if self._tasks is None:
            source, test = contest.split(self.lab.source(), self.lab.sizes.held_out)
            self._tasks = [(self._part(source, first), _of(test, first)) for first in (0, 5)]
        return self._tasks

    def _part(self, source, first):
        train, held_out = (_of(images, first) for images in (source.train, source.test))
        return dataclasses.replace(source, train=train, test=held_out, classes=tuple(source.classes[first : first + 5]))

    def train_backbone(self, seed, folder):
        """The function of the cell that all arms begin from."""
        import keras

        (old, _), _ = self.tasks()
        if self.given is not None:
            model = keras.saving.load_model(self.given, compile=False)
            model.save(folder / "model.keras")
            return [{"old_held_out": _accuracy(model, old.test)}]
        import keras_resnet as kr

        keras.utils.set_random_seed(seed)
        shape = (*old.image_size, old.train.channels)
        model = kr.create_model(
            self.lab.sizes.network, num_classes=5, input_shape=shape, preprocessing=old.preprocessing,
            **contest.widths(self.lab.sizes),
        )  # fmt: skip
        batch = self.lab.sizes.batch
        rows = self.lab.train(
            folder, model, old, recipe="cpu-budget", small_crops=1.0, epochs=self.lab.sizes.backbone_epochs, seed=seed,
            batch_size=batch, fused_norm=True,
        )  # fmt: skip
        return [{"old_held_out": round(1 - rows[-1]["test_error"], 6)}]

    def train(self, arm, seed, rate, epochs, final, folder):
        """The function of an arm: one row with the accuracy on both tasks."""
        import keras

        import keras_resnet as kr
        from keras_resnet.training import TrainingError, fit

        sizes = self.lab.sizes
        (old, old_test), (new, new_test) = self.tasks()
        backbone = keras.saving.load_model(self.lab.folder(backbone_key(seed)) / "model.keras", compile=False)
        keras.utils.set_random_seed(1000 * seed + 1)
        model = kr.replace_head(backbone, 5)
        if arm == "grown":
            points = [layer.name for layer in model.layers if layer.name.startswith("stage") and layer.name.endswith("_out")]
            model = self.lab.grow(
                model, points, total_blocks=sizes.blocks, block=sizes.block, gate="zero_gamma", seed=1000 * seed + 1
            )  # fmt: skip
        run = {
            "batch_size": sizes.batch, "base_batch": sizes.batch, "learning_rate": rate, "nesterov": True, "schedule": "cosine",
            "weight_decay": 5e-4, "warmup_epochs": 0.05 * epochs, "flip": True, "crop_padding": 4, "clip_norm": 5.0,
            "fused_norm": True, "frozen_epochs": 0 if arm == "everything" else epochs,
            "gate_lr_multiplier": sizes.gate_rate if arm == "grown" else 1.0,
        }  # fmt: skip
        if self.lab.data_name == "digits":
            run |= {"flip": False, "crop_padding": 0}
        trained = fit(model, new, out=folder, validate="none", epochs=epochs, seed=1000 * seed + 1, **run).model
        on_old = trained if arm != "grown" else kr.without_blocks(trained)
        on_old = _with_head_of(on_old, backbone)
        old_images, new_images = (old_test, new_test) if final else (old.test, new.test)
        probe = old_images.images[:256].astype("float32")
        same = bool(np.array_equal(on_old(probe, training=False), backbone(probe, training=False)))
        if arm != "everything" and not same:
            raise TrainingError(f"the old answers of arm {arm} changed, although its backbone was frozen")
        row = {
            "old_before": _accuracy(backbone, old_images), "old_accuracy": _accuracy(on_old, old_images),
            "new_accuracy": _accuracy(trained, new_images), "old_answers_equal": int(same),
        }  # fmt: skip
        return [{**row, "mean_accuracy": (row["old_accuracy"] + row["new_accuracy"]) / 2}]


def _of(images, first):
    """The images of five classes, labelled from 0."""
    labels = np.asarray(images.labels)
    part = images.take(np.flatnonzero((labels >= first) & (labels < first + 5)))
    return dataclasses.replace(part, labels=np.asarray(part.labels) - first)


def _with_head_of(model, other):
    """A copy of a model with the weights of another's last layer."""
    from keras_resnet.growth import copy_model

    copied = copy_model(model)
    copied.layers[-1].set_weights(other.layers[-1].get_weights())
    return copied


def _accuracy(model, images):
    parts = [
        np.asarray(model.predict_on_batch(images.images[start : start + 250].astype("float32"))).argmax(-1)
        for start in range(0, images.size, 250)
    ]
    return float((np.concatenate(parts) == np.asarray(images.labels)).mean())


# ---------------------------------------------------------------- what the tables say


def figures(results):
    """Accuracy on the old task over that on the new one."""
    figure, axes = panels(1, 1, width=5.4, height=4.2)
    for (arm, label), colour in zip(LABELS.items(), lab.COLOURS, strict=False):
        rows = pick(results.rows, phase="final", arm=arm)
        x, y = ([100 * row[key] for row in rows] for key in ("new_accuracy", "old_accuracy"))
        axes[0, 0].plot(x, y, "o", color=colour, label=label)
    axes[0, 0].set(xlabel="accuracy on the new classes, %", ylabel="accuracy on the old classes, %")
    figure.legend(loc="outside lower center", frameon=False)
    return {"": figure}


def facts(results):
    """The table of arms, and that of trials."""
    body = []
    for arm, label in LABELS.items():
        rows = pick(results.rows, phase="final", arm=arm)
        cells = [plus_minus([row[key] for row in rows], ".2f", 100) for key in ("old_accuracy", "new_accuracy", "mean_accuracy")]
        equal = "yes" if all(row["old_answers_equal"] for row in rows) else "no"
        body.append([label, *cells, equal, len(rows)])
    header = ["arm", "old classes, %", "new classes, %", "mean, %", "old answers ==", "seeds"]
    trials = [
        [LABELS[r["arm"]], r["rate"], *(f"{100 * r[key]:.2f}" for key in ("old_accuracy", "new_accuracy", "mean_accuracy"))]
        for r in pick(results.rows, phase="trial")
    ]
    trial_header = ["arm", "learning rate", "old classes, held out, %", "new classes, held out, %", "mean, %"]
    return {"table": markdown(header, body), "trials": markdown(trial_header, trials), "gain": _gain(results.rows)}


def _gain(rows):
    """What the grown arm is ahead of the others, over pairs of one seed."""

    def ahead(other, key):
        by_seed = [{row["seed"]: row[key] for row in pick(rows, phase="final", arm=arm)} for arm in ("grown", other)]
        gains = 100 * np.array([value - by_seed[1][seed] for seed, value in by_seed[0].items() if seed in by_seed[1]])
        error = f" ± {gains.std(ddof=1) / np.sqrt(len(gains)):.1f}" if len(gains) > 1 else ""
        return f"{gains.mean():+.1f}{error} points"

    new, mean = ahead("head", "new_accuracy"), ahead("everything", "mean_accuracy")
    return (
        f"{new} on the new classes against the new head alone, and {mean} on the mean of old and new classes against fine-tuning "
        "everything (± is the standard error over seeds)"
    )


if __name__ == "__main__":
    main()
