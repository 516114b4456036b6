"""What a pipeline is asked to do: jobs, of which later ones take what earlier ones leave."""

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.blocks import BUILT_AT_ONCE, JOB_ID_PATTERN, Block
from llama_stack_provider_moe.spec.labels import MAX_LABELS, Labels
from llama_stack_provider_moe.spec.notify import PipelineNotify

MOST_PARTS = 64
PREFIX = "parts."
# Every setting that may name another job; * is each entry of a list or an object. A test compares it with the specs.
REFERENCES = (
    "model", "adapter_folder", "measurements", "branches.*.model", "from_analysis.job", "adapter.init_from",
    "adapter.from_analysis.job", "eval.judge.model", "eval.masked_from_analysis.job", "eval.ablated.measurements",
    "teacher", "distill.model", "surgery.add.mlp_from",
    "reward.*.grader.model", "reward.*.grader.probe",
    "reward.*.grader.graders.*.model", "reward.*.grader.graders.*.probe",
)  # fmt: skip
_NOT_PARTS = {
    "export": "a part's own `export` block, which makes its export once it has completed",
    "playground": "a recipe that ends by itself; start a playground of the result afterwards",
}

PART_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,31}$"
PartName = Annotated[str, Field(pattern=PART_PATTERN)]


class PipelinePart(Block):
    """A part of a pipeline: a job with a name."""

    name: PartName = Field(
        description="Name of the part: 1 to 32 lower-case letters, digits, '_' and '-', the first a letter or a digit. "
        "Its job gets the pipeline's name, '-' and this name; later parts name its result "
        "`parts.NAME` or `parts.NAME/merged`."
    )
    job: dict[str, Any] = Field(description="Job of the part, as in `POST jobs`, without `job_uuid`.")

    @field_validator("job", mode="after")
    @classmethod
    def _is_a_parts_job(cls, job: dict[str, Any]) -> dict[str, Any]:
        if job.get("job_uuid") is not None:
            raise ValueError("job_uuid: is not for a part, whose job gets the names of pipeline and part; leave it out")
        expected = _NOT_PARTS.get(str(job.get("recipe")))
        if expected is not None:
            raise ValueError(f"recipe: {job['recipe']!r} is not valid in a pipeline; expected {expected}")
        return job


class PipelineSpec(Block):
    """A pipeline: jobs that run as soon as the parts that they name have completed."""

    model_config = BUILT_AT_ONCE

    pipeline_uuid: str | None = Field(
        default=None,
        pattern=JOB_ID_PATTERN,
        max_length=90,
        description="Name of the pipeline; its jobs get the names of their parts behind it. Left out: the server "
        "chooses one.",
    )
    labels: Labels = Field(
        default={},
        max_length=MAX_LABELS,
        description="Labels of every job of the pipeline, beside those that a part's job states itself.",
    )
    notify: PipelineNotify | None = Field(
        default=None,
        description="Whom to tell once, when all its jobs have ended; `notify` of a part's job is about that job. "
        "Left out: nobody.",
    )
    parts: list[PipelinePart] = Field(
        min_length=1,
        max_length=MOST_PARTS,
        description="Parts, each after those whose results it names. Parts that name none start at once.",
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "PipelineSpec":
        names = [part.name for part in self.parts]
        for at, name in enumerate(names):
            if name in names[:at]:
                raise ValueError(f"parts.{at}.name: {name!r} is the name of part {names.index(name)} too; expected "
                                 "each name once")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _name_earlier_parts(self) -> "PipelineSpec":
        names = [part.name for part in self.parts]
        for at, part in enumerate(self.parts):
            for path, value in references(part.job):
                wanted = part_of(value)
                if wanted in names[:at]:
                    continue
                why = "is this part itself" if wanted == part.name else "comes later" if wanted in names else "is none"
                earlier = ", ".join(f"{PREFIX}{name}" for name in names[:at])
                expected = f"an earlier part ({earlier})" if earlier else "no part: this is the first one"
                raise ValueError(f"parts.{at}.job.{path}: {value[:80]!r} {why}; expected {expected}")
        return self

    def located(self, at: int, pipeline_id: str, error: str) -> str:
        """Return the text of an error about a part's job, with the names of parts instead of those of their jobs."""
        for part in sorted((part.name for part in self.parts[:at]), key=len, reverse=True):
            name = re.escape(job_id(pipeline_id, part))
            error = re.sub(rf"\bjob '{name}'", f"part {part!r}", error)
            error = re.sub(rf"(?<![\w./-]){name}(?![\w-])", f"{PREFIX}{part}", error)
        field = error.partition(": ")[0]
        named = any(field == path for path, _ in references(self.parts[at].job))
        return f"parts.{at}.job.{error}" if named else f"part {self.parts[at].name!r}: {error}"

    def job_of(self, at: int, pipeline_id: str) -> dict[str, Any]:
        """Return the body of a part's job, in which names of parts are those of their jobs."""
        part = self.parts[at]
        body: dict[str, Any] = _renamed(part.job, pipeline_id)
        labels = body.get("labels")
        if self.labels and (labels is None or isinstance(labels, dict)):
            body["labels"] = {**self.labels, **(labels or {})}
        return body | {"job_uuid": job_id(pipeline_id, part.name)}


def job_id(pipeline_id: str, part: str) -> str:
    """Return the name of a part's job."""
    return f"{pipeline_id}-{part}"


def part_of(value: str) -> str:
    """Return the name of the part that a reference names, as written: `mix` of `parts.mix/model`."""
    return value.removeprefix(PREFIX).partition("/")[0]


def references(job: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each setting of a job that names a part, and its value."""
    for path in REFERENCES:
        yield from _at(job, path.split("."), "")


def _at(value: object, keys: list[str], path: str) -> Iterator[tuple[str, str]]:
    if not keys:
        if isinstance(value, str) and value.startswith(PREFIX):
            yield path, value
    elif keys[0] == "*" and isinstance(value, list | dict):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _at(each, keys[1:], f"{path}.{key}")
    elif isinstance(value, dict) and keys[0] in value:
        yield from _at(value[keys[0]], keys[1:], f"{path}.{keys[0]}".removeprefix("."))


def _renamed(job: dict[str, Any], pipeline_id: str) -> dict[str, Any]:
    named = dict(references(job))

    def copied(value: object, path: str) -> object:
        if path in named:
            part, slash, artifact = str(value).removeprefix(PREFIX).partition("/")
            return f"{job_id(pipeline_id, part)}{slash}{artifact}"
        if isinstance(value, dict):
            return {key: copied(each, f"{path}.{key}".removeprefix(".")) for key, each in value.items()}
        return [copied(each, f"{path}.{at}") for at, each in enumerate(value)] if isinstance(value, list) else value

    if not named:
        return dict(job)
    found = copied(job, "")
    assert isinstance(found, dict)
    return found
