"""docs/reference/http-api.md, made from the OpenAPI document of our own routes."""

import re
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from llama_stack_provider_moe.control.guard import routes as guard_routes
from llama_stack_provider_moe.control.guard.service import GuardService
from llama_stack_provider_moe.control.server.openai.routes import PREFIX as OPENAI
from llama_stack_provider_moe.control.server.routes import OLDER_PREFIX, PREFIX, create_router
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.spec.guard_config import GuardConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.contracts.reference import BLOCKS

Table = Callable[[list[str], list[list[str]]], list[str]]
SETTINGS = "settings.md"
JOB_MODELS = {model.__name__ for _, _, model, _ in BLOCKS}


def document() -> dict[str, Any]:
    """The OpenAPI document of every route that we serve, Prometheus' too."""
    host = FastAPI(title="post-training", version="v1alpha")
    host.include_router(create_router(PostTrainingService(ProviderConfig(prometheus=True), {})))
    shields = GuardService(GuardConfig(on_failure="block"), None)
    host.include_router(guard_routes.create_router(guard_routes.SafetyService(shields)))
    return host.openapi()


def page(table: Table) -> list[str]:
    """The page's lines, each route with what it takes and answers, then the schemas that they name."""
    described = document()
    schemas = described["components"]["schemas"]
    lines = [
        "# HTTP API",
        "",
        f"All routes are under `{PREFIX}`, and again under `{OLDER_PREFIX}`, which older SDKs call, except those that "
        f"begin with `/v1/`: `{OPENAI}`, and the safety API on OGX (`/v1/safety`, `/v1/moderations`, `/v1/shields`), "
        "which on Llama Stack is the host's own, with the same bodies and answers. A running server also describes "
        "them at `/openapi.json`. Errors are listed in [Errors](errors.md); the fields of a job are listed in "
        "[Settings](settings.md).",
    ]
    named: list[str] = []
    for path, methods in described["paths"].items():
        for method, route in methods.items():
            lines += ["", f"## {method.upper()} {path.removeprefix(PREFIX)}", "", route["summary"]]
            lines += _parameters(route, table)
            if "requestBody" in route:
                lines += ["", f"Body: {_body(route['requestBody'], named)}"]
            lines += ["", f"Answer: {_answer(route['responses'], named)}"]
    lines += ["", "## Schemas", "", "The bodies and answers that the routes above name."]
    for name in _reachable(named, schemas):
        lines += ["", f"### {name}", *_schema(schemas[name], table)]
    return lines


def _parameters(route: dict[str, Any], table: Table) -> list[str]:
    rows = []
    for parameter in route.get("parameters", []):
        schema = parameter["schema"]
        default = schema.get("default")
        shown = "required" if parameter["required"] else "" if default is None else f"`{str(default).lower()}`"
        meaning = parameter.get("description", "The job." if parameter["name"] == "job_uuid" else "")
        kind = _type(schema, []) + _range(schema)
        rows.append([f"`{parameter['name']}`", parameter["in"], kind, shown, meaning])
    return table(["Parameter", "In", "Type", "Default", "Meaning"], rows) if rows else []


def _body(body: dict[str, Any], named: list[str]) -> str:
    kinds = list(body["content"])
    if kinds[0] != "application/json":
        return f"{', '.join(f'`{kind}`' for kind in kinds)}. {body['description']}"
    return _type(body["content"][kinds[0]]["schema"], named)


def _answer(responses: dict[str, Any], named: list[str]) -> str:
    parts = []
    for media, content in responses["200"].get("content", {}).items():
        schema = content.get("schema", {})
        parts.append(_type(schema, named) if "$ref" in schema or media == "application/json" else f"`{media}`")
    return " or ".join(dict.fromkeys(part for part in parts if part)) or "nothing"


def _type(schema: dict[str, Any], named: list[str]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in JOB_MODELS:
            return f"[{name}]({SETTINGS})"
        named.append(name)
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(each, named) for each in schema[key]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{choice}`" for choice in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), named)}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"object of {_type(inner, named)}" if isinstance(inner, dict) else "object"
    words = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
    return words.get(schema.get("type", ""), "any")


def _range(schema: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    options = [schema, *schema.get("anyOf", [])]
    bounds = [f"{sign} {each[key]:,.0f}" for each in options for key, sign in signs.items() if key in each]
    return f", {' and '.join(bounds)}" if bounds else ""


def _reachable(named: list[str], schemas: dict[str, Any]) -> list[str]:
    found: list[str] = []
    waiting = list(named)
    while waiting:
        name = waiting.pop()
        if name in found or name not in schemas:
            continue
        found.append(name)
        references = re.findall(r"#/components/schemas/(\w+)", repr(schemas[name]))
        waiting += [each for each in references if each not in JOB_MODELS]
    return sorted(found)


def _schema(schema: dict[str, Any], table: Table) -> list[str]:
    text = " ".join(schema.get("description", "").partition("\n\n")[0].split())
    lines = ["", text] if text else []
    if "properties" not in schema:
        return [*lines, "", _type(schema, [])]
    required = set(schema.get("required", []))
    rows = [
        [f"`{name}`" + ("" if name in required else " (optional)"), _type(each, []), each.get("description", "")]
        for name, each in schema["properties"].items()
    ]
    return [*lines, *table(["Field", "Type", "Meaning"], rows)]
