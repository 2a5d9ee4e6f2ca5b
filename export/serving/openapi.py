"""The server's own description in OpenAPI 3.1: the same routes as `app`, as data."""

from __future__ import annotations

from typing import Any

from .protocol import DTYPES, HEADER_LENGTH

ERROR = {
    "description": "What is wrong, in one sentence",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/error"}}},
}
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
BINARY = {"type": "string", "format": "binary"}
OF_MODELS = (400, 404, 408, 413, 415, 500, 503)
PARAMETERS = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}


def describe(version: str) -> dict[str, Any]:
    """Return the OpenAPI document.

    Args:
        version: The server's version.

    Returns:
        Dict
    """
    return {
        "openapi": "3.1.0",
        "info": {"title": "resnet-export serve: Open Inference Protocol v2", "version": version},
        "paths": _server_paths() | _model_paths("/v2/models/{name}") | _model_paths("/v2/models/{name}/versions/{version}"),
        "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _server_paths():
    control = {"requestBody": _json_body({"type": "object"}), "parameters": [_path_parameter("name")]}
    only_ready = _json_body({"type": "object", "properties": {"ready": {"type": "boolean"}}})
    metadata = _object({"name": TEXT, "version": TEXT, "extensions": _array(TEXT)})
    metrics = {"200": {"description": "Text", "content": {"text/plain": {}}}, "401": ERROR}
    of_body = (400, 408, 413, 503)
    return {
        "/v2": {"get": _operation("Server metadata", metadata)},
        "/v2/health/live": {"get": _operation("Is the server there?", _object({"live": {"const": True}}))},
        "/v2/health/ready": {"get": _operation("Are all models ready?", _object({"ready": {"const": True}}), 503)},
        "/v2/models/stats": {"get": _operation("Statistics of all models", _schema("statistics"))},
        "/v2/repository/index": {
            "post": _operation("All models and their states", _array(_schema("index_entry")), *of_body)
            | {"requestBody": only_ready}
        },
        "/v2/repository/models/{name}/load": {
            "post": _operation("Load a model again", {"type": "object"}, 403, 404, 500, *of_body) | control
        },
        "/v2/repository/models/{name}/unload": {
            "post": _operation("Stop serving a model", {"type": "object"}, 403, 404) | control
        },
        "/metrics": {"get": {"summary": "Metrics for Prometheus", "responses": metrics}},
    }


def _model_paths(base):
    names = [_path_parameter(name) for name in ("name", "version") if f"{{{name}}}" in base]
    top = {"name": "top", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5}}
    length = {"name": HEADER_LENGTH, "in": "header", "schema": COUNT, "description": "Length of the JSON; tensors follow it"}
    depth = {"name": "depth", "in": "query", "schema": TEXT, "description": "Member of a family"}
    reads = {
        "": ("Model metadata", _schema("metadata")),
        "/ready": ("Is the model ready?", _object({"name": TEXT, "ready": {"const": True}})),
        "/config": ("Triton's model configuration", {"type": "object"}),
        "/stats": ("Statistics", _schema("statistics")),
        "/card": ("The model's card", {"type": "object"}),
    }
    described = {path: _operation(summary, schema, 404, 503) for path, (summary, schema) in reads.items()}
    return {base + path: {"get": operation, "parameters": names} for path, operation in described.items()} | {
        f"{base}/infer": {"post": _infer(), "parameters": [*names, length]},
        f"{base}/classify": {"post": _classify(), "parameters": [*names, top, depth]},
    }


def _infer():
    bodies = {"application/json": {"schema": _schema("infer_request")}, "application/octet-stream": {"schema": BINARY}}
    operation = _operation("Infer", _schema("infer_response"), *OF_MODELS)
    operation["responses"]["200"]["content"]["application/octet-stream"] = {}
    return operation | {"requestBody": {"required": True, "content": bodies}}


def _classify():
    operation = _operation("Classify an image file", _schema("classes"), *OF_MODELS)
    return operation | {"requestBody": {"required": True, "content": {"image/*": {"schema": BINARY}}}}


def _operation(summary, schema, *errors):
    responses = {"200": {"description": summary, "content": {"application/json": {"schema": schema}}}}
    return {"summary": summary, "responses": responses | {str(status): ERROR for status in (401, *errors)}}


def _json_body(schema):
    return {"required": False, "content": {"application/json": {"schema": schema}}}


def _path_parameter(name):
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1, "pattern": "^[^/]+$"}}


def _object(properties, optional=()):
    return {"type": "object", "properties": properties, "required": [name for name in properties if name not in optional]}


def _schema(name):
    return {"$ref": f"#/components/schemas/{name}"}


def _array(items):
    return {"type": "array", "items": items}


def _schemas():
    datatype = {"enum": list(DTYPES)}
    parts = {"name": TEXT, "datatype": datatype, "shape": _array(COUNT), "parameters": PARAMETERS, "data": {"type": "array"}}
    tensor = _object(parts, ("parameters", "data"))
    spec = _object({"name": TEXT, "datatype": datatype, "shape": _array({"type": "integer", "minimum": -1})})
    requested = _object({"name": TEXT, "parameters": PARAMETERS}, ("parameters",))
    found = _object({"class": COUNT, "label": {"type": ["string", "null"]}, "probability": {"type": "number"}})
    request = {"id": TEXT, "parameters": PARAMETERS, "inputs": _array(tensor), "outputs": _array(requested)}
    response = {"model_name": TEXT, "model_version": TEXT, "id": TEXT, "parameters": PARAMETERS, "outputs": _array(tensor)}
    counted = _object({"name": TEXT, "version": TEXT, "inference_count": COUNT, "execution_count": COUNT})
    state = {"enum": ["READY", "LOADING", "UNAVAILABLE"]}
    model = {"model_name": TEXT, "model_version": TEXT}
    metadata = {"name": TEXT, "versions": _array(TEXT), "platform": TEXT, "inputs": _array(spec), "outputs": _array(spec)}
    return {
        "error": _object({"error": TEXT}) | {"additionalProperties": False},
        "metadata": _object(metadata),
        "statistics": _object({"model_stats": _array(counted)}),
        "index_entry": _object({"name": TEXT, "version": TEXT, "state": state, "reason": TEXT}),
        "classes": _object(model | {"depth": TEXT, "predictions": _array(found), "milliseconds": {"type": "number"}}, ("depth",)),
        "infer_request": _object(request, ("id", "parameters", "outputs")),
        "infer_response": _object(response, ("id", "parameters")),
    }
