"""The same application on Ray Serve: replicas on one machine or many, scaled with the load, exchanged without a gap.

Every replica runs the whole application, batcher included, so that rows are batched where the model is and only bodies travel.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray
import uvicorn
from ray import serve

from ..errors import UsageError
from .app import AppOptions, create_app
from .batcher import BatchOptions
from .connection import Connection, ConnectionLimits
from .models import ModelOptions, Source
from .raydata import join
from .repository import Repository
from .server import ServerOptions, allow_connections, bind

if TYPE_CHECKING:
    from starlette.applications import Starlette


APPLICATION = "resnet_export"
# Ray calls the function of this name in every proxy, before the proxy listens.
PROXY_HOOK = ("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "resnet_export.serving.cluster.protect_proxy")


@dataclass(frozen=True)
class ClusterSettings:
    """What is served, and on how many replicas. Paths must mean the same on every machine.

    Args:
        sources: `Source`s.
        folder: Repository folder, or None.
        models: `ModelOptions`.
        app: `AppOptions`.
        version: The server's version.
        replicas: Smallest and largest number.
        cpus: Cores of a replica, and threads of its onnxruntime.
        gpus: GPUs of a replica; a fraction shares one.
        grace: Seconds in which a replica that leaves finishes what it has taken.
    """

    sources: tuple[Source, ...] = ()
    folder: str | None = None
    models: ModelOptions = ModelOptions()
    app: AppOptions = AppOptions()
    version: str = "0"
    replicas: tuple[int, int] = (1, 1)
    cpus: int = 1
    gpus: float = 0.0
    grace: float = 60.0

    def __post_init__(self) -> None:
        if self.replicas[0] > self.replicas[1]:
            raise UsageError(f"--max-replicas ({self.replicas[1]}) must be at least --min-replicas ({self.replicas[0]})")

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the YAML for `serve deploy` holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ClusterSettings:
        models = values["models"] | {"batch": BatchOptions(**values["models"]["batch"])}
        return cls(
            **values
            | {
                "sources": tuple(Source(entry["name"], entry["version"], Path(entry["path"])) for entry in values["sources"]),
                "models": ModelOptions(**models),
                "app": AppOptions(**values["app"] | {"api_keys": tuple(values["app"]["api_keys"])}),
                "replicas": tuple(values["replicas"]),
            }
        )


def application(args: dict) -> serve.Application:
    """Ray Serve's application builder (`import_path: resnet_export.serving.cluster:application`).

    Args:
        args: `ClusterSettings.to_json()`.

    Returns:
        The application, a `ray.serve.Application`.
    """
    settings = ClusterSettings.from_json(args)

    def build() -> Starlette:
        # onnxruntime would otherwise take all cores, in every replica.
        models = dataclasses.replace(settings.models, threads=settings.cpus)
        repository = Repository(list(settings.sources), settings.folder, models)
        # A replica takes requests as soon as it has been built, so it is warmed up here.
        repository.open(warm_up=True)
        return create_app(repository, settings.app, settings.version)

    return serve.deployment(serve.ingress(build)(), **deployment_options(settings)).bind()


def deployment_options(settings: ClusterSettings) -> dict[str, Any]:
    """Ray Serve's options for a deployment: scaling, back-pressure, resources."""
    low, high = settings.replicas
    # Two batches' worth of requests keep a replica busy; more than that is a reason for another one.
    busy = 2 * settings.models.batch.max_rows
    options = {
        "name": "models",
        "max_ongoing_requests": 4 * settings.models.batch.max_rows,
        "max_queued_requests": settings.models.batch.queue_rows,
        "graceful_shutdown_timeout_s": settings.grace,
        "ray_actor_options": {"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    }
    if low == high:
        return options | {"num_replicas": low}
    return options | {"autoscaling_config": {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": busy}}


def protect_proxy() -> list:
    """Have this Ray proxy treat connections as `serve` does without Ray; its own protocol loses the body after an `Upgrade`.

    Returns:
        No middlewares, which is what Ray asks for here.
    """
    files, load = allow_connections(), uvicorn.Config.load
    limits = ConnectionLimits(per_address=files // 2 if files else None)

    def load_protected(config: uvicorn.Config) -> None:
        config.http, config.ws = functools.partial(Connection, limits=limits), "none"  # type: ignore[assignment]
        load(config)

    uvicorn.Config.load = load_protected  # type: ignore[assignment, method-assign]
    return []


def config_yaml(settings: ClusterSettings, host: str, port: int) -> str:
    """Return the configuration for `serve deploy`, as YAML (of which JSON is a part)."""
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "resnet_export.serving.cluster:application",
                "args": settings.to_json(),
            }
        ],
    }
    return json.dumps(config, indent=2) + "\n"


def start(settings: ClusterSettings, host: str, port: int, address: str | None = None) -> None:
    """Start, or join, a cluster and serve on it; called again with other settings, replicas are exchanged one by one.

    Args:
        settings: `ClusterSettings`.
        host, port: Where every machine's proxy listens.
        address: A running cluster; None starts one on this machine.

    Raises:
        UsageError: The port is taken, or the cluster cannot be reached.
    """
    if not ray.is_initialized():
        if address is None:
            with bind(ServerOptions(host, port)):
                pass
            # The proxies inherit the environment of the cluster, which begins here.
            os.environ.setdefault(*PROXY_HOOK)
        join(address)
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    try:
        serve.run(application(settings.to_json()), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise UsageError(f"the models do not start on the cluster: {error}") from error


def run(settings: ClusterSettings, host: str, port: int, address: str | None, tell: Callable[..., object]) -> int:
    """Serve on a cluster until SIGTERM or SIGINT.

    Args:
        settings, host, port, address: See `start`.
        tell: Called with an event, its text and details.

    Returns:
        The signal that ended it.
    """
    if port == 0:
        raise UsageError("--engine ray needs a fixed --port, got 0")
    ended, received = threading.Event(), []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        ended.set()

    start(settings, host, port, address)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    url = f"http://{host}:{port}"
    tell("listening", f"serving on {url} with Ray", url=url, models=[source.name for source in settings.sources])
    tell("ready", "ready")
    ended.wait()
    if not _left(watch=address is None):
        tell("stopped", "stopped; the cluster has ended by itself, and what it had taken is not answered")
        # Ray would wait for the cluster for a minute, and then abort.
        os._exit(1)
    ray.shutdown()
    tell("stopped", "stopped")
    return received[0]


def _leave() -> None:
    # The replicas finish what they have taken; a shutdown alone would end the proxy under their answers.
    serve.delete(APPLICATION)
    serve.shutdown()


def _left(watch: bool) -> bool:
    """Take the application from the cluster.

    Args:
        watch: Whether to give up where the cluster is gone: a signal may have gone to all processes of a local one.

    Returns:
        Whether the cluster was there to the end.
    """
    if not watch:
        _leave()
        return True
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    leaving = threading.Thread(target=_leave, daemon=True)
    leaving.start()
    while leaving.is_alive():
        leaving.join(1)
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            return False
    return True
