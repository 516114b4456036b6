"""Read our own files and rows; unknown fields are ignored.

Unknown keys in a user's input are errors (`Block`). But files of another version of this package may have more fields
than this version knows, and must still be readable: servers, supervisors and training processes are upgraded one after
the other, and a job outlives all of them.
"""

import json

from pydantic import BaseModel, TypeAdapter, ValidationError


def read_as[M: BaseModel](kind: type[M], content: bytes | str) -> M:
    """Read `content`, JSON that this package wrote, as `kind`; unknown fields are ignored at every depth.

    Raises:
        ValidationError: It is damaged, or a known field has an unknown value.
    """
    return kind.model_validate_json(content, extra="ignore")


def read_with[T](adapter: TypeAdapter[T], content: bytes | str) -> T:
    """Like `read_as`, for a type adapter."""
    return adapter.validate_json(content, extra="ignore")


def read_each[M: BaseModel](kind: type[M], values: object) -> tuple[list[M], list[str]]:
    """Read each value of a list as `kind`; return the readable ones, and a line about each unreadable one."""
    if not isinstance(values, list):
        return [], [f"{type(values).__name__} instead of a list"]
    found, problems = [], []
    for number, value in enumerate(values, 1):
        try:
            found.append(kind.model_validate(value, extra="ignore"))
        except ValidationError as error:
            problems.append(f"entry {number}: {why_unreadable(error)}")
    return found, problems


def unknown_fields(written: object, read: object, where: str = "") -> list[str]:
    """Return `path = value` for each field in the JSON document `written` that is missing in its parsed form `read`."""
    if isinstance(written, dict) and isinstance(read, dict):
        inside = [(f"{where}.{name}" if where else name, value, name) for name, value in written.items()]
        unknown = [f"{path} = {json.dumps(value)[:80]}" for path, value, name in inside if name not in read]
        known = [unknown_fields(value, read[name], path) for path, value, name in inside if name in read]
        return [*unknown, *(each for found in known for each in found)]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        pairs = zip(written, read, strict=True)
        return [each for number, pair in enumerate(pairs) for each in unknown_fields(*pair, f"{where}.{number}")]
    return []


def why_unreadable(error: Exception) -> str:
    """Describe in one line what is wrong with a file or a value, without its content."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{where}: {first['msg']}{more}".removeprefix(": ")[:300]
