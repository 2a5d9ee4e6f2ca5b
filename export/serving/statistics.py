"""What a served model has done: counts and durations, as Triton's statistics extension and as its Prometheus metrics."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest

if TYPE_CHECKING:
    from .batcher import Answer, Timing


# Upper bounds of the histograms, in seconds.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PHASES = ("queue", "compute_input", "compute_infer", "compute_output")
# The same under the names of the histograms.
STAGES = ("queue", "input", "compute", "output")
# There is no cache here, but Triton's clients read what one would count.
CACHE = ("cache_hit", "cache_miss")


@dataclass
class Duration:
    """How often something happened, and the nanoseconds it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def include(self, other: Duration) -> None:
        """Add what another one has counted."""
        self.count += other.count
        self.ns += other.ns

    def to_json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass
class Buckets:
    """A histogram of durations, with the bounds of `BUCKETS`."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one duration, in nanoseconds."""
        self.counts[bisect.bisect_left(BUCKETS, ns / 1e9)] += 1
        self.ns += ns


def _phases(names):
    return {name: Duration() for name in names}


@dataclass
class Statistics:
    """Counters of one version of a model; they start at zero when it is loaded."""

    inferences: int = 0
    executions: int = 0
    last_inference: int = 0
    requests: dict[str, Duration] = field(default_factory=lambda: _phases(("success", "fail", *PHASES, *CACHE)))
    batches: dict[int, dict[str, Duration]] = field(default_factory=dict)
    stages: dict[str, Buckets] = field(default_factory=lambda: {stage: Buckets() for stage in STAGES})

    def executed(self, timing: Timing) -> None:
        """Count one run (a `batcher.Timing`)."""
        self.executions += 1
        self.inferences += timing.rows
        batch = self.batches.setdefault(timing.rows, _phases(PHASES[1:]))
        for name, ns in zip(PHASES[1:], (timing.gather, timing.infer, timing.scatter), strict=True):
            batch[name].add(ns)

    def succeeded(self, ns: int, answer: Answer) -> None:
        """Count one answered request: its nanoseconds altogether, and the `batcher.Answer`."""
        self.last_inference = time.time_ns() // 1_000_000
        parts = (answer.queued, *(sum(getattr(run, part) for run in answer.runs) for part in ("gather", "infer", "scatter")))
        self.requests["success"].add(ns)
        for name, stage, part in zip(PHASES, STAGES, parts, strict=True):
            self.requests[name].add(part)
            self.stages[stage].add(part)

    def failed(self, ns: int) -> None:
        """Count one request that ended in an error."""
        self.requests["fail"].add(ns)

    def to_json(self, name: str, version: str) -> dict[str, Any]:
        """Return the entry of the statistics extension."""
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_inference,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": {key: value.to_json() for key, value in self.requests.items()},
            "batch_stats": [
                {"batch_size": rows, **{key: value.to_json() for key, value in phases.items()}}
                for rows, phases in sorted(self.batches.items())
            ],
        }


def total(parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of several models together."""
    whole = Statistics(
        inferences=sum(part.inferences for part in parts),
        executions=sum(part.executions for part in parts),
        last_inference=max(part.last_inference for part in parts),
    )
    for part in parts:
        for name, duration in part.requests.items():
            whole.requests[name].include(duration)
        for rows, phases in part.batches.items():
            batch = whole.batches.setdefault(rows, _phases(PHASES[1:]))
            for name, duration in phases.items():
                batch[name].include(duration)
    return whole


class RequestCounts:
    """How often each route was asked, by HTTP status and reason, and how long the answers took."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "method", "status", "reason")
        self._requests = Counter("resnet_export_http_requests", "HTTP requests", labels, registry=self.registry)
        self._seconds = Histogram(
            "resnet_export_http_request_duration_seconds",
            "From the head of a request to the end of its answer",
            ("route",),
            buckets=BUCKETS,
            registry=self.registry,
        )

    def count(self, route: str, method: str, status: int, reason: str, seconds: float) -> None:
        """Count one request.

        Args:
            route: Name of the route, "none" if there is none.
            method: HTTP method.
            status: HTTP status of the answer; 499 if the client went away first.
            reason: One word that says why it was not answered as asked, or "ok".
            seconds: Time that it took.
        """
        self._requests.labels(route, method, str(status), reason).inc()
        self._seconds.labels(route).observe(seconds)


# Metric name, what it says, and how it is read off the statistics.
COUNTERS = (
    ("request_success", "Successful inference requests", lambda s: s.requests["success"].count),
    ("request_failure", "Failed inference requests", lambda s: s.requests["fail"].count),
    ("count", "Rows inferred", lambda s: s.inferences),
    ("exec_count", "Model executions, each of one batch", lambda s: s.executions),
    ("request_duration_us", "Microseconds in requests", lambda s: s.requests["success"].ns // 1000),
    ("queue_duration_us", "Microseconds in the queue", lambda s: s.requests["queue"].ns // 1000),
    ("compute_input_duration_us", "Microseconds putting batches together", lambda s: s.requests["compute_input"].ns // 1000),
    ("compute_infer_duration_us", "Microseconds in the model", lambda s: s.requests["compute_infer"].ns // 1000),
    ("compute_output_duration_us", "Microseconds handing out results", lambda s: s.requests["compute_output"].ns // 1000),
)


def render_metrics(
    models: Iterable[tuple[dict[str, str], Statistics, int]], requests: RequestCounts | None = None
) -> tuple[bytes, str]:
    """Write the text that Prometheus reads: the models' counters, the HTTP counts, and the process's memory, time and files.

    Args:
        models: `(labels, Statistics, requests waiting)` of every model; the labels are its name and version, and of a member of a
            family its depth.
        requests: The counts of HTTP requests, if there are any.

    Returns:
        `(bytes, content type)`.
    """
    models = [
        (",".join(f'{key}="{value}"' for key, value in names.items()), counts, waiting) for names, counts, waiting in models
    ]
    lines = []
    # prometheus-client would append `_total` to the names that Triton's dashboards look for.
    for name, text, read in COUNTERS:
        lines += _family(
            f"nv_inference_{name}", "counter", text, [(labels, read(statistics)) for labels, statistics, _ in models]
        )
    waiting = [(labels, count) for labels, _, count in models]
    lines += _family("nv_inference_pending_request_count", "gauge", "Requests waiting in the queue", waiting)
    lines += _stages(models)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    of_requests = generate_latest(requests.registry) if requests else b""
    return "\n".join(lines + [""]).encode() + of_requests + generate_latest(registry), CONTENT_TYPE_LATEST


def _family(name: str, kind: str, text: str, samples: Sequence[tuple[str, float]]) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *(f"{name}{{{labels}}} {value}" for labels, value in samples)]


def _stages(models: list[tuple[str, Statistics, int]]) -> list[str]:
    name = "resnet_export_stage_duration_seconds"
    text = "Time of requests in the queue, and of their batches' input, compute and output"
    lines = _family(name, "histogram", text, [])
    for labels, statistics, _ in models:
        for stage, histogram in statistics.stages.items():
            inside, total = f'{labels},stage="{stage}"', 0
            for bound, count in zip((*BUCKETS, "+Inf"), histogram.counts, strict=True):
                total += count
                lines.append(f'{name}_bucket{{{inside},le="{bound}"}} {total}')
            lines += [f"{name}_sum{{{inside}}} {histogram.ns / 1e9}", f"{name}_count{{{inside}}} {total}"]
    return lines
