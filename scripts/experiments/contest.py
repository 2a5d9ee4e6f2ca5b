"""What experiments A and B share: arms that compete at equal compute, tuned on held-out images, tested once.

The backbone never saw the held-out training images. Every arm gets the same number of trials, and its recipe is the one with
the best accuracy on those images. An untouched arm is always there. The test set is read once per finished run. Runs of
one seed are compared in pairs, and the spread over seeds and a bootstrap over images are reported apart.
"""

import dataclasses
import functools

import click
import lab
import numpy as np
from lab import Cell, band, markdown, panels, pick, plus_minus

HELD_OUT_SEED = 2026
REPORT = click.option("--report", is_flag=True, help="Train nothing: write tables and figures from the sub-runs that are done.")
UNTOUCHED = "untouched"
# The arms of the main comparison. They run first, so that a run that is cut short has them, and with all seeds.
MAIN = (UNTOUCHED, "further", "identity")


def split(source, held_out):
    """Hold out some training images of every class; the test images of the result are the held-out ones.

    Args:
        source: `keras_resnet.data.Source`.
        held_out: Number of images to hold out.

    Returns:
        `(source to train and validate on, test images)`.
    """
    rng = np.random.default_rng(HELD_OUT_SEED)
    labels = np.asarray(source.train.labels)
    classes = np.unique(labels)
    each = max(1, held_out // len(classes))
    held = np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == value))[:each] for value in classes]))
    rest = np.setdiff1d(np.arange(source.train.size), held)
    return dataclasses.replace(source, train=source.train.take(rest), test=source.train.take(held)), source.test


def widths(sizes, widen=1):
    """The fields of a CIFAR network with `widen` times the filters of `sizes.widths` in its stages."""
    found = tuple(widen * width for width in sizes.widths)
    return {"widths": found, "stem_widths": found[:1], "stem_stride": sizes.stem_stride}


class Contest:
    """Arms that start from one backbone and compete at equal compute.

    Subclasses set `arms`, and define `backbone`, `train_backbone`, `model` and `images`.

    Args:
        lab_: `Lab`; its sizes have `budgets`, `trial_budget`, `rates`, `decays`, `gate_rates`, `control_seeds`, `batch`.
        report: Whether to train nothing and to report the sub-runs that are done.
    """

    arms: dict = {}
    augmentation: dict = {}
    from_scratch: tuple = ()
    # Recipes of arms that are not tuned.
    untuned: dict = {UNTOUCHED: None}

    def __init__(self, lab_, report=False):
        self.lab, self.report = lab_, report
        self._images = None

    # ------------------------------------------------------------ what differs

    def train_backbone(self, seed, folder):
        """The function of the cell that all arms begin from."""
        raise NotImplementedError

    def backbone(self, seed):
        """The trained backbone."""
        raise NotImplementedError

    def model(self, arm, seed):
        """The untrained model of an arm."""
        raise NotImplementedError

    def images(self):
        """`(source to train and validate on, test images)`."""
        if self._images is None:
            self._images = split(self.lab.source(), self.lab.sizes.held_out)
        return self._images

    # ------------------------------------------------------------ cells

    def recipes(self, arm):
        """The recipes that an arm may try; every arm has as many."""
        sizes = self.lab.sizes
        grid = [{"learning_rate": rate, "weight_decay": decay} for rate in sizes.rates for decay in sizes.decays]
        gates = sizes.gate_rates if arm == "identity" else (1.0,)
        found = [{**recipe, "gate_lr_multiplier": gate} for gate in gates for recipe in grid]
        return found[:: max(1, len(found) // len(grid))][: len(grid)]

    def backbones(self):
        """The sub-runs of the backbones."""
        seeds, sizes = self.lab.seeds, self.lab.sizes
        return [
            Cell(self.backbone_key(seed), functools.partial(self.train_backbone, seed), sizes.backbone_epochs, ("model.keras",))
            for seed in seeds[: 1 if sizes.one_backbone == "yes" else None]
        ]

    def trials(self, arms):
        """The sub-runs that choose the recipes of some arms."""
        seed, budget = self.lab.seeds[0], self.lab.sizes.trial_budget
        return [
            Cell(
                {"phase": "trial", "arm": arm, "recipe": number, "seed": seed},
                functools.partial(self.train, arm, seed, budget, recipe, None),
                self.budget_of(arm, budget),
            )
            for arm in arms
            if arm not in self.untuned
            for number, recipe in enumerate(self.recipes(arm))
        ]

    def finals(self, arms, trials):
        """The sub-runs of some arms that are tested, with each arm's best recipe."""
        sizes, cells = self.lab.sizes, []
        for budget in sizes.budgets:
            for number, seed in enumerate(self.lab.seeds):
                for arm in arms:
                    if arm not in MAIN and number >= sizes.control_seeds:
                        continue
                    cells.append(
                        Cell(
                            {"phase": "final", "arm": arm, "budget": budget, "seed": seed},
                            functools.partial(self.train, arm, seed, budget, self.best_recipe(arm, trials), self.images()[1]),
                            0.01 if arm == UNTOUCHED else self.budget_of(arm, budget),
                            ("right.npy", "drift.csv"),
                        )
                    )
        return cells

    def best_recipe(self, arm, trials):
        """The recipe of an arm with the best held-out accuracy; None where there is no trial of it."""
        if not pick(trials, arm=arm):
            return self.untuned.get(arm)
        ends = {row["recipe"]: row["held_out_accuracy"] for row in pick(trials, arm=arm)}
        return self.recipes(arm)[max(ends, key=ends.get)]

    def backbone_key(self, seed):
        """Key of the cell of a backbone."""
        seed = self.lab.seeds[0] if self.lab.sizes.one_backbone == "yes" else seed
        return {"phase": "backbone", "arm": "backbone", "seed": seed}

    def train(self, arm, seed, budget, recipe, test, folder):
        """The function of an arm's cell: one row.

        Args:
            arm: Key of `arms`.
            seed: Seed of new weights, order and augmentation.
            budget: Compute, in epochs of the backbone.
            recipe: Fields of `Run`; None leaves the backbone untouched.
            test: Test images, which are read once at the end; None for a trial.
            folder: Of the cell.
        """
        import keras

        import keras_resnet as kr
        from keras_resnet.training import DriftLogger, fit
        from keras_resnet.zoo.counting import count_macs

        source, _ = self.images()
        model = self.model(arm, seed)
        macs, backbone_macs = count_macs(model), count_macs(self.backbone(seed))
        row = {"macs_per_image": macs, "parameters": model.count_params(), **(recipe or {})}
        if recipe is not None:
            epochs = max(1, round(self.budget_of(arm, budget) * backbone_macs / macs))
            probe = source.test.images[:64].astype("float32")
            watch = [DriftLogger(probe, folder / "drift.csv")] if kr.find_blocks(model) and test is not None else []
            batch = self.lab.sizes.batch
            options = {
                "batch_size": batch, "base_batch": batch, "nesterov": True, "warmup_epochs": min(2.0, 0.05 * epochs),
                "clip_norm": 5.0, **self.augmentation, **self.options_of(arm), **recipe,
            }  # fmt: skip
            if self.lab.data_name == "digits":
                options |= {"flip": False, "crop_padding": 0}
            if self.frozen(arm):
                options["frozen_epochs"] = epochs
            result = fit(
                model, source, out=folder, validate="none", epochs=epochs, seed=1000 * seed + 1, callbacks=watch, **options
            )  # fmt: skip
            model = result.model
            row |= {
                "epochs": epochs,
                "macs": 3 * macs * epochs * source.train.size,
                "train_accuracy": result.history[-1]["accuracy"],
            }
        row["held_out_accuracy"] = float(self.right(model, source.test).mean())
        if test is not None:
            right = self.right(model, test)
            np.save(folder / "right.npy", right)
            row["test_accuracy"] = float(right.mean())
            if kr.find_blocks(model) and arm != UNTOUCHED:
                grown = {block.path for block in kr.find_blocks(model) if block.add.grown}
                drifts = [d.mean for d in kr.drift(model, source.test.images[:64].astype("float32")) if d.block in grown]
                if drifts:
                    row |= {"smallest_drift": min(drifts), "median_drift": float(np.median(drifts)), "largest_drift": max(drifts)}
        keras.backend.clear_session()
        return [row]

    def budget_of(self, arm, budget):
        """The budget of an arm; a network from scratch also gets what the backbone cost."""
        return budget + (self.lab.sizes.backbone_epochs if arm in self.from_scratch else 0)

    def options_of(self, arm):
        """Further fields of `Run` for an arm."""
        return {}

    def frozen(self, arm):
        """Whether the arm trains new blocks and the head only."""
        return False

    def right(self, model, images):
        """Whether each image is classified correctly."""
        parts = [
            np.asarray(model.predict_on_batch(images.images[start : start + 250].astype("float32"))).argmax(-1)
            for start in range(0, images.size, 250)
        ]
        return np.concatenate(parts) == np.asarray(images.labels)

    # ------------------------------------------------------------ run

    def run(self, module):
        """Run everything that is not done, write the tables, draw the figures.

        With `report` nothing is trained, and the tables are those of the sub-runs that are done.
        """
        rows, finals = self._run(self.backbones()), []
        for arms in (MAIN, [arm for arm in self.arms if arm not in MAIN]):
            trials = self._run(self.trials(arms))
            cells = self._done(self.finals(arms, trials))
            rows += [*trials, *self.lab.run(cells)]
            finals += cells
        drifts = [
            {**cell.key, **row}
            for cell in finals
            if (path := self.lab.folder(cell.key) / "drift.csv").exists()
            for row in lab.read_csv(path)
        ]
        self.lab.write(rows, drift=drifts, comparison=self.comparisons(finals))
        self.lab.publish(module)

    def _run(self, cells):
        return self.lab.run(self._done(cells))

    def _done(self, cells):
        """The cells that count: all, or with `report` those that are done."""
        return [cell for cell in cells if not self.report or self.lab.is_done(cell.key)]

    def comparisons(self, finals):
        """Differences of every arm to the better of untouched and trained further, with both kinds of uncertainty.

        Pairs are runs of one seed. The better of the two is found over the seeds that both have.
        """
        right = {tuple(cell.key.values())[1:]: np.load(self.lab.folder(cell.key) / "right.npy") for cell in finals}
        rows = []
        for budget in self.lab.sizes.budgets:
            seeds = {arm: [s for s in self.lab.seeds if (arm, budget, s) in right] for arm in self.arms}
            both = sorted(set(seeds[UNTOUCHED]) & set(seeds["further"]))
            if not both:
                continue
            means = {arm: np.mean([right[arm, budget, seed].mean() for seed in both]) for arm in (UNTOUCHED, "further")}
            better = max(means, key=means.get)
            for arm in self.arms:
                pairs = [(right[arm, budget, seed], right[better, budget, seed]) for seed in seeds[arm] if seed in seeds[better]]
                if arm == better or not pairs:
                    continue
                gains = np.array([100 * (a.mean() - b.mean()) for a, b in pairs])
                low, high = bootstrap(np.mean([a.astype(float) - b for a, b in pairs], axis=0))
                row = {"budget": budget, "arm": arm, "against": better, "gain": round(float(gains.mean()), 4)}
                if len(gains) > 1:
                    row["standard_error"] = round(float(gains.std(ddof=1) / np.sqrt(len(gains))), 4)
                rows.append({**row, "low": round(100 * low, 4), "high": round(100 * high, 4), "seeds": len(gains)})
        return rows


def bootstrap(differences, draws=2000):
    """The 95 % interval of the mean of differences per image, resampled over images."""
    rng = np.random.default_rng(0)
    means = [rng.choice(differences, len(differences)).mean() for _ in range(draws)]
    return tuple(float(value) for value in np.quantile(means, (0.025, 0.975)))


# ---------------------------------------------------------------- what the tables say


def figures(results, labels):
    """Test accuracy over compute, on an axis that shows the differences."""
    finals = pick(results.rows, phase="final")
    figure, axes = panels(1, 1, width=6.4, height=4.6)
    axis = axes[0, 0]
    for (arm, label), colour in zip(labels.items(), lab.COLOURS, strict=False):
        rows = pick(finals, arm=arm)
        if rows and arm == UNTOUCHED:
            axis.axhline(100 * np.mean([row["test_accuracy"] for row in rows]), color=colour, ls="--", label=label)
        elif rows:
            band(axis, rows, "budget", "test_accuracy", 100, color=colour, label=label, marker="o", bars=True)
    axis.set_xticks(sorted({row["budget"] for row in finals}))
    axis.set(xlabel="compute after the backbone, in epochs of the backbone", ylabel="test accuracy, %")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return {"": figure}


def facts(results, labels):
    """The tables of the arms, their differences and the trials."""
    return {
        "table": _arms(pick(results.rows, phase="final"), labels),
        "gains": _gains(results.more["comparison"], labels),
        "gain": _gain(results.more["comparison"]),
        "longest": str(max(results.about["budgets"])),
        "trials": _trials(pick(results.rows, phase="trial"), labels),
    }


def _arms(finals, labels):
    body = []
    for budget, arm in dict.fromkeys((row["budget"], row["arm"]) for row in finals):
        rows = pick(finals, budget=budget, arm=arm)
        drifts = [row[key] for row in rows for key in ("smallest_drift", "largest_drift") if key in row]
        accuracies = (
            plus_minus([row[key] for row in rows], ".2f", 100) if key in rows[0] else "–"
            for key in ("train_accuracy", "held_out_accuracy", "test_accuracy")
        )
        cost = f"{rows[0]['macs_per_image'] / 1e6:.2f} M"
        drift = f"{min(drifts):.2g} to {max(drifts):.2g}" if drifts else "–"
        body.append([labels[arm], cost, budget, rows[0].get("epochs", 0), *accuracies, drift, len(rows)])
    header = [
        "network", "multiply-adds", "compute", "epochs", "training accuracy, %", "held out, %", "test, %", "drift", "seeds"
    ]  # fmt: skip
    return markdown(header, body)


def _gain(comparison):
    """The gain of the identity arm at the largest budget, in words."""
    rows = pick(comparison, arm="identity")
    if not rows:
        return "not measured yet"
    row = max(rows, key=lambda row: row["budget"])
    against = {"further": "the network that was trained further", UNTOUCHED: "the untouched network"}[row["against"]]
    interval = f"95 % interval over images {row['low']:+.2f} to {row['high']:+.2f}"
    if "standard_error" not in row:
        return f"{row['gain']:+.2f} points against {against} (one seed; {interval})"
    seeds = f"standard error over {row['seeds']} seeds"
    return f"{row['gain']:+.2f} ± {row['standard_error']:.2f} points against {against} ({seeds}; {interval})"


def _gains(comparison, labels):
    body = [
        [
            labels[row["arm"]], row["budget"], labels[row["against"]], f"{row['gain']:+.2f}",
            f"{row['standard_error']:.2f}" if "standard_error" in row else "–", f"{row['low']:+.2f} to {row['high']:+.2f}",
            row["seeds"],
        ]
        for row in comparison
    ]  # fmt: skip
    header = ["network", "compute", "against", "gain, points", "standard error over seeds", "95 % over images", "seeds"]
    return markdown(header, body)


def _trials(trials, labels):
    options = ("learning_rate", "weight_decay", "gate_lr_multiplier", "epochs")
    body = [[labels[row["arm"]], *(row[key] for key in options), f"{100 * row['held_out_accuracy']:.2f}"] for row in trials]
    return markdown(["network", "learning rate", "weight decay", "factor for gates", "epochs", "held out, %"], body)
