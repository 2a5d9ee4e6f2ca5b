#!/usr/bin/env python
"""Plain and residual networks of growing depth: which of them train worse when they are deeper?"""

import sys
from dataclasses import dataclass

import lab
import numpy as np
from lab import Cell, band, markdown, panels, pick, plus_minus, size

NAME = "degradation"
# Kinds of shortcut, see `ResNetConfig`.
NETS = {"plain": "none", "residual": "pad"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    depths: tuple = size((20, 32, 44, 56), "Depths.", plan=True)
    spread_depths: tuple = size((20, 56), "Depths trained with every seed; the others with the first.", plan=True)
    width: int = size(8, "Filters of the first stage; the paper has 16.")
    images: int = size(4_000, "Training images.")
    test_images: int = size(2_500, "Test images.")
    epochs: int = size(8, "Epochs.")
    batch: int = size(32, "Images per step.")


QUICK = Sizes(depths=(8, 20), spread_depths=(8, 20), width=4, images=256, test_images=128, epochs=3, batch=32)


@lab.experiment(lambda flags: (NAME, QUICK if flags["quick"] else Sizes()), Sizes)
def main(lab_):
    """Train plain and residual networks of the same depths, in the same way, and compare their errors.

    The recipe is that of the paper (SGD, rate 0.1 per 128 images, divided by 10 after a half and three quarters, crops and
    mirroring), shortened. The training error is the mean over an epoch while it is trained.

    \b
    Examples:
      scripts/experiments/degradation.py --quick
      scripts/experiments/degradation.py --data cifar10.npz --width 16 --epochs 30 --seeds 0,1,2,3,4

    Source: He et al. 2015 (arXiv 1512.03385), section 4.2 and figure 6.
    """
    sizes = lab_.sizes
    cells = [
        Cell({"net": net, "depth": depth, "seed": seed}, trainer(lab_, net, depth, seed), cost=depth)
        for depth in sizes.depths
        for seed in (lab_.seeds if depth in sizes.spread_depths else lab_.seeds[:1])
        for net in NETS
    ]
    lab_.write(lab_.run(cells))
    lab_.publish(sys.modules[__name__])


def config_of(net, depth, width):
    """Architecture of a cell.

    Raises:
        TrainingError: there is no network of this depth.
    """
    from keras_resnet import ResNetConfig

    widths = tuple(width * factor for factor in (1, 2, 4))
    with lab.sentences():
        return ResNetConfig.cifar(depth, shortcut=NETS[net], widths=widths, stem_widths=widths[:1])


def trainer(lab_, net, depth, seed):
    """The function of a cell."""
    sizes = lab_.sizes

    def train(folder):
        model = lab_.create(config_of(net, depth, sizes.width), seed)
        return lab_.train(
            folder, model, recipe="he2015-cifar", epochs=sizes.epochs, batch_size=sizes.batch, seed=seed,
            warmup_epochs=0.5,
        )  # fmt: skip

    return train


# ---------------------------------------------------------------- what the tables say


def final(rows, net, depth):
    """The rows of the last epoch."""
    found = pick(rows, net=net, depth=depth)
    return pick(found, epoch=max(row["epoch"] for row in found))


def depths_of(rows):
    """Depths in order."""
    return sorted({row["depth"] for row in rows})


def figures(results):
    """Errors over epochs for plain and residual networks, as in the paper's figure 6, and training error over depth."""
    from matplotlib import colormaps

    rows = results.rows
    figure, axes = panels(1, 3, sharey=True)
    # Colours of depths have an order, and are not those of the two nets.
    shades = colormaps["viridis"](np.linspace(0.9, 0, len(depths_of(rows))))
    for axis, net in zip(axes[0], NETS, strict=False):
        for depth, colour in zip(depths_of(rows), shades, strict=True):
            found = pick(rows, net=net, depth=depth)
            band(axis, found, "epoch", "train_error", 100, color=colour, ls="--", lw=1.2)
            band(axis, found, "epoch", "test_error", 100, color=colour, lw=2, label=f"{depth} layers")
        axis.set(title=f"{net} networks", xlabel="epoch")
        axis.legend(frameon=False, fontsize=8, title="test (line), training (dashed)", title_fontsize=8)
    axes[0, 0].set_ylabel("error, %")
    for net, colour in zip(NETS, ("#d55e00", "#0072b2"), strict=True):
        ends = [row for depth in depths_of(rows) for row in final(rows, net, depth)]
        band(axes[0, 2], ends, "depth", "train_error", 100, bars=True, color=colour, marker="o", label=net)
    axes[0, 2].set(title="training error after the last epoch", xlabel="weighted layers", xticks=depths_of(rows))
    axes[0, 2].legend(frameon=False)
    return {"": figure}


def facts(results):
    """The table, and how much worse the deepest is than the shallowest."""
    rows = results.rows
    body = []
    for depth in depths_of(rows):
        line = [depth]
        for net in NETS:
            ends = final(rows, net, depth)
            line += [plus_minus([row[key] for row in ends], ".1f", 100) for key in ("train_error", "test_error")]
        body.append([*line, len(ends)])
    header = ["layers", "plain, training", "plain, test", "residual, training", "residual, test", "seeds"]
    shallow, deep = depths_of(rows)[0], depths_of(rows)[-1]
    changes = "; ".join(f"{net}: {lab.difference(gap(rows, net, shallow, deep))}" for net in NETS)
    change = f"Training error of {deep} layers against {shallow}: {changes}."
    return {"table": markdown(header, body), "gap": change, "steps": lab.written(max(row["step"] for row in rows))}


def gap(rows, net, shallow, deep):
    """Per seed: training error at the deep end minus the shallow one, in percentage points."""
    ends = {depth: {row["seed"]: row["train_error"] for row in final(rows, net, depth)} for depth in (shallow, deep)}
    return [100 * (ends[deep][seed] - ends[shallow][seed]) for seed in ends[shallow] if seed in ends[deep]]


if __name__ == "__main__":
    main()
