"""Laws for jobs that need other jobs' files: those files are deleted only if that is forced."""

import json
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.guard import start
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.store.references import Uses, uses_of
from llama_stack_provider_moe.control.store.store import JobStore, NewJob
from llama_stack_provider_moe.control.supervisor.removal import Retention, remove
from llama_stack_provider_moe.errors import Conflict, NotFound
from llama_stack_provider_moe.jobdir.events import now
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec import JOB_SPEC, SFTSpec
from llama_stack_provider_moe.spec.guard_config import GuardConfig
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.control.server.test_allowed_paths import model_at
from tests.control.server.test_model_names import leave
from tests.support.cli_support import moe_train
from tests.support.host_support import ask, folder_of, over_http, serving_in_process, submit
from tests.support.jobs_support import tiny_config
from tests.support.probe_cards import BODY as CARD
from tests.support.probe_cards import write_card

SFT: dict[str, Any] = {"recipe": "sft", "model": "owner/name", "data": {"dataset_id": "good"}}
ADAPTER = {"adapter": {"rank": 2}}
FROM_VICTIM = {"analysis": "JOBS/victim/x", "moe_layers": [0], "num_experts": 4}


@pytest.fixture
def shared(url: str) -> Iterator[JobStore]:
    store = JobStore(url)
    yield store
    store.close()


def add(store: JobStore, job_id: str, owner: str = "ann", **more: Any) -> None:
    store.add(NewJob(job_id, owner, "sft", "some/model", f"/jobs/{job_id}", **more))


def end(store: JobStore, job_id: str, state: JobState = JobState.COMPLETED) -> None:
    store.move(job_id, JobState.IN_PROGRESS)
    store.move(job_id, state)


# The store.


@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.UNREADABLE])
@pytest.mark.parametrize("kind", ["uses", "uses_to_complete"])
def test_what_a_job_needs_is_not_deleted(shared: JobStore, kind: str, state: JobState) -> None:
    add(shared, "base")
    end(shared, "base")
    add(shared, "later", **{kind: ("base",)})
    if state is not JobState.SCHEDULED:
        shared.move("later", JobState.IN_PROGRESS)
    if state.ended:
        shared.move("later", state)
    needed = kind == "uses" or state is not JobState.COMPLETED
    assert [job.id for job in shared.dependents("base")] == ["later"] * needed
    old, kept = shared.ended_before(now() + timedelta(days=1)), shared.ended_before(now() + timedelta(days=1), 9, True)
    assert ("base" in [job.id for job in old], "base" in [job.id for job in kept]) == (not needed, needed)
    if needed:
        with pytest.raises(Conflict, match=rf"job 'base' is needed by job 'later' \({state}\); delete those first"):
            shared.delete("base", "ann")
        told: list[str] = []
        shared.delete("base", "ann", force=lambda jobs: told.extend(job.id for job in jobs))
        assert told == ["later"]
    else:
        shared.delete("base", "ann")
    assert [job.id for job in shared.list(None)] == ["later"]


def test_a_dependent_that_was_deleted_counts_no_more_and_a_later_job_of_its_name_neither(shared: JobStore) -> None:
    add(shared, "base")
    end(shared, "base")
    add(shared, "later", uses=("base",))
    end(shared, "later")
    shared.delete("later", None)
    add(shared, "later")
    assert shared.dependents("base") == []
    shared.delete("base", None)
    add(shared, "again", uses=("later",))
    add(shared, "base")
    end(shared, "base")
    assert shared.dependents("base") == []
    shared.delete("base", None)


def test_a_job_that_needs_what_is_gone_is_not_taken(shared: JobStore) -> None:
    with pytest.raises(NotFound, match="job 'base', whose files this job needs, no longer exists"):
        add(shared, "later", uses=("base",))
    assert shared.list(None) == []


def test_what_a_job_needs_of_an_export_keeps_the_exported_job_too(shared: JobStore) -> None:
    add(shared, "parent")
    end(shared, "parent")
    add(shared, "export", parent="parent")
    end(shared, "export")
    add(shared, "later", uses=("export",))
    end(shared, "later")
    for job_id in ("parent", "export"):
        with pytest.raises(Conflict, match="is needed by job 'later'"):
            shared.delete(job_id, None)
    assert [job.id for job in shared.ended_before(now() + timedelta(days=1))] == ["later"]
    shared.delete("later", None)
    assert [job.id for job in shared.delete("parent", None)] == ["parent", "export"]


def test_other_owners_jobs_are_counted_and_not_named(shared: JobStore) -> None:
    add(shared, "base")
    end(shared, "base")
    for number in range(12):
        add(shared, f"mine-{number}", uses=("base",))
    add(shared, "secret-plan", "bob", uses=("base",))
    with pytest.raises(
        Conflict, match=r"'mine-9' \(scheduled\), 2 more, 1 job\(s\) of other owners; delete"
    ) as refused:
        shared.delete("base", "ann")
    assert "secret" not in str(refused.value)


# What a spec names.


@pytest.mark.parametrize(
    ("changes", "uses"),
    [
        ({}, Uses((), ())),
        ({"model": "JOBS/a/artifacts/merged", **ADAPTER}, Uses(("a",), ())),
        ({"model": "JOBS/a/artifacts/merged", "adapter": None}, Uses((), ("a",))),
        ({"model": "JOBS/mine/artifacts/merged", **ADAPTER}, Uses(("mine",), ())),
        (
            {"model": "JOBS/a/artifacts/merged", **ADAPTER,
             "eval": {"refuse_dataset_id": "good", "judge": {"kind": "model", "model": "JOBS/b/artifacts/model"}}},
            Uses(("a",), ("b",)),
        ),
        ({"model": "/elsewhere/jobs/a/artifacts/merged", **ADAPTER}, Uses((), ())),
        (
            {"model": "JOBS/a/artifacts/merged", "adapter": {"rank": 2, "init_from": "JOBS/b/artifacts/adapter"}},
            Uses(("a",), ("b",)),
        ),
    ],
)  # fmt: skip
def test_paths_below_jobs_are_what_a_training_needs(tmp_path: Path, changes: Any, uses: Uses) -> None:
    body = json.loads(json.dumps(SFT | changes).replace("JOBS", str(tmp_path)))
    assert uses_of(JOB_SPEC.validate_python(body), tmp_path) == uses


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": {"plan": "per_expert", "rules": [{"experts": {"0": 4}}], "rules_from": FROM_VICTIM}},
        {"data": {"dataset_id": "JOBS/victim/data/train.jsonl"}},
        {"model_from": "JOBS/victim/merged"},
    ],
)
def test_text_of_the_callers_own_holds_no_job_of_another_owner(tmp_path: Path, changes: Any) -> None:
    body = json.loads(json.dumps(SFT | ADAPTER | changes).replace("JOBS", str(tmp_path)))
    assert uses_of(JOB_SPEC.validate_python(body), tmp_path) == Uses((), ())


def test_an_analysis_needs_its_adapter_and_the_base_of_that(tmp_path: Path) -> None:
    (tmp_path / "adapted").mkdir()
    (tmp_path / "adapted" / "spec.json").write_text(json.dumps(SFT | {"model": f"{tmp_path}/base/artifacts/merged"}))
    spec = JOB_SPEC.validate_python({
        "recipe": "routing_analysis", "model": "owner/name", "data": {"sets": {"a": "good", "b": "good"}},
        "adapter_folder": f"{tmp_path}/adapted/artifacts/adapter",
    })  # fmt: skip
    assert uses_of(spec, tmp_path) == Uses((), ("adapted", "base"))


def test_an_export_needs_its_base_until_it_is_done(tmp_path: Path) -> None:
    spec = JOB_SPEC.validate_python({
        "recipe": "export", "of": "trained", "model": f"{tmp_path}/base/artifacts/merged", "export": {"merged": True},
    })  # fmt: skip
    assert uses_of(spec, tmp_path) == Uses((), ("base",))


def test_a_probe_needs_its_base_for_as_long_as_it_exists(tmp_path: Path) -> None:
    (tmp_path / "adapted").mkdir()
    (tmp_path / "adapted" / "spec.json").write_text(json.dumps(SFT | {"model": f"{tmp_path}/base/artifacts/merged"}))
    spec = JOB_SPEC.validate_python({
        "recipe": "probe", "model": f"{tmp_path}/other/artifacts/model",
        "data": {"sets": {"target": "good", "baseline": "good"}},
        "adapter_folder": f"{tmp_path}/adapted/artifacts/adapter",
    })  # fmt: skip
    assert uses_of(spec, tmp_path) == Uses(("adapted", "base", "other"), ())


# The service.


@pytest.fixture
def service(tmp_path: Path) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path) as made:
        yield made


def built_on(service: PostTrainingService) -> tuple[str, str]:
    """A completed job with a merged model, and a job that was trained on it."""
    base = submit(service, job_uuid="base", **ADAPTER)
    model = model_at(folder_of(service, base).root / "artifacts" / "merged")
    end(service.store, base)
    later = submit(service, job_uuid="later", model=str(model), **ADAPTER)
    return base, later


def test_a_model_that_another_job_was_trained_on_is_kept_until_forced(service: PostTrainingService) -> None:
    base, later = built_on(service)
    end(service.store, later)
    answer = ask(service, "DELETE", f"/jobs/{base}")
    assert answer.status_code == 409
    assert answer.json()["error"]["message"].startswith("job 'base' is needed by job 'later' (completed); delete those")
    assert folder_of(service, base).root.is_dir()
    forced = ask(service, "DELETE", f"/jobs/{base}?force=true")
    assert (forced.status_code, forced.json()["broken"]) == (
        200, ["job 'later' (completed): the model that its adapter was trained on is gone"],
    )  # fmt: skip
    assert not folder_of(service, base).root.exists()


def test_what_breaks_is_said_of_each_state(service: PostTrainingService) -> None:
    base, later = built_on(service)
    other = submit(service, model=str(folder_of(service, base).root / "artifacts" / "merged"), **ADAPTER)
    end(service.store, other, JobState.FAILED)
    assert ask(service, "DELETE", f"/jobs/{base}?force=true").json()["broken"] == [
        f"job {later!r} (scheduled): it will fail", f"job {other!r} (failed): it can't be resumed",
    ]  # fmt: skip


def test_the_command_line_forces_and_says_what_breaks(service: PostTrainingService) -> None:
    base, _ = built_on(service)
    with over_http(service) as url:
        refused = moe_train("rm", base, "--url", url)
        assert refused.code != 0
        assert "is needed by job 'later' (scheduled)" in " ".join(refused.err.split())
        forced = moe_train("rm", base, "--force", "--url", url)
    assert forced.code == 0, forced.err
    assert "broken: job 'later' (scheduled): it will fail" in forced.out


def test_retention_keeps_what_is_needed_and_says_so_once(
    store: JobStore, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config: ProviderConfig = tiny_config(root, retention_days=1e-9)
    for job_id, more in (("base", {}), ("later", {"uses": ("base",)})):
        (config.jobs_dir / job_id).mkdir(parents=True)
        store.add(NewJob(job_id, "ann", "sft", "m", str(config.jobs_dir / job_id), **more))  # type: ignore[arg-type]
        if job_id == "base":
            end(store, "base")
    retention = Retention(store, config)
    with caplog.at_level("INFO"):
        assert retention.remove_older() == retention.remove_older() == []
    told = [record.getMessage() for record in caplog.records]
    assert told == ["job base is older than 1e-09 days, but kept for job 'later' (scheduled)"]
    end(store, "later")
    assert retention.remove_older() == ["later"]
    assert retention.remove_older() == ["base"]


def test_a_job_whose_base_was_just_deleted_is_not_taken(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = submit(service, job_uuid="base", **ADAPTER)
    model = model_at(folder_of(service, base).root / "artifacts" / "merged")
    end(service.store, base)
    add_to_store = service.store.add

    def late(new: NewJob, _limits: object) -> Any:
        remove(service.store, service.config, base, None)
        return add_to_store(new)

    monkeypatch.setattr(service.store, "add", late)
    answer = ask(service, "POST", "/jobs", json=SFT | ADAPTER | {"model": str(model), "job_uuid": "later"})
    assert answer.status_code == 404
    assert "'base', whose files this job needs, no longer exists" in answer.json()["error"]["message"]
    assert not folder_of(service, "later").root.exists()


@pytest.mark.parametrize("kind", ["model", "init_from", "analysis", "export"])
@pytest.mark.parametrize("named_again", [False, True])
def test_a_job_whose_sources_were_deleted_is_not_resumed(
    service: PostTrainingService, kind: str, named_again: bool
) -> None:
    base, later = built_on(service)
    merged = str(folder_of(service, base).root / "artifacts" / "merged")
    if kind == "init_from":
        adapter = folder_of(service, base).root / "artifacts" / "adapter"
        adapter.mkdir()
        spec = folder_of(service, later).read_spec()
        assert isinstance(spec, SFTSpec)
        assert spec.adapter is not None
        changed = spec.model_copy(
            update={"model": "owner/name", "adapter": spec.adapter.model_copy(update={"init_from": str(adapter)})}
        )
        folder_of(service, later).spec.write_text(changed.model_dump_json())
    elif kind == "analysis":
        body = {"recipe": "routing_analysis", "data": {"sets": {"a": "good", "b": "good"}}, "model": merged}
        later = ask(service, "POST", "/jobs", json=body).json()["job_uuid"]
    elif kind == "export":  # of a job on that base; the export merges with it
        service.store.move(later, JobState.IN_PROGRESS)
        service.store.move(later, JobState.COMPLETED, artifacts=(leave(service, later, "adapter"),))
        later = ask(service, "POST", f"/jobs/{later}/exports", json={"merged": True}).json()["job_uuid"]
    service.store.request_cancel(later, None)
    assert ask(service, "DELETE", f"/jobs/{base}?force=true").status_code == 200
    if named_again:
        submit(service, job_uuid=base, **ADAPTER)
    answer = ask(service, "POST", f"/jobs/{later}/resume")
    assert answer.status_code == 409, answer.text
    message = answer.json()["error"]["message"]
    assert message.startswith(f"job {later!r} can't be resumed: it needs "), message
    assert f"of job {base!r}, which {'no longer exists' if named_again else 'was deleted'}" in message
    assert service.store.get(later, None).state is JobState.CANCELLED


def test_a_job_whose_sources_are_there_is_resumed(service: PostTrainingService) -> None:
    _, later = built_on(service)
    service.store.request_cancel(later, None)
    assert ask(service, "POST", f"/jobs/{later}/resume").status_code == 200


def shields(tmp_path: Path, **probes: Path) -> None:
    """Start shields with these probes, as far as jobs are concerned."""
    config = GuardConfig.model_validate({
        "on_failure": "block", "state_dir": str(tmp_path / "guard"), "probes": {n: str(p) for n, p in probes.items()}
    })  # fmt: skip
    start.keep_what_is_read(config)


def test_a_job_whose_files_shields_read_is_kept_until_they_let_go_or_it_is_forced(
    service: PostTrainingService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, fitted = submit(service, job_uuid="base", **ADAPTER), submit(service, job_uuid="fitted", **ADAPTER)
    model = model_at(folder_of(service, base).root / "artifacts" / "merged")
    probe = folder_of(service, fitted).probe
    write_card(probe, base=CARD["base"] | {"model": str(model)})
    outside = tmp_path / "elsewhere"
    write_card(outside)
    for job_id in (base, fitted):
        end(service.store, job_id)
    shields(tmp_path, refused=probe, other=outside)
    for job_id in (base, fitted):
        answer = ask(service, "DELETE", f"/jobs/{job_id}")
        assert answer.status_code == 409, answer.text
        told = answer.json()["error"]["message"]
        assert told.startswith(f"job {job_id!r} is read by shields of a server (probe 'refused'); take it out of")
        assert str(tmp_path) not in told, "paths of the server are not for its users"
        assert folder_of(service, job_id).root.is_dir()
    retention = Retention(service.store, service.config.model_copy(
        update={"supervisor": service.config.supervisor.model_copy(update={"retention_days": 1e-9})}
    ))  # fmt: skip
    with caplog.at_level("INFO"):
        assert retention.remove_older() == retention.remove_older() == []
    assert [record.getMessage() for record in caplog.records if "kept for shields" in record.getMessage()] == [
        f"job {each} is older than 1e-09 days, but kept for shields of a server (probe 'refused')"
        for each in (base, fitted)
    ]
    shields(tmp_path, other=outside)
    assert ask(service, "DELETE", f"/jobs/{base}").status_code == 200
    shields(tmp_path, refused=probe)
    forced = ask(service, "DELETE", f"/jobs/{fitted}?force=true")
    assert (forced.status_code, forced.json()["broken"]) == (
        200, ["shields of a server (probe 'refused'): they can't score once they start again"],
    )  # fmt: skip


def test_a_group_with_a_job_that_shields_read_is_not_deleted_in_part(
    service: PostTrainingService, tmp_path: Path
) -> None:
    parts = [{"name": name, "job": {**SFT, **ADAPTER}} for name in ("one", "two")]
    assert ask(service, "POST", "/pipelines", json={"pipeline_uuid": "p", "parts": parts}).status_code == 200
    for name in ("p-one", "p-two"):
        end(service.store, name)
    write_card(folder_of(service, "p-one").probe)
    shields(tmp_path, refused=folder_of(service, "p-one").probe)
    assert ask(service, "DELETE", "/pipelines/p").status_code == 409
    assert folder_of(service, "p-two").root.is_dir()
    assert ask(service, "DELETE", "/pipelines/p?force=true").status_code == 200


def test_shields_whose_state_folder_is_gone_read_nothing(service: PostTrainingService, tmp_path: Path) -> None:
    fitted = submit(service, job_uuid="fitted", **ADAPTER)
    end(service.store, fitted)
    write_card(folder_of(service, fitted).probe)
    shields(tmp_path, refused=folder_of(service, fitted).probe)
    (entry,) = (folder_of(service, fitted).root / "readers").iterdir()
    entry.write_text("damaged")
    assert "is read by somebody" in ask(service, "DELETE", f"/jobs/{fitted}").json()["error"]["message"]
    shields(tmp_path, refused=folder_of(service, fitted).probe)
    shutil.rmtree(tmp_path / "guard")
    assert ask(service, "DELETE", f"/jobs/{fitted}").status_code == 200
