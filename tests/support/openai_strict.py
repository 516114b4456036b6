"""Checks answers against OpenAI's published types. It needs the openai package alone, as `openai_script` does."""

import json
from typing import Any

from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
from pydantic import BaseModel

TYPES: dict[str, type[BaseModel]] = {
    "fine_tuning.job": FineTuningJob,
    "fine_tuning.job.event": FineTuningJobEvent,
    "fine_tuning.job.checkpoint": FineTuningJobCheckpoint,
    "file": FileObject,
}
ERROR_KEYS = {"message", "type", "param", "code"}
# Fields that may be null by OpenAI's types for TypeScript; others are left out. Python's types accept null for both.
NULLABLE = {
    "error", "param", "fine_tuned_model", "finished_at", "trained_tokens", "validation_file", "estimated_finish",
    "integrations", "metadata", "name", "entity", "data",
}  # fmt: skip


def require_strict(content: Any) -> None:
    """Check an answer: an object of a published type, a list of them, or an error; nothing is converted or extra."""
    if "error" in content and "object" not in content:
        assert set(content) == {"error"}
        assert set(content["error"]) == ERROR_KEYS
        assert all(isinstance(content["error"][key], str) for key in ERROR_KEYS - {"param"})
        return
    if content["object"] == "list":
        assert set(content) - {"first_id", "last_id"} == {"object", "data", "has_more"}
        for each in content["data"]:
            require_strict(each)
        return
    parsed = TYPES[content["object"]].model_validate_json(json.dumps(content), strict=True)
    assert extras(parsed) == [], content
    assert nulls(content) <= NULLABLE, content


def nulls(content: Any) -> set[str]:
    """Fields that are null, at every depth; figures of an event may be anything."""
    if isinstance(content, list):
        return set().union(*map(nulls, content))
    if not isinstance(content, dict):
        return set()
    here = {name for name, value in content.items() if value is None}
    return here.union(*(nulls(value) for name, value in content.items() if name != "data"))


def extras(model: BaseModel, path: str = "") -> list[str]:
    """Fields that the published type does not have, at every depth."""
    found = [f"{path}{name}" for name in model.model_extra or {}]
    for name in type(model).model_fields:
        value = getattr(model, name)
        for index, each in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(each, BaseModel):
                found += extras(each, f"{path}{name}.{index}.")
    return found
