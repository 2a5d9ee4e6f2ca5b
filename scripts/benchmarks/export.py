"""`scripts/benchmark.py export`: what an export costs in time and memory, and what its file is worth, beside other exporters."""

import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

WAYS = ("resnet_export", "keras", "torch")
MODELS = {"resnet50": "ResNet50", "resnet152": "ResNet152"}
DEPTHS = (56, 110, 1202)


def build(name):
    """A model of keras.applications (`MODELS`) or else of the zoo, with random statistics and biases."""
    import keras

    import keras_resnet as kr

    keras.utils.set_random_seed(0)
    if name in MODELS:
        model = getattr(keras.applications, MODELS[name])(weights=None, classifier_activation=None)
    else:
        model = kr.create_model(name)
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.name in ("bias", "beta", "moving_mean"):
            variable.assign(rng.normal(0, 0.1, variable.shape))
        elif variable.name in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def _ours(model, path):
    from resnet_export import artifact, convert

    interface, _ = convert.prepared(model, {})
    converted, _ = convert.convert(interface)
    artifact.write_onnx(converted, path)


def _keras(model, path):
    model.export(path, format="onnx", verbose=False)


def _torch(model, path):
    import torch

    batch = torch.export.Dim("batch")
    pixels = torch.zeros(2, 3, 224, 224)
    torch.onnx.export(model, (pixels,), path, dynamo=True, verbose=False, dynamic_shapes=({0: batch},), external_data=False)


@click.group()
def parts():
    """The process that `export` starts for each measurement."""


@parts.command()
@click.argument("way", type=click.Choice(WAYS))
@click.argument("name")
@click.argument("path")
def once(way, name, path):
    """Seconds and peak memory of one export from a built model to a file, verification excluded; imports are not counted."""
    if way == "torch":
        import onnxscript  # noqa: F401  # the first export would count its import
        import torchvision

        model, run = getattr(torchvision.models, name)().eval(), _torch
    else:
        import onnxruntime  # noqa: F401
        import tf2onnx  # noqa: F401

        from resnet_export import convert  # noqa: F401

        model, run = build(name), _ours if way == "resnet_export" else _keras
        model(np.zeros((1, *model.inputs[0].shape[1:]), "float32"))
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    run(model, path)
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": grown, "file_bytes": os.path.getsize(path)}))


def measured(python, way, name, path):
    """One export in a process of its own, or None where the way's library is not installed."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run([python, __file__, "once", way, name, str(path)], capture_output=True, text=True, env=environment)
    if done.returncode:
        click.echo(f"{way} {name}: {done.stderr.strip().splitlines()[-1]}", err=True)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Exports per way, interleaved; medians are printed.")
@click.option("--models", default="resnet50,resnet152", show_default=True)
@click.option("--depths/--no-depths", default=True, show_default=True, help="CIFAR ResNets of growing depth too.")
@click.option("--pairs", default=31, show_default=True, help="Timed rounds of the files' latency.")
@click.option("--peer-python", default=sys.executable, help="Python of the environment with the `peers` extra.")
@click.option("--folder", type=click.Path(path_type=Path), default="benchmark-export", show_default=True)
def export(rounds, models, depths, pairs, peer_python, folder):
    """Time and peak memory of exports, and latency of the files, side by side."""
    folder.mkdir(exist_ok=True)
    pythons = {"resnet_export": sys.executable, "keras": sys.executable, "torch": peer_python}
    rows = {}
    for name in models.split(","):
        for turn in range(rounds):
            for way in WAYS:
                row = measured(pythons[way], way, name, folder / f"{name}-{way}.onnx")
                if row:
                    rows.setdefault((name, way), []).append(row)
                    click.echo(f"{name} {way} {turn + 1}/{rounds}: {row['seconds']:.2f} s", err=True)
        _show(name, {way: rows[name, way] for way in WAYS if (name, way) in rows})
        latency([folder / f"{name}-{way}.onnx" for way in WAYS if (name, way) in rows], pairs)
    if depths:
        scaling(folder, rounds)


def _show(name, ways):
    ours = np.median([row["seconds"] for row in ways["resnet_export"]])
    for way, found in ways.items():
        seconds, peak = (np.median([row[key] for row in found]) for key in ("seconds", "peak_bytes"))
        size = found[0]["file_bytes"]
        click.echo(f"{name:10} {way:14} {seconds:6.2f} s  ours/it {ours / seconds:5.2f}  peak {peak / size:5.1f} × the weights")


def scaling(folder, rounds):
    """Seconds by depth, and the exponent with which they grow."""
    taken = []
    for depth in DEPTHS:
        found = [measured(sys.executable, "resnet_export", f"resnet{depth}", folder / "cifar.onnx") for _ in range(rounds)]
        taken.append(float(np.median([row["seconds"] for row in found if row])))
        click.echo(f"depth {depth:5} {taken[-1]:6.2f} s")
    slope = np.polyfit(np.log(DEPTHS), np.log(taken), 1)[0]
    click.echo(f"grows with exponent {slope:.2f}")


def latency(files, pairs):
    """Latency of our file, the first, against each of the others."""
    from benchmarks.pairs import compare

    for batch in (1, 8):
        ours, *others = [_runner(file, batch) for file in files]
        for file, other in zip(files[1:], others, strict=True):
            if ours and other:
                click.echo("  " + compare(f"batch {batch}, ours / {file.stem}", other, ours, pairs).line(1.02))


def _runner(file, batch):
    """A function that runs a file once on two threads; None if the file takes no such batch."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    # A thread that spins after one file's run would take a core from the other's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    value = session.get_inputs()[0]
    if isinstance(value.shape[0], int) and value.shape[0] != batch:
        return None
    shape = [batch, *(size if isinstance(size, int) else 224 for size in value.shape[1:])]
    feeds = {value.name: np.random.default_rng(0).normal(size=shape).astype("float32")}
    return lambda: session.run(None, feeds)


if __name__ == "__main__":
    parts()
