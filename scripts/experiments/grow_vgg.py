#!/usr/bin/env python
"""A trained VGG and 26 more layers at equal compute: put in as the identity, at random, or without shortcuts."""

import functools
import sys
from dataclasses import dataclass

import click
import lab
import numpy as np
from lab import Cell, band, markdown, panels, pick, plus_minus, size

# The trunk that is trained here is one experiment, the one from ImageNet another: their results have names of their own.
NAMES = {"cifar": "grow_vgg", "imagenet": "grow_imagenet"}
LAYERS = 26
CUT = "block3_pool"
# Arguments of `grow`; None leaves the VGG as it is.
ARMS = {
    "vgg": None,
    "identity": {},
    "random": {"gate": "none"},
    "plain": {"block": "plain"},
}
LABELS = {
    "vgg": "VGG, trained on",
    "identity": f"+ {LAYERS} layers, identity at first",
    "random": f"+ {LAYERS} residual layers, random",
    "plain": f"+ {LAYERS} plain layers",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment."""

    network: str = size("vgg16_bn_w12", "VGG of the zoo to train; w12 is an eighth of the width.")
    images: int = size(10_000, "Training images.")
    test_images: int = size(2_500, "Test images.")
    image_size: int = size(32, "Side to which the images are brought for ImageNet's trunk.")
    trunk_epochs: int = size(16, "Epochs of the VGG before it grows.")
    trunk_rate: float = size(0.1, "Its learning rate.")
    epochs: int = size(8, "Further epochs of the grown networks; the VGG gets as many as cost the same, rounded up.")
    rate: float = size(0.02, "Their learning rate, and the VGG's.")
    block: str = size("preact", "Kind of the residual blocks.")
    batch: int = size(64, "Images per step.")


# Here most of a step is the upper half, and two 3 × 3 convolutions of 512 filters would cost as much as all of it.
IMAGENET = Sizes(
    "vgg16", images=2_000, test_images=2_000, trunk_epochs=3, trunk_rate=0.005, epochs=6, rate=0.005, block="depthwise"
)
QUICK = Sizes("vgg11_bn_w12", 256, 128, trunk_epochs=3, trunk_rate=0.05, epochs=2, batch=32)
QUICK_IMAGENET = Sizes("vgg16", 32, 16, trunk_epochs=1, trunk_rate=0.005, epochs=1, rate=0.005, block="depthwise", batch=16)


def default_sizes(flags):
    """Sizes of the trunk that is asked for."""
    table = {("cifar", False): Sizes(), ("cifar", True): QUICK, ("imagenet", False): IMAGENET, ("imagenet", True): QUICK_IMAGENET}
    return NAMES[flags["trunk"]], table[flags["trunk"], flags["quick"]]


@lab.experiment(
    default_sizes,
    Sizes,
    click.option(
        "--trunk", type=click.Choice(list(NAMES)), default="cifar", help="Train the VGG here, or take ImageNet's VGG16."
    ),
    click.option(
        "--weights",
        type=click.Path(exists=True, dir_okay=False, path_type=lab.Path),
        help="VGG16's ImageNet convolutions as .npz (block1_conv1/kernel, …).  [../shared/data/weights/vgg16_imagenet_notop.npz]",
    ),
)
def main(lab_, trunk, weights):
    """Grow a trained VGG by 26 layers and compare it with the VGG alone after further training of equal compute.

    The further compute of all arms is the same number of multiply-adds; the VGG alone gets whole epochs, rounded up, so at
    least as many. With --trunk imagenet the lower three blocks of VGG16 are frozen: their features are computed once.

    \b
    Examples:
      scripts/experiments/grow_vgg.py --quick
      scripts/experiments/grow_vgg.py --trunk imagenet
      scripts/experiments/grow_vgg.py --network vgg16_bn_w50 --trunk-epochs 40 --seeds 3,4,5
    """
    study = Study(lab_) if trunk == "cifar" else ImageNetStudy(lab_, weights)
    trunks = [
        Cell(trunk_key(seed), functools.partial(study.train_trunk, seed), lab_.sizes.trunk_epochs, ("model.keras",))
        for seed in lab_.seeds
    ]
    arms = [
        Cell({"arm": arm, "seed": seed}, functools.partial(study.train_arm, arm, seed), 2.5 * lab_.sizes.epochs, ("drift.csv",))
        for seed in lab_.seeds
        for arm in ARMS
    ]
    rows = lab_.run([*trunks, *arms])
    drifts = [
        {**cell.key, **row}
        for cell in arms
        if (path := lab_.folder(cell.key) / "drift.csv").exists()
        for row in lab.read_csv(path)
    ]
    lab_.write(rows, drift=drifts)
    lab_.publish(sys.modules[__name__])


def trunk_key(seed):
    """Key of the cell that the arms of a seed begin from."""
    return {"arm": "trunk", "seed": seed}


class Study:
    """A VGG trained on the images from scratch, and its arms.

    Args:
        lab_: `Lab`.
    """

    places = "block*_pool"
    augmentation = {"flip": True, "crop_padding": 4}

    def __init__(self, lab_):
        self.lab = lab_

    def source(self):
        """The data of all arms."""
        return self.lab.source()

    def new_trunk(self, seed):
        """The VGG before it has seen the images."""
        return self.lab.create(self.lab.sizes.network, seed)

    def train_trunk(self, seed, folder):
        """The function of the cell that the arms begin from."""
        sizes, trunk = self.lab.sizes, self.new_trunk(seed)
        self.grown(trunk, seed)  # A network that cannot grow is refused before it is trained.
        return self.lab.train(
            folder, trunk, self.source(), epochs=sizes.trunk_epochs, seed=seed, **self._run(sizes.trunk_rate)
        )  # fmt: skip

    def grown(self, trunk, seed, **arm):
        """A trunk with 26 more layers."""
        options = {"total_layers": LAYERS, "seed": 1000 * seed + 1, "block": self.lab.sizes.block}
        return self.lab.grow(trunk, self.places, **options | arm)

    def train_arm(self, arm, seed, folder):
        """The function of an arm: a row before the first step, then one per epoch."""
        import keras

        import keras_resnet as kr
        from keras_resnet.training import DriftLogger
        from keras_resnet.zoo.counting import count_macs

        sizes, source = self.lab.sizes, self.source()
        trunk = keras.saving.load_model(self.lab.folder(trunk_key(seed)) / "model.keras", compile=False)
        model = trunk if ARMS[arm] is None else self.grown(trunk, seed, **ARMS[arm])
        macs, grown_macs = (count_macs(m) for m in (model, self.grown(trunk, seed)))
        epochs = int(np.ceil(sizes.epochs * grown_macs / macs))
        probe = source.test.images[:64].astype("float32")
        start = self._start(trunk, model, probe, source.test)
        watch = [DriftLogger(probe, folder / "drift.csv")] if kr.find_blocks(model) else []
        # Other images first than the trunk saw last.
        rows = self.lab.train(
            folder, model, source, may_diverge=True, epochs=epochs, seed=1000 * seed + 1, callbacks=watch, **self._run(sizes.rate)
        )  # fmt: skip
        per_step = 3 * macs * sizes.batch  # Forward, and twice that backward.
        return [start, *({**row, "macs": per_step * row["step"]} if "step" in row else row for row in rows)]

    def _run(self, rate):
        return {
            "batch_size": self.lab.sizes.batch, "base_batch": self.lab.sizes.batch, "learning_rate": rate, "weight_decay": 5e-4,
            "nesterov": True, "warmup_epochs": 0.5, "clip_norm": 5.0, **self.augmentation,
        }  # fmt: skip

    def _start(self, trunk, model, probe, test):
        import keras

        import keras_resnet as kr

        report = kr.identity_report(trunk, model, probe)
        logits = model.predict(test.images.astype("float32"), batch_size=self.lab.sizes.batch, verbose=0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(test.labels, logits)
        return {
            "epoch": 0, "step": 0, "test_loss": round(float(loss), 6),
            "test_error": round(float(np.mean(logits.argmax(-1) != test.labels)), 6), "macs": 0,
            "eager_difference": report.eager / report.scale, "graph_difference": report.graph / report.scale,
            "parameters": model.count_params(),
        }  # fmt: skip


class ImageNetStudy(Study):
    """VGG16's own convolutions: the lower three blocks give features once, the upper two are fine-tuned and grow.

    Args:
        lab_: `Lab`.
        weights: `.npz`; None for the default.
    """

    places = ["block4_pool", "block5_pool"]
    augmentation = {}

    def __init__(self, lab_, weights):
        from keras_resnet.training import TrainingError

        super().__init__(lab_)
        self.weights = weights or lab.SHARED / "weights" / "vgg16_imagenet_notop.npz"
        if not self.weights.exists():
            raise TrainingError(f"there are no weights at {self.weights}; give --weights FILE.npz")
        self._features = None

    def new_trunk(self, seed):
        import keras
        from keras import layers

        _, upper = self.halves()
        keras.utils.set_random_seed(seed)
        x = layers.GlobalAveragePooling2D(name="avg_pool")(upper.output)
        logits = layers.Dense(len(self.lab.source().classes), name="predictions", dtype="float32")(x)
        return keras.Model(upper.input, logits, name="vgg16_upper")

    def source(self):
        if self._features is None:
            self._features = self._computed()
        return self._features

    def halves(self):
        """VGG16 up to `CUT`, images 0–255 in, and what follows, features in."""
        import keras

        import keras_resnet as kr
        from keras_resnet.training import TrainingError

        side = self.lab.sizes.image_size
        whole = kr.create_model("vgg16", include_top=False, input_shape=(side, side, 3), preprocessing="caffe")
        try:
            with np.load(self.weights) as held:
                for layer in whole.layers:
                    if layer.weights:
                        layer.set_weights([held[f"{layer.name}/{kind}"] for kind in ("kernel", "bias")])
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(f"{self.weights} does not hold VGG16's convolutions as arrays: {error}") from error
        cut = whole.get_layer(CUT)
        inputs = keras.Input(cut.output.shape[1:])
        # Blocks follow a layer, not an input: this one makes the cut an insertion point.
        x = keras.layers.Activation("linear", name=CUT)(inputs)
        for layer in whole.layers[whole.layers.index(cut) + 1 :]:
            x = layer(x)
        return keras.Model(whole.input, cut.output), keras.Model(inputs, x)

    def _computed(self):
        import tensorflow as tf

        from keras_resnet.data import Source

        lower, _ = self.halves()
        side, source = self.lab.sizes.image_size, self.lab.source()

        def split(images):
            parts = []
            with lab.progress(range(0, images.size, 64), "features") as starts:
                for start in starts:
                    pixels = tf.image.resize(images.images[start : start + 64], (side, side))
                    parts.append(lower.predict_on_batch(np.broadcast_to(pixels, (*pixels.shape[:3], 3))))
            return features(np.concatenate(parts), images.labels)

        train, test = split(source.train), split(source.test)
        return Source(f"{source.name}, features", train, test, source.classes, train.images.shape[1:3], {"mean": 0.0, "std": 1.0})


def features(arrays, labels):
    """A split of feature maps instead of images."""
    from keras_resnet.data import Images

    class Features(Images):
        def __post_init__(self):
            """Features are floats, which `Images` refuses for pixels."""

    return Features(arrays, labels)


# ---------------------------------------------------------------- what the tables say


def figures(results):
    """Training loss and test accuracy over compute; heat map of the drift."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    rows = [row for row in results.rows if row["arm"] != "trunk"]
    figure, axes = panels(1, 3, width=4.6)
    for (arm, label), colour in zip(LABELS.items(), lab.COLOURS, strict=False):
        found = [{**row, "accuracy": 1 - row["test_error"]} for row in pick(rows, arm=arm) if "test_error" in row]
        band(axes[0, 0], found, "macs", "train_loss", color=colour, label=label)
        for axis in axes[0, 1:]:
            band(axis, found, "macs", "accuracy", 100, color=colour, label=label)
    axes[0, 0].set(ylabel="training loss", yscale="log")
    axes[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0, 0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[0, 0].yaxis.set_minor_formatter("")
    axes[0, 1].set_ylabel("test accuracy, %")
    best = 100 * (1 - min(row["test_error"] for row in rows if "test_error" in row))
    axes[0, 2].set(ylim=(best - 12, best + 1), ylabel="test accuracy, %, enlarged")
    for axis in axes.flat:
        axis.set_xlabel("multiply-adds since the growth")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(LABELS), frameon=False)
    drift = results.more["drift"]
    arms = [arm for arm in ARMS if pick(drift, arm=arm)]
    from keras_resnet.training.drift_logger import heat_map

    maps, axes = panels(1, len(arms), width=5.4, height=3.8)
    moved = [row["mean"] for row in drift if 0 < row["mean"] < np.inf]
    scale = LogNorm(min(moved), max(moved)) if moved else None
    for axis, arm in zip(axes[0], arms, strict=True):
        values = {}
        for row in pick(drift, arm=arm):
            values.setdefault((row["epoch"], row["block"]), []).append(row["mean"])
        heat_map([(epoch, block, float(np.mean(means))) for (epoch, block), means in values.items()], axis, scale)
        axis.set_title(f"{LABELS[arm]} (white: exactly 0)", fontsize=10)
        axis.grid(False)
    return {"": figure, "drift": maps}


def ends(rows, arm):
    """The last row of each seed of an arm, by seed; None where it diverged."""
    found = {}
    for row in pick(rows, arm=arm):
        found[row["seed"]] = row if "diverged" not in row else None
    return found


def ahead(some, others):
    """Test accuracy of an arm minus that of another, in percentage points, pairs of one seed; both as `ends` gives them."""
    return [100 * (others[seed]["test_error"] - row["test_error"]) for seed, row in some.items() if row and others.get(seed)]


def facts(results):
    """The table, and per arm the difference to the VGG in pairs of one seed."""
    rows, body, sentences = results.rows, [], []
    alone = ends(rows, "vgg")
    for arm, label in LABELS.items():
        starts, last = pick(rows, arm=arm, epoch=0), ends(rows, arm)
        whole = [row for row in last.values() if row]
        body.append(
            [
                label,
                f"{starts[0]['parameters'] / 1e6:.2f} M",
                f"{max(row['eager_difference'] for row in starts):.0e}".replace("0e+00", "0"),
                plus_minus([1 - row["test_error"] for row in starts], ".1f", 100),
                plus_minus([1 - row["test_error"] for row in whole], ".1f", 100) if whole else "diverged",
                plus_minus([row["train_loss"] for row in whole], ".3f") if whole else "diverged",
                f"{np.mean([row['macs'] for row in whole]) / 1e12:.1f}" if whole else "",
                f"{len(whole)} of {len(last)}" if len(whole) < len(last) else len(last),
            ]
        )
        if arm != "vgg" and (gains := ahead(last, alone)):
            sentences.append(f"{label}: {lab.difference(gains)}")
    header = [
        "network", "parameters", "largest change at step 0, relative", "accuracy at step 0, %", "accuracy at the end, %",
        "training loss at the end", "10¹² multiply-adds", "seeds",
    ]  # fmt: skip
    trunk = [1 - row["test_error"] for row in ends(rows, "trunk").values() if row]
    starts = ahead(ends(rows, "identity"), ends(rows, "random"))
    return {
        "table": markdown(header, body),
        "gains": "Test accuracy against the VGG trained on, pairs of one seed: " + "; ".join(sentences) + ".",
        "start": f"The start as the identity against the random one: {lab.difference(starts)}.",
        "trunk": f"The VGG before: {plus_minus(trunk, '.1f', 100)} %.",
    }


if __name__ == "__main__":
    main()
