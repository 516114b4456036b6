"""Checks a job's hub ids before accepting it: first in this machine's cache, then on the hub. It needs no torch.

The check uses the environment of a training process on this machine (`child_env`: HF_HOME, HF_HUB_OFFLINE,
HF_ENDPOINT, HF_TOKEN). A cluster may have models that this machine lacks, so jobs for a cluster only get a note.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import httpx

from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.guard import Guard
from llama_stack_provider_moe.control.supervisor.executors.local import training_environment
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.hub_cache import home_folder, is_cached, offline_variable
from llama_stack_provider_moe.ground.redaction import without_passwords
from llama_stack_provider_moe.spec import GRPOSpec, JobSpec, LoadingSpec, TrainingSpec
from llama_stack_provider_moe.spec.evaluated_job import EvaluatedJob
from llama_stack_provider_moe.spec.server_config import ProviderConfig

HUB = "https://huggingface.co"
TIME_LIMIT_S = 5.0
_CACHE = "the cache of the Hugging Face hub on the server's machine"


async def check(request: Draft, spec: JobSpec, config: ProviderConfig, guard: Guard) -> None:
    """Check the hub models that a resolved job names.

    Args:
        request: gets a note for every model that could not be checked.
        spec: the job.
        config: the server's configuration.
        guard: runs the parts that may block.

    Raises:
        InvalidInput: a model is neither cached here nor on the hub.
    """
    if not isinstance(spec, LoadingSpec | EvaluatedJob):
        return
    environment = training_environment(os.environ, config)
    named = {"model": spec.model}
    if isinstance(spec, EvaluatedJob) and spec.eval is not None and spec.eval.judge.model is not None:
        named["eval.judge.model"] = spec.eval.judge.model
    if isinstance(spec, TrainingSpec) and (teacher := spec.teacher_named()) is not None:
        named |= dict([teacher])
    if isinstance(spec, GRPOSpec):
        named |= spec.grader_models()
    for path, model in named.items():
        if os.path.isabs(model) or model in request.waits.names:
            continue
        # In a thread, because the cache may be on a slow disk.
        if not await guard.in_job_paths(_CACHE, is_cached, model, environment):
            token = await guard.in_job_paths(_CACHE, _token, environment)
            await _ask_hub(request, request.name(path), model, environment, token, spec.resources.executor == "ray")


async def _ask_hub(
    request: Draft, field: str, model: str, environment: Mapping[str, str], token: str | None, on_cluster: bool
) -> None:
    offline = offline_variable(environment)
    hint = f"; {request.hints[model]}" if model in request.hints else ""
    if offline is not None:
        why = f"training processes on this server are offline ({offline} is set), and its cache has no such model"
        if not on_cluster:
            raise InvalidInput(field, model, f"a job's name, a folder, or a model of the hub; {why}{hint}")
        request.notes.append(f"{field}: the server did not check whether {model!r} can be loaded: {why}")
        return
    endpoint = environment.get("HF_ENDPOINT", "").rstrip("/") or HUB
    hub = without_passwords(endpoint)  # the URL of an operator's mirror may contain a password
    try:
        answered = await _status(f"{endpoint}/{model}/resolve/main/config.json", token)
        unclear = f"{hub} answered with status {answered}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        answered, unclear = None, f"{hub} did not answer ({type(error).__name__})"
    if answered is not None and answered < httpx.codes.BAD_REQUEST:
        return
    # Without a token, the hub answers 401 both for a missing model and for one that needs a token.
    if answered in (httpx.codes.NOT_FOUND, httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        reasons = {404: "has no model of that name", 401: "has no such model, or HF_TOKEN may not read it"}
        why = reasons.get(answered, "does not let HF_TOKEN read it")
        raise InvalidInput(field, model, f"a job's name, a folder, or a model of the hub; {hub} {why}{hint}")
    if "/" not in model:
        raise InvalidInput(field, model, "a job's name, a folder in state_dir/models, or a hub id with its owner "
                           f"(owner/name); {unclear}")  # fmt: skip
    request.notes.append(f"{field}: the server could not check whether the hub has {model!r}: {unclear}{hint}")


async def _status(url: str, token: str | None) -> int:
    """The status of a HEAD request; follows redirects, because the hub redirects renamed models."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(timeout=TIME_LIMIT_S, follow_redirects=True, headers=headers) as client:
        return (await client.head(url)).status_code


def _token(environment: Mapping[str, str]) -> str | None:
    """The token that a training process would use."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environment.get(name):
            return environment[name].strip()
    path = Path(environment.get("HF_TOKEN_PATH") or home_folder(environment) / "token").expanduser()
    try:
        with path.open("rb") as file:
            return file.read(1024).decode("ascii", "ignore").strip() or None
    except OSError:
        return None
