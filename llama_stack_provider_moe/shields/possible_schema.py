"""Keywords of a JSON schema that no value can match: a tool with them could never be called as its author means."""

from collections.abc import Iterator, Mapping
from typing import TypeGuard

from llama_stack_provider_moe.errors import shorten

# What may name properties beside `properties`; `unevaluatedProperties` sees through them, `additionalProperties` not.
COMPOSED = {"allOf", "anyOf", "oneOf", "$ref", "if", "then", "else", "dependentSchemas"}
_BOUNDS = (
    ("minimum", "maximum"), ("minLength", "maxLength"), ("minItems", "maxItems"), ("minProperties", "maxProperties"),
    ("minContains", "maxContains"),
)  # fmt: skip


def impossible(schema: Mapping[str, object], closes: bool) -> Iterator[tuple[str, object, str]]:
    """Yield keyword, value and expectation for each keyword of a schema that nothing can match.

    Args:
        schema: one schema; those inside it are not looked at.
        closes: whether it describes a whole value, and so takes no keys but those it names.
    """
    required, properties = schema.get("required"), schema.get("properties", {})
    if closes and isinstance(required, list) and isinstance(properties, dict):
        for name in required:
            if isinstance(name, str) and name not in properties and _takes_no_others(schema):
                yield "required", name, f"keys that `properties` name: {shorten(list(properties), 200)}; a closed " \
                    "object takes no others, so no call could pass"  # fmt: skip
    if schema.get("enum") == []:
        yield "enum", [], "at least one value; no value could pass"
    for low, high in _BOUNDS:
        least, most = schema.get(low), schema.get(high)
        if _is_number(least) and _is_number(most) and least > most:
            yield low, least, f"at most {high}, which is {most}; no value could pass"


def _takes_no_others(schema: Mapping[str, object]) -> bool:
    if "additionalProperties" in schema:
        return schema["additionalProperties"] is False
    return schema.get("unevaluatedProperties", False) is False and not COMPOSED & set(schema)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
