"""FILE and `--set` -> the body of a job. What a job may hold is the server's to say; this only reads and edits JSON."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import FromAnalysis
from llama_stack_provider_moe.spec.adapter import MAX_RANK, ExpertsOfAnalysis
from llama_stack_provider_moe.spec.routing import made_for, masks_of, read_report, rules_of


def read_template(file: str, changes: Iterable[str]) -> dict[str, Any]:
    """The job in `file` (`-`: standard input) with `changes` laid over it, one after the other.

    Raises:
        InvalidInput: not a readable JSON object, a change that has no place in it, or no readable analysis.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        raise InvalidInput("FILE", file, f"a job template that can be read ({error})") from None
    try:
        body = json.loads(data, object_pairs_hook=_object, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:  # of wrong JSON, of bytes that are no text, of depth
        raise InvalidInput("FILE", file, f"a job template in JSON ({error})") from None
    if not isinstance(body, dict):
        raise InvalidInput("FILE", file, f"a job template, which is a JSON object; this is {_kind(body)}")
    for change in changes:
        _change(body, change)
    beside = Path() if file == "-" else Path(file).parent
    return _with_masks(_with_experts(body, beside), beside)


def _with_experts(body: dict[str, Any], beside: Path) -> dict[str, Any]:
    """`adapter.from_analysis.file`, a path on this machine, becomes the rules that it holds: a server reads no paths.

    Args:
        body: of a job.
        beside: the folder that a relative path begins in.
    """
    adapter = body.get("adapter")
    asked = adapter.get("from_analysis") if isinstance(adapter, dict) else None
    if not isinstance(adapter, dict) or not isinstance(asked, dict) or "file" not in asked:
        return body
    field = "adapter.from_analysis"
    own_rules = adapter.get("rules", [])
    if not isinstance(own_rules, list):
        raise InvalidInput("adapter.rules", own_rules, f"a list; this is {_kind(own_rules)}")
    wanted = _wanted(FromAnalysis, asked, field)
    rank = wanted.rank or adapter.get("rank")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise InvalidInput(f"{field}.rank", rank, f"a rank of 1 to {MAX_RANK}, here or as adapter.rank")
    path = beside / str(asked["file"])
    report = read_report(path, f"{field}.file")
    rules = [rule.model_dump() for rule in rules_of(report, wanted.set, wanted.top, rank, field)]
    origin = made_for(report, f"{path.name}, set {wanted.set}, top {wanted.top}").model_dump()
    kept = {name: value for name, value in adapter.items() if name != "from_analysis"}
    return {**body, "adapter": {**kept, "rules": [*rules, *own_rules], "rules_from": origin}}


def _with_masks(body: dict[str, Any], beside: Path) -> dict[str, Any]:
    """The same of `eval.masked_from_analysis.file`, which becomes `masked_experts`."""
    evaluation = body.get("eval")
    asked = evaluation.get("masked_from_analysis") if isinstance(evaluation, dict) else None
    if not isinstance(evaluation, dict) or not isinstance(asked, dict) or "file" not in asked:
        return body
    field = "eval.masked_from_analysis"
    if evaluation.get("masked_experts"):
        raise InvalidInput("eval.masked_experts", evaluation["masked_experts"], f"nothing beside {field}.file")
    wanted = _wanted(ExpertsOfAnalysis, asked, field)
    path = beside / str(asked["file"])
    report = read_report(path, f"{field}.file")
    kept = {name: value for name, value in evaluation.items() if name != "masked_from_analysis"}
    found = {
        "masked_experts": masks_of(report, wanted.set, wanted.top, field),
        "masked_from": made_for(report, f"{path.name}, set {wanted.set}, top {wanted.top}").model_dump(),
    }
    return {**body, "eval": {**kept, **found}}


def _wanted[Asked: ExpertsOfAnalysis](kind: type[Asked], asked: dict[str, Any], field: str) -> Asked:
    if "job" in asked:
        raise InvalidInput(field, asked, "one of job and file")
    others = {name: value for name, value in asked.items() if name != "file"}
    try:
        return kind.model_validate({**others, "job": "none"})  # in whose place the file stands
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"{field}.{'.'.join(map(str, first['loc']))}", first["input"], first["msg"]) from None


def _change(body: dict[str, Any], change: str) -> None:
    """`block.field=value`, in place. Blocks on the way are made where they are left out or null."""
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InvalidInput("--set", change, "block.field=value, such as training.n_epochs=3")
    block = body
    for depth, key in enumerate(keys[:-1], start=1):
        if block.get(key) is None:
            block[key] = {}
        if not isinstance(block[key], dict):
            where = ".".join(keys[:depth])
            raise InvalidInput("--set", change, f"a path through blocks; {where} is {_kind(block[key])}")
        block = block[key]
    block[keys[-1]] = _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:  # json would keep the last one and say nothing
            raise ValueError(f"key {key!r} stands twice in one object")
        found[key] = value
    return found


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "text", bool: "true or false", type(None): "null", dict: "an object"}
    return kinds.get(type(value), "a number")
