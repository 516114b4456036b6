"""Pipelines as callers meet them: every part is checked before anything starts; 404 for strangers."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.client import AsyncClient, Client
from llama_stack_provider_moe.control.server.late_names import resolved
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.store import NewJob
from llama_stack_provider_moe.jobdir.state import JobState
from tests.control.server.test_allowed_paths import model_at
from tests.control.server.test_model_names import leave
from tests.support.cli_support import moe_train
from tests.support.host_support import BODY, Datasets, ask, caller, folder_of, over_http, serving_in_process

WHOLE = BODY | {"adapter": None}
LORA = BODY | {"adapter": {"rank": 4}, "export": {"merged": True}}
MIX = {
    "recipe": "mix", "model": "owner/name", "method": "btx",
    "branches": [{"name": "math", "model": "parts.math/model"}, {"name": "code", "model": "parts.code/merged"}],
}  # fmt: skip
ROUTERS = BODY | {"model": "parts.mix", "adapter": {"rank": 4, "plan": "trunk"}}
SETS = {"recipe": "routing_analysis", "model": "parts.routers", "data": {"sets": {"a": "good", "b": "good"}}}
GRPO = BODY | {"recipe": "grpo", "training": {"batch_size": 4}}
ABLATION = {"recipe": "ablation", "model": "owner/name", "ablate": [{"layer": "0", "measurement": 0}]}
JOBS = {"math": WHOLE, "code": LORA, "mix": MIX, "routers": ROUTERS, "look": SETS}


def after(first: Any = WHOLE, **changes: Any) -> dict[str, Any]:
    """Two parts: `a`, and a training job `b` with these changes."""
    return {"a": first, "b": BODY | changes}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path, Datasets()) as made:
        yield made


def body(jobs: Any = None, **more: Any) -> dict[str, Any]:
    parts = [{"name": name, "job": job} for name, job in (jobs or JOBS).items()]
    return {"pipeline_uuid": "p", "parts": parts} | more


def create(service: PostTrainingService, jobs: Any = None, **more: Any) -> httpx.Response:
    return ask(service, "POST", "/pipelines", json=body(jobs, **more))


def message(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    found: str = answer.json()["error"]["message"]
    return found


def nothing_is_left(service: PostTrainingService) -> None:
    assert service.store.list(None) == []
    assert service.store.pipelines.list(None, 9) == []
    assert list(service.config.jobs_dir.glob("[!.]*")) == []
    assert list((service.config.state_dir / "staging").glob("*")) == []


def end(
    service: PostTrainingService, job_id: str, state: JobState = JobState.COMPLETED, *names: str, **more: Any
) -> None:
    service.store.move(job_id, JobState.IN_PROGRESS)
    made = tuple(leave(service, job_id, name) for name in names)
    service.store.move(job_id, state, artifacts=made, **more)


def seen(service: PostTrainingService) -> dict[str, Any]:
    found: dict[str, Any] = ask(service, "GET", "/pipelines/p").json()
    return found


def test_every_part_becomes_a_job_that_waits_for_those_that_it_names(service: PostTrainingService) -> None:
    made = create(service, labels={"team": "geo"}).json()
    assert (made["pipeline_uuid"], made["jobs"]) == ("p", {name: f"p-{name}" for name in JOBS})
    told = "part mix: branches.1.model: 'p-code/merged' is what job p-code will leave: this job waits for it"
    assert told in made["notes"]
    found = seen(service)
    assert (found["status"], found["jobs"]) == ("scheduled", {"scheduled": 5})
    assert {part["name"]: part["waits_for"] for part in found["parts"]} == {
        "math": [], "code": [], "mix": ["p-math", "p-code"], "routers": ["p-mix"], "look": ["p-routers"]
    }  # fmt: skip
    assert ask(service, "GET", "/pipelines").json()["data"][0]["jobs"] == {"scheduled": 5}
    listed = ask(service, "GET", "/jobs?pipeline=p&label=team=geo").json()["data"]
    assert [job["job_uuid"] for job in listed] == [f"p-{name}" for name in reversed(JOBS)]
    assert {job["pipeline"] for job in listed} == {"p"}
    look = json.loads(folder_of(service, "p-look").spec.read_text())
    assert (look["model"], look["adapter_folder"], look["model_from"]) == (
        "p-mix/model",
        "p-routers/adapter",
        "p-routers/adapter",
    )


@pytest.mark.parametrize("job", [
    BODY | {"distill": {"model": "parts.a"}},
    BODY | {"recipe": "distill", "teacher": "parts.a/model"},
    {"recipe": "surgery", "model": "owner/name", "data": {"dataset_id": "good"},
     "surgery": {"action": "add", "add": {"count": 1, "mlp_from": "parts.a"}}},
    GRPO | {"reward": [{"grader": {"type": "reward_model", "name": "x", "model": "parts.a"}}]},
    GRPO | {"reward": [{"grader": {"type": "multi", "name": "x", "calculate_output": "y", "graders": {
        "y": {"type": "refusal", "name": "y", "expect": "answer", "judge": "model", "model": "parts.a"}}}}]},
], ids=["distill", "teacher", "mlp_from", "grader", "multi"])  # fmt: skip
def test_teachers_donors_and_graders_may_be_parts(service: PostTrainingService, job: dict[str, Any]) -> None:
    answer = create(service, {"a": WHOLE, "b": job})
    assert answer.status_code == 200, answer.text
    assert seen(service)["parts"][1]["waits_for"] == ["p-a"]


def test_names_are_resolved_one_after_the_other(service: PostTrainingService) -> None:
    create(service)
    end(service, "p-math", JobState.COMPLETED, "model")
    folder = str(service.config.jobs_dir / "export-1")
    export = NewJob("export-1", "anonymous", "export", "owner/name", folder, 0, "p-code")
    end(service, "p-code", JobState.COMPLETED, "adapter", export=export)
    code = seen(service)["parts"][1]
    assert (code["status"], code["exports"]) == (
        "in_progress", [{"job_uuid": "export-1", "status": "scheduled", "reason": None}]
    )  # fmt: skip
    assert seen(service)["parts"][2]["waits_for"] == ["export-1"]
    Path(folder).mkdir()
    end(service, "export-1", JobState.COMPLETED, "merged")
    assert seen(service)["parts"][1]["status"] == "completed"
    (due,) = service.store.waits.due().ready
    mixed: Any = resolved(service.store, service.config, due.id)
    assert [branch.model for branch in mixed.branches] == [
        str(folder_of(service, "p-math").model), str(folder_of(service, "export-1").merged)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("jobs", "told"),
    [
        ({"a": BODY | {"model": "parts.b"}, "b": WHOLE}, "parts.0.job.model: 'parts.b' comes later; expected no part"),
        (after(model="parts.b/model"), "parts.1.job.model: 'parts.b/model' is this part itself; expected an earlier"),
        (after(adapter={"init_from": "parts.c"}), "parts.1.job.adapter.init_from: 'parts.c' is none; expected an earl"),
        ({"a": WHOLE, "b": MIX}, "parts.1.job.branches.0.model: 'parts.math/model' is none"),
        (after(model="parts.a/merged"), "parts.1.job.model: part 'a' will leave no 'merged'; it will leave: model"),
        (after(model="parts.a/"), "parts.1.job.model: part 'a' will leave no '/'; it will leave: model"),
        (after(model="parts.a/nope"), "parts.1.job.model: part 'a' will leave no 'nope'; it will leave: model"),
        (
            after(LORA, adapter={"init_from": "parts.a/n/p"}),
            "parts.1.job.adapter.init_from: part 'a' will leave no 'n/p'",
        ),
        (
            {"a": LORA, "b": MIX | {"branches": [{"name": name, "model": "parts.a/adapter"} for name in "xy"]}},
            "set options.save_merged in that job, and write 'parts.a/merged'",
        ),
        (
            {"a": WHOLE, "b": ABLATION | {"measurements": "parts.a"}},
            "parts.1.job.measurements: 'parts.a' is not valid; expected a job of recipe 'ablation_measure'",
        ),
        (after(LORA | {"export": None}, model="parts.a/merged"), "for that, set options.save_merged in it"),
        (after(optimizer={"lr": -1}), "part 'b': optimizer.lr: -1 is not valid"),
        (after(data={"dataset_id": "none"}), "part 'b': no data set 'none' is registered"),
        ({"a": BODY | {"job_uuid": "x"}}, "parts.0.job: job_uuid: is not for a part"),
        ({"A b": WHOLE}, "parts.0.name: 'A b' is not valid; expected 1 to 32 lower-case letters"),
        ({"a": {"recipe": "export", "of": "x"}}, "parts.0.job: recipe: 'export' is not valid in a pipeline"),
        ({"a": {"recipe": "playground", "model": "owner/name"}}, "recipe: 'playground' is not valid in a pipeline"),
        ({"a": WHOLE, "b": SETS | {"model": "parts.a", "data": {"sets": {"a": "good"}}}}, "part 'b': data.sets"),
    ],
)
def test_mistakes_are_named_with_their_part_and_nothing_is_created(
    service: PostTrainingService, jobs: dict[str, Any], told: str
) -> None:
    answer = create(service, jobs)
    assert answer.status_code in (400, 404), answer.text
    assert told in message(answer, answer.status_code)
    assert ask(service, "POST", "/pipelines/validate", json=body(jobs)).json() == answer.json()
    assert not re.search(r"\bp-[a-z]", answer.text)  # the names of jobs are made up by the server
    nothing_is_left(service)


def test_duplicate_and_unknown_keys(service: PostTrainingService) -> None:
    twice = [{"name": "a", "job": WHOLE}, {"name": "a", "job": WHOLE}]
    told = message(create(service, parts=twice))
    assert "parts.1.name: 'a' is the name of part 0 too; expected each name once" in told
    assert "max_parallel: unknown key" in message(create(service, max_parallel=2))
    assert "parts" in message(create(service, parts=[]))
    nothing_is_left(service)


def test_names_that_are_taken(service: PostTrainingService) -> None:
    create(service)
    assert message(create(service), 409) == "pipeline_uuid: 'p' is taken; leave it out, or choose another name"
    assert ask(service, "POST", "/jobs", json=BODY | {"job_uuid": "q-mix"}).status_code == 200
    told = message(create(service, pipeline_uuid="q"), 409)
    assert told == "part 'mix': job_uuid: 'q-mix' is taken; leave it out, or choose another name"
    assert len(service.store.list(None)) == 6


def test_a_dry_run_creates_nothing(service: PostTrainingService) -> None:
    found = ask(service, "POST", "/pipelines/validate", json=body()).json()["parts"]
    assert [found[name]["spec"]["recipe"] for name in JOBS] == ["sft", "sft", "mix", "sft", "routing_analysis"]
    assert found["math"]["train_rows"] == 12
    nothing_is_left(service)


def test_owners_and_limits(tmp_path: Path) -> None:
    with serving_in_process(tmp_path, Datasets(), limits={"waiting_jobs": 5}) as service:
        with caller("ann"):
            assert create(service).status_code == 200
            assert "5 are needed" in message(create(service, pipeline_uuid="q"), 429)
        with caller("bob"):
            for method, path in (
                ("GET", ""), ("POST", "/cancel"), ("POST", "/resume"), ("DELETE", "")
            ):  # fmt: skip
                told = message(ask(service, method, f"/pipelines/p{path}"), 404)
                assert told == "pipeline 'p' does not exist"
            assert ask(service, "GET", "/pipelines").json() == {"data": [], "has_more": False}
            assert "is taken" in message(create(service), 409)
            told = message(create(service, {"a": BODY | {"model": "p-math"}}, pipeline_uuid="r"))
            assert "waits" not in told


def test_cancel_resume_and_delete(service: PostTrainingService) -> None:
    create(service)
    end(service, "p-math", JobState.COMPLETED, "model")
    end(service, "p-code", JobState.FAILED, reason="diverged")
    assert message(ask(service, "DELETE", "/pipelines/p"), 409).startswith(
        "pipeline 'p' has jobs that wait or run (p-mix"
    )
    cancelled = ask(service, "POST", "/pipelines/p/cancel").json()
    assert (cancelled["status"], cancelled["jobs"]) == ("cancelled", {"completed": 1, "failed": 1, "cancelled": 3})
    resumed = ask(service, "POST", "/pipelines/p/resume").json()
    assert [job["job_uuid"] for job in resumed["jobs"]] == ["p-code", "p-mix", "p-routers", "p-look"]
    assert seen(service)["jobs"] == {"completed": 1, "scheduled": 4}
    ask(service, "POST", "/pipelines/p/cancel")
    gone = ask(service, "DELETE", "/pipelines/p").json()
    assert gone["jobs"] == [f"p-{name}" for name in reversed(JOBS)]
    nothing_is_left(service)


def test_a_pipeline_that_a_job_outside_needs_is_deleted_as_a_whole_or_not_at_all(service: PostTrainingService) -> None:
    create(service, {"a": WHOLE, "b": BODY | {"model": "parts.a"}})
    outside = BODY | {"model": "p-a", "job_uuid": "outside"}
    assert ask(service, "POST", "/jobs", json=outside).status_code == 200
    ask(service, "POST", "/pipelines/p/cancel")
    service.store.move("outside", JobState.FAILED, "job 'p-a', which it waits for, was cancelled")
    told = message(ask(service, "DELETE", "/pipelines/p"), 409)
    assert told.startswith("pipeline 'p' is needed by job 'outside' (failed); nothing was deleted. Delete those first")
    assert told.endswith("(one that failed or was cancelled can be resumed, so it still needs them)")
    assert [part["name"] for part in seen(service)["parts"]] == ["a", "b"]
    assert folder_of(service, "p-b").root.is_dir()
    gone = ask(service, "DELETE", "/pipelines/p?force=true").json()
    assert (gone["jobs"], len(gone["broken"])) == (["p-b", "p-a"], 1)


def test_the_log_of_a_part_that_failed_is_named(service: PostTrainingService) -> None:
    create(service)
    service.store.acquire_lease("me", 1, 60)
    claimed = service.store.claim("me")
    assert claimed is not None
    service.store.move(claimed.id, JobState.FAILED, reason="diverged")
    service.store.move("p-mix", JobState.FAILED, f"job {claimed.id!r}, which it waits for, failed: diverged")
    with over_http(service) as url:
        shown = moe_train("pipelines", "p", "--url", url)
    assert f"to see why: moe-train logs {claimed.id}" in shown.err
    assert "logs p-mix" not in shown.err  # it never started, so it has none


def test_a_lost_part_is_shown(service: PostTrainingService) -> None:
    create(service, {"a": WHOLE, "b": WHOLE})
    ask(service, "POST", "/pipelines/p/cancel")
    assert ask(service, "DELETE", "/jobs/p-b").status_code == 200
    assert (seen(service)["lost"], len(seen(service)["parts"])) == (["b"], 1)
    with over_http(service) as url:
        assert "so the pipeline can't be resumed: b" in moe_train("pipelines", "p", "--url", url).out
        refused = moe_train("pipelines", "p", "--resume", "--url", url)
    assert (refused.code, "the job of part 'b' was deleted before it had completed" in refused.err) == (2, True)


def test_clients_and_commands(service: PostTrainingService, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(body()))
    model_at(service.config.models_dir / "own")
    with over_http(service) as url:
        with Client(url) as client:
            assert client.validate_pipeline(body())["parts"]["mix"]["spec"]["recipe"] == "mix"
        run = ["--url", url]
        dry = moe_train("pipeline", str(file), "--dry-run", "--set", "math.model=own", *run)
        assert (dry.code, dry.out.splitlines()[0]) == (0, "math: sft of own, 12 rows")
        assert "mix: mix of owner/name\n" in dry.out  # it reads no rows
        made = moe_train("pipeline", str(file), "--set", "math.optimizer.lr=3e-5", "--name", "q", *run)
        assert (made.code, made.out.splitlines()[0]) == (
            0, "pipeline q has 5 parts: q-math, q-code, q-mix, q-routers, q-look"
        )  # fmt: skip
        assert json.loads(folder_of(service, "q-math").spec.read_text())["optimizer"]["lr"] == 3e-5
        wrong = moe_train("pipeline", str(file), "--set", "none.optimizer.lr=3e-5", *run)
        assert (wrong.code, "one of the parts math, code, mix, routers, look" in wrong.err) == (2, True)
        shown = moe_train("pipelines", "q", *run)
        assert (shown.code, "waits for q-math, q-code" in shown.out) == (0, True)
        assert "q-mix" in moe_train("ls", "--pipeline", "q", *run).out
        assert "waits for q-mix" in moe_train("status", "q-routers", *run).out
        assert moe_train("pipelines", "q", "--cancel", "--rm", *run).code == 2
        assert "q is cancelled" in moe_train("pipelines", "q", "--cancel", *run).out
        followed = moe_train("pipelines", "q", "--follow", *run)
        assert (followed.code, followed.out.splitlines()[-1]) == (3, "pipeline q: cancelled")
        assert "q is resumed: q-math" in moe_train("pipelines", "q", "--resume", *run).out

        async def asked() -> None:
            async with AsyncClient(url) as client:
                assert (await client.cancel_pipeline("q"))["status"] == "cancelled"
                assert (await client.pipelines())["data"][0]["pipeline_uuid"] == "q"
                assert len((await client.delete_pipeline("q"))["jobs"]) == 5

        asyncio.run(asked())
        assert moe_train("pipelines", *run).out.strip() == "no pipelines"
