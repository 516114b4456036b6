"""Whether a rule on an argument can hold and can break: one that can't protects nothing, and says nothing of it."""

from collections.abc import Iterator, Mapping

from llama_stack_provider_moe.errors import InvalidBody, InvalidInput, shorten
from llama_stack_provider_moe.shields.possible_schema import COMPOSED

# The types of values that each test is about; of another type a value breaks it always.
_TYPES = {
    "matches": ("string",), "does_not_match": ("string",), "inside": ("string",), "hosts": ("string",),
    "at_least": ("number", "integer"), "at_most": ("number", "integer"), "max_length": ("string", "array"),
}  # fmt: skip
_LISTS = ("one_of", "none_of")
_KINDS = {"array", "boolean", "integer", "null", "number", "object", "string"}
_CLOSING = ("additionalProperties", "unevaluatedProperties")


def check_rule(schema: Mapping[str, object], rule: Mapping[str, object], field: str) -> None:
    """Refuse a rule on an argument that its schema does not have, or has with another type.

    Args:
        schema: of the tool's arguments, as written; it may have mistakes of its own, which are named elsewhere.
        rule: as written, with an `argument` that is a pointer.
        field: the caller's name for the rule.

    Raises:
        InvalidInput: the rule would never hold, or never break.
    """
    places = _at(schema, str(rule["argument"]), f"{field}.argument")
    allowed = None if places is None else _types(places)
    if allowed is None:
        return
    problems = [*_problems(rule, allowed, field)]
    if problems:
        raise InvalidBody([str(each) for each in problems])


def _problems(rule: Mapping[str, object], allowed: set[str], field: str) -> Iterator[InvalidInput]:
    told = f"which `parameters` say is of type {' or '.join(sorted(allowed))}"
    for name, types in _TYPES.items():
        if rule.get(name) is not None and not allowed & set(types):
            wanted = f"a test of what {rule['argument']!r} can be, {told}; no value could pass"
            yield InvalidInput(f"{field}.{name}", rule[name], wanted)
    for name in _LISTS:
        values = rule.get(name)
        for value in values if isinstance(values, list) else ():
            if not allowed & _types_of(value):
                yield InvalidInput(f"{field}.{name}", value, f"a value that {rule['argument']!r} can have, {told}")
                break


def _at(schema: Mapping[str, object], pointer: str, field: str) -> list[Mapping[str, object]] | None:
    """The schemas of what a pointer names; None where they can't be told, such as below an `anyOf` or a `$ref`."""
    found: list[Mapping[str, object]] = [{"type": "object", **schema}]
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        below: list[object] = []
        for each in found:
            if COMPOSED & set(each):
                return None
            below += [*_members(each, name), *_items(each, name)]
        named = [key for each in found for key in _properties(each)]
        found = []
        for inner in below:
            if not isinstance(inner, dict):
                return None  # true: anything; or a mistake
            found.append(inner)
        if not found:
            raise InvalidInput(field, pointer, f"an argument that `parameters` names: {shorten(named, 200)}")
    return found


def _members(schema: Mapping[str, object], name: str) -> Iterator[object]:
    """The schemas of an object's members of this name; * is any."""
    if not _may_be(schema, "object"):
        return
    properties = _properties(schema)
    if name == "*":
        yield from properties.values()
    elif name in properties:
        yield properties[name]
        return
    for key in _CLOSING:
        if schema.get(key, False) is not False:
            yield schema[key]


def _items(schema: Mapping[str, object], name: str) -> Iterator[object]:
    """The schemas of a list's items of this number; * is any."""
    if not _may_be(schema, "array") or not (name == "*" or name.isdecimal()):
        return
    first = schema.get("prefixItems", [])
    first = first if isinstance(first, list) else [None]
    if name == "*":
        yield from first
    elif int(name) < len(first):
        yield first[int(name)]
        return
    if schema.get("items", True) is not False:
        yield schema.get("items", True)


def _properties(schema: Mapping[str, object]) -> dict[str, object]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _may_be(schema: Mapping[str, object], kind: str) -> bool:
    types = _types([schema])
    return types is None or kind in types


def _types(schemas: list[Mapping[str, object]]) -> set[str] | None:
    """The types that values of these schemas can have; None: any, or it can't be told."""
    found: set[str] = set()
    for schema in schemas:
        if COMPOSED & set(schema):
            return None
        if "type" in schema:
            types = schema["type"]
            names = [types] if isinstance(types, str) else types
            if not isinstance(names, list) or not all(isinstance(each, str) and each in _KINDS for each in names):
                return None
            found |= set(names)
        elif isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
            for value in values:
                found |= _types_of(value)
        else:
            return None
    return found


def _types_of(value: object) -> set[str]:
    """The names that JSON Schema has for a value's type."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if isinstance(value, int) or value.is_integer() else {"number"}
    if value is None:
        return {"null"}
    return {"string"} if isinstance(value, str) else {"array" if isinstance(value, list) else "object"}
