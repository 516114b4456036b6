"""OpenAI's fine-tuning API without a host: requests and their jobs, and what is wrong with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server.openai.methods import BASE_LR
from llama_stack_provider_moe.control.server.openai.requests import drafted
from llama_stack_provider_moe.control.server.openai.routes import PREFIX
from llama_stack_provider_moe.control.server.resolve import parse_spec
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import DPOSpec, GRPOSpec, Optimizer, TrainingSpec
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.host_support import ask, serving_in_process, submit
from tests.support.openai_support import require_strict

MINIMAL: dict[str, Any] = {"model": "owner/name", "training_file": "good"}
JOBS = f"http://test{PREFIX}/jobs"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    """A service for requests that create nothing."""
    with serving_in_process(tmp_path_factory.mktemp("shared")) as made:
        yield made


def spec_of(body: dict[str, Any], **settings: Any) -> TrainingSpec:
    """The job of a request, as the server would validate it."""
    config = ProviderConfig(**settings)
    spec = parse_spec(drafted(body, config)[1], config)
    assert isinstance(spec, TrainingSpec)
    return spec


def method(kind: str, **hyperparameters: Any) -> dict[str, Any]:
    """A request with that method and these hyperparameters."""
    return MINIMAL | {"method": {"type": kind, kind: {"hyperparameters": hyperparameters}}}


def test_the_base_of_supervised_is_the_default_learning_rate() -> None:
    assert BASE_LR["sft"] == Optimizer().lr == spec_of(MINIMAL).optimizer.lr


GRADER = {"type": "string_check", "name": "right", "input": "{{ sample.output_text }}", "operation": "ilike",
          "reference": "{{item.answer}}"}  # fmt: skip


def reinforced(grader: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    """A request for reinforcement with that grader and these hyperparameters."""
    block = {"grader": grader or GRADER, "hyperparameters": given}
    return MINIMAL | {"method": {"type": "reinforcement", "reinforcement": block}, "moe": moe or {}}


def grpo_of(body: dict[str, Any], **settings: Any) -> GRPOSpec:
    """The job of a request for reinforcement."""
    spec = spec_of(body, **settings)
    assert isinstance(spec, GRPOSpec)
    return spec


def test_reinforcement_is_grpo_and_counts_prompts() -> None:
    words = (
        "n_epochs",
        "batch_size",
        "learning_rate_multiplier",
        "compute_multiplier",
        "eval_interval",
        "eval_samples",
    )
    auto = grpo_of(reinforced(**dict.fromkeys(words, "auto"), reasoning_effort="default"))
    assert auto == grpo_of(reinforced())
    assert (auto.training.batch_size, auto.rl.n_generations, auto.optimizer.lr) == (4, 4, BASE_LR["grpo"])
    assert auto.reward[0].grader.model_dump() == GRADER | {"input": "{{ sample.output_text }}"}
    more = grpo_of(reinforced(batch_size=6, compute_multiplier=2, learning_rate_multiplier=0.5, n_epochs=3,
                              eval_samples=1))  # fmt: skip
    assert (more.training.batch_size, more.rl.n_generations, more.training.n_epochs) == (48, 8, 3)
    assert more.optimizer.lr == BASE_LR["grpo"] / 2
    assert grpo_of(reinforced(compute_multiplier=2)).training.batch_size == 8, "auto fits the answers"
    parts = {"training": {"gradient_accumulation_steps": 3}, "rl": {"n_generations": 2, "beta": 0.1}}
    parted = grpo_of(reinforced(batch_size=6, moe=parts))
    assert (parted.training.batch_size, parted.rl.n_generations, parted.rl.beta) == (4, 2, 0.1)
    with pytest.raises(InvalidInput, match=r"a number whose product with 2, .* is a multiple of 3"):
        grpo_of(reinforced(batch_size=4, moe=parts))
    assert grpo_of(reinforced(moe={"rl": {"n_generations": 2}})).training.batch_size == 2


@pytest.mark.parametrize(("kind", "recipe"), [("supervised", "sft"), ("dpo", "dpo")])
def test_hyperparameters(kind: str, recipe: str) -> None:
    auto = spec_of(method(kind, n_epochs="auto", batch_size="auto", learning_rate_multiplier="auto"))
    assert auto == spec_of(MINIMAL | {"method": {"type": kind}})
    assert (auto.recipe, auto.training.n_epochs, auto.optimizer.lr) == (recipe, 1, BASE_LR[recipe])
    chosen = spec_of(method(kind, n_epochs=3, batch_size=2, learning_rate_multiplier=0.5))
    assert (chosen.training.n_epochs, chosen.training.batch_size) == (3, 2)
    assert chosen.optimizer.lr == pytest.approx(BASE_LR[recipe] / 2)


def test_beta_is_of_dpo() -> None:
    spec = spec_of(method("dpo", beta=0.3))
    assert isinstance(spec, DPOSpec)
    assert spec.beta == 0.3
    with pytest.raises(InvalidInput, match=r"method\.supervised\.hyperparameters\.beta: unknown key"):
        spec_of(method("supervised", beta=0.3))


def test_the_older_place_of_hyperparameters() -> None:
    assert spec_of(MINIMAL | {"hyperparameters": {"n_epochs": 2}}).training.n_epochs == 2
    with pytest.raises(InvalidInput, match=r"method\.supervised\.hyperparameters has them"):
        spec_of(method("supervised", n_epochs=1) | {"hyperparameters": {"n_epochs": 2}})


def test_a_batch_is_of_all_processes() -> None:
    moe = {"resources": {"gpus": 0, "processes": 2}, "training": {"gradient_accumulation_steps": 4}}
    spec = spec_of(method("supervised", batch_size=32) | {"moe": moe})
    assert spec.training.batch_size == 4
    with pytest.raises(InvalidInput, match="batch_size: 12 is not valid; expected a multiple of 8"):
        spec_of(method("supervised", batch_size=12) | {"moe": moe})
    accumulates = {"defaults": {"training": {"gradient_accumulation_steps": 3}}}
    assert spec_of(method("supervised", batch_size=12), **accumulates).training.batch_size == 4


def test_a_default_of_the_server_is_what_auto_means() -> None:
    assert spec_of(method("dpo"), defaults={"optimizer": {"lr": 3e-5}}).optimizer.lr == 3e-5


def test_everything_else_reaches_the_job() -> None:
    body = MINIMAL | {
        "validation_file": "one", "seed": 7, "suffix": "mine", "metadata": {"team": "a"},
        "integrations": [{"type": "wandb", "wandb": {"project": "p", "entity": "e"}}],
        "moe": {"adapter": {"rank": 4}, "moe": {"train_router": True}, "options": {"max_length": 64},
                "export": {"merged": True}, "resources": {"gpus": 0}},
    }  # fmt: skip
    spec = spec_of(body)
    assert (spec.data.validation_dataset_id, spec.options.seed, spec.metadata) == ("one", 7, {"team": "a"})
    assert spec.job_uuid is not None
    assert spec.job_uuid.startswith("mine-")
    assert spec.trackers.wandb is not None
    assert (spec.trackers.wandb.project, spec.trackers.wandb.entity) == ("p", "e")
    assert spec.adapter is not None
    assert (spec.adapter.rank, spec.moe.train_router, spec.options.max_length) == (4, True, 64)
    assert spec.export is not None
    assert spec.resources.gpus == 0
    assert body["moe"]["options"] == {"max_length": 64}, "the request is unchanged"


RL_PLACE = "method.reinforcement.hyperparameters"
MISTAKES: list[tuple[str, dict[str, Any], str, str]] = [
    ("unknown key", {"color": 1}, "color", "color: unknown key"),
    ("no such method", {"method": {"type": "ppo"}}, "method.type", "'ppo' is not valid"),
    ("no grader", {"method": {"type": "reinforcement"}}, "method.reinforcement", "an object with the grader"),
    ("python", reinforced({"type": "python", "name": "p", "source": "1"}), "method.reinforcement.grader",
     "this server runs no code of users"),
    ("grader", reinforced(GRADER | {"operation": "gt"}), "method.reinforcement.grader.operation", "'gt' is not valid"),
    ("interval", reinforced(eval_interval=5), f"{RL_PLACE}.eval_interval", "answered after each epoch"),
    ("samples", reinforced(eval_samples=4), f"{RL_PLACE}.eval_samples", "1 or 'auto'"),
    ("effort", reinforced(reasoning_effort="high"), f"{RL_PLACE}.reasoning_effort", "no such setting"),
    ("compute", reinforced(compute_multiplier=0.3), f"{RL_PLACE}.compute_multiplier", "a whole number of answers"),
    ("compute twice", reinforced(compute_multiplier=1, moe={"rl": {"n_generations": 4}}), "moe.rl.n_generations",
     "compute_multiplier states it"),
    ("beta of dpo", reinforced(beta=0.1), f"{RL_PLACE}.beta", "unknown key"),
    ("form", {"method": {"type": "reinforcement", "reinforcement": {
        "grader": GRADER, "response_format": {"type": "json_schema", "json_schema": {}}}}},
     "method.reinforcement.response_format", "a grader of type 'json_schema'"),
    ("no such column", reinforced(), "training_file", "answer"),
    ("two methods", {"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "method.type is 'dpo'"),
    ("epochs", method("supervised", n_epochs=0), "method.supervised.hyperparameters.n_epochs", "expected >= 1"),
    ("text", method("supervised", n_epochs="many"), "method.supervised.hyperparameters.n_epochs", "an integer"),
    ("a boolean", method("dpo", beta=True), "method.dpo.hyperparameters.beta", "a number"),
    ("beta", method("dpo", beta=-1), "method.dpo.hyperparameters.beta", "expected > 0"),
    ("multiplier", method("dpo", learning_rate_multiplier=0),
     "method.dpo.hyperparameters.learning_rate_multiplier", "expected > 0"),
    ("seed", {"seed": -1}, "seed", "expected >= 0"),
    ("suffix", {"suffix": "a b"}, "suffix", "letters, digits"),
    ("metadata", {"metadata": {"k": "v" * 513}}, "metadata.k", "at most 512 characters"),
    ("much metadata", {"metadata": {str(n): "" for n in range(17)}}, "metadata", "at most 16"),
    ("tracker", {"integrations": [{"type": "other", "wandb": {"project": "p"}}]}, "integrations.0.type", "'wandb'"),
    ("project", {"integrations": [{"type": "wandb", "wandb": {"project": "a b"}}]},
     "integrations.0.wandb.project", "1 to 64 letters"),
    ("run name", {"integrations": [{"type": "wandb", "wandb": {"project": "p", "name": "n"}}]},
     "integrations.0.wandb.name", "name of its job"),
    ("tags", {"integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["t"]}}]},
     "integrations.0.wandb.tags", "no tags"),
    ("unknown block", {"moe": {"adaptor": {}}}, "moe.adaptor", "unknown key (did you mean adapter?)"),
    ("unknown setting", {"moe": {"adapter": {"rnk": 4}}}, "moe.adapter.rnk", "unknown key (did you mean rank?)"),
    ("bad setting", {"moe": {"adapter": {"rank": -1}}}, "moe.adapter.rank", "-1 is not valid"),
    ("stated elsewhere", {"moe": {"model": "x"}}, "moe.model", "`model` of the request states it"),
    ("stated twice", {"seed": 1, "moe": {"options": {"seed": 2}}}, "moe.options.seed", "seed states it"),
    ("not a block", {"seed": 1, "moe": {"options": 3}}, "moe.options", "an object"),
    ("rows", {"training_file": "bad"}, "training_file", "row 4: row: has columns"),
    ("held-out rows", {"validation_file": "bad"}, "validation_file", "row 4: row: has columns"),
    ("too few rows", {"training_file": "one"}, "training_file", "at least 2 rows"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "param", "text"), [case[1:] for case in MISTAKES], ids=[one[0] for one in MISTAKES]
)
def test_mistakes(shared: PostTrainingService, changes: dict[str, Any], param: str, text: str) -> None:
    answer = ask(shared, "POST", JOBS, json=MINIMAL | changes)
    require_strict(answer.json())
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert text in error["message"]
    assert error["code"] == ("invalid_file" if "row 4" in text or text == "answer" else "invalid_value")
    assert shared.store.list(None) == []


def test_other_errors_have_the_same_shape(service: PostTrainingService) -> None:
    done = submit(service, job_uuid="done")
    service.store.request_cancel(done, None)
    cases: list[tuple[str, str, Any, int, str]] = [
        ("POST", "", MINIMAL | {"training_file": "nope"}, 404, "not_found"),
        ("POST", "", [], 400, "invalid_value"),
        ("GET", "/ftjob-nope", None, 404, "not_found"),
        ("GET", "/done", None, 404, "not_found"),
        ("POST", "/ftjob-nope/cancel", None, 404, "not_found"),
        ("GET", "?limit=0", None, 400, "invalid_value"),
        ("GET", "?after=x", None, 404, "not_found"),
        ("GET", "/ftjob-done/events?after=x", None, 400, "invalid_value"),
        ("GET", "/ftjob-done/checkpoints?after=x", None, 400, "invalid_value"),
        ("GET", "/../files/file-result-done/content", None, 404, "not_found"),
        ("GET", "/../files/done", None, 404, "not_found"),
    ]
    for verb, path, body, status, code in cases:
        answer = ask(service, verb, JOBS + path, **({} if body is None else {"json": body}))
        require_strict(answer.json())
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert ask(service, "GET", JOBS + "?limit=0").json()["error"]["param"] == "limit"


def test_a_body_that_is_not_json(service: PostTrainingService) -> None:
    answer = ask(service, "POST", JOBS, content=b"{", headers={"Content-Type": "application/json"})
    require_strict(answer.json())
    assert answer.status_code == 400
