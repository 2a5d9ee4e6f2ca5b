"""The command line of serving: parse, call one function, print. What these commands need is imported when they run."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import DeviceError, UsageError
from ..options import KINDS

MIB = 2**20
DELAY_HELP = "Maximum time a request may wait for others to join its batch, in milliseconds."


def register(group: click.Group) -> None:
    """Add the commands of this module to a click group."""
    for command in (serve, triton, tf_serving):
        group.add_command(command)


def _tell(as_json, event, text, **details):
    """Print an event; a reader that is gone or a full disk does not stop the server."""
    with contextlib.suppress(OSError):
        click.echo(json.dumps({"event": event, **details}) if as_json else text)


@contextlib.contextmanager
def _output_is_optional():
    """Drop what standard output and error still hold when they cannot be written: Python would end with exit code 120."""
    try:
        yield
    finally:
        # A stream that was closed before the start is None.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                with open(os.devnull, "wb") as null:
                    os.dup2(null.fileno(), stream.fileno())


@contextlib.contextmanager
def _needs_extra(extra):
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith(("resnet_export", "export")):
            raise
        raise DeviceError(f"{error.name} is not installed; pip install 'keras-resnet-export[{extra}]'") from error


def _options(*options):
    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _number(kind, name, default, text):
    above_zero = click.IntRange(min=1) if kind is int else click.FloatRange(min=0, min_open=True)
    return click.option(name, type=above_zero, default=default, show_default=default is not None, help=text)


def scores_options(function: Callable) -> Callable:
    """Add the options that say what the outputs of a file from another exporter mean."""
    name = click.option("--scores", metavar="NAME", help="Output that scores the classes, if the file does not say so.")
    kind = click.option("--output-kind", type=click.Choice(KINDS), help="Meaning of that output, if the file does not say so.")
    return name(kind(function))


model_options = _options(
    click.option("--device", default="auto", show_default=True, help="Device to run on: auto, cpu, cuda, tensorrt or openvino."),
    _number(int, "--threads", None, "Threads of onnxruntime for one batch; by default its own choice."),
    _number(int, "--max-batch", 16, "Maximum number of rows in a batch."),
    click.option("--max-delay-ms", type=click.FloatRange(0, 60_000), default=5.0, show_default=True, help=DELAY_HELP),
    _number(int, "--queue", 1024, "Maximum number of waiting rows; further requests get status 503."),
    _number(int, "--instances", 1, "Batches that run at the same time; several GPUs share them."),
    _number(int, "--max-rows", 256, "Maximum number of rows in a request."),
    _number(int, "--max-pixels", 64_000_000, "Maximum number of pixels of an image."),
    _number(int, "--max-open-pixels", 2**22, "Maximum number of pixels at which a model of dynamic size runs."),
    _number(float, "--timeout", 60.0, "Maximum time a request may wait and run, in seconds."),
    click.option(
        "--warm-up/--no-warm-up", default=True, show_default=True, help="Run every batch size once before the server is ready."
    ),
    click.option(
        "--adaptive",
        is_flag=True,
        help="For a family: use one member shallower for each full batch that is waiting, before requests are refused.",
    ),
    scores_options,
)
app_options = _options(
    _number(int, "--max-body-mb", 64, "Maximum size of a request, in MiB."),
    _number(int, "--max-json-mb", 64, "Maximum size of the JSON in a request or answer, in MiB; larger tensors must be binary."),
    _number(int, "--max-buffered-mb", 1024, "Maximum memory for all requests and answers together, in MiB."),
    _number(
        float,
        "--body-timeout",
        30.0,
        "Time in which a request must arrive, and in which the client must read the answer, in seconds.",
    ),
    click.option("--allow-control", is_flag=True, help="Allow clients to load and unload models."),
    click.option(
        "--api-key-file",
        type=click.Path(),
        help="File with one API key per line. Requests then need `Authorization: Bearer KEY`.",
    ),
)
server_options = _options(
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all interfaces."),
    click.option(
        "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on; 0 chooses a free one."
    ),
    click.option(
        "--grpc-port", type=click.IntRange(0, 65535), help="Also serve gRPC on this port; 0 chooses a free one. Off by default."
    ),
    _number(
        int,
        "--processes",
        1,
        "Number of server processes that share the port, each with its own models, queue and limits (Linux only). Process k "
        "serves its metrics on port --metrics-port + k.",
    ),
    _number(float, "--grace", 60.0, "Maximum time a shutdown waits for requests in flight, in seconds."),
    _number(
        int,
        "--max-connections-per-address",
        None,
        "Maximum number of connections from one address; by default half of the open files that are allowed.",
    ),
    click.option("--uds", type=click.Path(), help="Unix socket to listen on instead of --host and --port."),
    click.option("--root-path", default="", metavar="PATH", help="Path under which a proxy serves this server, e.g. /models."),
    click.option("--metrics-port", type=click.IntRange(0, 65535), help="Serve /metrics on this port only, without a key."),
    click.option(
        "--shutdown-delay",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="Time after SIGTERM in which the server still accepts requests, but reports that it is not ready, in seconds.",
    ),
    click.option("--access-log", is_flag=True, help="Log every request to standard error."),
    click.option("--ssl-certfile", type=click.Path(), help="File with the TLS certificate."),
    click.option("--ssl-keyfile", type=click.Path(), help="File with the key of the TLS certificate."),
)
# Of these only `--engine ray` knows what to do.
CLUSTER_DEFAULTS = {"min_replicas": 1, "max_replicas": 1, "gpus_per_replica": 0.0, "address": None}
cluster_options = _options(
    click.option(
        "--engine",
        type=click.Choice(["uvicorn", "ray"]),
        default="uvicorn",
        show_default=True,
        help="Serve here, or on a Ray cluster.",
    ),
    _number(int, "--min-replicas", 1, "With --engine ray: minimum number of replicas."),
    _number(int, "--max-replicas", 1, "With --engine ray: maximum number of replicas, under load."),
    click.option(
        "--gpus-per-replica",
        type=click.FloatRange(0),
        default=0.0,
        help="With --engine ray: GPUs per replica; may be a fraction.",
    ),
    click.option(
        "--address",
        help="With --engine ray: address of a running cluster (auto, or ray://HOST:PORT); by default a local one is started.",
    ),
    click.option(
        "--write-config", type=click.Path(), help="With --engine ray: write the YAML file for `serve deploy` instead of serving."
    ),
    click.option("--force", is_flag=True, help="With --write-config: overwrite the file."),
)
common_options = _options(
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
)


batch_prediction_options = _options(
    click.option("--url", help="Address of a server to use instead of a FILE."),
    click.option("--model", help="With --url: name of the model, if the server has several."),
    _number(int, "--concurrency", 8, "With --url: number of requests at the same time."),
    click.option("--api-key-file", type=click.Path(), help="With --url: file with the API key to send; of several, the first."),
    click.option("-o", "--out", help="Write a .csv, .parquet or .jsonl file with a row per image, in order; errors become rows."),
    click.option("--resume", is_flag=True, help="With --out: resume an interrupted run."),
    click.option("--force", is_flag=True, help="With --out: overwrite the file, and restart an interrupted run."),
    _number(int, "--batch", 16, "Number of images per batch."),
    click.option(
        "--engine", type=click.Choice(["local", "ray"]), default="local", help="Run here, or on workers of a Ray cluster."
    ),
    _number(int, "--workers", 1, "With --engine ray: number of workers, each with one core or --gpus-per-worker."),
    click.option(
        "--gpus-per-worker", type=click.FloatRange(0), default=0.0, help="With --engine ray: GPUs per worker; may be a fraction."
    ),
    click.option("--address", help="With --engine ray: address of a running cluster (auto, or ray://HOST:PORT)."),
)


def is_batch_prediction(images: Sequence[str], url: str | None, out: str | None, engine: str) -> bool:
    """Return whether `predict` streams: to a file, through a server, on a cluster, or from a folder, a list or a table."""
    collections = (name for name in images if os.path.isdir(name) or name.endswith((".txt", ".parquet")))
    return bool(url or out) or engine == "ray" or any(collections)


def predict_batches(file: str | None, images: Sequence[str], out: str | None, as_json: bool, **options: Any) -> int | None:
    """`predict` for folders, lists (.txt), tables (.parquet), servers (`--url`) and output files (`--out`)."""
    from .. import console as report
    from . import bulk

    items = bulk.read_items(images)
    if options["url"]:
        classifier = _remote(options)
    else:
        classifier = (_pool if options["engine"] == "ray" else _local)(file, options)
    if not out:
        return _print_rows(classifier.rows(items), as_json)
    with report.steps(as_json) as tell:
        done = [0, 0]

        def count(rows: list[dict[str, Any]]) -> None:
            done[0] += len(rows)
            done[1] += sum(row["error"] is not None for row in rows)
            tell(f"{done[0]:,} images, {done[1]:,} errors")

        found = bulk.run(items, classifier, out, resume=options["resume"], overwrite=options["force"], on_rows=count)
    report.show(found, f"{found['images']:,} images, {found['errors']:,} errors: {found['file']}", as_json)
    return None


def _declared(options):
    return {name: options[name] for name in ("scores", "output_kind")}


def _local(file, options):
    from .bulk import LocalClassifier

    return LocalClassifier(file, options["device"], options["top"], options["batch"], **_declared(options))


def _pool(file, options):
    with _needs_extra("cluster"):
        from .raydata import PoolOptions, RayClassifier
    pool = PoolOptions(
        workers=options["workers"],
        gpus=options["gpus_per_worker"],
        address=options["address"],
        batch=options["batch"],
        **_declared(options),
    )
    return RayClassifier(file, options["device"], options["top"], pool)


def _remote(options):
    with _needs_extra("client"):
        from .client import RemoteClassifier, RemoteOptions
    key = read_keys(options["api_key_file"])[0] if options["api_key_file"] else None
    remote = RemoteOptions(options["top"], options["concurrency"], api_key=key, **_declared(options))
    return RemoteClassifier(options["url"], options["model"], remote)


def _print_rows(rows, as_json):
    """Print a JSON line or the best class of every image as it comes; 2 if any could not be classified."""
    failed = has_values = False
    for row in rows:
        failed |= row["error"] is not None
        has_values |= "values" in row
        if as_json:
            click.echo(json.dumps(row))
        elif row["error"]:
            click.echo(f"{row['file']}: {row['error']}", err=True)
        elif "values" in row:
            click.echo(f"{row['file']}  {json.dumps(row['values'])}")
        else:
            best = zip(row["classes"], row["labels"], row["probabilities"], strict=True)
            click.echo(f"{row['file']}  " + "  ".join(f"{label or index} {share:.4f}" for index, label, share in best))
    if has_values and not as_json:
        from ..console import VALUES_HINT

        click.echo(VALUES_HINT, err=True)
    return 2 if failed else 0


@click.command()
@click.argument("files", nargs=-1, metavar="[NAME=]FILE...")
@click.option("--repository", type=click.Path(), help="Folder of models: NAME/VERSION/model.onnx or NAME.onnx.")
@server_options
@model_options
@app_options
@cluster_options
@common_options
@_output_is_optional()
def serve(
    files: tuple[str, ...],
    repository: str | None,
    engine: str,
    write_config: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> int | None:
    """Serve ONNX models over HTTP and gRPC.

    The server implements the Open Inference Protocol v2 of KServe and Triton. It has a web page at / and classifies image files
    that are posted to /v2/models/NAME/classify. If a NAME is given several times, the files are versions 1, 2, … of that
    model. A family.json of `resnet-export family` is one model of which each request chooses the depth.

    \b
    Example:
      resnet-export serve resnet50.onnx small=resnet20.onnx --port 8000
    """
    tell = functools.partial(_tell, as_json)
    if force and not write_config:
        raise UsageError("--force needs --write-config")
    if engine == "ray" or write_config:
        return _serve_on_ray(files, repository, write_config, force, tell, options)
    if wrong := [name for name in CLUSTER_DEFAULTS if options[name] != CLUSTER_DEFAULTS[name]]:
        raise UsageError(f"--{wrong[0].replace('_', '-')} needs --engine ray")
    return _serve_here(files, repository, tell, options, as_json)


def _serve_here(files, repository, tell, options, as_json):
    """Serve on this machine, in one process or several; returns the exit code."""
    if options["processes"] > 1:
        ended_by = _serve_in_processes(files, repository, tell, options, as_json)
    else:
        ended_by = _serve_in_process(files, repository, tell, options, as_json)
        tell("stopped", "stopped")
    # Ctrl-C is an interruption; SIGTERM is how a server is meant to be stopped.
    return 130 if ended_by == signal.SIGINT else 0


def _serve_in_process(files, repository, tell, options, as_json, reuse_port=False):
    """Serve in this process until a signal comes; returns the signal."""
    with _needs_extra("serve"):
        from . import server
        from .app import create_app, metrics_app
    from .repository import Repository, parse_sources

    tls = _tls(options["ssl_certfile"], options["ssl_keyfile"])
    listen = server.ServerOptions(
        host=options["host"],
        port=options["port"],
        grace=options["grace"],
        head_timeout=options["body_timeout"],
        max_connections_per_address=options["max_connections_per_address"],
        shutdown_delay=options["shutdown_delay"],
        uds=options["uds"],
        reuse_port=reuse_port,
        access_log=options["access_log"],
        tls=tls,
    )
    models = Repository(parse_sources(files), repository, _model_options(options))
    metrics_port = options["metrics_port"]
    app = create_app(
        models,
        _app_options(options),
        version(),
        on_ready=lambda: tell("ready", "ready"),
        root_path=options["root_path"],
        with_metrics=metrics_port is None and not reuse_port,
    )
    service, config = app.state.service, server.configure(app, listen)
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(server.bind(listen))
        grpc = _with_grpc(app, listen, options["grpc_port"]) if options["grpc_port"] is not None else None
        metrics, details = None, {"grpc": grpc.target} if grpc else {}
        if metrics_port is not None:
            side = stack.enter_context(server.bind(server.ServerOptions(options["host"], metrics_port), "--metrics-port"))
            metrics, details["metrics_url"] = (metrics_app(service), side), server.url_of(side) + "/metrics"
        server.log_to_stderr(listen.access_log, as_json)
        models.open()
        url = server.url_of(bound, bool(tls))
        names = ", ".join(f"{entry['name']}/{entry['version']}" for entry in models.index())
        shown = f"{url} and, for gRPC, {grpc.target}" if grpc else url
        tell("listening", f"serving {names} on {shown}", url=url, models=models.index(), **details)

        def reload():
            service.keys.replace(_keys(options))
            if grpc:
                grpc.reload_certificate()

        hooks = server.Hooks(service.drain, reload, listen.shutdown_delay)
        ended_by = server.run(config, bound, hooks, metrics, companions=[grpc] if grpc else ())
    if grpc and grpc.failure:
        raise grpc.failure
    return ended_by


def _serve_in_processes(files, repository, tell, options, as_json):
    """Serve in several processes on the same ports until a signal comes; returns the signal."""
    with _needs_extra("serve"):
        from . import processes, server
    processes.check_platform()
    if wrong := [name for name in ("uds", "allow_control") if options[name]]:
        raise UsageError(
            f"--{wrong[0].replace('_', '-')} cannot be combined with --processes, because it would reach one process only"
        )
    if options["metrics_port"] == 0:
        raise UsageError("--metrics-port 0 cannot be combined with --processes, which use consecutive ports for their metrics")
    count, ports = options["processes"], {}
    options = options | {"threads": options["threads"] or max(1, (os.cpu_count() or 1) // count)}
    server.log_to_stderr(options["access_log"], as_json)
    with contextlib.ExitStack() as held:
        for name in ("port", "grpc_port"):
            if options[name] is not None:
                flag = f"--{name.replace('_', '-')}"
                ports[name] = held.enter_context(processes.reserved_port(options["host"], options[name], flag))
        serve_one = functools.partial(_serve_as_one_of, files, repository, options | ports, as_json)
        return processes.Supervisor(serve_one, count, tell).run()


def _serve_as_one_of(files, repository, options, as_json, index, tell):
    """Serve as one of several processes, whose metrics have ports that follow each other."""
    if options["metrics_port"]:
        options = options | {"metrics_port": options["metrics_port"] + index}
    return _serve_in_process(files, repository, tell, options, as_json, reuse_port=True)


def _with_grpc(app, listen, port):
    """The gRPC server, which starts and stops with the application."""
    import dataclasses

    from . import server

    with _needs_extra("grpc"):
        from . import grpc_server
    if port and port == listen.port:
        raise UsageError(f"--port and --grpc-port are both {port}; choose two ports")
    # Said before anything starts: that the port is taken, or which one is free.
    with server.bind(dataclasses.replace(listen, port=port, uds=None), "--grpc-port") as bound:
        port = bound.getsockname()[1]
    tls, files = dict(listen.tls), server.allow_connections()
    options = grpc_server.GrpcOptions(
        host=listen.host,
        port=port,
        grace=listen.grace,
        max_connections=files // 2 if files else None,
        certificate=tls.get("ssl_certfile"),
        key=tls.get("ssl_keyfile"),
        reuse_port=listen.reuse_port,
    )
    made = grpc_server.GrpcServer(app.state.service, options)
    grpc_server.attach(app, made)
    return made


def _serve_on_ray(files, repository, write_config, force, tell, options):
    from ..artifact import publishing
    from .repository import Repository, parse_sources

    alone = ("ssl_certfile", "access_log", "allow_control", "uds", "root_path", "metrics_port", "shutdown_delay")
    wrong = [name for name in alone if options[name]] + ["grpc_port"] * (options["grpc_port"] is not None)
    wrong += ["processes"] * (options["processes"] > 1)
    if wrong:
        raise UsageError(f"--{wrong[0].replace('_', '-')} cannot be combined with --engine ray")
    with _needs_extra("cluster"):
        from . import cluster
    settings = cluster.ClusterSettings(
        sources=tuple(parse_sources(files)),
        folder=os.path.abspath(repository) if repository else None,
        models=_model_options(options),
        app=_app_options(options),
        version=version(),
        replicas=(options["min_replicas"], options["max_replicas"]),
        cpus=options["threads"] or 1,
        gpus=options["gpus_per_replica"],
        grace=options["grace"],
    )
    # Said here, before anything is started elsewhere: a name twice, a missing folder.
    Repository(list(settings.sources), settings.folder, settings.models)
    if write_config:
        with publishing(write_config, force) as place:
            place.write_text(cluster.config_yaml(settings, options["host"], options["port"]), encoding="utf-8")
        tell("written", f"{write_config}: serve deploy {write_config}", file=write_config)
        return 0
    ended_by = cluster.run(settings, options["host"], options["port"], options["address"], tell)
    return 130 if ended_by == signal.SIGINT else 0


def version() -> str:
    try:
        return importlib.metadata.version("keras-resnet-export")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _tls(certfile, keyfile):
    if keyfile and not certfile:
        raise UsageError("--ssl-keyfile needs --ssl-certfile")
    return tuple((name, path) for name, path in (("ssl_certfile", certfile), ("ssl_keyfile", keyfile)) if path)


def _model_options(options):
    from .batcher import BatchOptions
    from .models import ModelOptions

    return ModelOptions(
        device=options["device"],
        threads=options["threads"],
        batch=BatchOptions(options["max_batch"], options["max_delay_ms"] / 1000, options["queue"], options["instances"]),
        max_request_rows=options["max_rows"],
        max_pixels=options["max_pixels"],
        max_open_pixels=options["max_open_pixels"],
        timeout=options["timeout"],
        warm_up=options["warm_up"],
        adaptive=options["adaptive"],
        **_declared(options),
    )


def _app_options(options):
    from .app import AppOptions

    return AppOptions(
        max_body=options["max_body_mb"] * MIB,
        max_json=options["max_json_mb"] * MIB,
        max_buffered=options["max_buffered_mb"] * MIB,
        body_timeout=options["body_timeout"],
        allow_control=options["allow_control"],
        api_keys=_keys(options),
        decoders=max(2, os.cpu_count() or 2),
    )


def _keys(options):
    return read_keys(options["api_key_file"]) if options["api_key_file"] else ()


def read_keys(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read the API keys in a file, one per line. Empty lines and lines that begin with `#` are ignored.

    Raises:
        UsageError: The file cannot be read, or holds no key: a server without keys would be open.
    """
    try:
        # Some editors begin a file with a byte-order mark.
        with open(path, encoding="utf-8-sig") as file:
            keys = tuple(line.strip() for line in file if line.strip() and not line.startswith("#"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the API keys in {path}: {getattr(error, 'strerror', None) or error}") from error
    if not keys:
        raise UsageError(f"{path} contains no API key; write one key per line")
    if wrong := [number for number, key in enumerate(keys, 1) if not (key.isascii() and key.isprintable())]:
        raise UsageError(f"key {wrong[0]} in {path} cannot be sent in an HTTP header; use printable ASCII characters only")
    return keys


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="[NAME=]FILE...")
@click.argument("repository", type=click.Path())
@click.option(
    "--max-batch",
    type=click.IntRange(0),
    help="Maximum number of rows in a batch; by default 16, or 0 for a model without a batch axis.",
)
@click.option(
    "--max-delay-us",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Maximum time a request may wait for others, in microseconds.",
)
@_options(_number(int, "--instances", 1, "Number of copies of each model that run at the same time."))
@click.option("--gpu", is_flag=True, help="Run on GPUs.")
@click.option("--tensorrt", type=click.Choice(["fp32", "fp16"]), help="Run with TensorRT at this precision.")
@click.option("--engine-cache", metavar="FOLDER", help="Folder on the server in which TensorRT caches its engines.")
@click.option("--warm-up/--no-warm-up", default=True, show_default=True, help="Have Triton run the model before it is ready.")
@click.option("--force", is_flag=True, help="Replace models that exist already.")
@click.option("--add", is_flag=True, help="Add FILE as the next version of a model that exists already.")
@click.option("--kserve", type=click.Path(), help="Also write a KServe InferenceService to this YAML file.")
@click.option("--storage-uri", help="Address of the repository for KServe, e.g. s3://bucket/repository.")
@common_options
def triton(
    files: tuple[str, ...],
    repository: str,
    force: bool,
    add: bool,
    kserve: str | None,
    storage_uri: str | None,
    as_json: bool,
    max_delay_us: int,
    **options: Any,
) -> None:
    """Write a model repository for NVIDIA's Triton.

    If a NAME is given several times, the files are versions 1, 2, … of that model. The members of a family.json become separate
    models.

    \b
    Example:
      resnet-export triton resnet50.onnx models/ --gpu --tensorrt fp16
    """
    from ..artifact import publishing
    from .families import member_sources
    from .repository import parse_sources
    from .triton import TritonOptions, kserve_yaml, write_repository

    if (kserve is None) != (storage_uri is None):
        raise UsageError("--kserve and --storage-uri must be given together")
    sources = [member for source in parse_sources(files) for member in member_sources(source)]
    yaml = kserve_yaml(_service_name(sources), storage_uri, options["gpu"]) if kserve else None
    written = write_repository(
        sources, repository, TritonOptions(max_delay=max_delay_us / 1e6, **options), overwrite=force, add=add
    )
    if kserve:
        with publishing(kserve, force) as place:
            place.write_text(yaml, encoding="utf-8")
        written.append(Path(kserve))
    paths = [str(path) for path in written]
    click.echo(json.dumps({"files": paths}) if as_json else "\n".join(paths))


def _service_name(sources):
    return sources[0].name.lower().replace("_", "-").replace(".", "-")


@click.command("tf-serving")
@click.argument("folder", type=click.Path())
@click.option("--name", help="Name of the model; by default that of the folder.")
@click.option("--port", type=click.IntRange(1, 65535), default=8501, show_default=True, help="Port of the REST API.")
@common_options
def tf_serving(folder: str, name: str | None, port: int, as_json: bool) -> None:
    """Print a command that serves a SavedModel folder.

    The command starts TensorFlow Serving in Docker.

    \b
    Example:
      resnet-export tf-serving model/ --name resnet50
    """
    from .triton import tf_serving_command

    command = tf_serving_command(folder, name, port)
    click.echo(json.dumps({"command": command}) if as_json else command)
