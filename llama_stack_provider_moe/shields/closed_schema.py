"""A JSON schema (draft 2020-12) of a tool's arguments, closed: an object takes no key that its schema does not name.

JSON Schema is open unless `additionalProperties` says otherwise, and a schema written in a hurry then lets through what
its author forgot. Here each object that says neither `additionalProperties` nor `unevaluatedProperties` gets
`unevaluatedProperties: false`, which, unlike the former, sees through `allOf`, `anyOf`, `oneOf` and `$ref`. An unknown
keyword (`requried`) is an error, and so is a keyword that would be ignored (`format: postcode`) or would fetch
something (`$ref` to another document). Patterns run in Rust's regex engine, whose time is linear in the text, because
an attacker writes the text.
"""

import difflib
import ipaddress
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.shields.possible_schema import impossible
from llama_stack_provider_moe.shields.schema_references import References, counted, within
from llama_stack_provider_moe.spec.linear_patterns import MAX_PATTERN, matcher

MAX_DEPTH = 24
MAX_SCHEMAS = 2_000
MOST_PROBLEMS = 100  # named at once: each costs a search for words like it
_CHILD = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames", "contains")
_IN_PLACE_LISTS = ("allOf", "anyOf", "oneOf")
_IN_PLACE = ("if", "then", "else", "not")
_VALUES = (
    "type", "enum", "const", "multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum", "maxLength",
    "minLength", "pattern", "maxItems", "minItems", "uniqueItems", "maxContains", "minContains", "maxProperties",
    "minProperties", "required", "dependentRequired", "format", "title", "description", "default", "examples",
    "$comment", "$ref", "deprecated", "readOnly", "writeOnly",
)  # fmt: skip
# Not `patternProperties`: jsonschema tries its patterns with Python's engine, which a text can keep busy for hours.
KEYWORDS = {"properties", *_CHILD, *_IN_PLACE_LISTS, *_IN_PLACE, *_VALUES, "prefixItems", "dependentSchemas", "$defs"}
_NOT_CLOSED_BELOW = ("not", "if", "contains", "propertyNames")  # closing there would widen the whole


class Mismatch(NamedTuple):
    """Where arguments do not match the schema.

    Attributes:
        pointer: JSON Pointer to the value.
        keyword: of the schema that it breaks.
    """

    pointer: str
    keyword: str


class CheckedSchema:
    """A schema, checked and ready to validate.

    Args:
        schema: as written.
        field: the caller's name for it, for errors.
        closes: whether an object that says nothing of other keys takes none.

    Raises:
        InvalidInput: the schema is not valid, or not one that this class supports; `InvalidBody` if it has several
            problems, all of which are named.
    """

    def __init__(self, schema: Mapping[str, object], field: str, closes: bool) -> None:
        self._count = 0
        self._closes = closes
        self._problems: dict[str, InvalidInput] = {}
        self._made: list[tuple[str, dict[str, object]]] = []  # the schemas in it, each with its field
        self._check_root(schema, field)
        self.schema = self._closed(self._whole(schema), field, 0, closes=closes)
        assert isinstance(self.schema, dict)
        references = References(self.schema, self._made)
        for where, each in self._made:
            if "$ref" in each and f"{where}.$ref" not in self._problems:
                self._collect(references.follow, each, f"{where}.$ref")
        kind = _validator()
        for error in kind(kind.META_SCHEMA).iter_errors(self.schema):
            path = ".".join([field, *map(str, error.absolute_path)])
            self._wrong(path, error.instance, f"what draft 2020-12 has there ({error.message[:120]})")
        self._refuse()
        references.check_work()
        self._validate = kind(self.schema, format_checker=_formats())

    def _check_root(self, schema: Mapping[str, object], field: str) -> None:
        """Note what is wrong with the whole; any JSON may be described."""

    def _whole(self, schema: Mapping[str, object]) -> dict[str, object]:
        return dict(schema)

    def _wrong(self, field: str, value: object, expected: str) -> None:
        """Note a problem; of one field only the first, because the others follow from it."""
        self._problems.setdefault(field, InvalidInput(field, value, expected))
        if len(self._problems) >= MOST_PROBLEMS:
            self._refuse()

    def _collect[**P](self, check: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            check(*args, **kwargs)
        except InvalidInput as error:
            self._problems.setdefault(error.field, error)

    def _refuse(self) -> None:
        if len(self._problems) == 1:
            raise next(iter(self._problems.values()))
        if self._problems:
            raise InvalidBody([str(each) for each in self._problems.values()])

    def mismatches(self, arguments: object, limit: int = 3, most_references: int | None = None) -> list[Mismatch]:
        """Return the first places where the arguments do not match.

        Args:
            arguments: the value.
            limit: most places.
            most_references: most references to follow; None: any number, where something else ends it.

        Raises:
            RecursionError: the arguments are nested too deep for the schema.
            TooMuchWork: it takes more references.
        """
        found = []
        with within(most_references):
            for error in self._validate.iter_errors(arguments):
                found.append(Mismatch(pointer_of(error.absolute_path), str(error.validator)))
                if len(found) == limit:
                    break
        return found

    def _closed(self, schema: object, field: str, depth: int, closes: bool) -> Any:
        """A copy of `schema`; `closes`: whether it describes a whole value, rather than one of several views of it."""
        self._count += 1
        if depth > MAX_DEPTH or self._count > MAX_SCHEMAS:
            self._wrong(field, "deeper", f"at most {MAX_DEPTH} levels and {MAX_SCHEMAS:,} schemas")
            self._refuse()
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            self._wrong(field, schema, "a JSON schema, an object")
            return schema
        for key in schema:
            if key not in KEYWORDS:
                close = difflib.get_close_matches(str(key)[:MAX_PATTERN], KEYWORDS, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                self._wrong(f"{field}.{key}", schema[key], "a keyword of JSON Schema 2020-12 that rules support; there "
                            f"is none of this name{hint}")  # fmt: skip
        for name, value, expected in impossible(schema, closes):
            self._wrong(f"{field}.{name}", value, expected)
        made = {
            key: self._keyword(key, value, f"{field}.{key}", depth + 1) if key in KEYWORDS else value
            for key, value in schema.items()
        }
        if closes and not {"additionalProperties", "unevaluatedProperties"} & set(schema):
            made["unevaluatedProperties"] = False
        self._made.append((field, made))
        return made

    def _keyword(self, key: str, value: object, field: str, depth: int) -> object:
        closes = self._closes and key not in _NOT_CLOSED_BELOW
        if key in ("properties", "$defs", "dependentSchemas"):
            if not isinstance(value, dict):
                self._wrong(field, value, "an object of schemas")
                return value
            whole = self._closes and key == "properties"  # a definition is whole where it is used
            return {str(name): self._closed(each, f"{field}.{name}", depth, whole) for name, each in value.items()}
        if key in _CHILD:
            return self._closed(value, field, depth, closes)
        if key in _IN_PLACE:
            return self._closed(value, field, depth, closes=False)
        if key in (*_IN_PLACE_LISTS, "prefixItems"):
            if not isinstance(value, list):
                self._wrong(field, value, "a list of schemas")
                return value
            whole = self._closes and key == "prefixItems"
            return [self._closed(each, f"{field}.{number}", depth, whole) for number, each in enumerate(value)]
        if key == "pattern":
            self._collect(matcher, value, field)
        if key == "format" and not (isinstance(value, str) and value in FORMATS):
            self._wrong(field, value, f"one of {', '.join(FORMATS)}; any other would not be checked")
        if key == "$ref" and not (isinstance(value, str) and (value == "#" or value.startswith("#/"))):
            self._wrong(field, value, "a reference inside this schema, such as '#/$defs/path'")
        return value


class ClosedSchema(CheckedSchema):
    """A schema of a tool's arguments, which are an object; it is closed.

    Args:
        schema: as written.
        field: the caller's name for it, for errors.

    Raises:
        InvalidInput: see `CheckedSchema`.
    """

    def __init__(self, schema: Mapping[str, object], field: str) -> None:
        super().__init__(schema, field, closes=True)

    def _check_root(self, schema: Mapping[str, object], field: str) -> None:
        if schema.get("type", "object") != "object":
            self._wrong(f"{field}.type", schema["type"], "'object', because arguments are an object")

    def _whole(self, schema: Mapping[str, object]) -> dict[str, object]:
        return {"type": "object", **schema}


def pointer_of(path: object) -> str:
    """Return a JSON Pointer (RFC 6901) of keys and numbers, shortened: a key may be the attacker's."""
    assert hasattr(path, "__iter__")
    text = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
    return text if len(text) <= 200 else text[:199] + "…"


def _pattern(_: object, pattern: str, instance: object, __: object) -> Iterator[object]:
    from jsonschema.exceptions import ValidationError

    if isinstance(instance, str) and not matcher(pattern, "pattern")(instance):
        yield ValidationError("does not match the pattern")


@cache
def _validator() -> Any:
    """Draft 2020-12 with linear patterns; imported here, because it takes long and many servers have no ToolGuard."""
    from jsonschema import Draft202012Validator, validators

    follow = counted(Draft202012Validator.VALIDATORS["$ref"])
    return validators.extend(Draft202012Validator, {"pattern": _pattern, "$ref": follow})


def _is_uri(text: str) -> bool:
    return bool(urlsplit(text).scheme) and not any(each.isspace() for each in text)


def _is_date(text: str) -> bool:
    return date.fromisoformat(text).isoformat() == text  # Python also reads 20260101 and 2026-W01-4


def _is_moment(text: str) -> bool:
    return datetime.fromisoformat(text).tzinfo is not None and text[10:11] in ("T", "t")


def _is_uuid(text: str) -> bool:
    return str(uuid.UUID(text)) == text.lower()


FORMATS: dict[str, Callable[[str], object]] = {
    "date": _is_date,
    "date-time": _is_moment,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uri": _is_uri,
    "uuid": _is_uuid,
}


@cache
def _formats() -> Any:
    from jsonschema import FormatChecker

    checker = FormatChecker(formats=())
    for name, read in FORMATS.items():

        def holds(instance: object, read: Callable[[str], object] = read) -> bool:
            return not isinstance(instance, str) or read(instance) is not False

        checker.checks(name, raises=ValueError)(holds)
    return checker
