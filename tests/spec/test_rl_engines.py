"""`rl.engine` of a job, and `engines` of a server: what may be asked, and where."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.errors import InvalidBody, InvalidInput
from llama_stack_provider_moe.spec import GRPOSpec
from llama_stack_provider_moe.spec.engines_config import ENGINES, engine_named
from llama_stack_provider_moe.spec.rl_engines import ENGINE_TYPES, VllmServerEngine
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from llama_stack_provider_moe.spec.validation_errors import validated

BODY: dict[str, Any] = {
    "recipe": "grpo", "model": "m", "data": {"dataset_id": "a"},
    "reward": [{"grader": {"type": "length", "name": "short", "most": 9}}],
}  # fmt: skip
FAST = {"url": "http://127.0.0.1:8000/", "weights_dir": "/dev/shm/moe", "key_variable": "VLLM_KEY"}


def job(engine: dict[str, Any], **blocks: Any) -> GRPOSpec:
    return validated(GRPOSpec, {**BODY, "rl": {"engine": engine}, **blocks})


def test_each_type_is_one_and_the_model_itself_is_the_default() -> None:
    assert {type_: job({"type": type_, **({"server": "fast"} if type_ == "vllm_server" else {})}).rl.engine.type
            for type_ in ENGINE_TYPES} == {type_: type_ for type_ in ENGINE_TYPES}  # fmt: skip
    assert validated(GRPOSpec, BODY).rl.engine.type == "transformers"
    server = job({"type": "vllm_server", "server": "fast"}).rl.engine
    assert isinstance(server, VllmServerEngine)
    assert (server.importance_sampling, server.importance_sampling_cap, server.max_mismatch) == (
        "sequence_mask",
        3,
        0.5,
    )


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ({"type": "sglang"}, "rl.engine: "),
        ({"type": "vllm_server"}, "rl.engine.server: is missing"),
        ({"type": "vllm_server", "server": "http://x"}, "rl.engine.server: 'http://x' is not valid; expected 1 to 128"),
        ({"type": "vllm_server", "server": "a", "url": "http://x"}, "rl.engine.url: unknown key"),
        ({"type": "vllm_server", "server": "a", "importance_sampling_cap": 0}, "rl.engine.importance_sampling_cap: 0"),
        ({"type": "vllm_colocate", "gpu_memory_utilization": 1}, "rl.engine.gpu_memory_utilization: 1"),
        ({"type": "transformers", "server": "a"}, "rl.engine.server: unknown key"),
    ],
    ids=str,
)
def test_a_mistake_is_named_by_its_field(engine: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidBody) as refused:
        job(engine)
    assert told in str(refused.value)


@pytest.mark.parametrize("field", ["quantize_base", "use_dora"])
def test_weights_that_can_not_be_given_exactly_are_refused(field: str) -> None:
    with pytest.raises(InvalidBody, match=f"rl.engine: 'vllm_server' is not valid with adapter.{field}"):
        job({"type": "vllm_server", "server": "fast"}, adapter={field: True})


@pytest.mark.parametrize("engine", [{"type": "vllm_server", "server": "fast"}, {"type": "vllm_colocate"}], ids=str)
def test_an_engine_is_for_a_job_of_one_process(engine: dict[str, Any]) -> None:
    """One folder of weights and one random order of answers; the trained model itself writes in several processes."""
    two = {"gpus": 0, "processes": 2}
    with pytest.raises(InvalidBody) as refused:
        job(engine, resources=two)
    assert f"resources: 2 processes are not valid with rl.engine {engine['type']!r}; expected 1" in str(refused.value)
    assert job({"type": "transformers"}, resources=two).resources.ranks == 2


def test_only_servers_that_the_operator_names_are_asked(tmp_path: Path) -> None:
    config = ProviderConfig.model_validate({"state_dir": tmp_path / "state", "engines": {"fast": FAST}})
    assert engine_named("fast", config.engines, "rl.engine.server").url == "http://127.0.0.1:8000"
    assert "VLLM_KEY" in config.secrets
    assert ENGINES.validate_json(ENGINES.dump_json(config.engines)) == config.engines
    with pytest.raises(InvalidInput, match=r"rl\.engine\.server: 'slow' is not valid; expected one of fast, which"):
        engine_named("slow", config.engines, "rl.engine.server")
    with pytest.raises(
        InvalidInput, match=r"expected a name in `engines` of the server's configuration, which has none"
    ):
        engine_named("fast", {}, "rl.engine.server")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"url": "http://me:secret@host"}, "without a user or a path"),
        ({"url": "ftp://host"}, "expected http://HOST:PORT"),
        ({"weights_dir": "here"}, "'here' is not valid; expected an absolute path"),
        ({"key_variable": "A KEY"}, "String should match pattern"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_mistake_of_the_operator_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as refused:
        ProviderConfig.model_validate({"engines": {"fast": FAST | changes}})
    assert told in str(refused.value)


def test_weights_are_written_apart_from_the_state(tmp_path: Path) -> None:
    settings = {"state_dir": tmp_path, "engines": {"fast": FAST | {"weights_dir": str(tmp_path / "jobs")}}}
    with pytest.raises(ValidationError, match=r"engines\.fast\.weights_dir: .* and state_dir .* overlap"):
        ProviderConfig.model_validate(settings)
