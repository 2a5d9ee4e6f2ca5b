#!/usr/bin/env python
"""Which gate suits which optimiser: a briefly trained VGG is grown by 26 layers with each gate."""

import functools
import sys
from collections import deque
from dataclasses import dataclass

import lab
import numpy as np
from lab import Cell, markdown, panels, pick, plus_minus, size

NAME = "gates"
PLACES = "block*_pool"
GATES = ("zero_conv", "zero_gamma", "rezero", "fixup", "layerscale", "none")
DEFAULT = "zero_conv"
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "nesterov": True, "weight_decay": 5e-4},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
}
NAMES = {"sgd": "SGD", "adamw": "AdamW"}
WINDOW = 20
MEASURES = {"final_loss": "loss of the last epoch", "steps_to_half": "steps until half"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    network: str = size("vgg11_bn_w12", "VGG of the zoo that grows; w12 is an eighth of the width.")
    layers: int = size(26, "Layers that it grows by.")
    images: int = size(4_000, "Training images.")
    test_images: int = size(2_500, "Test images.")
    trunk_epochs: int = size(1, "Epochs of the VGG before it grows.")
    epochs: int = size(8, "Epochs of the grown networks.")
    batch: int = size(64, "Images per step.")
    sgd_rates: tuple = size((0.02, 0.05, 0.1), "Rates for SGD; each gate is shown at its best one.", plan=True)
    adamw_rates: tuple = size((2e-3,), "Rates for AdamW.", plan=True)


QUICK = Sizes("vgg11_bn_w12", 10, 256, 128, trunk_epochs=2, epochs=2, batch=32, sgd_rates=(0.05,), adamw_rates=(2e-3,))


@lab.experiment(lambda flags: (NAME, QUICK if flags["quick"] else Sizes()), Sizes)
def main(lab_):
    """Grow a briefly trained VGG by 26 layers with each gate, and continue to train it with SGD and with AdamW.

    Measured are the steps until the training loss (mean of 20 steps) is half of the VGG's before it grew, and the training
    loss of the last epoch. Every gate is shown at the best of the rates, which are the same for all gates of an optimiser.

    \b
    Examples:
      scripts/experiments/gates.py --quick
      scripts/experiments/gates.py --seeds 3,4,5 --adamw-rates 1e-3,5e-3
    """
    sizes = lab_.sizes
    trunks = [
        Cell({"gate": "trunk", "seed": seed}, functools.partial(train_trunk, lab_, seed), sizes.trunk_epochs, ("model.keras",))
        for seed in lab_.seeds
    ]
    arms = [
        Cell(
            {"gate": gate, "optimizer": optimizer, "rate": rate, "seed": seed},
            functools.partial(train_arm, lab_, gate, optimizer, rate, seed),
            cost=3 * sizes.epochs,
        )
        for seed in lab_.seeds
        for optimizer in OPTIMIZERS
        for rate in getattr(sizes, f"{optimizer}_rates")
        for gate in GATES
    ]
    lab_.write(lab_.run([*trunks, *arms]))
    lab_.publish(sys.modules[__name__])


def train_trunk(lab_, seed, folder):
    """The function of the cell that all gates begin from; its last loss is what is to be halved."""
    sizes, vgg = lab_.sizes, lab_.create(lab_.sizes.network, seed)
    lab_.grow(vgg, PLACES, total_layers=sizes.layers)  # A network that cannot grow is refused before it is trained.
    rows = lab_.train(
        folder, vgg, epochs=sizes.trunk_epochs, batch_size=sizes.batch, base_batch=sizes.batch,
        learning_rate=0.05, warmup_epochs=0.5, seed=seed, **OPTIMIZERS["sgd"],
    )  # fmt: skip
    return [{"final_loss": rows[-1]["train_loss"], "test_error": rows[-1]["test_error"]}]


def train_arm(lab_, gate, optimizer, rate, seed, folder):
    """The function of a cell: one row."""
    import keras

    sizes, trunk = lab_.sizes, {"gate": "trunk", "seed": seed}
    (before,) = lab_.rows_of(trunk)
    vgg = keras.saving.load_model(lab_.folder(trunk) / "model.keras", compile=False)
    model = lab_.grow(vgg, PLACES, total_layers=sizes.layers, gate=gate, seed=1000 * seed + 1)
    losses = folder / "losses.csv"
    rows = lab_.train(
        folder, model, may_diverge=True, epochs=sizes.epochs, batch_size=sizes.batch, base_batch=sizes.batch, learning_rate=rate,
        seed=1000 * seed + 1, callbacks=[step_losses(losses)], **OPTIMIZERS[optimizer],
    )  # fmt: skip
    if "diverged" in rows[-1]:
        return [{"diverged": 1}]
    half = steps_until([row["loss"] for row in lab.read_csv(losses)], before["final_loss"] / 2)
    ends = {"final_loss": rows[-1]["train_loss"], "test_error": rows[-1]["test_error"], "start_loss": before["final_loss"]}
    return [{**ends, **({} if half is None else {"steps_to_half": half})}]


def steps_until(losses, bound):
    """Steps until the mean of the last `WINDOW` losses is at most `bound`, or None."""
    window = deque(maxlen=WINDOW)
    for step, loss in enumerate(losses, 1):
        window.append(loss)
        if len(window) == WINDOW and np.mean(window) <= bound:
            return step
    return None


def step_losses(path):
    """A callback that writes the loss of every step; what is there from a run that was broken off is gone on from."""
    import keras

    class StepLosses(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            metric = next(metric for metric in self.model.metrics if metric.name == "loss")
            self.before = float(metric.total), float(metric.count)
            # Steps after the checkpoint are repeated, and written again.
            done = int(self.model.optimizer.iterations)
            self.rows = [row for row in lab.read_csv(path) if row["step"] <= done] if path.exists() else []

        def on_train_batch_end(self, batch, logs=None):
            metric = next(metric for metric in self.model.metrics if metric.name == "loss")
            total, count = float(metric.total), float(metric.count)
            loss = (total - self.before[0]) / max(count - self.before[1], 1)
            self.before = total, count
            self.rows.append({"step": int(self.model.optimizer.iterations), "loss": loss})
            lab.write_csv(self.rows, path)

    return StepLosses()


# ---------------------------------------------------------------- what the tables say


def best(rows, gate, optimizer):
    """The rows of the rate with the least mean final loss; a rate at which a seed diverged comes last."""
    rates = {}
    for row in pick(rows, gate=gate, optimizer=optimizer):
        rates.setdefault(row["rate"], []).append(row)
    mean = {rate: np.mean([row.get("final_loss", np.inf) for row in found]) for rate, found in rates.items()}
    return rates[min(mean, key=mean.get)]


def figures(results):
    """Final loss and steps to half, per gate and optimiser; a dot per seed."""
    figure, axes = panels(2, len(OPTIMIZERS), width=5, height=2.8)
    for column, optimizer in enumerate(OPTIMIZERS):
        for axis, (key, label) in zip(axes[:, column], MEASURES.items(), strict=True):
            for place, (gate, colour) in enumerate(zip(GATES, lab.COLOURS, strict=False)):
                values = [row[key] for row in best(results.rows, gate, optimizer) if key in row]
                axis.scatter([place] * len(values), values, color=colour, s=24, zorder=3)
                if values:
                    axis.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, color=colour, lw=2)
                else:
                    axis.text(place, 0.5, "never", ha="center", color="#777", transform=axis.get_xaxis_transform())
            axis.set(ylabel=label, title=NAMES[optimizer], xlim=(-0.6, len(GATES) - 0.4))
            axis.set_xticks(range(len(GATES)), GATES, fontsize=8)
        axes[1, column].set_ylim(0, steps_of(results.about))
    for axis in axes[0]:
        axis.set_ylim(0, max(axis.get_ylim()[1] for axis in axes[0]))
    return {"": figure}


def steps_of(sizes):
    """Steps of a grown network."""
    return sizes["epochs"] * (sizes["images"] // sizes["batch"])


def facts(results):
    """The table, and what it says of the default."""
    found = {}
    header = ["gate", "best learning rate", "steps to half the loss", "final loss", f"against `{DEFAULT}`", "test accuracy, %"]
    for optimizer in OPTIMIZERS:
        body = []
        for gate in GATES:
            rows = best(results.rows, gate, optimizer)
            whole, pairs = [row for row in rows if "final_loss" in row], against(results.rows, gate, optimizer)
            halves = [row["steps_to_half"] for row in whole if "steps_to_half" in row]
            steps = plus_minus(halves, ".0f") if halves else "never"
            body.append(
                [
                    f"`{gate}`",
                    f"{rows[0]['rate']:g}",
                    steps + (f" ({len(halves)} of {len(rows)})" if 0 < len(halves) < len(rows) else ""),
                    plus_minus([row["final_loss"] for row in whole], ".3f") if whole else "diverged",
                    plus_minus(pairs, "+.3f") if pairs and gate != DEFAULT else "",
                    plus_minus([1 - row["test_error"] for row in whole], ".1f", 100) if whole else "diverged",
                ]
            )
        found[optimizer] = markdown(header, body)
    return {
        **found, "rates": rates_table(results.rows), "steps": str(steps_of(results.about)),
        "epoch_steps": str(steps_of({**results.about, "epochs": 1})),
        "verdict": "\n".join(f"- {verdict(results.rows, optimizer)}" for optimizer in OPTIMIZERS),
    }  # fmt: skip


def rates_table(rows):
    """Table of final loss and test accuracy at every rate: how much a gate minds the choice."""
    columns = sorted({(row["optimizer"], row["rate"]) for row in rows if "rate" in row}, reverse=True)
    body = []
    for gate in GATES:
        line = []
        for optimizer, rate in columns:
            found = pick(rows, gate=gate, optimizer=optimizer, rate=rate)
            if any("final_loss" not in row for row in found):
                line.append("diverged")
                continue
            accuracy = np.mean([1 - row["test_error"] for row in found])
            line.append(f"{plus_minus([row['final_loss'] for row in found], '.2f')}; {100 * accuracy:.1f}")
        body.append([f"`{gate}`", *line])
    return markdown(["gate", *(f"{NAMES[optimizer]}, {rate:g}" for optimizer, rate in columns)], body)


def against(rows, gate, optimizer):
    """Final loss minus the default gate's, for each seed that both have brought to the end."""
    losses, theirs = (
        {row["seed"]: row["final_loss"] for row in best(rows, name, optimizer) if "final_loss" in row} for name in (gate, DEFAULT)
    )
    return [loss - theirs[seed] for seed, loss in losses.items() if seed in theirs]


def verdict(rows, optimizer):
    """Whether any gate beats the default by more than the spread of the differences over seeds."""
    differences = {gate: against(rows, gate, optimizer) for gate in GATES}
    better = [
        f"`{gate}` ({plus_minus(pairs, '+.3f')})"
        for gate, pairs in differences.items()
        if gate not in (DEFAULT, "none") and len(pairs) > 1 and np.mean(pairs) < 0 and lab.exceeds_spread(pairs)
    ]
    name = NAMES[optimizer]
    if len(differences[DEFAULT]) < 2:
        return f"{name}: fewer than two seeds show no spread, so nothing is said of the default `{DEFAULT}`."
    if better:
        return f"{name}: a lower final loss than the default `{DEFAULT}` by more than the spread has {', '.join(better)}."
    return f"{name}: no gate has a lower final loss than the default `{DEFAULT}` by more than the spread."


if __name__ == "__main__":
    main()
