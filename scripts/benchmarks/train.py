"""`scripts/benchmark.py train`: images per second of the trainer, of plain `fit` and of PyTorch; with --gpu, over all GPUs."""

import functools
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

BAR = 1.00
CASES = {
    "resnet20": {"size": 32, "batch": 128, "classes": 10},
    "cifar_speed": {"size": 32, "batch": 500, "classes": 10},
    "resnet50": {"size": 224, "batch": 8, "classes": 1000},
}
SETTINGS = {
    "batch_size": 128,
    "base_batch": 128,
    "nesterov": True,
    "schedule": "constant",
    "validate": "none",
    "weight_decay": 1e-4,
}


def batch_of(size, batch, classes):
    """Random images and one-hot labels."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (batch, size, size, 3)).astype("float32")
    return images, np.eye(classes, dtype="float32")[rng.integers(0, classes, batch)]


def endless(images, labels):
    """The same batch for ever, run like the trainer's own pipelines: what is measured is the step, not the input."""
    import tensorflow as tf

    from keras_resnet.data.pipeline import with_options

    return with_options(tf.data.Dataset.from_tensors((images, labels)).repeat())


def trainer_of(model, size, batch, steps, **changes):
    """Our trainer as `fit` drives it, one epoch of `steps` steps a call: `run(dataset)`."""
    from keras_resnet import training
    from keras_resnet.training.learner import Learner
    from keras_resnet.training.segments import segments
    from keras_resnet.training.tasks import classification

    run = training.Run.of(
        **{**SETTINGS, "batch_size": batch, "base_batch": batch, "epochs": 1_000_000, "learning_rate": 1e-3, **changes}
    )
    placement = training.place(run)
    learner = Learner(model, run, placement, classification(model, model.output_shape[-1]), 1e-3)
    learner.enter(segments(run)[0])

    def run_steps(dataset):
        iterator = iter(placement.distribute(dataset))
        learner.steps.reset()
        for _ in range(steps):
            float(learner.steps.train(iterator)["loss"])

    return run_steps


def steps_of(model, size, batch):
    """One step of our trainer on images that are there already."""
    images, labels = batch_of(size, batch, model.output_shape[-1])
    run, dataset = trainer_of(model, size, batch, 1), endless(images, labels)
    return lambda: run(dataset)


def plain_fit(model, images, labels, steps):
    """Keras' own `fit` with the same optimiser and loss."""
    import keras

    model.compile(
        keras.optimizers.SGD(1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    dataset = endless(images, labels)
    return lambda: model.fit(dataset, steps_per_epoch=steps, epochs=1, verbose=0)


def where_time_goes(model, images, labels):
    """Seconds of a step's parts, by difference: forward, backward, the rest (update, metrics)."""
    import keras
    import tensorflow as tf

    loss = keras.losses.CategoricalCrossentropy(from_logits=True)

    @tf.function
    def forward():
        return loss(labels, model(images, training=True))

    @tf.function
    def gradients():
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        return tape.gradient(value, model.trainable_variables)

    return _seconds(forward), _seconds(gradients)


def _seconds(call, rounds=7):
    call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


TORCH = """
import json, sys, time, torch, torchvision
name, size, batch, classes, steps, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model = getattr(torchvision.models, name)(num_classes=classes).train()
optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4)
x, y = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last), torch.randint(0, classes, (batch,))
model = model.to(memory_format=torch.channels_last)
def step():
    optimizer.zero_grad(); torch.nn.functional.cross_entropy(model(x), y).backward(); optimizer.step()
step()
started = time.perf_counter()
for _ in range(steps): step()
print(json.dumps(steps * batch / (time.perf_counter() - started)))
"""


def torch_speed(python, name, size, batch, classes, steps, threads):
    """Images per second of torchvision's model in a process of its own, or None."""
    arguments = [python, "-c", TORCH, name, *map(str, (size, batch, classes, steps, threads))]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        click.echo(f"torchvision cannot be measured ({done.stderr.strip().splitlines()[-1]})", err=True)
        return None
    return json.loads(done.stdout)


@click.command()
@click.option("--pairs", default=31, show_default=True, help="Turns of every comparison.")
@click.option("--steps", default=4, show_default=True, help="Training steps per turn.")
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(list(CASES)),
    help="Measure only this model; may be given several times.",
)
@click.option("--torch-python", help="Python interpreter with torchvision; by default this one, if it has it.")
@click.option(
    "--precision",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "mixed_bfloat16"]),
    help="Dtype policy of all models, on CPUs.",
)
@click.option("--fused-norm", is_flag=True, help="Train with --fused-norm, which plain `fit` does not have.")
@click.option(
    "--gpu",
    is_flag=True,
    help="Measure MirroredStrategy over all GPUs instead: precision, XLA, and the share of time spent waiting for input.",
)
@click.option("--out", type=click.Path(dir_okay=False), help="Write all numbers to this JSON file.")
def train(pairs, steps, models, torch_python, precision, fused_norm, gpu, out):
    """Compare training steps of this trainer, of plain Keras and of PyTorch.

    \b
    Examples:
      scripts/benchmark.py train --pairs 31
      taskset -c 1 scripts/benchmark.py train --model cifar_speed --precision mixed_bfloat16 --fused-norm
    """
    if gpu:
        figures = measure_gpus(steps * 8)
    else:
        figures = measure_cpu(models or list(CASES), pairs, steps, torch_python, precision, fused_norm)
    if out:
        Path(out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measure_cpu(models, pairs, steps, torch_python, precision="float32", fused_norm=False):
    """Ratios against plain `fit`, and where a step's time goes."""
    import os

    import keras

    import keras_resnet as kr
    from keras_resnet.zoo.counting import count_macs

    keras.config.set_dtype_policy(precision)
    figures = {"pairs": pairs, "steps": steps, "precision": precision, "fused_norm": fused_norm, "cases": {}}
    if torch_python is None and importlib.util.find_spec("torchvision"):
        torch_python = sys.executable
    for name in models:
        size, batch, classes = (CASES[name][key] for key in ("size", "batch", "classes"))
        images, labels = batch_of(size, batch, classes)
        shape = (size, size, 3)
        own = kr.create_model(name, weights=None, input_shape=shape)
        run, dataset = trainer_of(own, size, batch, steps, fused_norm=fused_norm), endless(images, labels)
        peers = {"plain fit, same model": kr.create_model(name, weights=None, input_shape=shape)}
        if name == "resnet50":
            peers["plain fit, keras.applications"] = keras.applications.ResNet50(
                weights=None, input_shape=shape, classifier_activation=None
            )
        found = figures["cases"].setdefault(name, {})
        ours = functools.partial(run, dataset)
        for peer, model in peers.items():
            result = compare(f"{name}: {peer}", plain_fit(model, images, labels, steps), ours, pairs)
            click.echo(result.line(BAR))
            found[peer] = {**asdict(result), "images_per_second": steps * batch / result.candidate}
        speed = steps * batch / result.candidate
        # Forward and backward pass: three times the multiply-adds, two operations each.
        found["gflops"] = 6 * count_macs(own) * speed / 1e9
        click.echo(f"{name}: {speed:.0f} images/s, {found['gflops']:.0f} GFLOP/s")
        if torch_python and name == "resnet50":
            speed = torch_speed(torch_python, name, size, batch, classes, steps * 2, os.cpu_count())
            if speed:
                found["torchvision_images_per_second"] = speed
                click.echo(f"{name}: torchvision {speed:.1f} images/s, ours is {steps * batch / result.candidate / speed:.2f} ×")
        forward, gradients = where_time_goes(own, images, labels)
        whole = result.candidate / steps
        shares = {"forward": forward / whole, "backward": (gradients - forward) / whole, "update": 1 - gradients / whole}
        found["shares"] = shares
        click.echo(f"{name}: of a step " + ", ".join(f"{key} {100 * value:.0f} %" for key, value in shares.items()))
    return figures


def measure_gpus(steps):
    """Images per second of ResNet-50 over 1 … all GPUs, by precision and XLA, with and without the input pipeline."""
    import keras
    import tensorflow as tf

    import keras_resnet as kr
    from keras_resnet import data

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        click.echo("Error: TensorFlow sees no GPU; install the extra [train-gpu] on a machine that has one", err=True)
        sys.exit(4)
    rows, size, per_gpu = [], 224, 128
    images = np.random.default_rng(0).integers(0, 256, (2048, 256, 256, 3)).astype("uint8")
    split = data.Images(images, np.arange(2048) % 1000)
    click.echo(f"{'GPUs':>4} {'precision':14} {'XLA':5} {'images/s':>9} {'with input':>11} {'held back':>10}")
    for count in sorted({1, *(2**k for k in range(1, 8) if 2**k <= len(gpus)), len(gpus)}):
        for precision in ("float32", "mixed_bfloat16", "mixed_float16"):
            for jit in (False, True):
                keras.backend.clear_session()
                keras.config.set_dtype_policy(precision)
                batch = per_gpu * count
                devices = tuple(f"GPU:{i}" for i in range(count))
                model = kr.create_model("resnet50", weights=None)
                run = trainer_of(model, size, batch, steps, jit=jit, precision=precision, devices=devices)
                still = endless(*batch_of(size, per_gpu, 1000))
                crops = data.Augmentation(random_area=0.08, flip=True)
                fed = data.training_batches(
                    split, batch=batch, size=(size, size), num_classes=1000, augmentation=crops, replicas=count
                )
                speeds = []
                for dataset in (still, fed):
                    run(dataset)
                    started = time.perf_counter()
                    run(dataset)
                    speeds.append(steps * batch / (time.perf_counter() - started))
                held = max(0.0, 1 - speeds[1] / speeds[0])
                rows.append(
                    {"gpus": count, "precision": precision, "xla": jit, "images_per_second": speeds[0], "with_input": speeds[1]}
                )
                click.echo(f"{count:4} {precision:14} {jit!s:5} {speeds[0]:9.0f} {speeds[1]:11.0f} {100 * held:9.0f} %")
    return {"gpus": [gpu.name for gpu in gpus], "rows": rows}
