"""Train, grow, export and classify handwritten digits, from a small VGG to a verified ONNX file and a report."""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

TRAINING_IMAGES = 300
VGG_EPOCHS, FURTHER_EPOCHS = 18, 18
VGG_RATE, FURTHER_RATE = 0.03, 0.01
NEW_LAYERS = 26
BATCH = 32


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        default=Path(__file__).resolve().parents[1] / "demo",
        type=Path,
        help="Folder for all results; by default demo/ in the repository.",
    )
    out = parser.parse_args().out
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{out} cannot be written ({error.strerror}); give another folder with --out")
    from rich.console import Console

    Demo(out, Console()).run()


class Demo:
    """The steps of the demo, in order; each adds what it measured to `self.seen`, from which the report is made."""

    def __init__(self, out, console):
        self.out, self.console, self.seen = out, console, {}
        self.start = time.perf_counter()

    def say(self, text):
        self.console.print(f"[dim]{time.perf_counter() - self.start:4.0f} s[/]  {text}", highlight=False, soft_wrap=True)

    def run(self):
        import resnet_export as rx

        with self.console.status("Loading TensorFlow"), rx.source.quiet_start():
            import keras
            import tensorflow as tf

            import keras_resnet as kr

        tf.get_logger().setLevel("ERROR")
        keras.utils.set_random_seed(0)
        train, test = load_digits()
        self.say(f"Digits: {len(train[0])} images to train on, {len(test[0])} to test on, 32×32 pixels, 10 classes")

        vgg = kr.create_model(
            "vgg16_w25",
            input_shape=(32, 32, 3),
            num_classes=10,
            preprocessing="tf",
            head="pool",
            labels=[str(n) for n in range(10)],
        )
        before = self.train(vgg, train, test, VGG_EPOCHS, VGG_RATE, "Train a small VGG-16")

        grown = kr.grow(vgg, after="block*_pool", total_layers=NEW_LAYERS, seed=1)
        identity = kr.identity_report(vgg, grown, test[0][:64])
        same = accuracy(grown, test)
        self.say(
            f"Grown by {NEW_LAYERS} layers in {identity.blocks} blocks: "
            f"max |Δ| of the logits {identity.eager:g}, accuracy {same:.2%}"
        )
        if not identity.holds:
            sys.exit(f"The grown model differs from the VGG:\n{identity}")

        control = kr.growth.copy_model(vgg)
        further = {
            "grown": self.train(grown, train, test, FURTHER_EPOCHS, FURTHER_RATE, f"Continue with {NEW_LAYERS} more layers"),
            "VGG alone": self.train(control, train, test, FURTHER_EPOCHS, FURTHER_RATE, "For comparison: the VGG alone"),
        }
        with self.console.status("Measuring the drift of every block"):
            drift = kr.drift(grown, test[0][:256])
        means = [block.mean for block in drift]
        self.say(f"Drift: ‖F(x)‖/‖x‖ of the blocks is now {min(means):.2g} to {max(means):.2g}; it was 0")

        files = self.export(grown)
        pictures = self.classify(files["onnx"], test)
        latencies = self.time(grown, files, test[0])
        self.seen |= {
            "vgg": vgg, "grown": grown, "identity": identity, "before": before, "further": further, "drift": drift,
            "files": files, "pictures": pictures, "latencies": latencies, "counts": (len(train[0]), len(test[0])), "same": same,
        }  # fmt: skip
        from demo_report import write_report

        path = write_report(self.out / "report.html", self.seen, time.perf_counter() - self.start)
        self.say(f"All done in {time.perf_counter() - self.start:.0f} s")
        shown = relative(self.out)
        print(
            f"Report: {path} – open it in a browser. "
            f"Next: {relative(Path(sys.executable).parent)}/resnet-export predict {shown}/digits.onnx {shown}/images/*.png"
        )

    def train(self, model, train, test, epochs, rate, title):
        """Train with SGD, momentum and a warmed-up cosine schedule on shifted images; returns the test accuracies."""
        import keras
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        data = augmented(*train)
        steps = -(-len(train[0]) // BATCH)
        warm_up = 2 * steps
        schedule = keras.optimizers.schedules.CosineDecay(0.0, epochs * steps - warm_up, warmup_target=rate, warmup_steps=warm_up)
        model.compile(
            keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True, clipnorm=1.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=False,
        )
        scores = [accuracy(model, test)]
        columns = (
            TextColumn("       {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs  {task.fields[score]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(title, total=epochs, score="")

            def after_epoch(epoch, logs):
                scores.append(float(logs["val_accuracy"]))
                bar.update(task, advance=1, score=f"test accuracy {scores[-1]:.1%}")

            callback = keras.callbacks.LambdaCallback(on_epoch_end=after_epoch)
            model.fit(
                data,
                epochs=epochs,
                validation_data=test,
                validation_batch_size=256,
                verbose=0,
                shuffle=False,
                callbacks=[callback],
            )
        self.say(f"{title}: test accuracy {scores[0]:.2%} → {scores[-1]:.2%}")
        return scores

    def export(self, model):
        """ONNX and SavedModel, both verified, and the Keras file itself."""
        import keras_resnet as kr
        import resnet_export as rx

        files = {
            "keras": self.out / "digits.keras",
            "onnx": self.out / "digits.onnx",
            "savedmodel": self.out / "digits_savedmodel",
        }
        with self.console.status("Saving, exporting and verifying"):
            # A copy is uncompiled, so the file holds no optimiser state.
            kr.growth.copy_model(model).save(files["keras"])
            results = {"onnx": rx.to_onnx(model, files["onnx"]), "savedmodel": rx.to_savedmodel(model, files["savedmodel"])}
            again = rx.verify(files["onnx"], model)
        for name, result in results.items():
            self.say(f"Exported {relative(files[name])}: {'verified' if result.report.passed else 'NOT VERIFIED'}, "
                     f"largest relative error {result.report.worst():.1e}")  # fmt: skip
        self.seen["reports"] = results | {"again": again}
        return files

    def classify(self, onnx, test, count=20):
        """Write some test images as files and classify the files, as a user would."""
        from PIL import Image

        import resnet_export as rx

        paths = []
        for index in range(count):
            paths.append(self.out / "images" / f"{index:02d}_digit_{test[1][index]}.png")
            Image.fromarray(test[0][index].astype("uint8")).save(paths[-1])
        found = rx.predict(onnx, [str(path) for path in paths], top=3)
        right = sum(int(p.classes[0]) == label for p, label in zip(found, test[1], strict=False))
        self.say(f"Classified {count} image files with onnxruntime: {right} right")
        return [(path, int(label), prediction) for path, label, prediction in zip(paths, test[1], found, strict=False)]

    def time(self, model, files, images, repeats=30):
        """Median latency in ms of one image and of 32, for Keras, the SavedModel and onnxruntime."""
        import tensorflow as tf

        import resnet_export as rx

        serve = tf.saved_model.load(str(files["savedmodel"])).signatures["serving_default"]
        session = rx.session(str(files["onnx"]))
        runners = {
            "keras": lambda x: model.predict_on_batch(x),
            "savedmodel": lambda x: serve(images=tf.constant(x))["logits"].numpy(),
            "onnx": lambda x: session.run({"images": x}),
        }
        measured = {}
        with self.console.status("Measuring latencies"):
            for name, run in runners.items():
                for batch in (1, 32):
                    times = []
                    for _ in range(repeats + 3):
                        begin = time.perf_counter()
                        run(images[:batch])
                        times.append(time.perf_counter() - begin)
                    measured[name, batch] = 1000 * float(np.median(times[3:]))
        self.say("One image takes " + ", ".join(f"{measured[name, 1]:.1f} ms in {name}" for name in runners))
        return measured


def load_digits():
    """scikit-learn's 8×8 digits as 32×32×3 pixels 0–255, shuffled: `((x_train, y_train), (x_test, y_test))`."""
    from sklearn.datasets import load_digits as embedded

    digits = embedded()
    x = np.kron(digits.images * (255 / 16), np.ones((1, 4, 4)))[..., None].repeat(3, -1).round().astype("float32")
    order = np.random.default_rng(0).permutation(len(x))
    first, rest = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return (x[first], digits.target[first]), (x[rest], digits.target[rest])


def augmented(x, y):
    """Batches of slightly shifted, turned and zoomed images."""
    import keras
    import tensorflow as tf

    move = keras.Sequential(
        [
            keras.layers.RandomTranslation(0.1, 0.1, fill_mode="nearest", seed=1),
            keras.layers.RandomRotation(0.04, fill_mode="nearest", seed=2),
            keras.layers.RandomZoom(0.1, fill_mode="nearest", seed=3),
        ]
    )
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=0).batch(BATCH)
    return batches.map(lambda images, labels: (move(images, training=True), labels)).prefetch(2)


def accuracy(model, test):
    return float(np.mean(model.predict(test[0], batch_size=256, verbose=0).argmax(-1) == test[1]))


def relative(path):
    """A path as short as it can be typed from here."""
    path = Path(path).absolute()
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


if __name__ == "__main__":
    main()
