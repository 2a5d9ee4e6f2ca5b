"""`scripts/benchmark.py serve`: what serving costs over bare onnxruntime, measured in one run, alternatives interleaved.

Everything is a process of its own: the bare loop, the servers, and the load of each, which shares the cores with its server.
All are there at the same time and take turns of a second or two, the others being stopped (SIGSTOP) meanwhile, so that a
machine that is now fast and now slow is so for all of them. Rates and latencies count the time in which a contender was awake;
a request that lasts over several turns counts in each by its share.
"""

import asyncio
import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import os
import signal
import socket
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
HALF_OF = 8  # half load is half of what so many clients get
BARE, AGAIN = "bare", "bare again"


@click.group()
def parts():
    """The processes that `serve` starts."""


def _told():
    """A list that is no longer empty when this process has been told to end what it is about and report."""
    told = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    return told


@parts.command()
@click.argument("model")
@click.argument("rows", type=int)
@click.argument("threads", type=int)
def bare(model, rows, threads):
    """onnxruntime alone, batch after batch until told to stop: when each began and ended."""
    from resnet_export.runtime.sessions import session

    opened = session(model, "cpu", threads=threads or None)
    batch = {opened.inputs[0].name: _pixels(opened.inputs[0], rows)}
    told, spans = _told(), []
    while not told:
        begin = time.monotonic()
        opened.run(batch)
        spans.append((begin, time.monotonic()))
    print(json.dumps(spans))


def _pixels(spec, rows):
    return np.random.default_rng(0).integers(0, 256, (rows, *spec.shape[1:])).astype(spec.dtype)


@parts.command()
@click.argument("url")
@click.argument("kind", type=click.Choice(["binary", "grpc", "jpeg", "json", "litserve"]))
@click.argument("clients", type=int)
@click.option("--rate", type=float, default=0, help="Requests per second that come in any case; 0: each client waits.")
@click.option("--requests", type=int, default=0, help="Number of requests to stop after; 0: stop when told.")
def load(url, kind, clients, rate, requests):
    """A server under load: when each request began and ended."""
    try:
        print(json.dumps(asyncio.run(_load(url, kind, clients, rate, requests, _told()))))
    except asyncio.IncompleteReadError as error:
        raise SystemExit("the server hung up") from error


async def _load(url, kind, clients, rate, requests, told):
    connect = _GrpcConnection.open if kind == "grpc" else _HttpConnection.open
    message = _grpc_message(url) if kind == "grpc" else _message(url, kind)
    host, port = urlsplit(url).hostname, urlsplit(url).port
    spans, state = [], {"left": requests or 10**9, "next": time.monotonic()}
    random = np.random.default_rng(1)

    async def client():
        connection = await connect(host, port)
        while not told and state["left"] > 0:
            state["left"] -= 1
            begin = time.monotonic()
            if rate:
                # Latency counts from when the request was due, so that a server that stalls cannot hide it.
                begin = state["next"]
                state["next"] += random.exponential(1 / rate)
                await asyncio.sleep(max(0, begin - time.monotonic()))
            await connection.ask(message)
            spans.append((begin, time.monotonic()))
        connection.writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return spans


@dataclasses.dataclass
class _HttpConnection:
    """HTTP/1.1 with as little work as possible, because the load shares the cores with the server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, host, port):
        return cls(*await asyncio.open_connection(host, port))

    async def ask(self, message):
        self.writer.write(message)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        body = await self.reader.readexactly(length)
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the server answered {head[:40]!r} {body[:400]!r}")


@dataclasses.dataclass
class _GrpcConnection:
    """HTTP/2 as `_HttpConnection` has HTTP/1.1: the frames of one call after the other, without a client library."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    stream: int = 1

    @classmethod
    async def open(cls, host, port):
        reader, writer = await asyncio.open_connection(host, port)
        # The server may send as much as it likes, for all streams together too.
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0) + _frame(8, 0, 0, (2**31 - 2**16).to_bytes(4, "big")))
        return cls(reader, writer)

    async def ask(self, message):
        head, chunks = message
        frames = [_frame(0, chunk is chunks[-1], self.stream, chunk) for chunk in chunks]
        self.writer.write(_frame(1, 4, self.stream, head) + b"".join(frames))
        size, ended = 0, False
        while not ended:
            header = await self.reader.readexactly(9)
            payload = await self.reader.readexactly(int.from_bytes(header[:3], "big"))
            kind, flags = header[3], header[4]
            if kind in (4, 6) and not flags & 1:
                self.writer.write(_frame(kind, 1, 0, payload if kind == 6 else b""))
            elif kind in (3, 7):
                raise SystemExit(f"the server ended the call: {payload[:400]!r}")
            size += len(payload) if kind == 0 else 0
            ended = kind in (0, 1) and flags & 1
        if not size:
            raise SystemExit(f"the server refused the call: {payload[:400]!r}")
        self.stream += 2


def _frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _grpc_message(url):
    """The header block of a call of ModelInfer, and its message in pieces as large as a frame may be."""
    import grpc

    from resnet_export.runtime.sessions import TensorInfo
    from resnet_export.serving import grpc_messages, protocol

    name, target = url.rsplit("/", 1)[1], urlsplit(url).netloc
    path = f"/{grpc_messages.TRITON_SERVICE}/ModelMetadata"
    with grpc.insecure_channel(target) as channel:
        method = grpc_messages.METHODS[path]
        found = method.response.FromString(channel.unary_unary(path)(method.request(name=name).SerializeToString())).inputs[0]
    spec = TensorInfo(found.name, tuple(found.shape), protocol.DTYPES[found.datatype].name)
    pixels = _pixels(spec, 1)
    asked = grpc_messages.ModelInferRequest(model_name=name, raw_input_contents=[pixels.tobytes()])
    asked.inputs.add(name=found.name, datatype=found.datatype, shape=pixels.shape)
    fields = {
        ":path": path.replace("Metadata", "Infer"),
        ":authority": "bench",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    # POST and http by their numbers in HPACK's table, the rest in full.
    head = b"\x83\x86" + b"".join(b"\x00%c%b%c%b" % (len(k), k.encode(), len(v), v.encode()) for k, v in fields.items())
    data = asked.SerializeToString()
    data = b"\x00" + len(data).to_bytes(4, "big") + data
    return head, [data[start : start + 16384] for start in range(0, len(data), 16384)]


def _message(url, kind):
    base, name = url.rsplit("/", 1)
    if kind == "litserve":
        pixels = np.random.default_rng(0).bytes(int(urlsplit(url).query))
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        body, path, headers = part + pixels + b"\r\n--x--\r\n", "/predict", "Content-Type: multipart/form-data; boundary=x\r\n"
    elif kind == "jpeg":
        body, path, headers = _jpeg(), f"/v2/models/{name}/classify", ""
    else:
        from resnet_export.runtime.sessions import TensorInfo
        from resnet_export.serving import protocol

        entry = json.load(urlopen(f"{base}/v2/models/{name}"))["inputs"][0]
        spec = TensorInfo(entry["name"], tuple(entry["shape"]), protocol.DTYPES[entry["datatype"]].name)
        body, length = protocol.encode_request({spec.name: _pixels(spec, 1)}, binary=kind != "json")
        path, headers = f"/v2/models/{name}/infer", "Content-Type: application/json\r\n"
        if length is not None:
            headers = f"{protocol.HEADER_LENGTH}: {length}\r\n"
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
    """A server that runs: where it answers, and which load it takes."""

    url: str
    kind: str
    processes: tuple[subprocess.Popen, ...]


@dataclasses.dataclass
class Contender:
    """Something that does work in turns: the process that reports it, all processes it takes, and when they were awake."""

    work: subprocess.Popen
    processes: list
    rows: int
    since: float = dataclasses.field(default_factory=time.monotonic)
    awake: list = dataclasses.field(default_factory=list)
    turns: list = dataclasses.field(default_factory=list)

    def wake(self):
        self.since = time.monotonic()
        _signal(self.processes, signal.SIGCONT)

    def sleep(self):
        _signal(self.processes, signal.SIGSTOP)
        self.awake.append((self.since, time.monotonic()))

    def turn(self, seconds):
        self.wake()
        time.sleep(seconds)
        self.sleep()
        self.turns.append(self.awake[-1])

    def report(self):
        """`(images per second of every turn, latencies in milliseconds)`, after letting it finish what it has begun."""
        self.wake()
        self.work.terminate()
        output = self.work.communicate(timeout=120)[0]
        self.sleep()
        if self.work.returncode:
            raise SystemExit(f"{self.work.args} failed")
        spans = json.loads(output)
        took = _overlaps(spans, self.awake).sum(1)
        shares = _overlaps(spans, self.turns) / took[:, None]
        lengths = np.diff(self.turns)[:, 0]
        return (self.rows * shares.sum(0) / lengths).tolist(), (1000 * took).tolist()


def _overlaps(spans, intervals):
    """Seconds that every span [n] has in common with every interval [m], as [n, m]."""
    spans, intervals = np.array(spans)[:, None], np.array(intervals)[None]
    return (np.minimum(spans[..., 1], intervals[..., 1]) - np.maximum(spans[..., 0], intervals[..., 0])).clip(0)


def _signal(processes, number):
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, number)


@contextlib.contextmanager
def _started(command, whole_group=True, **popen):
    """A process that leads a group of its own, which is ended with all that it has started, or by itself."""
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True, start_new_session=True, **popen)
    try:
        yield process
    finally:
        # It may be gone already, but not what it started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
        process.wait(60)


@contextlib.contextmanager
def _serving(model, name, *arguments, kind="binary"):
    command = [sys.executable, "-m", "resnet_export", "serve", f"{name}={model}", "--port", "0", "--json", "--device", "cpu"]
    with _started([*command, "--timeout", 600, *arguments]) as process:
        events = map(json.loads, process.stdout)
        listening = next(event for event in events if event["event"] == "listening")
        next(event for event in events if event["event"] == "ready")
        if "grpc" in listening:
            yield Server(f"grpc://{listening['grpc']}/{name}", "grpc", (process,))
        else:
            yield Server(f"{listening['url']}/{name}", kind, (process,))


@contextlib.contextmanager
def _peer(program, python, health, kind, *arguments):
    """Another server with the same session, in an environment of its own, once `health` answers."""
    with _started([python, Path(__file__).with_name(program), *arguments], stderr=subprocess.DEVNULL) as process:
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit(f"{program} does not start; run it by hand: {' '.join(map(str, process.args))}")
        for _ in range(600):
            with contextlib.suppress(OSError):
                if urlopen(f"{url}/{health}").status == 200:
                    break
            time.sleep(0.1)
        else:
            raise SystemExit(f"{program} does not start")
        yield Server(f"{url}/net{_query(kind, arguments[0])}", kind, (process,))


def _query(kind, model):
    """The size of one picture in bytes, which LitServe does not tell its clients."""
    if kind != "litserve":
        return ""
    from resnet_export.runtime.sessions import session

    return f"?{_pixels(session(model, 'cpu', threads=1).inputs[0], 1).nbytes}"


@contextlib.contextmanager
def _ray(python, model, *arguments):
    """This package's application on Ray Serve, with one replica. Only its load is stopped: Ray replaces what does not answer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "resnet_export", "serve", f"net={model}", "--engine", "ray", "--port", port, "--json"]
    command += ["--device", "cpu", "--timeout", 600, *arguments]
    with _started(command, whole_group=False, stderr=subprocess.DEVNULL) as process:
        events = (json.loads(line) for line in process.stdout if line.startswith("{"))
        next(event for event in events if event["event"] == "ready")
        yield Server(f"http://127.0.0.1:{port}/net", "binary", ())


def _part(*arguments):
    return [sys.executable, __file__, *arguments]


def _latencies(*arguments):
    """Requests per second and latencies of a load that ends by itself."""
    with _started(_part("load", *arguments)) as process:
        spans = np.array(json.loads(process.communicate(timeout=280)[0]))
    took = 1000 * np.diff(spans)[:, 0]
    seconds = spans[:, 1].max() - spans[:, 0].min()
    return {"rate": len(spans) / seconds, "p50": float(np.quantile(took, 0.5)), "p99": float(np.quantile(took, 0.99))}


def _metric(url, name):
    text = urlopen(f"{url.rsplit('/', 1)[0]}/metrics").read().decode()
    return next(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


@click.command()
@click.argument("model", type=click.Path(exists=True))
@click.option("--small", type=click.Path(exists=True), help="Small model whose memory is measured over 10,000 requests.")
@click.option("--threads", default=0, help="Threads of onnxruntime; 0 leaves the choice to it.")
@click.option("--max-batch", default=8, show_default=True)
@click.option("--max-delay-ms", default=5.0, show_default=True)
@click.option(
    "--clients",
    multiple=True,
    type=int,
    default=CLIENTS,
    show_default=True,
    help="Number of clients; may be given several times.",
)
@click.option("--only", multiple=True, help="Row to compare with binary requests, instead of all; may be given several times.")
@click.option("--turns", default=12, show_default=True, help="Turns of every alternative; 0 skips the comparison.")
@click.option("--seconds", default=1.5, show_default=True, help="Length of a turn, in seconds.")
@click.option("--litserve-python", default=lambda: os.environ.get("LITSERVE_PYTHON"), help="Python that has litserve.")
@click.option("--kserve-python", default=lambda: os.environ.get("KSERVE_PYTHON"), help="Python that has kserve.")
@click.option("--mlserver-python", default=lambda: os.environ.get("MLSERVER_PYTHON"), help="Python that has mlserver.")
@click.option("--ray-python", default=lambda: os.environ.get("RAY_PYTHON"), help="Python that has ray[serve].")
@click.option(
    "--out", type=click.Path(), help="JSON file for all figures, with a diagram next to it. Turns of an earlier run are kept."
)
def serve(model, small, threads, max_batch, max_delay_ms, clients, only, turns, seconds, out, **pythons):
    """Compare serving over HTTP and gRPC with a bare onnxruntime loop and with other servers; MODEL is an ONNX file.

    LitServe, KServe's SDK, MLServer and Ray Serve are measured if you name a Python interpreter that has them.
    """
    settings = {"model": Path(model).name, "threads": threads, "max_batch": max_batch, "max_delay_ms": max_delay_ms}
    figures = _begun(out, settings)
    # Servers lead groups of their own: whoever ends this process would leave them behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options = ["--max-batch", max_batch, "--max-delay-ms", max_delay_ms] + (["--threads", threads] if threads else [])
    starts = _starts(model, options, (max_batch, threads, max_delay_ms / 1000), pythons)
    if unknown := set(only) - set(starts):
        raise click.UsageError(f"there is no row {unknown.pop()!r}; choose from {', '.join(starts)}")
    for count in clients if turns else ():
        with contextlib.ExitStack() as stack:
            servers = {}
            for name, start in starts.items():
                if only and name not in ("binary", *only):
                    continue
                if start:
                    servers[name] = stack.enter_context(start())
                else:
                    click.echo(f"{name}: not measured; no environment that has it is named", err=True)
            # One client alone never fills a batch: what it is compared with does not either.
            rows = max_batch if count > 1 else 1
            _take_turns(figures["runs"], _contenders(stack, servers, model, rows, threads, count), count, turns, seconds)
            _kept(out, figures)
            click.echo(f"{count} clients: done", err=True)
    if full := figures["runs"].get(f"binary {HALF_OF}"):
        with _serving(model, "net", *options) as server:
            figures |= _at_half_load(server, statistics.mean(full["rates"]))
    if small:
        figures["memory"] = _memory(small)
    _kept(out, figures)
    click.echo(_report(figures))
    if out:
        _figure(figures, Path(out).with_suffix(".png"))


def _starts(model, options, batching, pythons):
    """How every server is started, by the name of its row; None for those that are not installed."""
    rows, threads, delay = batching
    peers = {
        "LitServe": ("health", "litserve", model, rows, threads, delay),
        "KServe SDK": ("v2/health/ready", "binary", model, threads),
        "MLServer": ("v2/health/ready", "json", model, rows, threads, delay),
    }
    started = functools.partial(_serving, model, "net", *options)
    starts = {
        "binary": started,
        "gRPC": functools.partial(started, "--grpc-port", 0) if importlib.util.find_spec("grpc") else None,
        "JPEG": functools.partial(started, kind="jpeg"),
        "2 processes": functools.partial(started, "--processes", 2) if sys.platform == "linux" else None,
    }
    for name, arguments in peers.items():
        short = name.split()[0].lower()
        python = pythons[f"{short}_python"]
        starts[name] = functools.partial(_peer, f"{short}_peer.py", python, *arguments) if python else None
    python = pythons["ray_python"]
    starts["Ray Serve"] = functools.partial(_ray, python, model, *options) if python else None
    return starts


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


def _contenders(stack, servers, model, rows, threads, clients):
    """All that take turns, by name, asleep."""

    def contender(command, rows, *processes):
        work = stack.enter_context(_started(command))
        return Contender(work, [work, *processes], rows)

    made = {name: contender(_part("bare", model, rows, threads), rows) for name in (BARE, AGAIN)}
    for name, server in servers.items():
        made[name] = contender(_part("load", server.url, server.kind, clients), 1, *server.processes)
    # What starting and first requests take is not what is measured.
    time.sleep(8)
    for entry in made.values():
        entry.sleep()
    return made


def _take_turns(runs, contenders, clients, turns, seconds):
    for number in range(turns):
        # There and back, so that nobody always comes after the same other.
        for contender in list(contenders.values())[:: 1 if number % 2 else -1]:
            contender.turn(seconds)
    for name, contender in contenders.items():
        rates, latencies = contender.report()
        kept = runs.setdefault(f"{name} {clients}", {"rates": [], "latencies": []})
        kept["rates"] += rates
        kept["latencies"] += latencies


def _memory(model):
    """Resident bytes of a server after 1,000 and after 11,000 requests."""
    with _serving(model, "small") as server:
        _latencies(server.url, "binary", 8, "--requests", 1000)
        before = _metric(server.url, "process_resident_memory_bytes")
        _latencies(server.url, "binary", 8, "--requests", 10_000)
        return {"after_1000": before, "after_11000": _metric(server.url, "process_resident_memory_bytes")}


def _at_half_load(server, capacity):
    """Latencies at half of a server's capacity, and the executions of 64 requests that come at once."""
    rate = ["--rate", capacity / 2, "--requests", round(10 * capacity)]
    latencies, before = _latencies(server.url, "binary", 32, *rate), _metric(server.url, "nv_inference_exec_count")
    _latencies(server.url, "binary", 64, "--requests", 64)
    return {"half_load": latencies, "executions_of_64": _metric(server.url, "nv_inference_exec_count") - before}


def _report(figures):
    runs, settings = figures["runs"], figures["settings"]
    names = dict.fromkeys(name.rsplit(" ", 1)[0] for name in runs)
    counts = [count for count in CLIENTS if f"{BARE} {count}" in runs]
    lines = ["", f"{'clients':8} {'':12}  images/s   of bare   quartiles     p99 ms"]
    for count in counts:
        for name in names:
            entry = runs[f"{name} {count}"]
            low, middle, high = _ratios(runs, name, BARE, count)
            p99 = np.quantile(entry["latencies"], 0.99)
            rate = statistics.mean(entry["rates"])
            lines.append(f"{count:<8} {name:12}  {rate:8.1f}   {middle:7.2f}   {low:.2f} – {high:.2f}   {p99:8.1f}")
    for name in [name for name in names if name in ("gRPC", "2 processes")]:
        for count in counts:
            low, middle, high = _ratios(runs, name, "binary", count)
            lines.append(f"{name} over binary, {count} clients: {middle:.2f} ({low:.2f} – {high:.2f})")
    for name in [name for name in names if name not in (BARE, AGAIN, "binary", "gRPC", "JPEG", "2 processes")]:
        for count in counts:
            low, middle, high = _ratios(runs, "binary", name, count)
            lines.append(f"binary over {name}, {count} clients: {middle:.2f} ({low:.2f} – {high:.2f})")
    if half := figures.get("half_load"):
        full = runs[f"{BARE} {HALF_OF}"]
        batch = statistics.median(full["latencies"])
        lines += [
            f"{len(full['rates'])} turns; a batch of {settings['max_batch']} takes {batch:.1f} ms",
            f"p99 at half load ({half['rate']:.1f}/s): {half['p99']:.1f} ms, bar {3 * batch + settings['max_delay_ms']:.1f} ms",
            f"64 requests at once: {figures['executions_of_64']:.0f} executions",
        ]
    if memory := figures.get("memory"):
        after = [f"{memory[f'after_{count}'] / 2**20:.1f} MiB after {count}" for count in (1000, 11000)]
        lines.append(f"memory: {', '.join(after)} requests")
    return "\n".join(lines)


def _ratios(runs, name, other, clients):
    """Quartiles of the ratio of two alternatives' rates, turn by turn."""
    one, two = (np.array(runs[f"{which} {clients}"]["rates"]) for which in (name, other))
    return np.quantile(one / two, (0.25, 0.5, 0.75))


def _figure(figures, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    runs = figures["runs"]
    counts = [count for count in CLIENTS if f"{BARE} {count}" in runs]
    for kind in dict.fromkeys(name.rsplit(" ", 1)[0] for name in runs if not name.startswith(BARE)):
        entries = [runs[f"{kind} {count}"] for count in counts]
        points = [(statistics.mean(entry["rates"]), np.quantile(entry["latencies"], 0.99)) for entry in entries]
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
        for count, point in zip(counts, points, strict=True):
            axes.annotate(f" {count}", point)
    axes.axvline(statistics.mean(runs[f"{BARE} 8"]["rates"]), color="grey", linestyle=":", label="bare loop")
    axes.set(xlabel="images per second", ylabel="p99 latency, ms", yscale="log", title="Throughput and latency; numbers: clients")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parts()
