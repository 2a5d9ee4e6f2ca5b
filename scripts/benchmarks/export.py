"""`scripts/benchmark.py export`: what an export costs in time and memory, and how fast its file runs, next to other exporters."""

import contextlib
import gc
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

WAYS = ("resnet_export", "keras", "torch")
MODELS = {"resnet50": "ResNet50", "resnet152": "ResNet152"}
DEPTHS = ("resnet56", "resnet110", "preresnet1001")


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
    from resnet_export import artifact
    from resnet_export.conversion.convert import convert
    from resnet_export.conversion.prepare import prepare
    from resnet_export.options import ExportOptions

    options = ExportOptions()
    converted, _ = convert(prepare(model, options).signature, options.opset)
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

        import resnet_export.exporters  # noqa: F401

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


PARTS = ("time", "depths", "latency", "openvino", "int8", "nncf", "pruned")


@click.command()
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Parts to run, comma-separated.")
@click.option(
    "--rounds", default=3, show_default=True, help="Exports with each exporter, which take turns; the medians are printed."
)
@click.option("--models", default="resnet50,resnet152", show_default=True)
@click.option("--pairs", default=31, show_default=True, help="Rounds in which the latency of the files is timed.")
@click.option("--peer-python", default=sys.executable, help="Python with torch and torchvision (extra `peers`).")
@click.option("--openvino-python", default=sys.executable, help="Python with openvino and nncf (extra `peers`).")
@click.option("--folder", type=click.Path(path_type=Path), default="benchmark-export", show_default=True)
def export(parts, rounds, models, pairs, peer_python, openvino_python, folder):
    """Measure time and peak memory of exports, and the latency of their files, next to other exporters."""
    wanted = parts.split(",")
    if unknown := set(wanted) - set(PARTS):
        raise click.UsageError(f"--parts must be among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    folder.mkdir(exist_ok=True)
    for name in models.split(","):
        files = {way: folder / f"{name}-{way}.onnx" for way in WAYS}
        if "time" in wanted:
            timed(name, files, rounds, {"torch": peer_python})
        if {"latency", "openvino", "int8", "nncf"} & set(wanted) and not files["resnet_export"].is_file():
            measured(sys.executable, "resnet_export", name, files["resnet_export"])
        if "latency" in wanted:
            latency([file for file in files.values() if file.is_file()], pairs)
        if "openvino" in wanted:
            against_openvino(files["resnet_export"], pairs, openvino_python)
        if "int8" in wanted:
            quantised(files["resnet_export"], pairs)
        if "nncf" in wanted:
            against_nncf(files["resnet_export"], pairs, openvino_python)
    if "depths" in wanted:
        scaling(folder, rounds)
    if "pruned" in wanted:
        pruned(folder, pairs)


def timed(name, files, rounds, pythons):
    """Seconds and peak memory of all ways, interleaved."""
    rows = {}
    for turn in range(rounds):
        for way in WAYS:
            row = measured(pythons.get(way, sys.executable), way, name, files[way])
            if row:
                rows.setdefault(way, []).append(row)
                click.echo(f"{name} {way} {turn + 1}/{rounds}: {row['seconds']:.2f} s", err=True)
    _show(name, rows)


def _show(name, ways):
    ours = np.median([row["seconds"] for row in ways["resnet_export"]])
    for way, found in ways.items():
        seconds, peak = (np.median([row[key] for row in found]) for key in ("seconds", "peak_bytes"))
        size = found[0]["file_bytes"]
        click.echo(f"{name:10} {way:14} {seconds:6.2f} s  ours/it {ours / seconds:5.2f}  peak {peak / size:5.1f} × the weights")


def scaling(folder, rounds):
    """Seconds by depth, and the exponent with which they grow."""
    taken = []
    for name in DEPTHS:
        found = [measured(sys.executable, "resnet_export", name, folder / "cifar.onnx") for _ in range(rounds)]
        taken.append(float(np.median([row["seconds"] for row in found if row])))
        click.echo(f"{name:14} {taken[-1]:6.2f} s")
    depths = [int(re.search(r"\d+$", name)[0]) for name in DEPTHS]
    slope = np.polyfit(np.log(depths), np.log(taken), 1)[0]
    click.echo(f"grows with exponent {slope:.2f}")


def latency(files, pairs):
    """Latency of our file, the first, against each of the others, on two threads."""
    from benchmarks.pairs import compare

    for batch in (1, 8):
        ours, *others = [_runner(file, batch) for file in files]
        for file, other in zip(files[1:], others, strict=True):
            if ours and other:
                click.echo("  " + compare(f"batch {batch}, ours / {file.stem}", other, ours, pairs).line(1.02))


def against_openvino(file, pairs, python):
    """Latency of our file in onnxruntime against the same file in OpenVINO, which computes in float32."""
    from benchmarks.pairs import compare

    for threads, bar in ((2, 1.05), (1, 1.15)):
        for batch in (1, 8):
            with _openvino(python, file, batch, threads) as other:
                if other:
                    name = f"batch {batch}, {threads} threads, onnxruntime / OpenVINO"
                    click.echo("  " + compare(name, other, _runner(file, batch, threads), pairs).line(bar))


def _runner(file, batch, threads=2):
    """A function that runs a file once; None if the file takes no such batch."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # A thread that spins after one file's run would take a core from the other's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    value = session.get_inputs()[0]
    if isinstance(value.shape[0], int) and value.shape[0] != batch:
        return None
    shape = [batch, *(size if isinstance(size, int) else 224 for size in value.shape[1:])]
    feeds = {value.name: np.random.default_rng(0).normal(size=shape).astype("float32")}
    return lambda: session.run(None, feeds)


OPENVINO = """
import sys, numpy, openvino
path, batch, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
model = openvino.Core().read_model(path)
shape = [batch, *(size.get_length() for size in list(model.input(0).partial_shape)[1:])]
model.reshape(shape)
request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
feeds = [numpy.random.default_rng(0).normal(size=shape).astype("float32")]
for _ in sys.stdin:
    request.infer(feeds)
    print("done", flush=True)
"""


@contextlib.contextmanager
def _openvino(python, file, batch, threads):
    """A function that runs a file once in a process with OpenVINO (a pipe adds some 0.05 ms); None where it is not installed."""
    command = [python, "-c", OPENVINO, str(file), str(batch), str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def once():
        process.stdin.write("go\n")
        process.stdin.flush()
        return process.stdout.readline()

    try:
        if once() == "done\n":
            yield once
        else:
            click.echo(f"OpenVINO: {process.stderr.read().strip().splitlines()[-1]}", err=True)
            yield None
    finally:
        process.kill()
        process.communicate()


def write_int8(file: Path, path: Path) -> None:
    """Write an int8 file; the weights are random, so only its speed means something.

    Args:
        file: float32 ONNX file.
        path: File to write.
    """
    import resnet_export as rx

    size = [dim.dim_value for dim in rx.artifact.read_proto(file, external_data=False).graph.input[0].type.tensor_type.shape.dim]
    images = np.random.default_rng(0).normal(size=(16, *size[1:])).astype("float32")
    rx.to_int8(file, path, calibration=images, max_drop=100, max_error=100)


INT8_BARS = {1: 3.0, 2: 2.5}


def quantised(file, pairs):
    """int8 against float32 at batch 8; the bars are for CPUs that multiply 8-bit numbers in one step (VNNI)."""
    from benchmarks.pairs import compare

    from resnet_export.quantization.int8 import has_vnni

    path = file.with_name(f"{file.stem}-int8.onnx")
    write_int8(file, path)
    vnni = has_vnni()
    click.echo(f"{file.stem} int8, CPU {'with' if vnni else 'without'} VNNI")
    for threads, bar in INT8_BARS.items():
        found = compare(
            f"batch 8, {threads} threads, int8 / float32", _runner(file, 8, threads), _runner(path, 8, threads), pairs
        )
        click.echo(f"  {found.line(1 / bar if vnni else None)}  {1 / found.ratio:.2f} × faster")


NNCF = """
import sys, numpy, nncf, openvino
source, target = sys.argv[1:]
model = openvino.Core().read_model(source)
shape = [size.get_length() for size in list(model.input(0).partial_shape)[1:]]
images = numpy.random.default_rng(0).normal(size=(16, 1, *shape)).astype("float32")
openvino.save_model(nncf.quantize(model, nncf.Dataset(list(images)), subset_size=len(images)), target, compress_to_fp16=False)
"""
NNCF_BAR = 1.05


def against_nncf(file: Path, pairs: int, python: str) -> None:
    """Latency at batch 8 of our int8 file, in onnxruntime and in OpenVINO, against NNCF's int8 of the same float32 file.

    Args:
        file: float32 ONNX file.
        pairs: Timed rounds.
        python: Python that has openvino and nncf.
    """
    from benchmarks.pairs import compare

    ours, peer = file.with_name(f"{file.stem}-int8.onnx"), file.with_name(f"{file.stem}-nncf.xml")
    if not ours.is_file():
        write_int8(file, ours)
    done = subprocess.run([python, "-c", NNCF, str(file), str(peer)], capture_output=True, text=True)
    if done.returncode:
        click.echo(f"NNCF: {done.stderr.strip().splitlines()[-1]}", err=True)
        return
    for threads in (1, 2):
        with _openvino(python, peer, 8, threads) as reference, _openvino(python, ours, 8, threads) as in_openvino:
            if not (reference and in_openvino):
                return
            for name, runner in (("onnxruntime", _runner(ours, 8, threads)), ("OpenVINO", in_openvino)):
                found = compare(f"batch 8, {threads} threads, int8 in {name} / NNCF", reference, runner, pairs)
                click.echo("  " + found.line(NNCF_BAR))


def pruned(folder, pairs):
    """VGG16 with 26 weighted layers of untouched blocks, exported with `prune_identity`, against VGG16."""
    import keras
    from benchmarks.pairs import compare

    import keras_resnet as kr
    import resnet_export as rx

    trunk = keras.applications.VGG16(weights=None, classifier_activation=None)
    deep = kr.grow(trunk, after="block*_pool", total_layers=26)
    for name, model in (("trunk", trunk), ("pruned", deep)):
        rx.to_onnx(model, folder / f"{name}.onnx", prune_identity=True if name == "pruned" else None)
    runners = [_runner(folder / f"{name}.onnx", 1) for name in ("trunk", "pruned")]
    click.echo("  " + compare("VGG16 grown and pruned / VGG16", *runners, pairs).line(1.0))


if __name__ == "__main__":
    parts()
