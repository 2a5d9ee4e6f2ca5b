#!/usr/bin/env python
"""Stacks of layers fitted to a known map: what is easy for a residual block, and what if the map is far from the identity?"""

import functools
import os
import sys
from dataclasses import dataclass

import click
import lab
import numpy as np
from lab import Cell, band, markdown, panels, pick, size

NAME = "learn_identity"


@dataclass(frozen=True)
class Form:
    """How a pair of layers `F(x) = W2 relu(W1 x + b1) + b2` is used: alone or with a shortcut, and how it starts."""

    label: str
    shortcut: bool
    start: str


FORMS = {
    "plain": Form("plain", False, "random"),
    "plain_identity": Form("plain, started as the identity", False, "identity"),
    "residual": Form("residual, F = 0 at the start", True, "zero"),
    "residual_random": Form("residual, random start", True, "scaled"),
}
# Of the orthogonal maps a rotation can be reached from the identity without leaving them, a reflection cannot.
TARGETS = {
    "identity": "x",
    "near": "x + small",
    "negative": "−x",
    "rotation": "Qx, Q a rotation",
    "reflection": "Qx, Q with a reflection",
}
PATHS = {"line": "straight: H = (1 − 2t) I", "arc": "turning: H = rotations by πt"}
POINTS = 9
MARKS = 20
FLOOR = 1e-14
# Hollow and of several shapes, so that lines on top of each other remain visible.
STYLES = [
    {"color": colour, "marker": marker, "mfc": "none", "ms": 4 + 1.5 * i}
    for i, (colour, marker) in enumerate(zip(lab.COLOURS, "ov^s", strict=False))
]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    layers: tuple = size((2, 8, 26), "Weighted layers of the stacks.", plan=True)
    width: int = size(16, "Dimensions of x, an even number; hidden layers have twice as many.")
    steps: int = size(2_000, "Steps, a multiple of 20.")
    batch: int = size(64, "Samples per step.")
    rates: tuple = size((1e-3, 3e-3, 1e-2, 3e-2), "Learning rates; each form is shown at its best one.")


QUICK = Sizes(layers=(2, 8), width=4, steps=100, batch=32, rates=(3e-3, 1e-2))


@lab.experiment(lambda flags: (NAME, QUICK if flags["quick"] else Sizes()), Sizes)
def main(lab_):
    """Fit plain and residual stacks of 2, 8, 26 layers to y = Hx, with H the identity, near it, and ever further away.

    Both forms have the same parameters, steps, data and rates, and both can express every H exactly at every depth (a pair of
    layers holds x = relu(x) − relu(−x)), so that differences are differences of learning. Samples are Gaussian; Adam, rate
    falling to zero along a cosine. The error is E‖ŷ − Hx‖² / E‖x‖² on new samples.

    \b
    Examples:
      scripts/experiments/learn_identity.py --quick
      scripts/experiments/learn_identity.py --seeds 3,4,5 --width 32

    Source: He et al. 2015 (arXiv 1512.03385), section 3.1: the hypothesis that is tested here.
    """
    cells = [
        Cell({"form": form, "layers": layers}, fitter(lab_, form, layers), cost=layers)
        for layers in lab_.sizes.layers
        for form in FORMS
    ]
    lab_.write(lab_.run(cells))
    lab_.publish(sys.modules[__name__])


# ---------------------------------------------------------------- maps


def maps(width):
    """All maps that are fitted: `(path, name or position, function of a seed -> H)`."""
    eye = np.eye(width)

    def near(seed):
        noise = np.random.default_rng([seed, 1]).standard_normal((width, width))
        return eye + 0.1 * noise * np.linalg.norm(eye) / np.linalg.norm(noise)

    def orthogonal(seed, determinant):
        q, r = np.linalg.qr(np.random.default_rng([seed, 2]).standard_normal((width, width)))
        q = q * np.sign(np.diag(r))
        q[0] *= np.sign(np.linalg.det(q)) * determinant
        return q

    def turning(t):
        c, s = np.cos(np.pi * t), np.sin(np.pi * t)
        return np.kron(np.eye(width // 2), [[c, -s], [s, c]])

    named = {
        "identity": lambda seed: eye,
        "near": near,
        "negative": lambda seed: -eye,
        "rotation": functools.partial(orthogonal, determinant=1),
        "reflection": functools.partial(orthogonal, determinant=-1),
    }
    found = [("named", name, make) for name, make in named.items()]
    for t in np.linspace(0, 1, POINTS):
        found.append(("line", float(t), lambda seed, t=t: (1 - 2 * t) * eye))
        found.append(("arc", float(t), lambda seed, t=t: turning(t)))
    return found


def distance(matrix):
    """‖H − I‖ / ‖I‖, Frobenius: 0 for the identity, 2 for −I."""
    eye = np.eye(len(matrix))
    return float(np.linalg.norm(matrix - eye) / np.linalg.norm(eye))


# ---------------------------------------------------------------- fitting


def fitter(lab_, name, layers):
    """The function of a cell: all maps, seeds and rates side by side, as one batch of small networks."""

    def train(folder):
        sizes = lab_.sizes
        if sizes.width % 2 or sizes.steps % MARKS or layers % 2:
            raise click.UsageError(f"--width and --layers must be even and --steps a multiple of {MARKS}")
        runs = [
            {"path": path, "target": target, "distance": round(distance(h), 6), "seed": seed, "rate": rate, "H": h}
            for path, target, make in maps(sizes.width)
            for seed in lab_.seeds
            for h in [make(seed)]
            for rate in sizes.rates
        ]
        fleet = Fleet(runs, FORMS[name], layers // 2, sizes, folder / "state.npz")
        with lab.progress(range(fleet.marks_done, MARKS), f"{name}, {layers} layers") as marks:
            for _ in marks:
                fleet.advance()
        errors = np.array(fleet.errors)
        below = errors < 0.01
        first_below = np.where(below.any(0), below.argmax(0) * (sizes.steps // MARKS), -1)
        return [
            {
                **{key: value for key, value in run.items() if key != "H"},
                "start_error": float(errors[0, i]),
                "error": float(errors[-1, i]),
            }
            | ({"steps_to_1_percent": int(first_below[i])} if first_below[i] >= 0 else {})
            for i, run in enumerate(runs)
        ]

    return train


class Fleet:
    """Many small networks of one form, trained side by side; all its state is in one file.

    Args:
        runs: dicts with `H`, `seed` and `rate`; seeds decide initial weights and samples.
        form: `Form`.
        pairs: pairs of layers.
        sizes: `Sizes`.
        path: of the state; what is there is gone on from.
    """

    def __init__(self, runs, form, pairs, sizes, path):
        import tensorflow as tf

        self.tf, self.form, self.sizes, self.path = tf, form, sizes, path
        self.seeds = sorted({run["seed"] for run in runs})
        self.which = tf.constant([self.seeds.index(run["seed"]) for run in runs])
        self.maps = tf.constant(np.stack([run["H"].T for run in runs]), tf.float32)
        self.rates = tf.constant([run["rate"] for run in runs], tf.float32)[:, None, None]
        start = {seed: initial_weights(form.start, pairs, sizes.width, seed) for seed in self.seeds}
        values = [np.stack([start[run["seed"]][i] for run in runs]) for i in range(4 * pairs)]
        self.weights = [tf.Variable(value) for value in values]
        self.moments = [[tf.Variable(np.zeros_like(value)) for value in values] for _ in range(2)]
        self.errors = []
        self._steps = tf.function(self._some_steps)
        self._error = tf.function(self._test_error)
        self._restore()

    @property
    def marks_done(self):
        """How many of the `MARKS` parts of the steps are done."""
        return len(self.errors) - 1

    def advance(self):
        """Train one part, measure, save."""
        count = self.sizes.steps // MARKS
        self._steps(self.tf.constant(self.marks_done * count), self.tf.constant(count))
        self._measure()

    def _restore(self):
        if not self.path.exists():
            self._measure()
            return
        with np.load(self.path) as held:
            self.errors = list(held["errors"])
            for i, variable in enumerate(self._state()):
                variable.assign(held[str(i)])

    def _state(self):
        return [*self.weights, *self.moments[0], *self.moments[1]]

    def _measure(self):
        self.errors.append(self._error().numpy())
        partial = self.path.with_name("part.npz")
        np.savez(partial, errors=np.array(self.errors), **{str(i): v.numpy() for i, v in enumerate(self._state())})
        os.replace(partial, self.path)

    def samples(self, count, step):
        """Gaussian samples `(runs, count, width)`; runs of one seed see the same."""
        shape = [count, self.sizes.width]
        drawn = self.tf.stack([self.tf.random.stateless_normal(shape, [seed, step]) for seed in self.seeds])
        return self.tf.gather(drawn, self.which)

    def forward(self, x):
        """What the networks make of `x`."""
        for i in range(0, len(self.weights), 4):
            w1, b1, w2, b2 = self.weights[i : i + 4]
            branch = self.tf.nn.relu(x @ w1 + b1) @ w2 + b2
            x = x + branch if self.form.shortcut else branch
        return x

    def _squares(self, x):
        """Per network: mean over samples of ‖ŷ − Hx‖² / width."""
        return self.tf.reduce_mean(self.tf.square(self.forward(x) - x @ self.maps), [1, 2])

    def _test_error(self):
        # Steps are counted from 0, so that no sample was trained on.
        parts = [self._squares(self.samples(256, -1 - part)) for part in range(4)]
        return self.tf.add_n(parts) / len(parts)

    def _some_steps(self, first, count):
        tf = self.tf
        for step in tf.range(first, first + count):
            with tf.GradientTape() as tape:
                # The sum keeps the networks apart: none has a part in the gradient of another.
                loss = tf.reduce_sum(self._squares(self.samples(self.sizes.batch, step)))
            gradients = tape.gradient(loss, self.weights)
            done = tf.cast(step, tf.float32)
            rate = self.rates * 0.5 * (1 + tf.cos(np.pi * done / self.sizes.steps))
            rate *= tf.sqrt(1 - 0.999 ** (done + 1)) / (1 - 0.9 ** (done + 1))
            for weight, gradient, mean, square in zip(self.weights, gradients, *self.moments, strict=True):
                mean.assign(0.9 * mean + 0.1 * gradient)
                square.assign(0.999 * square + 0.001 * gradient**2)
                weight.assign_sub(rate * mean / (tf.sqrt(square) + 1e-8))


def initial_weights(start, pairs, width, seed):
    """Weights and biases of all pairs, `[w1, b1, w2, b2] * pairs`, float32.

    `"random"`: He's for the first layer, and a second one that keeps the variance; `"scaled"`: the second over √pairs, so that
    the variance stays below e times the input's behind shortcuts too; `"zero"`: a second layer of 0; `"identity"`:
    W1 = [I, −I], W2 = [I; −I].
    """
    rng = np.random.default_rng([seed, 3])
    hidden, weights = 2 * width, []
    for _ in range(pairs):
        w1 = rng.standard_normal((width, hidden)) * np.sqrt(2 / width)
        w2 = rng.standard_normal((hidden, width)) * np.sqrt(1 / hidden)
        if start == "scaled":
            w2 /= np.sqrt(pairs)
        elif start == "zero":
            w2 = np.zeros_like(w2)
        elif start == "identity":
            w1 = np.concatenate([np.eye(width), -np.eye(width)], 1)
            w2 = w1.T
        weights += [w1, np.zeros((1, hidden)), w2, np.zeros((1, width))]
    return [np.asarray(weight, "float32") for weight in weights]


# ---------------------------------------------------------------- what the tables say


def best(rows):
    """The rows at the rate with the least mean error over seeds, for each form, depth and map."""
    groups = {}
    for row in rows:
        group = groups.setdefault((row["form"], row["layers"], row["path"], row["target"]), {})
        group.setdefault(row["rate"], []).append(row)
    found = []
    for rates in groups.values():
        # A rate at which a network went astray is none that anyone would choose.
        means = {rate: np.mean([_finite(row["error"]) for row in held]) for rate, held in rates.items()}
        found += rates[min(means, key=means.get)]
    return found


def _finite(error):
    return error if np.isfinite(error) else np.inf


def figures(results):
    """Error per map and depth; error over the distance of H from the identity."""
    rows = best(results.rows)
    depths = sorted({row["layers"] for row in rows})
    named, axes = panels(1, len(TARGETS), width=3.2, sharey=True)
    for axis, (target, label) in zip(axes[0], TARGETS.items(), strict=True):
        for (form, about), style in zip(FORMS.items(), STYLES, strict=True):
            found = pick(rows, path="named", target=target, form=form)
            band(axis, found, "layers", "error", floor=FLOOR, label=about.label, **style)
        axis.set(title=f"H(x) = {label}", xlabel="weighted layers", yscale="log", xticks=depths)
    axes[0, 0].set_ylabel(f"error E‖ŷ − Hx‖² / E‖x‖²\n(0 is drawn at {FLOOR:g})")
    named.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(FORMS), frameon=False)
    far, axes = panels(len(PATHS), len(depths), sharey=True)
    for line, (path, label) in zip(axes, PATHS.items(), strict=True):
        for axis, depth in zip(line, depths, strict=True):
            for (form, about), style in zip(FORMS.items(), STYLES, strict=True):
                found = pick(rows, path=path, form=form, layers=depth)
                band(axis, found, "distance", "error", floor=FLOOR, label=about.label, **style)
            distances = np.linspace(0, 2, 101)
            nothing = np.maximum((1 - distances) ** 2, FLOOR) if path == "line" else np.ones_like(distances)
            axis.plot(distances, nothing, color="0.4", lw=1, ls=":", label="answering 0")
            axis.set(title=f"{depth} layers, {label}", yscale="log", xlabel="distance of H from the identity, ‖H − I‖ / ‖I‖")
            axis.title.set_fontsize(10)
        line[0].set_ylabel(f"error E‖ŷ − Hx‖² / E‖x‖²\n(0 is drawn at {FLOOR:g})")
    far.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(FORMS) + 1, frameon=False)
    return {"targets": named, "distance": far}


def facts(results):
    """Tables of the error per map, depth and form: geometric mean over seeds, smallest to largest."""
    rows = best(results.rows)
    found = {}
    for target, label in TARGETS.items():
        body = []
        for depth in sorted({row["layers"] for row in rows}):
            cells = [_errors(pick(rows, path="named", target=target, form=form, layers=depth)) for form in FORMS]
            body.append([f"{label}, {depth} layers", *cells])
        found[target] = body
    header = ["map, depth", *(form.label for form in FORMS.values())]
    table = markdown(header, [line for body in found.values() for line in body])
    return {"table": table, "cost": cost(results.rows), "resolution": str(results.about["steps"] // MARKS)}


def cost(rows):
    """Table: steps until the error is below 1 %, over the distance of H from I, for the deepest stacks.

    Median over seeds at the rate at which it is least: the rate that ends lowest is not the fastest.
    """
    deepest = max(row["layers"] for row in rows)
    found = pick(rows, path="arc", layers=deepest)
    distances = sorted({row["distance"] for row in found})
    body = []
    for form, about in FORMS.items():
        medians = [fewest_steps(pick(found, form=form, distance=distance)) for distance in distances]
        body.append([about.label, *(f"{median:.0f}" if np.isfinite(median) else "never" for median in medians)])
    return markdown([f"{deepest} layers, distance of H from I", *(f"{distance:.2f}" for distance in distances)], body)


def fewest_steps(rows):
    """Least over rates of the median over seeds; a seed that never gets there counts as later than all others."""
    return min(
        np.median([row.get("steps_to_1_percent", np.inf) for row in pick(rows, rate=rate)])
        for rate in {row["rate"] for row in rows}
    )


def _errors(rows):
    errors = [row["error"] for row in rows]
    if not all(np.isfinite(errors)):
        return "diverged"
    if max(errors) == 0:
        return "0"
    if min(errors) == 0 or len(errors) == 1:
        return f"{max(errors):.0e}"
    return f"{np.exp(np.mean(np.log(errors))):.0e} ({min(errors):.0e} to {max(errors):.0e})"


if __name__ == "__main__":
    main()
