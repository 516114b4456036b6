"""JSON schemas in the OpenAPI document that no model of a route stands for.

FastAPI builds a validator for each model of a route when a server starts, and another for each way that leads to the
route. Those of the refusals of 130 routes would be 3,000, which nothing would use.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from pydantic import BaseModel

from llama_stack_provider_moe.control.server.wire import JsonObject


def inlined(model: type[BaseModel]) -> JsonObject:
    """Return the schema of a model without references, because `#/$defs/...` would dangle in a larger document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    return cast("JsonObject", _inlined(schema, definitions))


def _inlined(node: object, definitions: Mapping[str, JsonObject]) -> object:
    if isinstance(node, list):
        return [_inlined(each, definitions) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        referred = definitions[node["$ref"].rpartition("/")[2]]
        node = {**referred, **{key: value for key, value in node.items() if key != "$ref"}}
    return {key: _inlined(value, definitions) for key, value in node.items()}


@dataclass(frozen=True)
class SchemaOf:
    """Documents a field with the schema of a block, which is made when somebody asks for the document."""

    block: type[BaseModel]

    def __get_pydantic_json_schema__(self, core_schema: object, handler: object) -> JsonObject:
        """Return the schema; pydantic calls this."""
        return inlined(self.block)


def documented_refusals(error: type[BaseModel], statuses: Iterable[HTTPStatus]) -> dict[int | str, dict[str, Any]]:
    """Return the documented answers of a router for requests that it refuses.

    Not the host's `standard_responses`: their references are dangling in the document that 0.6.1 serves.

    Args:
        error: the model of the answers' body.
        statuses: their HTTP statuses.
    """
    content = {"application/json": {"schema": inlined(error)}}
    return {each.value: {"description": each.phrase, "content": content} for each in statuses}
