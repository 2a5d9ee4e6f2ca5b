#!/usr/bin/env python
"""How far new blocks drift in a network without norms, with and without `scale="match"`, for SGD and AdamW."""

import functools
import sys
from dataclasses import dataclass

import click
import grow_vgg
import lab
import numpy as np
from lab import Cell, markdown, panels, pick, size

# 13 blocks, 26 layers: in proportion to the three convolutions before each of the two points.
POINTS = ["block3_pool"] * 6 + ["block4_pool"] * 7
SCALES = {"none": None, "match": "match"}
LABELS = {"none": "branches as they are", "match": 'scale="match"'}
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    images: int = size(512, "Training images.")
    test_images: int = size(512, "Test images.")
    image_size: int = size(32, "Side to which the images are brought.")
    trunk_epochs: int = size(2, "Epochs of the VGG with its new head, before it grows.")
    trunk_rate: float = size(0.005, "Learning rate of those epochs, with SGD.")
    epochs: int = size(3, "Epochs after the growth.")
    sgd_rates: tuple = size((0.005,), "Learning rates of SGD with Nesterov momentum 0.9.", plan=True)
    adamw_rates: tuple = size((0.0003,), "Learning rates of AdamW.", plan=True)
    block: str = size("preact", "Kind of the residual blocks.")
    batch: int = size(16, "Images per step.")


QUICK = Sizes(32, 16, trunk_epochs=1, epochs=1, sgd_rates=(0.005,), adamw_rates=(0.0003,), block="depthwise")


@lab.experiment(
    lambda flags: ("match_scale", QUICK if flags["quick"] else Sizes()),
    Sizes,
    click.option(
        "--weights",
        type=click.Path(exists=True, dir_okay=False, path_type=lab.Path),
        help="VGG16's ImageNet convolutions as .npz (block1_conv1/kernel, …).  [../shared/data/weights/vgg16_imagenet_notop.npz]",
    ),
)
def main(lab_, weights):
    """Grow the ImageNet VGG16 by 26 layers after blocks 3 and 4, train on, and log the drift of every block.

    Blocks 1 to 3 are frozen: their features are computed once. All arms of a seed start from the same VGG, whose new head and
    upper blocks were trained before.

    \b
    Examples:
      scripts/experiments/match_scale.py --quick
      scripts/experiments/match_scale.py --seeds 0 --sgd-rates 0.01
    """
    study = Study(lab_, weights)
    sizes = lab_.sizes
    backbones = [
        Cell(
            grow_vgg.trunk_key(seed),
            functools.partial(study.train_trunk, seed),
            sizes.trunk_epochs,
            ("model.keras",),
        )
        for seed in lab_.seeds
    ]
    arms = [
        Cell(
            {"arm": scale, "optimizer": optimizer, "rate": rate, "seed": seed},
            functools.partial(study.train_scaled, scale, optimizer, rate, seed),
            3 * sizes.epochs,
            ("drift.csv",),
        )
        for seed in lab_.seeds
        for optimizer in OPTIMIZERS
        for rate in getattr(sizes, f"{optimizer}_rates")
        for scale in SCALES
    ]
    rows = lab_.run([*backbones, *arms])
    drifts = [{**cell.key, **row} for cell in arms for row in lab.read_csv(lab_.folder(cell.key) / "drift.csv")]
    lab_.write(rows, drift=drifts)
    lab_.publish(sys.modules[__name__])


class Study(grow_vgg.ImageNetStudy):
    """The ImageNet VGG16 on CIFAR-10, grown with and without a matched scale."""

    def grown(self, trunk, seed, **arm):
        return self.lab.grow(trunk, POINTS, **{"seed": 1000 * seed + 1, "block": self.lab.sizes.block} | arm)

    def train_scaled(self, scale, optimizer, rate, seed, folder):
        """The function of an arm: a row per epoch."""
        import keras

        from keras_resnet.growth import block_scales
        from keras_resnet.training import DriftLogger

        sizes, source = self.lab.sizes, self.source()
        backbone = keras.saving.load_model(self.lab.folder(grow_vgg.trunk_key(seed)) / "model.keras", compile=False)
        data = source.train.images[:256].astype("float32") if SCALES[scale] else None
        model = self.grown(backbone, seed, scale=SCALES[scale], data=data)
        probe = source.test.images[:64].astype("float32")
        # The log of a run that stopped early is appended to, and a run without it starts a new one.
        watch = [DriftLogger(probe, folder / "drift.csv")]
        run = self._run(rate) | {"optimizer": optimizer, "weight_decay": 5e-4 if optimizer == "sgd" else 0.01}
        rows = self.lab.train(folder, model, source, may_diverge=True, epochs=sizes.epochs, seed=seed, callbacks=watch, **run)
        scales = list(block_scales(model).values())
        return [{**row, "smallest_scale": min(scales), "largest_scale": max(scales)} for row in rows]


# ---------------------------------------------------------------- what the tables say


def figures(results):
    """Drift of every block over the epochs: a panel per optimizer and learning rate, a colour per arm."""
    arms = [row for row in results.rows if row["arm"] != "trunk"]
    settings = list(dict.fromkeys((row["optimizer"], row["rate"]) for row in arms))
    figure, axes = panels(1, len(settings), width=3.6, sharey=True)
    for axis, (optimizer, rate) in zip(axes[0], settings, strict=True):
        for (arm, label), colour in zip(LABELS.items(), lab.COLOURS, strict=False):
            rows = pick(results.more["drift"], arm=arm, optimizer=optimizer, rate=rate)
            for number, block in enumerate(dict.fromkeys(row["block"] for row in rows)):
                found = [row for row in rows if row["block"] == block and row["mean"] > 0]
                lab.band(
                    axis, found, "epoch", "mean", floor=1e-8, color=colour, lw=1, alpha=0.7, label=None if number else label
                )  # fmt: skip
        axis.set(yscale="log", xlabel="epochs after the growth", title=f"{optimizer}, rate {rate:g}")
    axes[0, 0].set_ylabel("drift ‖F(x)‖/‖x‖ of each block")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return {"": figure}


def facts(results):
    """The table: smallest, median and largest drift at the end, by insertion point."""
    body = []
    arms = [row for row in results.rows if row["arm"] != "trunk"]
    for optimizer, rate, arm in dict.fromkeys((row["optimizer"], row["rate"], row["arm"]) for row in arms):
        rows = pick(arms, optimizer=optimizer, rate=rate, arm=arm)
        drift = pick(results.more["drift"], optimizer=optimizer, rate=rate, arm=arm)
        last = max((row["epoch"] for row in drift), default=0)
        ends = [row for row in drift if row["epoch"] == last]
        places = []
        for point in dict.fromkeys(POINTS):
            values = [row["mean"] for row in ends if row["block"].startswith(point)]
            spread = f"{min(values):.1e} / {np.median(values):.1e} / {max(values):.1e}" if values else "–"
            places.append(spread)
        finals = [row for row in rows if row["epoch"] == max(r["epoch"] for r in rows)]
        broken = any("diverged" in row for row in rows)
        accuracy = "diverged" if broken else lab.plus_minus([1 - row["test_error"] for row in finals], ".1f", 100)
        body.append([f"{optimizer}, {rate:g}", LABELS[arm], *places, accuracy])
    header = [
        "optimizer, learning rate", "arm", "drift after block3_pool: smallest / median / largest",
        "after block4_pool", "accuracy, %",
    ]  # fmt: skip
    return {"table": markdown(header, body)}


if __name__ == "__main__":
    main()
