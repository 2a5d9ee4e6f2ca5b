#!/usr/bin/env python
"""Experiment B: the ImageNet VGG16 on CIFAR-10, plus 26 layers with a matched scale, at equal compute."""

import dataclasses
import sys
from dataclasses import dataclass

import click
import contest
import grow_vgg
import lab
import numpy as np
from lab import size
from match_scale import POINTS

LAYERS = 26
LABELS = {
    "untouched": "VGG16 fine-tuned, untouched",
    "further": "VGG16, trained further",
    "identity": f'+ {LAYERS} layers, identity, scale="match"',
    "adapters": f"+ {LAYERS} layers, backbone frozen",
    "random": f"+ {LAYERS} residual layers, random",
    "plain": f"+ {LAYERS} plain layers",
}
GROWN = {"identity": {}, "adapters": {}, "random": {"gate": "none"}, "plain": {"block": "plain"}}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    images: int = size(50_000, "Training images, the held-out ones included.")
    held_out: int = size(5_000, "Training images held out to choose the recipes; nothing is trained on them.")
    test_images: int = size(5_000, "Test images.")
    image_size: int = size(32, "Side to which the images are brought.")
    views: int = size(2, "Views of each training image whose features are computed: 1, or 2 with the mirrored one.")
    backbone_epochs: int = size(20, "Epochs in which blocks 4 and 5 and the head are fine-tuned before the growth.")
    backbone_rate: float = size(0.01, "Learning rate of those epochs.")
    one_backbone: str = size("yes", 'Whether all seeds start from one backbone: "yes" or "no".')
    trial_budget: int = size(5, "Compute of a trial, in epochs of the backbone.")
    budgets: tuple = size((10, 30), "Compute of the runs that are compared, in epochs of the backbone.", plan=True)
    rates: tuple = size((0.005, 0.01, 0.02), "Peak learning rates that every arm tries.")
    decays: tuple = size((0.0005, 0.001), "Weight decays that every arm tries.")
    gate_rates: tuple = size((1.0, 4.0), "Factors on the learning rate of the gates that the grown arm tries.")
    block: str = size("preact", "Kind of the residual blocks.")
    control_seeds: int = size(5, "Number of seeds of the arms other than untouched, further and identity.", plan=True)
    batch: int = size(64, "Images per step.")


QUICK = Sizes(
    images=96, held_out=32, test_images=32, views=1, backbone_epochs=1, trial_budget=1, budgets=(1,), rates=(0.005,),
    decays=(0.0005,), gate_rates=(1.0,), block="depthwise", batch=32,
)  # fmt: skip


@lab.experiment(
    lambda flags: ("grow_pretrained", QUICK if flags["quick"] else Sizes()),
    Sizes,
    click.option(
        "--weights",
        type=click.Path(exists=True, dir_okay=False, path_type=lab.Path),
        help="VGG16's ImageNet convolutions as .npz (block1_conv1/kernel, …).  [../shared/data/weights/vgg16_imagenet_notop.npz]",
    ),
    contest.REPORT,
)
def main(lab_, weights, report):
    """Fine-tune blocks 4 and 5 of the ImageNet VGG16 on CIFAR-10, then grow it by 26 layers and train on.

    Blocks 1 to 3 are frozen: their features are computed once, in float16. Recipes are chosen on held-out images, with as many
    trials for every arm. The budgets are equal numbers of multiply-adds.

    \b
    Examples:
      scripts/experiments/grow_pretrained.py --quick
      scripts/experiments/grow_pretrained.py --seeds 0,1,2,3,4
    """
    GrowPretrained(lab_, weights, report).run(sys.modules[__name__])


class GrowPretrained(contest.Contest):
    """The upper half of VGG16 on features of the lower half.

    Args:
        lab_: `Lab`.
        weights: `.npz`; None for the default.
        report: See `contest.Contest`.
    """

    arms = dict.fromkeys(LABELS)
    augmentation = {"schedule": "cosine"}

    def __init__(self, lab_, weights, report=False):
        super().__init__(lab_, report)
        self.vgg = grow_vgg.ImageNetStudy(lab_, weights)

    def images(self):
        """`(features to train and validate on, features of the test images)`."""
        if self._images is None:
            source, test = contest.split(self.lab.source(), self.lab.sizes.held_out)
            lower, _ = self.vgg.halves()
            train = [self._features(lower, source.train, mirrored) for mirrored in range(self.lab.sizes.views)]
            labels = np.concatenate([np.asarray(source.train.labels)] * len(train))
            held_out, test = (
                grow_vgg.features(self._features(lower, part, 0), np.asarray(part.labels)) for part in (source.test, test)
            )
            both = grow_vgg.features(np.concatenate(train), labels)
            norm = {"mean": 0.0, "std": 1.0}
            source = dataclasses.replace(
                source, train=both, test=held_out, image_size=both.images.shape[1:3], preprocessing=norm
            )  # fmt: skip
            self._images = source, test
        return self._images

    def _features(self, lower, images, mirrored):
        import tensorflow as tf

        side, parts = self.lab.sizes.image_size, []
        with lab.progress(range(0, images.size, 64), "features") as starts:
            for start in starts:
                pixels = images.images[start : start + 64]
                pixels = tf.image.resize(pixels[:, :, ::-1] if mirrored else pixels, (side, side))
                values = lower.predict_on_batch(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))
                parts.append(values.astype("float16"))
        return np.concatenate(parts)

    def train_backbone(self, seed, folder):
        source, _ = self.images()
        rows = self.lab.train(
            folder, self.vgg.new_trunk(seed), source, epochs=self.lab.sizes.backbone_epochs, seed=seed,
            batch_size=self.lab.sizes.batch, base_batch=self.lab.sizes.batch, learning_rate=self.lab.sizes.backbone_rate,
            weight_decay=5e-4, nesterov=True, warmup_epochs=0.5, clip_norm=5.0, schedule="cosine", flip=False, crop_padding=0,
        )  # fmt: skip
        return [
            {"held_out_accuracy": round(1 - rows[-1]["test_error"], 6), "train_accuracy": round(1 - rows[-1]["train_error"], 6)}
        ]

    def backbone(self, seed):
        import keras

        return keras.saving.load_model(self.lab.folder(self.backbone_key(seed)) / "model.keras", compile=False)

    def model(self, arm, seed):
        backbone = self.backbone(seed)
        if arm not in GROWN:
            return backbone
        options = {"block": self.lab.sizes.block, "seed": 1000 * seed + 1} | GROWN[arm]
        if options["block"] != "plain":
            data = self.images()[0].train.images[:512].astype("float32")
            options |= {"scale": "match", "data": data}
        return self.lab.grow(backbone, POINTS, **options)

    def frozen(self, arm):
        return arm == "adapters"

    def options_of(self, arm):
        return {"flip": False, "crop_padding": 0}


def figures(results):
    """Accuracy over compute."""
    return contest.figures(results, LABELS)


def facts(results):
    """The tables."""
    return contest.facts(results, LABELS)


if __name__ == "__main__":
    main()
