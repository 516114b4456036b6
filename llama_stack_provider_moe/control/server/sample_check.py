"""Checks a job's rows with its model's chat template where this machine has the model's tokenizer."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.guard import Guard
from llama_stack_provider_moe.control.server.row_sample import RowSample
from llama_stack_provider_moe.control.server.template_check import Kind, Question, Sample, TemplateChecker
from llama_stack_provider_moe.control.supervisor.executors.local import training_environment
from llama_stack_provider_moe.errors import InvalidInput, InvalidRows, RowProblem
from llama_stack_provider_moe.ground.hub_cache import cached_model
from llama_stack_provider_moe.spec import (
    AnalysisSpec,
    BreakerSpec,
    DPOSpec,
    InferenceJob,
    JobSpec,
    KTOSpec,
    LoadingSpec,
    RewardSpec,
    WritingSpec,
)
from llama_stack_provider_moe.spec.row_sources import RowSource
from llama_stack_provider_moe.spec.server_config import ProviderConfig

_TOKENIZER = "tokenizer_config.json"  # whatever kind of tokenizer it is


async def tokenizer_folder(spec: JobSpec, config: ProviderConfig, guard: Guard) -> Path | None:
    """Return the folder with the files of the model's tokenizer: the model's own, or that in the hub's cache."""
    if not isinstance(spec, LoadingSpec):
        return None
    environment = training_environment(os.environ, config)
    return await guard.in_job_paths(f"model {spec.model!r}", _at_hand, spec.model, environment)


def _at_hand(model: str, environment: Mapping[str, str]) -> Path | None:
    folder = Path(model) if os.path.isabs(model) else cached_model(model, environment)
    return folder if folder is not None and (folder / _TOKENIZER).is_file() else None


def kind_of(spec: JobSpec, source: RowSource) -> Kind | None:
    """Return how the job renders the rows of a source; None if the model's template renders none of them."""
    if source.kind == "judged":
        return None
    if source.kind != "recipe":
        return "whole" if source.answered else "prompt"
    if isinstance(spec, AnalysisSpec):
        return "whole"
    if isinstance(spec, WritingSpec):
        return "prompt"
    if isinstance(spec, DPOSpec | RewardSpec):
        return "pair"
    if isinstance(spec, KTOSpec):
        return "answer"
    if isinstance(spec, BreakerSpec) and source.part in ("train", "validation"):
        return "break"
    return "learnt"


async def check(
    request: Draft,
    spec: JobSpec,
    model: Path,
    samples: Sequence[tuple[RowSource, RowSample]],
    counts: Mapping[str, int],
    templates: TemplateChecker,
) -> None:
    """Render the sampled rows as the job will.

    Args:
        request: gets a note if the rows could not be checked.
        spec: the job.
        model: `tokenizer_folder`.
        samples: the job's data sets, each with the rows kept of it.
        counts: number of rows of each part.
        templates: renders them.

    Raises:
        InvalidInput: the model has no chat template for these rows.
        InvalidRows: the chat template can't render some of the rows.
    """
    assert isinstance(spec, LoadingSpec)
    parts: dict[str, Sample] = {}
    for source, sample in samples:
        kind, sampled = kind_of(spec, source), sample.rows()
        if kind is not None and sampled:
            parts[source.part] = {"kind": kind, "rows": sampled}
    if not parts:
        return
    options = spec.options
    rendering = {} if isinstance(spec, InferenceJob) else {
        "turns": spec.options.turns, "reasoning": spec.options.reasoning, "special_tokens": spec.options.special_tokens
    }  # fmt: skip
    checked = await templates.check(
        Question(
            model=str(model), name=spec.model, chat_template=options.chat_template, rendering=rendering, parts=parts
        )
    )
    if checked.unavailable is not None:
        request.notes.append(f"the rows were not checked with the model's chat template: {checked.unavailable}")
    if checked.refused is not None:
        expected = f"a model that can render conversations; this one {checked.refused}"
        raise InvalidInput(request.name("model"), spec.model, expected)
    for source, _ in samples:
        problems = [RowProblem(number, *rest) for part, number, *rest in checked.problems if part == source.part]
        if problems:
            looked_at = len(parts[source.part]["rows"])
            raise InvalidRows(source.dataset_id, problems, len(problems), counts[source.part], looked_at)
