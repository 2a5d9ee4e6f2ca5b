"""`scripts/benchmark.py gpu`: compares all the ways in which onnxruntime can run a file on a GPU, and the CPU."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

# Name -> (which file, device, settings). TensorRT's first session builds the engine, its second finds it in the cache.
WAYS = {
    "cuda": ("float32", "cuda", {"tf32": False}),
    "cuda, TF32": ("float32", "cuda", {"tf32": True}),
    "cuda, TF32, NHWC": ("float32", "cuda", {"tf32": True, "nhwc": True}),
    "cuda, TF32, heuristic search": ("float32", "cuda", {"tf32": True, "conv_search": "heuristic"}),
    "cuda, TF32, graphs": ("float32", "cuda", {"tf32": True, "graphs": True}),
    "cuda, float16": ("float16", "cuda", {}),
    "cuda, float16, NHWC": ("float16", "cuda", {"nhwc": True}),
    "cuda, float16, NHWC, graphs": ("float16", "cuda", {"nhwc": True, "graphs": True}),
    "tensorrt, float32": ("float32", "tensorrt", {}),
    "tensorrt, float16": ("float32", "tensorrt", {"fp16": True}),
    "tensorrt, float16, cached": ("float32", "tensorrt", {"fp16": True}),
    "tensorrt, float16, graphs": ("float32", "tensorrt", {"fp16": True, "graphs": True}),
    "tensorrt, int8": ("int8", "tensorrt", {"int8": True}),
}
HEAD = ("way", "batch", "ms", "p99 ms", "images/s", "opened in s", "max error")


@click.command()
@click.argument("model", default="resnet50")
@click.option("--batches", default="1,8,32,128", show_default=True, help="Batch sizes, comma-separated.")
@click.option("--runs", default=50, show_default=True, help="Timed runs per row.")
@click.option("--folder", type=click.Path(path_type=Path), help="Folder in which files and engines are kept.")
def gpu(model, batches, runs, folder):
    """Measure latency, throughput and error of MODEL (a name or .keras file) on this machine's GPU.

    Compares precisions, NHWC, CUDA graphs and TensorRT. Exits with code 4 if no GPU works.
    """
    from resnet_export.errors import ExportError

    try:
        with tempfile.TemporaryDirectory() as temporary:
            place = folder or Path(temporary)
            place.mkdir(exist_ok=True)
            files = prepared(model, place)
            for line in table(files, [int(size) for size in batches.split(",")], runs, place / "engines"):
                click.echo(line)
    except ExportError as error:
        click.echo(f"benchmark gpu: {error}", err=True)
        sys.exit(error.exit_code)


def prepared(model, folder):
    """`{precision: file}` of a model; says that there is no GPU before it builds anything.

    Raises:
        DeviceError: no GPU starts.
    """
    import resnet_export as rx
    from resnet_export.runtime.doctor import start

    if (verdict := start("cuda")) != "starts":
        raise rx.DeviceError(f"there is no GPU to measure: {verdict}")
    files = {precision: folder / f"{precision}.onnx" for precision in ("float32", "float16", "int8")}
    exported(model, files["float32"])
    rx.to_float16(files["float32"], files["float16"])
    shape = rx.session(files["float32"], "cpu").inputs[0].shape[1:]
    images = np.random.default_rng(0).uniform(0, 255, (32, *shape)).astype("float32")
    rx.to_int8(files["float32"], files["int8"], calibration=images, target="gpu", max_drop=100)
    return files


def exported(model, path):
    """Export in a process of its own: TensorFlow's CUDA and onnxruntime's do not share one.

    Raises:
        UsageError: with what the export said.
    """
    import resnet_export as rx

    command = [sys.executable, "-m", "resnet_export", "onnx", model, str(path), "--force"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"})
    if done.returncode:
        raise rx.UsageError(f"cannot export {model}: {done.stderr.strip().splitlines()[-1]}")


def table(files, batches, runs, engines):
    """The lines of the table, one by one; a way that does not start says why in its line.

    Args:
        files: `{precision: ONNX file}`.
        batches: batch sizes.
        runs: timed runs per row.
        engines: folder for TensorRT's engines.
    """
    import resnet_export as rx
    from resnet_export.runtime.benchmark import random_feeds

    yield "  ".join(f"{name:>12}" if index else f"{name:32}" for index, name in enumerate(HEAD))
    cpu = rx.session(files["float32"], "cpu")
    feeds = {size: random_feeds(cpu, size) for size in batches}
    expected = cpu.run(feeds[batches[0]])
    for name, (precision, device, settings) in {"cpu": ("float32", "cpu", {}), **WAYS}.items():
        cache = {"cache": engines} if device == "tensorrt" else {}
        fixed = {} if device == "cpu" else {"batches": batches}
        try:
            started = time.perf_counter()
            opened = rx.session(files[precision], device, **fixed, **cache, **settings)
            got = opened.run(feeds[batches[0]])
            took = time.perf_counter() - started
        except rx.ExportError as error:
            yield f"{name:32}  {error}"
            continue
        error = max(float(np.abs(got[key] - value).max() / np.abs(value).max()) for key, value in expected.items())
        for size in batches:
            p50, p99 = np.quantile(timed(opened, feeds[size], runs if device != "cpu" else 5), (0.5, 0.99))
            figures = (size, 1000 * p50, 1000 * p99, size / p50, took, error)
            shown = ("d", ".3f", ".3f", ",.0f", ".1f", ".1e")
            yield "  ".join([f"{name:32}", *(f"{format(value, form):>12}" for value, form in zip(figures, shown, strict=True))])


def timed(opened, feeds, runs):
    """Seconds of each run, copies to and from the device included, after five to warm up."""
    found = []
    for _ in range(5 + runs):
        started = time.perf_counter()
        opened.run(feeds)
        found.append(time.perf_counter() - started)
    return found[5:]
