"""Resolves the models and probes that graders name, as far as the caller may use them, and checks their schemas."""

from pathlib import Path

from llama_stack_provider_moe.control.server import allowed_paths, files, model_names
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.store.store import JobStore
from llama_stack_provider_moe.errors import NotFound
from llama_stack_provider_moe.graders.bounded import checked_schema
from llama_stack_provider_moe.graders.judges import judge_named
from llama_stack_provider_moe.spec.graders import (
    AnyGrader,
    JsonSchema,
    Monitor,
    Multi,
    PlainGrader,
    Refusal,
    RewardModel,
)
from llama_stack_provider_moe.spec.judged_graders import LabelModel, ScoreModel
from llama_stack_provider_moe.spec.server_config import ProviderConfig

PROBE = "probe"  # the recipe, and its artifact


class GraderNames:
    """Resolves what graders name, for one caller.

    Args:
        request: maps fields to the caller's names for them.
        config: the server's configuration.
        store: the store that has the jobs.
        whose: the owner whose jobs the caller may name; None for every owner's.
    """

    def __init__(self, request: Draft, config: ProviderConfig, store: JobStore, whose: str | None) -> None:
        self._names = model_names.Names(request, config, store, whose)
        self._request, self._config, self._store, self._whose = request, config, store, whose

    def resolved(self, grader: AnyGrader, path: str) -> AnyGrader:
        """Return a grader whose models are hub ids or folders.

        Args:
            grader: as the caller wrote it.
            path: of the grader, a dotted name.

        Raises:
            InvalidInput, Forbidden, NotFound, Conflict: it names what is not there, or what the caller may not use; or
                its schema is not valid.
        """
        if isinstance(grader, Multi):
            inner = {name: self._plain(each, f"{path}.graders.{name}") for name, each in grader.graders.items()}
            return grader.model_copy(update={"graders": inner})
        return self._plain(grader, path)

    def _plain(self, grader: PlainGrader, path: str) -> PlainGrader:
        match grader:
            case ScoreModel() | LabelModel():
                judge_named(grader.model, self._config.graders.judges, self._request.name(f"{path}.model"))
                return grader
            case JsonSchema():
                checked_schema(grader.json_schema, grader.closed, self._request.name(f"{path}.json_schema"))
                return grader
            case Refusal(model=str() as model):
                return grader.model_copy(update={"model": self._names.whole_model(model, f"{path}.model")})
            case RewardModel():
                model = self._names.whole_model(grader.model, f"{path}.model", allowed_paths.CLASSIFIER_HEADS)
                return grader.model_copy(update={"model": model})
            case Monitor():
                return grader.model_copy(update={"probe": self._probe(grader.probe, f"{path}.probe")})
            case _:
                return grader

    def _probe(self, value: str, path: str) -> str:
        """The folder of a probe: of a job, or below a folder that jobs may read."""
        try:
            self._store.get(value, self._whose)
        except NotFound:
            field = self._request.name(path)
            return str(allowed_paths.resolve_folder(value, field, self._config, self._may_use))
        job = self._names.completed(value, path, (PROBE,), "its probe is")
        assert job is not None
        folder: Path = files.folder(job, self._store, PROBE)
        return str(folder)

    def _may_use(self, job_id: str) -> None:
        self._store.get(job_id, self._whose)
