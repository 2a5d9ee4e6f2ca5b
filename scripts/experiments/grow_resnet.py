#!/usr/bin/env python
"""Experiment A: a trained ResNet-20 plus 26 layers, against the same network trained further, at equal compute."""

import sys
from dataclasses import dataclass

import click
import contest
import lab
from lab import size

LAYERS = 26
LABELS = {
    "untouched": "ResNet-20, untouched",
    "further": "ResNet-20, trained further",
    "identity": f"+ {LAYERS} layers, identity at first",
    "random": f"+ {LAYERS} residual layers, random",
    "plain": f"+ {LAYERS} plain layers",
    "scratch": "grown architecture from scratch",
}
GROWN = {"identity": {}, "random": {"gate": "none"}, "plain": {"block": "plain"}, "scratch": {}}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    network: str = size("resnet20", "Residual network of the zoo to train and to grow.")
    images: int = size(50_000, "Training images, the held-out ones included.")
    held_out: int = size(5_000, "Training images held out to choose the recipes; nothing is trained on them.")
    test_images: int = size(5_000, "Test images.")
    backbone_epochs: int = size(120, "Epochs of the backbone before it grows.")
    one_backbone: str = size("yes", 'Whether all seeds start from one backbone: "yes" or "no".')
    trial_budget: int = size(20, "Compute of a trial, in epochs of the backbone.")
    budgets: tuple = size((20, 60, 180), "Compute of the runs that are compared, in epochs of the backbone.", plan=True)
    rates: tuple = size((0.05, 0.1, 0.2), "Peak learning rates that every arm tries.")
    decays: tuple = size((0.0003, 0.0005), "Weight decays that every arm tries.")
    gate_rates: tuple = size((4.0, 8.0), "Factors on the learning rate of the gates that the grown arm tries.")
    erasing: float = size(0.25, "Probability of random erasing, for all arms.")
    gate: str = size("zero_gamma", "Gate of the identity blocks.")
    batch: int = size(128, "Images per step.")


QUICK = Sizes(
    images=128, held_out=64, test_images=64, backbone_epochs=1, trial_budget=1, budgets=(1, 2), rates=(0.05,), decays=(0.0005,),
    gate_rates=(4.0,), batch=32,
)  # fmt: skip


@lab.experiment(
    lambda flags: ("grow_resnet", QUICK if flags["quick"] else Sizes()),
    Sizes,
    click.option(
        "--backbone",
        type=click.Path(exists=True, dir_okay=False, path_type=lab.Path),
        help="Trained backbone (.keras) that saw none of the held-out images; it replaces the training of the backbone.",
    ),
)
def main(lab_, backbone):
    """Grow a trained ResNet-20 by 26 layers over its three stages and train on, next to the network itself.

    Recipes are chosen on held-out images, with as many trials for every arm. The budgets are equal numbers of multiply-adds; the
    network from scratch also gets what the backbone cost.

    \b
    Examples:
      scripts/experiments/grow_resnet.py --quick
      scripts/experiments/grow_resnet.py --seeds 0,1,2,3,4
      scripts/experiments/grow_resnet.py --backbone runs/resnet20/model.keras --budgets 60
    """
    GrowResNet(lab_, backbone).run(sys.modules[__name__])


class GrowResNet(contest.Contest):
    """ResNet-20, grown after the last block of each stage.

    Args:
        lab_: `Lab`.
        given: Path of a trained backbone, or None.
    """

    arms = dict.fromkeys(LABELS)

    def __init__(self, lab_, given):
        super().__init__(lab_)
        self.given = given
        self.augmentation = {"flip": True, "crop_padding": 4, "erasing": lab_.sizes.erasing, "schedule": "cosine"}

    def train_backbone(self, seed, folder):
        source, _ = self.images()
        if self.given is not None:
            import keras

            model = keras.saving.load_model(self.given, compile=False)
            model.save(folder / "model.keras")
            return [{"held_out_accuracy": float(self.right(model, source.test).mean())}]
        rows = self.lab.train(
            folder, self.lab.create(self.lab.sizes.network, seed), source, recipe="cpu-budget", small_crops=1.0,
            epochs=self.lab.sizes.backbone_epochs, seed=seed, batch_size=self.lab.sizes.batch,
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
        if arm == "scratch":
            backbone = self.lab.create(self.lab.sizes.network, seed)
        options = {"gate": self.lab.sizes.gate} | GROWN[arm]
        if options.get("block") == "plain":
            options.pop("gate")
        points = [max(names) for names in _stages(backbone).values()]
        return self.lab.grow(backbone, points, total_layers=LAYERS, seed=1000 * seed + 1, **options)


def _stages(model):
    """The outputs of the blocks of each stage."""
    found = {}
    for layer in model.layers:
        if layer.name.startswith("stage") and layer.name.endswith("_out") and "grow" not in layer.name:
            found.setdefault(layer.name.split("_")[0], []).append(layer.name)
    return found


def figures(results):
    """Accuracy over compute."""
    return contest.figures(results, LABELS)


def facts(results):
    """The tables."""
    return contest.facts(results, LABELS)


if __name__ == "__main__":
    main()
