"""`scripts/benchmark.py scaling`: what several GPUs can be expected to give, from volumes; the volumes measured on loopback."""

import subprocess
import sys
import tempfile
from pathlib import Path

import click

LINKS = {"NVLink (300 GB/s)": 300e9, "100 Gbit/s": 12.5e9, "25 Gbit/s": 3.125e9}
MODELS = ("resnet50", "resnet152", "wide_resnet50_2")
LATENCY = 20e-6


def ring_bytes(parameters, replicas, bytes_each=4):
    """Bytes a replica sends per step in a ring all-reduce of the gradients (Patarasuk and Yuan 2009): 2 (N − 1) / N of all."""
    return 2 * (replicas - 1) / replicas * parameters * bytes_each


def efficiency(parameters, replicas, bandwidth, step, overlap, latency=LATENCY):
    """Share of the linear speed-up: step / (step + the part of the all-reduce that nothing hides).

    Args:
        parameters: trainable parameters.
        replicas: GPUs.
        bandwidth: bytes per second of the slowest link of the ring.
        step: seconds of a step on one GPU.
        overlap: share of the all-reduce that the backward pass hides.
        latency: seconds of each of the ring's 2 (N − 1) messages.
    """
    exchange = ring_bytes(parameters, replicas) / bandwidth + 2 * (replicas - 1) * latency
    return step / (step + (1 - overlap) * exchange)


def table(speeds, batch, overlap):
    """Lines of a Markdown table: efficiency on 8 and 64 GPUs by model, link and speed of one GPU."""
    import keras_resnet as kr

    lines = [
        f"| model | gradients | one GPU, images/s | efficiency on 8 / 64 GPUs, {' | '.join(LINKS)} |",
        "|---|---|---|" + "---|" * len(LINKS),
    ]
    base = kr.model_info(MODELS[0]).macs
    for name in MODELS:
        info = kr.model_info(name)
        for speed in speeds:
            own = speed * base / info.macs
            cells = [
                " / ".join(f"{100 * efficiency(info.trainable, n, bandwidth, batch / own, overlap):.0f} %" for n in (8, 64))
                for bandwidth in LINKS.values()
            ]
            lines.append(f"| {name} | {info.trainable * 4 / 1e6:.0f} MB | {own:.0f} | " + " | ".join(cells) + " |")
    return lines


def measured_bytes(workers, epochs):
    """Bytes per step and worker over loopback in a run of ResNet-20, and its trainable parameters."""
    import keras_resnet as kr

    train = Path(__file__).resolve().parents[1] / "train.py"
    info = kr.model_info("resnet20", channels=1)

    def run(count, folder):
        before = _loopback()
        options = ["--data", "digits", "--batch-size", "120", "--epochs", str(count), "--validate", "none", "--quiet"]
        command = [sys.executable, str(train), *options, "--out", folder, "--local-workers", str(workers)]
        subprocess.run(command, check=True, capture_output=True)
        return _loopback() - before

    # What starting and ending cost is in both runs, and so not in their difference.
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        steps = epochs * (1437 // 120)
        return (run(2 * epochs, a) - run(epochs, b)) / steps / workers, info.trainable


def _loopback():
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


@click.command()
@click.option(
    "--speed",
    "speeds",
    multiple=True,
    type=float,
    default=(500, 1500, 3000),
    show_default=True,
    help="Assumed speed of ResNet-50 on one GPU, in images per second.",
)
@click.option("--batch", default=256, show_default=True, help="Images per GPU.")
@click.option(
    "--overlap", default=0.0, show_default=True, help="Share of the communication that the backward pass hides, from 0 to 1."
)
@click.option(
    "--measure",
    is_flag=True,
    help="Measure the volume with two processes over the loopback interface (Linux; no other network traffic).",
)
def scaling(speeds, batch, overlap, measure):
    """Estimate the efficiency on 8 and 64 GPUs; --measure checks the assumed communication volume.

    Example: scripts/benchmark.py scaling --speed 1200
    """
    for line in table(speeds, batch, overlap):
        click.echo(line)
    if measure:
        found, parameters = measured_bytes(2, 4)
        expected = ring_bytes(parameters, 2)
        click.echo(f"two workers: {found / 1e6:.3f} MB per step and worker, the ring's volume is {expected / 1e6:.3f} MB")
        click.echo(f"ratio {found / expected:.2f}")
