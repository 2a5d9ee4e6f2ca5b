"""The server against its own description: every route is described, and no request gets an answer that is not."""

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
from hypothesis import HealthCheck, given, settings
from running import serving
from schemathesis.specs.openapi import checks

from resnet_export.serving.app import _routes
from resnet_export.serving.openapi import describe

pytestmark = pytest.mark.slow
CHECKS = [checks.response_schema_conformance, checks.status_code_conformance, checks.content_type_conformance]
NOT_DESCRIBED = ("/", "/page.css", "/page.js", "/openapi.json", "/v2/")


def test_every_route_is_described():
    paths = describe("1")["paths"]
    described = {(method.upper(), path) for path, item in paths.items() for method in item if method != "parameters"}
    assert described == {(method, path) for method, path, _ in _routes() if path not in NOT_DESCRIBED}


def test_answers_to_any_request_are_as_described(models):
    with serving(models["tiny"], models["echo"], "--allow-control", "--body-timeout", "5") as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) == 22
        for operation in operations:
            _try_out(operation)
        assert server.process.poll() is None


def _try_out(operation):
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def every_case(case):
        # A name at random would never get past 404; another model is taken away and brought back meanwhile.
        names = case.path_parameters or {}
        if "name" in names:
            names["name"] = "echo" if "repository" in operation.path else "tiny"
        if "version" in names:
            names["version"] = "1"
        response = case.call()
        assert response.status_code < 500 or response.status_code == 503, response.text
        case.validate_response(response, checks=CHECKS)

    every_case()
