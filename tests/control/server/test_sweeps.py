"""Sweeps as callers meet them: every combination is checked before anything starts; 404 for strangers."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.server import sweeps as sweeps_module
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import NewJob
from llama_stack_provider_moe.jobdir.state import JobState
from tests.support.cli_support import moe_train
from tests.support.host_support import BODY, Datasets, ask, caller, folder_of, over_http, serving_in_process

PARAMETERS = {"optimizer.lr": [1e-4, 2e-4], "adapter.rank": [8, 16]}
GRPO = {**BODY, "recipe": "grpo", "reward": [{"grader": {"type": "length", "name": "short", "most": 12}}]}
JOB = BODY | {"adapter": {"alpha": 16}, "labels": {"team": "geo"}}


@pytest.fixture
def datasets() -> Datasets:
    return Datasets()


@pytest.fixture
def service(tmp_path: Path, datasets: Datasets) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path, datasets) as made:
        yield made


def create(service: PostTrainingService, job: Any = JOB, parameters: Any = PARAMETERS, **more: Any) -> httpx.Response:
    return ask(service, "POST", "/sweeps", json={"job": job, "parameters": parameters, "sweep_uuid": "lr"} | more)


def message(answer: httpx.Response) -> str:
    assert answer.status_code >= 400, answer.text
    found: str = answer.json()["error"]["message"]
    return found


def nothing_is_left(service: PostTrainingService) -> None:
    assert service.store.list(None) == []
    assert service.store.sweeps.list(None, 9) == []
    assert list(service.config.jobs_dir.glob("[!.]*")) == []
    assert list((service.config.state_dir / "staging").iterdir()) == []


def test_every_combination_becomes_a_job_of_its_own(service: PostTrainingService, datasets: Datasets) -> None:
    reads: list[int] = []
    datasets.during = lambda: reads.append(1)
    made = create(service, max_parallel=2).json()
    names = [f"lr-{number}" for number in range(4)]
    assert (made["sweep_uuid"], made["jobs"]) == ("lr", names)
    specs = [json.loads(folder_of(service, name).spec.read_text()) for name in names]
    wanted = [(1e-4, 8), (1e-4, 16), (2e-4, 8), (2e-4, 16)]
    assert [(spec["optimizer"]["lr"], spec["adapter"]["rank"]) for spec in specs] == wanted
    assert [(spec["job_uuid"], spec["adapter"]["alpha"]) for spec in specs] == [(name, 16) for name in names]
    assert len(reads) == 1, "the rows are read once"
    files = [folder_of(service, name).train_rows.stat() for name in names]
    assert {file.st_ino for file in files} == {files[0].st_ino}
    assert files[0].st_nlink == 4
    found = ask(service, "GET", "/sweeps/lr").json()
    assert (found["status"], found["max_parallel"], found["parameters"]) == ("scheduled", 2, PARAMETERS)
    assert [job["chosen"] for job in found["data"]] == [
        {"optimizer.lr": lr, "adapter.rank": rank} for lr, rank in wanted
    ]
    assert ask(service, "GET", "/sweeps").json()["data"][0]["jobs"] == {"scheduled": 4}
    listed = ask(service, "GET", "/jobs?sweep=lr&label=team=geo").json()["data"]
    assert [job["job_uuid"] for job in listed] == names[::-1]


def test_jobs_that_read_rows_otherwise_read_them_themselves(service: PostTrainingService, datasets: Datasets) -> None:
    reads: list[int] = []
    datasets.during = lambda: reads.append(1)
    create(service, parameters={"options.validation_split": [0.1, 0.2], "optimizer.lr": [1e-4, 2e-4]})
    assert len(reads) == 2


def test_a_draw_is_repeatable_and_keeps_the_order(service: PostTrainingService) -> None:
    many = {"optimizer.lr": [n * 1e-5 for n in range(1, 11)], "options.seed": list(range(10))}
    drawn = []
    for name in ("one", "two"):
        create(service, parameters=many, random=5, seed=7, sweep_uuid=name)
        drawn.append([job["chosen"] for job in ask(service, "GET", f"/sweeps/{name}").json()["data"]])
    assert drawn[0] == drawn[1]
    assert len({json.dumps(each) for each in drawn[0]}) == 5
    create(service, parameters=many, random=5, seed=8, sweep_uuid="three")
    assert [job["chosen"] for job in ask(service, "GET", "/sweeps/three").json()["data"]] != drawn[0]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("a value", {"parameters": {"optimizer.lr": [1e-4, -1]}},
     "with optimizer.lr=-1: optimizer.lr: -1 is not valid; expected > 0"),
    ("a pair", {"parameters": {"training.dtype": ["fp32", "fp16"], "adapter": [None, {"rank": 8}]}},
     'with training.dtype="fp16", adapter=null: '),
    ("an unknown setting", {"parameters": {"optimizer.lrr": [1]}}, "with optimizer.lrr=1: optimizer.lrr: unknown key"),
    ("a way through a value", {"parameters": {"optimizer.lr.more": [1]}, "job": JOB | {"optimizer": {"lr": 1e-4}}},
     "optimizer.lr.more: leads through optimizer.lr, which is not a block"),
    ("a stranger", {"notify": {"url": "https://elsewhere.example.com/"}},
     "notify.url: 'https://elsewhere.example.com/' is not valid; expected no `notify`, because this server"),
    ("no URL", {"notify": {"url": "ftp://elsewhere"}}, "notify.url: 'ftp://elsewhere' is not valid"),
    ("events", {"notify": {"url": "https://a.example.com/", "events": []}}, "notify.events: unknown key"),
    ("a name", {"parameters": {"job_uuid": ["a"]}}, "job_uuid: can't be swept"),
    ("twice once read", {"parameters": {"optimizer.lr": [1e-4, "0.0001"]}}, 'optimizer.lr="0.0001"'),
    ("twice as numbers", {"parameters": {"training.n_epochs": [1, 2, 1.0]}}, "is the same job once it is read"),
    ("twice", {"parameters": {"optimizer.lr": [1e-4, 1e-4]}}, "optimizer.lr: a value is given twice"),
    ("a part of another", {"parameters": {"adapter": [None], "adapter.rank": [8]}}, "is a part of adapter"),
    ("no values", {"parameters": {"optimizer.lr": []}}, "parameters.optimizer.lr: "),
    ("no setting", {"parameters": {}}, "parameters: "),
    ("a path", {"parameters": {"Optimizer/lr": [1]}}, "parameters.Optimizer/lr"),
    ("a name in the job", {"job": JOB | {"job_uuid": "mine"}}, "job_uuid: is not for a sweep"),
    ("a metric", {"metric": "beauty"}, "'beauty' is not valid; expected one of validation_loss"),
    ("a metric of another recipe", {"metric": "rewards/accuracies"}, "metric: 'rewards/accuracies' is not valid"),
    ("a reward of SFT", {"metric": "reward", "direction": "maximize"},
     "a figure that recipe 'sft' measures: validation_loss, loss, perplexity, mean_token_accuracy"),
    ("a small reward", {"job": GRPO, "metric": "reward"}, "a larger reward is better; expected 'maximize'"),
    ("another grader", {"job": GRPO, "metric": "rewards/long/mean", "direction": "maximize"},
     "'rewards/long/mean' is not valid; expected a figure that recipe 'grpo' measures: validation_loss, perplexity, "
     "reward, completions/mean_length, completions/clipped_ratio, rewards/short/mean"),
    ("KL without beta", {"job": GRPO, "metric": "kl"}, "'kl' is not valid"),
    ("nothing held out", {"job": JOB | {"options": {"validation_split": 0}}}, "a sweep compares figures on held-out"),
    ("no training", {"job": {"recipe": "export", "of": "a", "export": {}}}, ""),
    ("rows", {"job": JOB | {"data": {"dataset_id": "bad"}}}, "dataset 'bad': 1 problem(s)"),
    ("no data set", {"job": JOB | {"data": {"dataset_id": "none"}}}, "none"),
    ("too many", {"parameters": {"options.seed": list(range(65))}}, "at most 64 jobs of a sweep (`limits.sweep_jobs`"),
    ("a large draw", {"random": 5}, "random: 5 is not valid; expected at most 4"),
    ("an unknown key", {"grid": {}}, "grid: unknown key"),
]  # fmt: skip


def test_jobs_that_learn_from_rewards_are_ranked_by_a_held_out_reward(service: PostTrainingService) -> None:
    found = []
    for name, metric, beta in (("one", "reward", 0.0), ("two", "eval_rewards/short/mean", 0.0), ("three", "kl", 0.1)):
        direction = "minimize" if metric == "kl" else "maximize"
        job = GRPO | {"rl": {"beta": beta}}
        answer = create(service, job=job, sweep_uuid=name, metric=metric, direction=direction)
        assert answer.status_code == 200, answer.text
        shown = ask(service, "GET", f"/sweeps/{name}").json()
        found.append((shown["metric"], shown["direction"]))
    assert found == [("reward", "maximize"), ("eval_rewards/short/mean", "maximize"), ("kl", "minimize")]


def test_on_policy_distillation_is_ranked_by_its_divergence(service: PostTrainingService) -> None:
    job = {**BODY, "recipe": "distill", "teacher": BODY["model"]}
    assert create(service, job=job, sweep_uuid="taught").status_code == 200
    refused = create(service, job=job, sweep_uuid="not", metric="kl")
    assert "a figure that recipe 'distill' measures: validation_loss, perplexity" in message(refused)


@pytest.mark.parametrize(("changes", "said"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_a_mistake_is_named_and_leaves_nothing(
    service: PostTrainingService, changes: dict[str, Any], said: str
) -> None:
    answer = create(service, **changes)
    assert said in message(answer)
    assert answer.status_code in (400, 404)
    nothing_is_left(service)


def test_a_count_of_combinations_is_not_spelled_out(service: PostTrainingService) -> None:
    wide = {f"options.x{number}": list(range(1000)) for number in range(16)}
    assert "at most 64 jobs" in message(create(service, parameters=wide))


def test_early_ending_needs_optuna(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps_module, "is_installed", lambda: False)
    said = message(create(service, halving={}))
    assert "pip install 'llama-stack-provider-moe[sweeps]'" in said
    assert create(service).status_code == 200


def test_names_must_be_free(service: PostTrainingService) -> None:
    asyncio.run(service.submit(BODY | {"job_uuid": "lr-2"}))
    assert "with optimizer.lr=0.0002, adapter.rank=8: job_uuid: 'lr-2' is taken" in message(create(service))
    assert create(service, sweep_uuid="free").status_code == 200
    assert create(service, sweep_uuid="free").status_code == 409


def test_a_job_that_takes_a_name_meanwhile_keeps_its_folder(service: PostTrainingService, datasets: Datasets) -> None:
    def take() -> None:
        datasets.during = lambda: None
        taken = NewJob("lr-3", "bob", "sft", "some/model", str(folder_of(service, "lr-3").root))
        folder_of(service, "lr-3").root.mkdir()
        (folder_of(service, "lr-3").root / "mine").touch()
        service.store.add(taken)

    datasets.during = take
    assert create(service).status_code == 409
    assert (folder_of(service, "lr-3").root / "mine").exists()
    assert [job.id for job in service.store.list(None)] == ["lr-3"]


def test_limits_of_an_owner_count_every_job(tmp_path: Path) -> None:
    with serving_in_process(tmp_path, limits={"waiting_jobs": 5, "sweep_jobs": 4}) as service:
        assert create(service).status_code == 200
        refused = create(service, sweep_uuid="more", parameters={"options.seed": [1, 2]})
        assert refused.status_code == 429
        assert "so 1 are left, and 2 are needed" in message(refused)
        assert len(service.store.list(None)) == 4
        assert "at most 4 jobs" in message(create(service, parameters={"options.seed": [1, 2, 3, 4, 5]}))


def test_a_strangers_sweep_is_not_found(service: PostTrainingService) -> None:
    with caller("ann"):
        create(service)
    with caller("bob"):
        for method, path in (("GET", "/lr"), ("POST", "/lr/cancel"), ("DELETE", "/lr")):
            answer = ask(service, method, f"/sweeps{path}")
            assert (answer.status_code, message(answer)) == (404, "sweep 'lr' does not exist")
        assert ask(service, "GET", "/sweeps").json()["data"] == []
        assert ask(service, "GET", "/jobs?sweep=lr").json()["data"] == []
    with caller("ann"):
        assert ask(service, "GET", "/sweeps/lr").status_code == 200


def test_cancel_ends_all_and_then_it_can_be_deleted(service: PostTrainingService) -> None:
    create(service)
    assert service.store.claim("me") is not None
    assert "has jobs that wait or run (lr-0, lr-1, lr-2)" in message(ask(service, "DELETE", "/sweeps/lr"))
    assert ask(service, "POST", "/sweeps/lr/cancel").json()["jobs"] == {"in_progress": 1, "cancelled": 3}
    service.store.move("lr-0", JobState.CANCELLED)
    assert ask(service, "POST", "/sweeps/lr/cancel").json()["status"] == "cancelled"
    folder = str(service.config.jobs_dir / "outside")
    service.store.add(NewJob("outside", "anonymous", "sft", "owner/name", folder, uses=("lr-2",)))
    assert "sweep 'lr' is needed by job 'outside'" in message(ask(service, "DELETE", "/sweeps/lr"))
    assert len(ask(service, "GET", "/sweeps/lr").json()["data"]) == 4
    service.store.move("outside", JobState.CANCELLED)
    service.store.delete("outside", None)
    deleted = ask(service, "DELETE", "/sweeps/lr").json()
    assert deleted["jobs"] == [f"lr-{number}" for number in range(4)]
    nothing_is_left(service)


def test_a_sweep_that_has_ended_is_not_cancelled(service: PostTrainingService) -> None:
    create(service)
    for number in range(4):
        service.store.move(f"lr-{number}", JobState.IN_PROGRESS)
        service.store.move(f"lr-{number}", JobState.COMPLETED)
    answer = ask(service, "POST", "/sweeps/lr/cancel")
    told = "sweep 'lr' has ended: it is completed; there is nothing to cancel"
    assert (answer.status_code, message(answer)) == (409, told)
    assert ask(service, "GET", "/sweeps/lr").json()["cancel_requested_at"] is None
    with over_http(service) as url:
        refused = moe_train("sweeps", "lr", "--cancel", "--url", url)
    assert (refused.code, told in refused.err) == (2, True)


def test_the_search_of_the_older_api_names_the_route(service: PostTrainingService) -> None:
    training = {"n_epochs": 1, "data_config": {"dataset_id": "good", "batch_size": 1, "shuffle": True,
                                                "data_format": "instruct"}}  # fmt: skip
    body = {"job_uuid": "x", "model": "owner/name", "training_config": training, "logger_config": {},
            "hyperparam_search_config": {"lr": [1, 2]}}  # fmt: skip
    said = message(ask(service, "POST", "/supervised-fine-tune", json=body))
    assert "POST sweeps (moe-train sweep) runs one for each combination" in said


def test_the_commands(service: PostTrainingService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(BODY))
    with over_http(service) as url:
        monkeypatch.setenv("MOE_TRAIN_URL", url)
        grid = ("--grid", "optimizer.lr=1e-4,2e-4", "--grid", 'adapter=[null, {"rank": 8}]')
        done = moe_train("sweep", str(file), *grid, "--name", "lr", "--max-parallel", "2", "--label", "team=geo")
        assert done.code == 0, done.err
        assert "sweep lr has 4 jobs, lr-0 to lr-3" in done.out
        assert "lr" in moe_train("sweeps").out
        shown = moe_train("sweeps", "lr").out
        assert "4 scheduled" in shown
        assert "optimizer.lr" in shown
        assert '{"rank": 8}' in shown
        assert len(moe_train("ls", "--sweep", "lr", "--label", "team", "--json").document["data"]) == 4
        assert moe_train("sweeps", "lr", "--rm").code == 2
        assert moe_train("sweeps", "lr", "--cancel").out == "sweep lr is cancelled\n"
        assert moe_train("sweeps", "lr", "--rm").out == "sweep lr is deleted, with 4 jobs\n"
        assert moe_train("sweep", str(file), "--grid", "optimizer.lr").code == 2
