"""Numbers of a request that may be `auto`, which means the server's choice, as null does."""

from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema


def _or_auto(kind: str) -> tuple[BeforeValidator, WithJsonSchema]:
    schema = {"anyOf": [{"const": "auto", "type": "string"}, {"type": kind}, {"type": "null"}]}
    return BeforeValidator(lambda value: None if value == "auto" else value), WithJsonSchema(schema)


_integer, _number = _or_auto("integer"), _or_auto("number")
IntegerOrAuto = Annotated[int | None, _integer[0], _integer[1]]
NumberOrAuto = Annotated[float | None, _number[0], _number[1]]
