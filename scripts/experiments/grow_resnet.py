#!/usr/bin/env python
"""Experiment A: a trained ResNet-20 plus 26 layers, against the same network trained further, at equal compute."""

import sys
from dataclasses import dataclass

import click
import contest
import lab
from lab import size

LAYERS = 26
BACKBONE_DECAY = 2e-4
LABELS = {
    "untouched": "ResNet-20, untouched",
    "further": "ResNet-20, trained further",
    "identity": f"+ {LAYERS} layers, identity at first",
    "random": f"+ {LAYERS} residual layers, random",
    "plain": f"+ {LAYERS} plain layers",
    "scratch": "grown architecture from scratch",
    "wider": "twice as wide, from scratch",
}
GROWN = {"identity": {}, "random": {"gate": "none"}, "plain": {"block": "plain"}, "scratch": {}}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    network: str = size("resnet20", "Residual network of the zoo to train and to grow.")
    widths: tuple = size((8, 8, 8), "Filters of its stages.")
    stem_stride: int = size(2, "Stride of its first convolution.")
    images: int = size(50_000, "Training images, the held-out ones included.")
    held_out: int = size(5_000, "Training images held out to choose the recipes; nothing is trained on them.")
    test_images: int = size(5_000, "Test images.")
    stages: tuple = size((2, 3), "Stages that grow.")
    backbone_epochs: int = size(20, "Epochs of the backbone before it grows.")
    backbone_rate: float = size(0.4, "Peak learning rate of the backbone, and of the grown architecture from scratch.")
    one_backbone: str = size("yes", 'Whether all seeds start from one backbone: "yes" or "no".')
    trial_budget: int = size(5, "Compute of a trial, in epochs of the backbone.")
    budgets: tuple = size(
        (10, 25, 50), "Compute of the runs that are compared, in epochs of the backbone; the largest decides.", plan=True
    )
    control_seeds: int = size(1, "Number of seeds of the arms other than untouched, further and identity.", plan=True)
    rates: tuple = size((0.2, 0.4), "Peak learning rates that every arm tries.")
    decays: tuple = size((0.0002,), "Weight decays that every arm tries.")
    gate_rates: tuple = size((8.0,), "Factors on the learning rate of the gates that the grown arm tries.")
    block: str = size("postact", "Kind of the residual blocks.")
    gate: str = size("zero_gamma", "Gate of the identity blocks.")
    batch: int = size(256, "Images per step.")


QUICK = Sizes(
    images=128, held_out=64, test_images=64, backbone_epochs=1, trial_budget=1, budgets=(2,), control_seeds=1, rates=(0.05,),
    batch=32,
)  # fmt: skip


@lab.experiment(
    lambda flags: ("grow_resnet", QUICK if flags["quick"] else Sizes()),
    Sizes,
    click.option(
        "--backbone",
        type=click.Path(exists=True, dir_okay=False, path_type=lab.Path),
        help="Trained backbone (.keras) that saw none of the held-out images; it replaces the training of the backbone.",
    ),
    contest.REPORT,
)
def main(lab_, backbone, report):
    """Grow a trained ResNet-20 by 26 layers over its three stages and train on, next to the network itself.

    Recipes are chosen on held-out images, with as many trials for every arm. The budgets are equal numbers of multiply-adds; the
    networks from scratch also get what the backbone cost.

    \b
    Examples:
      scripts/experiments/grow_resnet.py --quick
      scripts/experiments/grow_resnet.py --seeds 0,1,2,3,4
      scripts/experiments/grow_resnet.py --backbone runs/resnet20/model.keras --budgets 60
    """
    GrowResNet(lab_, backbone, report).run(sys.modules[__name__])


class GrowResNet(contest.Contest):
    """ResNet-20, grown after the last block of each stage.

    Args:
        lab_: `Lab`.
        given: Path of a trained backbone, or None.
        report: See `contest.Contest`.
    """

    arms = dict.fromkeys(LABELS)
    # References, not competitors: they get the backbone's recipe and no trials.
    from_scratch = ("scratch", "wider")
    augmentation = {"flip": True, "crop_padding": 2, "schedule": "cosine", "fused_norm": True}

    def __init__(self, lab_, given, report=False):
        super().__init__(lab_, report)
        self.given = given
        self.recipe = {"learning_rate": lab_.sizes.backbone_rate, "weight_decay": BACKBONE_DECAY, "schedule": "one-cycle"}
        self.untuned = {**self.untuned, **dict.fromkeys(self.from_scratch, self.recipe)}

    def train_backbone(self, seed, folder):
        source, _ = self.images()
        if self.given is not None:
            import keras

            model = keras.saving.load_model(self.given, compile=False)
            model.save(folder / "model.keras")
            return [{"held_out_accuracy": float(self.right(model, source.test).mean())}]
        sizes = self.lab.sizes
        rows = self.lab.train(
            folder, self.create(seed), source, epochs=sizes.backbone_epochs, seed=seed, batch_size=sizes.batch,
            base_batch=sizes.batch, nesterov=True, clip_norm=5.0,
            **{**self.augmentation, **self.recipe},
        )  # fmt: skip
        return [
            {"held_out_accuracy": round(1 - rows[-1]["test_error"], 6), "train_accuracy": round(1 - rows[-1]["train_error"], 6)}
        ]

    def create(self, seed, widen=1):
        """The backbone with random weights, or the same network with `widen` times as many filters."""
        return self.lab.create(self.lab.sizes.network, seed, **contest.widths(self.lab.sizes, widen))

    def backbone(self, seed):
        import keras

        return keras.saving.load_model(self.lab.folder(self.backbone_key(seed)) / "model.keras", compile=False)

    def model(self, arm, seed):
        if arm == "wider":
            return self.create(seed, widen=2)
        backbone = self.create(seed) if arm == "scratch" else self.backbone(seed)
        if arm not in GROWN:
            return backbone
        options = {"block": self.lab.sizes.block, "gate": self.lab.sizes.gate} | GROWN[arm]
        if options.get("block") == "plain":
            options.pop("gate")
        points = [max(names) for stage, names in _stages(backbone).items() if stage in self.lab.sizes.stages]
        return self.lab.grow(backbone, points, total_layers=LAYERS, seed=1000 * seed + 1, **options)


def _stages(model):
    """The outputs of the blocks of each stage, by its number."""
    found = {}
    for layer in model.layers:
        if layer.name.startswith("stage") and layer.name.endswith("_out") and "grow" not in layer.name:
            found.setdefault(int(layer.name.split("_")[0].removeprefix("stage")), []).append(layer.name)
    return found


def figures(results):
    """Accuracy over compute."""
    return contest.figures(results, LABELS)


def facts(results):
    """The tables."""
    return contest.facts(results, LABELS)


if __name__ == "__main__":
    main()
