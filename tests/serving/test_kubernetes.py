"""The Kubernetes examples of the guide: they parse, agree with each other, and use options and paths that exist."""

from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="needs the extra `train`")
pytest.importorskip("starlette", reason="needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")
from resnet_export.serving import commands
from resnet_export.serving.app import _routes
from resnet_export.serving.statistics import render_metrics

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "kubernetes"


def documents(name):
    return {document["kind"]: document for document in yaml.safe_load_all((FOLDER / name).read_text())}


def options_of(container):
    assert container["command"] == ["resnet-export", "serve"]
    context = commands.serve.make_context("serve", list(container["args"]), resilient_parsing=False)
    return context.params


def check_probes(container, port):
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container:
            path = container[probe]["httpGet"]["path"]
            assert ("GET", path) in {(method, route) for method, route, _ in _routes()}
            assert container[probe]["httpGet"]["port"] in (port, "http")


def test_deployment_service_and_autoscaler():
    found = documents("deployment.yaml")
    pod = found["Deployment"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    options = options_of(container)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": options["port"], "metrics": options["metrics_port"]}
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(options["metrics_port"])
    assert options["shutdown_delay"] + options["grace"] < pod["spec"]["terminationGracePeriodSeconds"]
    # A pod is taken out of service while it still accepts.
    probe = container["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] < options["shutdown_delay"]
    check_probes(container, options["port"])
    labels = pod["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    scaler = found["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"].encode() in render_metrics([])[0]


def test_inference_service():
    [container] = documents("kserve.yaml")["InferenceService"]["spec"]["predictor"]["containers"]
    options = options_of(container)
    assert options["repository"] == "/mnt/models" and container["ports"][0]["containerPort"] == options["port"]
    check_probes(container, options["port"])
