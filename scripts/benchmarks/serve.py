"""`scripts/benchmark.py serve`: what serving costs over bare onnxruntime, measured in one run, alternatives interleaved.

Every measurement is a process of its own: the bare loop, the server, and the load, which shares the cores with the server.
Servers that are not being measured are stopped (SIGSTOP): some of them are never quite idle.
"""

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import click
import numpy as np

CLIENTS = (1, 8, 64)
BARE, SINGLE, AGAIN = "bare", "bare, batch 1", "bare again"


@click.group()
def parts():
    """The processes that `serve` starts."""


@parts.command()
@click.argument("model")
@click.argument("rows", type=int)
@click.argument("threads", type=int)
@click.argument("seconds", type=float)
def bare(model, rows, threads, seconds):
    """Images per second, and milliseconds per batch, of onnxruntime alone."""
    from resnet_export.runtime import session

    opened = session(model, "cpu", threads=threads or None)
    batch = {opened.inputs[0].name: _pixels(opened.inputs[0], rows)}
    for _ in range(3):
        opened.run(batch)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        opened.run(batch)
        times.append(time.perf_counter() - started)
    print(json.dumps({"rate": rows * len(times) / sum(times), "batch_ms": 1000 * statistics.median(times)}))


def _pixels(spec, rows):
    return np.random.default_rng(0).integers(0, 256, (rows, *spec.shape[1:])).astype(spec.dtype)


@parts.command()
@click.argument("url")
@click.argument("kind", type=click.Choice(["binary", "jpeg", "litserve"]))
@click.argument("clients", type=int)
@click.argument("seconds", type=float)
@click.option("--rate", type=float, default=0, help="Requests per second that come in any case; 0: each client waits.")
@click.option("--requests", type=int, default=0, help="Stop after so many.")
def load(url, kind, clients, seconds, rate, requests):
    """Requests per second and latencies of a server under load."""
    try:
        print(json.dumps(asyncio.run(_load(url, kind, clients, seconds, rate, requests))))
    except asyncio.IncompleteReadError as error:
        raise SystemExit("the server hung up") from error


async def _load(url, kind, clients, seconds, rate, requests):
    message = _message(url, kind)
    host, port = urlsplit(url).hostname, urlsplit(url).port
    latencies, started = [], time.perf_counter()
    state = {"left": requests or 10**9, "next": started}
    random = np.random.default_rng(1)

    async def client():
        reader, writer = await asyncio.open_connection(host, port)
        while time.perf_counter() < started + seconds and state["left"] > 0:
            state["left"] -= 1
            begin = time.perf_counter()
            if rate:
                # Latency counts from when the request was due, so that a server that stalls cannot hide it.
                begin = state["next"]
                state["next"] += random.exponential(1 / rate)
                await asyncio.sleep(max(0, begin - time.perf_counter()))
            writer.write(message)
            await _answer(reader)
            latencies.append(time.perf_counter() - begin)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    passed = time.perf_counter() - started
    shares = {name: 1000 * float(np.quantile(latencies, share)) for name, share in (("p50", 0.5), ("p99", 0.99))}
    return {"rate": len(latencies) / passed, "requests": len(latencies), **shares}


async def _answer(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    body = await reader.readexactly(length)
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"the server answered {head[:40]!r} {body[:400]!r}")


def _message(url, kind):
    base, name = url.rsplit("/", 1)
    if kind == "litserve":
        pixels = np.random.default_rng(0).bytes(224 * 224 * 3)
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        body, path, headers = part + pixels + b"\r\n--x--\r\n", "/predict", "Content-Type: multipart/form-data; boundary=x\r\n"
    elif kind == "jpeg":
        body, path, headers = _jpeg(), f"/v2/models/{name}/classify", ""
    else:
        from resnet_export.runtime import TensorInfo
        from resnet_export.serving import protocol

        entry = json.load(urlopen(f"{base}/v2/models/{name}"))["inputs"][0]
        spec = TensorInfo(entry["name"], tuple(entry["shape"]), protocol.DTYPES[entry["datatype"]].name)
        body, length = protocol.encode_request({spec.name: _pixels(spec, 1)})
        path, headers = f"/v2/models/{name}/infer", f"{protocol.HEADER_LENGTH}: {length}\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def _jpeg():
    """A photograph's worth of JPEG: 500 × 375, smooth shapes with a little noise."""
    from PIL import Image

    rows, columns = np.mgrid[:375, :500]
    waves = [np.sin(rows / a) + np.cos(columns / b) for a, b in ((31, 17), (53, 29), (11, 71))]
    image = np.stack(waves, -1) * 60 + 128 + np.random.default_rng(0).normal(0, 6, (375, 500, 3))
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype("u1")).save(file, "JPEG", quality=90)
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs: where it answers, which load it takes, and the process whose group is stopped and woken."""

    url: str
    kind: str
    process: subprocess.Popen

    @contextlib.contextmanager
    def awake(self):
        os.killpg(self.process.pid, signal.SIGCONT)
        yield self.url
        os.killpg(self.process.pid, signal.SIGSTOP)


@contextlib.contextmanager
def _started(command, **popen):
    """A process that leads a group of its own; it gets its standard output read and is ended with all it has started."""
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, start_new_session=True, **popen)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@contextlib.contextmanager
def _serving(model, name, *arguments):
    command = [sys.executable, "-m", "resnet_export", "serve", f"{name}={model}", "--port", "0", "--json", "--device", "cpu"]
    with _started([*command, *arguments]) as process:
        events = map(json.loads, process.stdout)
        url = next(event["url"] for event in events if event["event"] == "listening")
        next(event for event in events if event["event"] == "ready")
        yield Server(f"{url}/{name}", "binary", process)


@contextlib.contextmanager
def _peer(program, python, health, kind, *arguments):
    """Another server with the same session, in an environment of its own, once `health` answers."""
    with _started([python, Path(__file__).with_name(program), *arguments], stderr=subprocess.DEVNULL) as process:
        url = process.stdout.readline().strip()
        for _ in range(600):
            with contextlib.suppress(OSError):
                if urlopen(f"{url}/{health}").status == 200:
                    break
            time.sleep(0.1)
        else:
            raise SystemExit(f"{program} does not start")
        yield Server(f"{url}/net", kind, process)


def _measure(*arguments):
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def _metric(url, name):
    text = urlopen(f"{url.rsplit('/', 1)[0]}/metrics").read().decode()
    return next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option("--small", type=click.Path(exists=True), help="A small model, for the memory over 10,000 requests.")
@click.option("--threads", default=0, help="Threads of onnxruntime; 0: its own choice.")
@click.option("--max-batch", default=8, show_default=True)
@click.option("--max-delay-ms", default=5.0, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="How often every alternative is measured; 0: only the rest.")
@click.option("--seconds", default=4.0, show_default=True, help="Length of one measurement.")
@click.option("--litserve-python", default=lambda: os.environ.get("LITSERVE_PYTHON"), help="Python that has litserve.")
@click.option("--kserve-python", default=lambda: os.environ.get("KSERVE_PYTHON"), help="Python that has kserve.")
@click.option("--out", type=click.Path(), help="JSON file for all numbers, with a diagram beside it; rounds add to those in it.")
def serve(model, small, threads, max_batch, max_delay_ms, rounds, seconds, litserve_python, kserve_python, out):
    """Serving against a bare onnxruntime loop, LitServe and KServe's SDK, closed and open loop; MODEL is an ONNX file."""
    settings = {"model": Path(model).name, "threads": threads, "max_batch": max_batch, "max_delay_ms": max_delay_ms}
    figures = _begun(out, settings)
    # Servers lead groups of their own: whoever ends this process would leave them behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options = ["--max-batch", max_batch, "--max-delay-ms", max_delay_ms] + (["--threads", threads] if threads else [])
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(_serving(model, "net", *options))
        servers = {"binary": ours, "JPEG": dataclasses.replace(ours, kind="jpeg")}
        for name, python, *peer in (
            ("LitServe", litserve_python, "health", "litserve", model, max_batch, threads, max_delay_ms / 1000),
            ("KServe SDK", kserve_python, "v2/health/ready", "binary", model, threads),
        ):
            if python:
                program = f"{name.split()[0].lower()}_peer.py"
                servers[name] = stack.enter_context(_peer(program, python, *peer))
            else:
                click.echo(f"{name}: not measured, no environment is named", err=True)
        for server in servers.values():
            with server.awake():
                # What a first request sets up is not what is measured.
                _measure("load", server.url, server.kind, 8, 1)
        for number in range(rounds):
            _round(figures["runs"], servers, model, max_batch, threads, seconds)
            _kept(out, figures)
            click.echo(f"round {number + 1} of {rounds}", err=True)
        capacity = statistics.median(entry["rate"] for entry in figures["runs"]["binary 8"])
        with ours.awake() as url:
            figures["half_load"] = _measure("load", url, "binary", 32, 20, "--rate", capacity / 2)
            before = _metric(url, "nv_inference_exec_count")
            _measure("load", url, "binary", 64, 60, "--requests", 64)
            figures["executions_of_64"] = _metric(url, "nv_inference_exec_count") - before
    if small:
        figures["memory"] = _memory(small)
    _kept(out, figures)
    click.echo(_report(figures))
    if out:
        _figure(figures, Path(out).with_suffix(".png"))


def _begun(out, settings):
    """The figures in a file that an earlier piece of the same run wrote, or none yet."""
    if out and Path(out).exists():
        figures = json.loads(Path(out).read_text(encoding="utf-8"))
        if figures["settings"] != settings:
            raise click.UsageError(f"{out} holds figures of {figures['settings']}; choose another --out")
        return figures
    return {"settings": settings, "runs": {}}


def _kept(out, figures):
    if out:
        Path(out).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _round(runs, servers, model, rows, threads, seconds):
    """One measurement of everything, in turn."""

    def keep(name, *arguments):
        runs.setdefault(name, []).append(_measure(*arguments))

    keep(BARE, "bare", model, rows, threads, seconds)
    keep(SINGLE, "bare", model, 1, threads, seconds)
    for clients in CLIENTS:
        for name, server in servers.items():
            with server.awake() as url:
                keep(f"{name} {clients}", "load", url, server.kind, clients, seconds)
    keep(AGAIN, "bare", model, rows, threads, seconds)


def _memory(model):
    """Resident bytes of a server after 1,000 and after 11,000 requests."""
    with _serving(model, "small") as server:
        url = server.url
        _measure("load", url, "binary", 8, 120, "--requests", 1000)
        before = _metric(url, "process_resident_memory_bytes")
        _measure("load", url, "binary", 8, 120, "--requests", 10_000)
        return {"after_1000": before, "after_11000": _metric(url, "process_resident_memory_bytes")}


def _report(figures):
    runs, settings = figures["runs"], figures["settings"]
    width = max(map(len, runs))
    lines = ["", f"{'':{width}}  images/s   of bare   quartiles       p99 ms"]
    for name, entries in runs.items():
        rates = [entry["rate"] for entry in entries]
        # One client alone never fills a batch: what it is compared with does not either.
        bare = [entry["rate"] for entry in runs[SINGLE if name.endswith(" 1") else BARE]]
        ratios = [rate / reference for rate, reference in zip(rates, bare, strict=True)]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        p99 = statistics.median(entry.get("p99", 0) for entry in entries)
        lines.append(f"{name:{width}}  {statistics.median(rates):8.1f}   {middle:7.2f}   {low:.2f} – {high:.2f}   {p99:8.1f}")
    for name in sorted({name.rsplit(" ", 1)[0] for name in runs} & {"LitServe", "KServe SDK"}):
        for clients in CLIENTS:
            pairs = zip(runs[f"binary {clients}"], runs[f"{name} {clients}"], strict=True)
            low, middle, high = np.quantile([ours["rate"] / theirs["rate"] for ours, theirs in pairs], (0.25, 0.5, 0.75))
            lines.append(f"binary over {name}, {clients} clients: {middle:.2f} ({low:.2f} – {high:.2f})")
    half, memory = figures["half_load"], figures.get("memory")
    batch = statistics.median(entry["batch_ms"] for entry in runs[BARE])
    lines += [
        f"{len(runs[BARE])} rounds; a batch of {settings['max_batch']} takes {batch:.1f} ms",
        f"p99 at half load ({half['rate']:.1f}/s): {half['p99']:.1f} ms, bar {3 * batch + settings['max_delay_ms']:.1f} ms",
        f"64 requests at once: {figures['executions_of_64']:.0f} executions",
    ]
    if memory:
        after = [f"{memory[f'after_{count}'] / 2**20:.1f} MiB after {count}" for count in (1000, 11000)]
        lines.append(f"memory: {', '.join(after)} requests")
    return "\n".join(lines)


def _figure(figures, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    runs = figures["runs"]
    for kind in dict.fromkeys(name.rsplit(" ", 1)[0] for name in runs if name not in (BARE, SINGLE, AGAIN)):
        points = [
            [statistics.median(entry[what] for entry in runs[f"{kind} {clients}"]) for what in ("rate", "p99")]
            for clients in CLIENTS
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
        for clients, point in zip(CLIENTS, points, strict=True):
            axes.annotate(f" {clients}", point)
    axes.axvline(statistics.median(entry["rate"] for entry in runs[BARE]), color="grey", linestyle=":", label="bare loop")
    axes.set(xlabel="images per second", ylabel="p99 latency, ms", yscale="log", title="Throughput and latency; numbers: clients")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parts()
