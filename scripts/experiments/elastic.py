#!/usr/bin/env python
"""One network at several depths: with stochastic depth, against the same network without it and networks of those sizes."""

import functools
import sys
from dataclasses import dataclass

import contest
import lab
from lab import Cell, band, markdown, panels, pick, plus_minus, size

LABELS = {
    "elastic": "trained with stochastic depth, blocks left out",
    "plain": "trained without it, blocks left out",
    "own": "networks of that size, trained on their own",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    network: str = size("resnet56", "Residual network of the zoo.")
    depth: int = size(9, "Blocks of each stage of the whole network.")
    images: int = size(50_000, "Training images, the held-out ones included.")
    held_out: int = size(2_000, "Training images held out to choose blocks and to recalibrate on; nothing is trained on them.")
    test_images: int = size(5_000, "Test images.")
    epochs: int = size(60, "Epochs of the whole network; smaller ones get as many more as they are smaller.")
    rate: float = size(0.2, "Peak learning rate, for all networks.")
    drop_path: float = size(0.5, "Probability to drop the last block in the elastic arm.")
    budgets: tuple = size((0.75, 0.5), "Shares of the multiply-adds.")
    search_images: int = size(512, "Held-out images that the search uses.")
    batch: int = size(128, "Images per step.")


QUICK = Sizes(depth=2, images=256, held_out=64, test_images=64, epochs=1, rate=0.05, budgets=(0.75,), search_images=32, batch=32)


@lab.experiment(lambda flags: ("elastic", QUICK if flags["quick"] else Sizes()), Sizes)
def main(lab_):
    """Train a network with and without stochastic depth, leave out blocks, and compare with networks of those sizes.

    All networks get the same training compute. Blocks are chosen and statistics recalibrated on held-out training images, and the
    test images are read once per network.

    \b
    Examples:
      scripts/experiments/elastic.py --quick
      scripts/experiments/elastic.py --epochs 30 --seeds 0,1,2
    """
    study = Study(lab_)
    rows = lab_.run([cell for seed in lab_.seeds for cell in study.cells(seed)])
    lab_.write(rows)
    lab_.publish(sys.modules[__name__])


class Study:
    """The arms of the experiment.

    Args:
        lab_: `Lab`.
    """

    def __init__(self, lab_):
        self.lab, self.sizes = lab_, lab_.sizes
        self._images = None

    def images(self):
        """`(source to train and choose on, test images)`."""
        if self._images is None:
            self._images = contest.split(self.lab.source(), self.sizes.held_out)
        return self._images

    def cells(self, seed):
        """The sub-runs of a seed: both whole networks, and one network for each budget."""
        sizes = self.sizes
        whole = [
            Cell({"arm": arm, "trained": 1.0, "seed": seed}, functools.partial(self.whole, rate, seed), sizes.epochs)
            for arm, rate in (("elastic", sizes.drop_path), ("plain", 0.0))
        ]
        own = [
            Cell({"arm": "own", "trained": budget, "seed": seed}, functools.partial(self.own, budget, seed), sizes.epochs)
            for budget in sizes.budgets
        ]
        return [*whole, *own]

    def whole(self, drop_path, seed, folder):
        """Train the whole network; a row for each budget."""
        import keras_resnet as kr

        model = self.train(folder, self.network((self.sizes.depth,) * 3, seed, drop_path), self.sizes.epochs, seed)
        held_out = self.images()[0].test
        data = held_out.images.astype("float32"), held_out.labels
        budgets = (1.0, *self.sizes.budgets)
        with lab.sentences():
            curve = kr.depth_curve(model, data, budgets=budgets, search_images=self.sizes.search_images)
        rows = []
        for budget in budgets:
            point = curve.point(budget)
            by_drift = [other for other in curve.by_drift if other.share <= budget + 1e-9]
            rows.append(
                {
                    "budget": budget,
                    "share": round(point.share, 4),
                    "macs": point.macs,
                    "blocks": len(point.removed),
                    "accuracy": self.accuracy(curve.network(point)),
                    "accuracy_without_recalibration": self.accuracy(curve.network(point, recalibrate=False)),
                    "accuracy_by_drift": self.accuracy(curve.network(by_drift[0])),
                }
            )
        return rows

    def own(self, budget, seed, folder):
        """Train a network of that size for as long as the whole one takes."""
        whole = self.macs((self.sizes.depth,) * 3)
        depths = self.smaller(budget)
        epochs = round(self.sizes.epochs * whole / self.macs(depths))
        model = self.train(folder, self.network(depths, seed), epochs, seed)
        share = round(self.macs(depths) / whole, 4)
        return [{"budget": budget, "share": share, "macs": self.macs(depths), "accuracy": self.accuracy(model)}]

    def smaller(self, budget):
        """The depths of the largest network within a budget, with as even stages as possible."""
        whole, depths = self.macs((self.sizes.depth,) * 3), [self.sizes.depth] * 3
        while self.macs(depths) > budget * whole and max(depths) > 1:
            depths[max(range(3), key=lambda stage: (depths[stage], stage))] -= 1
        return tuple(depths)

    def macs(self, depths):
        """Multiply-adds of a network with this number of blocks in each stage."""
        from keras_resnet.models.registry import config_of
        from keras_resnet.zoo.counting import arithmetic

        return arithmetic(config_of(self.sizes.network).replace(depths=tuple(depths))).macs

    def network(self, depths, seed, drop_path=0.0):
        from keras_resnet.models.registry import config_of

        return self.lab.create(config_of(self.sizes.network).replace(depths=tuple(depths), drop_path=drop_path), seed)

    def train(self, folder, model, epochs, seed):
        """Train a network and return it, as it is after the last epoch."""
        from keras_resnet.training import fit

        sizes, source = self.sizes, self.images()[0]
        run = {
            "recipe": "elastic", "epochs": epochs, "learning_rate": sizes.rate, "batch_size": sizes.batch, "seed": seed,
            "base_batch": sizes.batch,
        }  # fmt: skip
        if self.lab.data_name == "digits":
            run |= {"flip": False, "crop_padding": 0}
        return fit(model, source, out=folder / "training", validate="none", **run).model

    def accuracy(self, model):
        """Accuracy on the test images."""
        test = self.images()[1]
        scores = model.predict(test.images.astype("float32"), batch_size=self.sizes.batch, verbose=0)
        return round(float((scores.argmax(-1) == test.labels).mean()), 6)


# ---------------------------------------------------------------- what the tables say


def figures(results):
    """Test accuracy over the share of the multiply-adds, an arm per line."""
    figure, axes = panels(1, 1, width=6.0, height=4.0)
    axis = axes[0][0]
    for (arm, label), colour in zip(LABELS.items(), lab.COLOURS, strict=False):
        rows = _with_whole(results, arm)
        if rows:
            band(axis, rows, "budget", "accuracy", 100, color=colour, marker="o", markersize=4, label=label)
    axis.set(xlabel="budget: share of the multiply-adds", ylabel="test accuracy in percent")
    axis.legend(fontsize="small")
    return {"": figure}


def _with_whole(results, arm):
    """The rows of an arm; the networks of smaller sizes are joined by the whole network without stochastic depth."""
    rows = pick(results.rows, arm=arm)
    return [*pick(results.rows, arm="plain", budget=1.0), *rows] if arm == "own" else rows


def facts(results):
    """A table of accuracies, and the differences that the experiment is about."""
    budgets = sorted({row["budget"] for row in results.rows}, reverse=True)
    header = ["", *(f"{budget:.0%}" for budget in budgets)]
    lines = []
    for label, arm, column in (
        ("stochastic depth", "elastic", "accuracy"),
        ("stochastic depth, without recalibration", "elastic", "accuracy_without_recalibration"),
        ("stochastic depth, chosen by drift", "elastic", "accuracy_by_drift"),
        ("the same network without it", "plain", "accuracy"),
        ("networks of that size", "own", "accuracy"),
    ):
        cells = [[row[column] for row in pick(_with_whole(results, arm), budget=budget) if column in row] for budget in budgets]
        lines.append([label, *(plus_minus(values, ".2f", 100) if values else "" for values in cells)])
    return {"table": markdown(header, lines), "differences": "\n".join(_differences(results, budgets))}


def _differences(results, budgets):
    for budget in budgets:
        for other, what in (("own", "networks of that size"), ("plain", "the same network without stochastic depth")):
            mine, theirs = (
                {row["seed"]: row["accuracy"] for row in pick(_with_whole(results, arm), budget=budget)}
                for arm in ("elastic", other)
            )
            seeds = sorted(set(mine) & set(theirs))
            if seeds and (budget < 1 or other == "plain"):
                gaps = [100 * (mine[seed] - theirs[seed]) for seed in seeds]
                yield f"At {budget:.0%}, against {what}: {lab.difference(gaps)}."


if __name__ == "__main__":
    main()
