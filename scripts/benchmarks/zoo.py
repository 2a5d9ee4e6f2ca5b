"""`scripts/benchmark.py zoo`: import, build, forward pass and training step, next to keras.applications and KerasHub."""

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from .pairs import compare

BAR = 1.03
IMPORT_BAR = 0.1
LINEAR_BAR = 1.2
# Depths 6n+2, far enough apart that a quadratic share would show.
DEPTHS = (110, 302, 602, 1202)
CLASSES = 1000


def peers(size):
    """`(name, function that builds theirs, function that builds ours)`, of equal multiply-adds."""
    import keras

    import keras_resnet as kr

    shape = (size, size, 3)
    plain = {"include_preprocessing": False, "input_shape": shape}

    def application(name):
        return lambda: getattr(keras.applications, name)(weights=None, input_shape=shape, classifier_activation=None)

    found = [
        ("keras.applications ResNet50", application("ResNet50"), lambda: kr.create_model("resnet50_v1", **plain)),
        ("keras.applications ResNet50V2", application("ResNet50V2"), lambda: kr.create_model("resnetv2_50_keras", **plain)),
    ]
    if importlib.util.find_spec("keras_hub"):
        import keras_hub

        blocks = {"stackwise_num_filters": [64, 128, 256, 512], "stackwise_num_blocks": [3, 4, 6, 3]}
        stem = {"input_conv_filters": [64], "input_conv_kernel_sizes": [7], "stackwise_num_strides": [1, 2, 2, 2]}
        kind = {"block_type": "bottleneck_block", "use_pre_activation": False}

        def hub():
            return keras_hub.models.ResNetBackbone(**stem, **blocks, **kind, image_shape=shape)

        found.append(("KerasHub ResNet-50 backbone", hub, lambda: kr.create_model("resnet50", include_top=False, **plain)))
    else:
        click.echo("keras_hub is not installed and left out", err=True)
    return found


def forward(model, x):
    """One pass in graph mode, as `predict` runs it."""
    return lambda: model.predict_on_batch(x)


def step(model, x):
    """One step of SGD; the loss is the mean of the squared output, the same for logits and feature maps."""
    import keras

    model.compile(keras.optimizers.SGD(1e-3), loss="mse")
    target = np.zeros((len(x), *model.output_shape[1:]), "float32") if None not in model.output_shape[1:] else None
    if target is None:
        target = np.zeros_like(model.predict_on_batch(x))
    return lambda: model.train_on_batch(x, target)


def import_seconds(code):
    """Seconds a fresh interpreter takes for some imports."""
    measure = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", measure], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure_import(rounds):
    """Median seconds that our import adds to `import keras`, pair by pair."""
    added = [import_seconds("import keras, keras_resnet") - import_seconds("import keras") for _ in range(rounds)]
    within = [import_seconds("import keras; t = time.perf_counter(); import keras_resnet") for _ in range(rounds)]
    return float(np.median(added)), float(np.median(within))


def measure_depths(rounds):
    """Milliseconds per block at each depth, the depths in turns; the fastest of the rounds, as noise only adds."""
    import keras

    import keras_resnet as kr

    config = kr.ResNetConfig.cifar
    times = {depth: [] for depth in DEPTHS}
    for _ in range(rounds):
        for depth in DEPTHS:
            keras.backend.clear_session()
            started = time.perf_counter()
            kr.create_model(config(depth, shortcut="pad"))
            times[depth].append(time.perf_counter() - started)
    return {depth: 1000 * min(seconds) / ((depth - 2) // 2) for depth, seconds in times.items()}


@click.command()
@click.option("--pairs", default=31, show_default=True, help="Turns of every comparison.")
@click.option("--size", default=224, show_default=True, help="Side of the images, in pixels.")
@click.option("--batch", default=4, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Repetitions of import and of build by depth.")
@click.option(
    "--skip",
    multiple=True,
    type=click.Choice(["import", "build", "forward", "step", "depth"]),
    help="Part to leave out; may be given several times.",
)
@click.option("--out", type=click.Path(dir_okay=False), help="Write all numbers to this JSON file.")
def zoo(pairs, size, batch, rounds, skip, out):
    """Time import, build, forward pass and training step, next to keras.applications and KerasHub."""
    figures = {"pairs": pairs, "size": size, "batch": batch}
    if "import" not in skip:
        added, within = measure_import(rounds)
        figures["import"] = {"added_s": added, "after_keras_s": within}
        verdict = "met" if within <= IMPORT_BAR else "MISSED"
        click.echo(f"import: {within:.3f} s after keras ({added:+.3f} s pair by pair)  bar {IMPORT_BAR} {verdict}")
    x = np.random.default_rng(0).standard_normal((batch, size, size, 3), "float32")
    results = []
    for name, theirs, ours in peers(size):
        if "build" not in skip:
            results.append((compare(f"build    {name}", theirs, ours, max(5, pairs // 3)), None))
            click.echo(results[-1][0].line())
        models = theirs(), ours()
        for part, run in (("forward", forward), ("step", step)):
            if part not in skip:
                results.append((compare(f"{part:8} {name}", *(run(model, x) for model in models), pairs), BAR))
                click.echo(results[-1][0].line(BAR))
    figures["comparisons"] = [{**asdict(result), "bar": bar} for result, bar in results]
    if "depth" not in skip:
        per_block = measure_depths(rounds)
        ratio = max(per_block.values()) / min(per_block.values())
        figures["depth_ms_per_block"] = per_block
        text = ", ".join(f"{depth}: {value:.2f}" for depth, value in per_block.items())
        verdict = "met" if ratio <= LINEAR_BAR else "MISSED"
        click.echo(f"build by depth, ms per block: {text}  ratio {ratio:.2f}  bar {LINEAR_BAR} {verdict}")
    if out:
        Path(out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
