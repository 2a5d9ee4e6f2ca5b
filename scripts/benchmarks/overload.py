"""`scripts/benchmark.py overload`: a family under more load than its whole network can take, with and without `--adaptive`.

Requests come at random times at a given rate, whether the server keeps up or not, and latency counts from when a request was due.
Every answer is compared with what the member that it names computes for that image.
"""

import asyncio
import csv
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import click
import numpy as np

MODES = {"fixed": (), "adaptive": ("--adaptive",)}
COLOURS = {"fixed": "#d55e00", "adaptive": "#0072b2"}
# Rows per run of the server, and rows that may wait there.
ROWS, QUEUE = 16, 256
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One request: seconds from when it was due to its answer, the member that gave it (None: refused), whether it was right."""

    seconds: float
    depth: str | None
    right: bool = False


@click.command()
@click.argument("family", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--data", required=True, type=click.Path(exists=True), help="Labelled test images, .npz, as `family --data` takes them."
)
@click.option("--loads", default="0.5,0.8,1,1.2,1.5,2,3", show_default=True, help="Offered load, as multiples of the capacity.")
@click.option("--seconds", default=5.0, show_default=True, help="Duration of each load.")
@click.option("--threads", default=1, show_default=True, help="Threads of the server's model.")
@click.option("--deadline-ms", type=float, help="Also give every request this deadline, in a third run.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="overload.png",
    show_default=True,
    help="Figure to draw; a .csv file is written next to it.",
)
def overload(family, data, loads, seconds, threads, deadline_ms, out):
    """Measure throughput, p99 and accuracy of FAMILY (family.json) under rising load, with and without --adaptive."""
    images, labels, expected = _answers(family, data, threads)
    capacity = _capacity(family, images, threads)
    click.echo(f"capacity of the whole network: {capacity:.0f} images per second in batches of {ROWS}")
    rows = []
    modes = {**MODES, **({"deadline": ()} if deadline_ms else {})}
    for mode, flags in modes.items():
        with _serving(family, threads, *flags) as url:
            for load in map(float, loads.split(",")):
                asked = _Load(url, images, labels, expected, deadline_ms if mode == "deadline" else None)
                outcomes = asyncio.run(asked.run(load * capacity, seconds))
                rows.append({"mode": mode, "load": load, "offered": round(load * capacity, 1), **_figures(outcomes, seconds)})
                click.echo("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _draw(rows, capacity, out)
    click.echo(out)


# ---------------------------------------------------------------- what is right


def _answers(family, data, threads):
    """Images, their labels, and what each member computes for them: `{depth: logits}`."""
    from resnet_export.elastic import PAIRS
    from resnet_export.family import read_family
    from resnet_export.runtime.sessions import session

    arrays = np.load(data)
    names = next(pair for pair in PAIRS if set(pair) <= set(arrays.files))
    images, labels = (arrays[name] for name in names)
    expected = {}
    for member in read_family(family).members:
        opened = session(family.parent / member.file, "cpu", threads=threads)
        images = images.astype(opened.inputs[0].dtype)
        parts = [opened.run(images[start : start + 64]) for start in range(0, len(images), 64)]
        expected[member.name] = np.concatenate([part[opened.outputs[0].name] for part in parts])
    return images, labels, expected


def _capacity(family, images, threads):
    """Images per second of the whole network without a server."""
    from resnet_export.family import read_family
    from resnet_export.runtime.sessions import session

    opened = session(family.parent / read_family(family).members[0].file, "cpu", threads=threads)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        opened.run(images[:ROWS])
        times.append(time.perf_counter() - started)
    return ROWS / float(np.median(times))


# ---------------------------------------------------------------- load


class _serving:
    """A server of the family in a process of its own; a context that gives the address of the model."""

    def __init__(self, family, threads, *flags):
        self.command = [
            sys.executable, "-m", "resnet_export", "serve", f"net={family}", "--port", "0", "--json", "--device", "cpu",
            "--threads", str(threads), "--max-batch", str(ROWS), "--queue", str(QUEUE), *flags,
        ]  # fmt: skip

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            event = json.loads(line)
            self.url = event.get("url", getattr(self, "url", None))
            if event["event"] == "ready":
                return f"{self.url}/v2/models/net/infer"
        raise SystemExit("the server does not start")

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait(60)


class _Load:
    """Requests for one image each, over connections that are kept.

    Args:
        url: Address of the model's `infer`.
        images, labels: Test images and their classes.
        expected: `{depth: logits of all images}`.
        deadline_ms: Deadline of every request, or None.
    """

    def __init__(self, url, images, labels, expected, deadline_ms):
        from resnet_export.serving import protocol

        self.address, self.labels, self.expected, self.protocol = urlsplit(url), labels, expected, protocol
        parameters = {} if deadline_ms is None else {"timeout": int(1000 * deadline_ms)}
        self.messages = [self._message(image[None], parameters) for image in images]
        self.idle = []

    def _message(self, image, parameters):
        body, length = self.protocol.encode_request({"images": image}, parameters=parameters)
        head = f"POST {self.address.path} HTTP/1.1\r\nHost: load\r\nContent-Length: {len(body)}\r\n"
        return f"{head}{self.protocol.HEADER_LENGTH}: {length}\r\n\r\n".encode() + body

    async def run(self, rate, seconds):
        random, tasks = np.random.default_rng(1), []
        due = start = time.monotonic()
        while due < start + seconds:
            due += random.exponential(1 / rate)
            await asyncio.sleep(max(0, due - time.monotonic()))
            tasks.append(asyncio.create_task(self._ask(int(random.integers(len(self.messages))), due)))
        outcomes = await asyncio.gather(*tasks)
        for _, writer in self.idle:
            writer.close()
        self.idle.clear()
        return outcomes

    async def _ask(self, number, due):
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.address.hostname, self.address.port)
        writer.write(self.messages[number])
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        body = await reader.readexactly(int(fields[b"content-length"]))
        took = time.monotonic() - due
        self.idle.append((reader, writer))
        if head.startswith(b"http/1.1 503"):
            return Outcome(took, None)
        if not head.startswith(b"http/1.1 200"):
            raise SystemExit(f"the server answered {body[:400]!r}")
        answer = self.protocol.decode_response(body, int(fields[self.protocol.HEADER_LENGTH.lower().encode()]))
        logits, depth = next(iter(answer.outputs.values()))[0], answer.parameters["depth"]
        want = self.expected[depth][number]
        if np.abs(logits - want).max() > TOLERANCE * max(1.0, np.abs(want).max()):
            raise SystemExit(f"an answer that names member {depth} is not what that member computes")
        return Outcome(took, depth, bool(logits.argmax() == self.labels[number]))


def _figures(outcomes, seconds):
    answered = [outcome for outcome in outcomes if outcome.depth is not None]
    depths = [outcome.depth for outcome in answered]
    times = [1000 * outcome.seconds for outcome in answered] or [float("nan")]
    shares = {depth: round(depths.count(depth) / max(1, len(depths)), 3) for depth in sorted(set(depths), reverse=True)}
    return {
        "answered": round(len(answered) / max(seconds, max(outcome.seconds for outcome in outcomes)), 1),
        "refused": round(1 - len(answered) / len(outcomes), 4),
        "p50": round(float(np.quantile(times, 0.5)), 2),
        "p99": round(float(np.quantile(times, 0.99)), 2),
        "accuracy": round(sum(outcome.right for outcome in answered) / max(1, len(answered)), 4),
        "right": round(sum(outcome.right for outcome in outcomes) / len(outcomes), 4),
        "depths": json.dumps(shares),
    }


# ---------------------------------------------------------------- figure


def _draw(rows, capacity, out):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 4)
    panels = (
        ("answered", "answers per second", 1, "linear"),
        ("p99", "p99 latency of answers in ms", 1, "log"),
        ("accuracy", "accuracy of the answers in percent", 100, "linear"),
        ("right", "right answers in percent of all requests", 100, "linear"),
    )
    for axis, (name, label, factor, scale) in zip(axes, panels, strict=True):
        for mode in dict.fromkeys(row["mode"] for row in rows):
            found = [row for row in rows if row["mode"] == mode]
            axis.plot(
                [row["load"] for row in found], [factor * row[name] for row in found], marker="o", markersize=4,
                color=COLOURS.get(mode, "#009e73"), label=mode,
            )  # fmt: skip
        axis.set(xlabel="offered load / capacity of the whole network", ylabel=label, yscale=scale)
        axis.axvline(1, color="#999999", lw=0.8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend()
    figure.suptitle(f"capacity {capacity:.0f} images per second; at most {QUEUE} rows wait")
    figure.savefig(out, dpi=120)
