"""Laws of an export job's process: listed results are complete and act like the adapter, whenever it was killed."""

import os
import shutil
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_stack_provider_moe.compute.export import merge as merging
from llama_stack_provider_moe.compute.export.hub import HubResult
from llama_stack_provider_moe.compute.export.load_check import NotRecorded
from llama_stack_provider_moe.compute.export.model_card import Source, model_card
from llama_stack_provider_moe.compute.recipes import export as recipe
from llama_stack_provider_moe.compute.recipes.export import steps as export_steps
from llama_stack_provider_moe.compute.recipes.export.step_log import Done, PlannedStep, Skipped, Steps
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train import checkpoints
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, STOPPED, train
from llama_stack_provider_moe.errors import ExportError
from llama_stack_provider_moe.jobdir import events
from llama_stack_provider_moe.jobdir.checkpoint_index import CHECKSUMS, sha256_of, verify_files
from llama_stack_provider_moe.jobdir.export_steps import StepState, read_steps
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.jobdir.scan import saved_artifacts
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support.export_support import by_peft, gap, logits, tensors
from tests.support.jobs_support import FORK
from tests.support.training_support import Run, Workshop, signals_put_back, workshop

__all__ = ["workshop"]
MOST_KILLS = 60


@pytest.fixture(scope="module")
def trained(workshop: Workshop) -> Run:
    run = workshop.run("sft", "granitemoe", eval=None)
    assert run.exit_code == COMPLETED, run.reason
    return run


def asked(of: Run, name: str, **block: Any) -> JobFolder:
    """The folder of an export job for `of`, as the service makes it."""
    folder = JobFolder(of.folder.root.with_name(name))
    shutil.rmtree(folder.root, ignore_errors=True)
    folder.root.mkdir()
    model = of.folder.read_spec().model
    export = {"load_check": False} | block  # a load check takes some 10 CPU-seconds in another process
    body = {"recipe": "export", "job_uuid": name, "of": of.folder.root.name, "model": model, "export": export}
    write_atomic(folder.spec, JOB_SPEC.validate_python(body))
    return folder


def done(folder: JobFolder) -> int:
    """Run the process of an export job, and return its exit code."""
    with signals_put_back():
        return train(folder)


def states(folder: JobFolder) -> dict[str, StepState]:
    return {step.name: step.state for step in read_steps(folder)}


def reason(folder: JobFolder) -> str:
    return str(events.latest(folder.events)["failed"].reason)


def test_what_is_merged_does_what_the_adapter_does(trained: Run) -> None:
    folder = asked(trained, "merged", merged=True, shard_size="100KB")
    assert done(folder) == COMPLETED
    manifest = folder.read_manifest()
    assert manifest is not None
    (artifact,) = manifest.artifacts
    root = Path(artifact.path)
    assert (artifact.identifier, artifact.kind, root) == ("merged/merged", "merged", folder.artifacts / "merged")
    assert artifact.sha256 == sha256_of(root / CHECKSUMS)
    assert verify_files(root) is None
    assert len(list(root.glob("model-*-of-*.safetensors"))) > 1
    adapter = by_peft(Path(trained.folder.read_spec().model), trained.folder.adapter)
    # fp32, two sums in another order: 1.2e-6 with logits of about 2.
    assert gap(logits(AutoModelForCausalLM.from_pretrained(root).eval()), logits(adapter)) < 1e-5
    # Training's figures for these weights go with them.
    entry = next(each for each in trained.manifest.artifacts if each.kind == "adapter")
    assert (artifact.epoch, artifact.step, artifact.metrics) == (entry.epoch, entry.step, entry.metrics)
    assert "sft" in (root / "README.md").read_text()
    assert not folder.work.exists()
    assert [(each.step, each.state) for each in events.read(folder.events).events if each.type == "export"] == [
        ("merged", "in_progress"), ("merged", "completed"),
    ]  # fmt: skip


def test_what_is_listed_was_loaded_again_and_compared(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = asked(trained, "compared", merged=True, load_check=True)
    assert done(folder) == COMPLETED, reason(folder)
    checked, merged = read_steps(folder)
    assert (checked.name, merged.name) == ("load_check", "merged")
    assert checked.figures is not None
    assert checked.figures["tensors"] > 0
    assert checked.figures["as_trained"]["share"] <= checked.figures["as_trained_tolerance"]
    (artifact,) = saved_artifacts(folder)
    assert artifact.verification == merged.figures
    assert artifact.verification is not None
    assert artifact.verification["gap"]["share"] <= artifact.verification["tolerance"]

    def merge(base: str, adapter: Path, out: Path, *_: Any, **__: Any) -> Any:
        # A merge that forgets the adapter, written where the real one writes its folder.
        report = merging.merge(base, adapter, out)
        shutil.copyfile(Path(base) / "model.safetensors", out / "model.safetensors")
        return report

    wrong = asked(trained, "wrong", merged=True, load_check=True)
    with monkeypatch.context() as during:
        during.setattr(export_steps, "merge", merge)
        during.setattr(recipe, "load_check", lambda *_: PlannedStep("load_check", Done))
        assert done(wrong) == FAILED
    assert "differs from the adapter on its base" in reason(wrong)
    assert saved_artifacts(wrong) == ()
    assert list(wrong.artifacts.iterdir()) == []


def test_what_was_never_recorded_is_skipped_and_fails_nothing(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any) -> Any:
        raise NotRecorded("of an earlier version")

    folder = asked(trained, "unrecorded", merged=True, load_check=True)
    with monkeypatch.context() as during:
        during.setattr(export_steps, "compare", nothing)
        assert done(folder) == COMPLETED
    checked, merged = read_steps(folder)
    assert (checked.state, checked.reason) == (StepState.SKIPPED, "of an earlier version")
    assert "not compared with the adapter: of an earlier version" in str(merged.note)


def test_a_push_without_a_token_fails_for_itself(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    folder = asked(trained, "pushed", merged=True, push={"repo_id": "team/model", "what": "merged"})
    assert done(folder) == FAILED
    assert "1 of 2 steps failed: push: push: HF_TOKEN is not set" in reason(folder)
    assert [each.identifier for each in saved_artifacts(folder)] == ["pushed/merged"]

    pushed: list[tuple[list[str], Any]] = []

    def push(what: Path, to: Any, _: Any) -> Any:
        pushed.append((sorted(path.name for path in what.iterdir()), to.repo_id))
        return HubResult(repo_id=to.repo_id, url="u", commit="c", private=True, files=1, bytes=1)

    monkeypatch.setattr(export_steps.hub, "push", push)
    assert done(folder) == COMPLETED
    assert "README.md" in pushed[0][0]
    assert pushed == [(sorted(path.name for path in folder.merged.iterdir()), "team/model")]
    files = asked(trained, "pushed-files", gguf=["f16", "q8_0"], push={"repo_id": "team/model", "what": "gguf"})
    for name in ("f16", "q8_0"):
        (files.artifacts / f"gguf-{name}").mkdir(parents=True)
        for file in (f"m-{name}.gguf", "Modelfile"):
            (files.artifacts / f"gguf-{name}" / file).touch()
    files.work.mkdir()
    log = events.EventLog(files.events)
    with closing(log):
        session: Any = Session(files.read_spec(), files, log)  # type: ignore[type-var]
        step = export_steps.pushed(session, recipe.find_trained(trained.folder.root))
        assert step.needs == ["gguf-f16", "gguf-q8_0"]
        step.run()
    assert pushed[-1][0] == ["README.md", "m-f16.gguf", "m-q8_0.gguf"]
    card = (files.work / "gguf" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\ntags: [gguf]\n---\n")
    assert "| Recipe | sft |" in card
    assert "| Adapter | LoRA, rank " in card
    assert "llama-server -m m-f16.gguf\nllama-server -m m-q8_0.gguf\n```" in card
    card = model_card("gguf", "team/base", Source(tmp_path), files={"m.gguf": 5_000_000_000, "mmproj-m.gguf": 20_000})
    assert 'base_model: "team/base"' in card
    assert "| m.gguf | 5.00 GB |\n| mmproj-m.gguf | 0.02 MB |" in card
    assert "llama-server -m m.gguf --mmproj mmproj-m.gguf\n```" in card


def test_over_four_bits_it_is_the_16_bit_base_that_is_merged(workshop: Workshop) -> None:
    run = workshop.run("sft", "granitemoe", adapter={"quantize_base": True})
    assert run.exit_code == COMPLETED, run.reason
    folder = asked(run, "of-four-bits", merged=True)
    assert done(folder) == COMPLETED, reason(folder)
    adapter = by_peft(Path(run.folder.read_spec().model), run.folder.adapter)
    assert gap(logits(AutoModelForCausalLM.from_pretrained(folder.merged).eval()), logits(adapter)) < 1e-5


def test_a_whole_model_is_a_folder_already(workshop: Workshop) -> None:
    run = workshop.run("sft", "llama", adapter=None)
    folder = asked(run, "of-whole", merged=True)
    assert done(folder) == COMPLETED
    (step,) = read_steps(folder)
    assert (step.state, step.artifact) == (StepState.COMPLETED, None)
    assert "artifact `model` of job" in str(step.note)
    manifest = folder.read_manifest()
    assert manifest is not None
    assert manifest.artifacts == []


def test_an_adapter_that_is_not_what_was_written_is_not_exported(trained: Run) -> None:
    broken = trained.folder.root.with_name("broken")
    shutil.copytree(trained.folder.root, broken)
    weights = broken / "artifacts" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    folder = asked(Run(JobFolder(broken), 0), "of-broken", merged=True)
    assert done(folder) == FAILED
    assert "adapter of job 'broken' has changed since the job wrote it: adapter_model.safetensors" in reason(folder)
    assert saved_artifacts(folder) == ()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    trained: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = asked(trained, "no-room", merged=True)
    usage = shutil.disk_usage(folder.root)
    with monkeypatch.context() as during:
        during.setattr(recipe.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert done(folder) == FAILED
    needed = merging.bytes_needed(trained.folder.read_spec().model, trained.folder.adapter)
    assert f"the exports need {needed:,} bytes, and the disk of {folder.root} has 1,000 free" in reason(folder)
    assert list(folder.artifacts.iterdir()) == []
    assert done(folder) == COMPLETED, "there is space again"
    weights = (folder.merged / "model.safetensors").stat().st_size
    assert weights < needed < weights + (2 << 20)


# Independent steps.


def run_steps(folder: JobFolder, steps: list[PlannedStep]) -> None:
    log = events.EventLog(folder.events)
    with closing(log):
        Steps(Session(folder.read_spec(), folder, log), steps).run()  # type: ignore[type-var]


def test_a_step_that_fails_leaves_the_others_alone_and_is_tried_again(trained: Run) -> None:
    folder = asked(trained, "some-fail", merged=True)
    folder.artifacts.mkdir()
    ran: list[str] = []
    broken = True

    def step(name: str, **more: Any) -> PlannedStep:
        target = folder.artifacts / name

        def run() -> Done:
            ran.append(name)
            if name == "bad" and broken:
                raise OSError(28, "No space left on device")
            if name == "unknown":
                raise Skipped("nothing was recorded")
            written = target.with_name(f".{name}.writing")
            written.mkdir()
            (written / "file").write_text(name)
            checkpoints.publish(written, target, 1)
            return Done(checkpoints.describe("some-fail", "gguf", target, 1, 1))

        return PlannedStep(name, run, **({"leaves": [target]} | more))

    steps = [step("good"), step("bad"), step("after-bad", needs=["bad"]), step("unknown", leaves=[]), step("last")]
    told = r"1 of 5 steps failed: bad: the disk is full .*; so after-bad, unknown could not"
    with pytest.raises(ExportError, match=told):
        run_steps(folder, steps)
    assert states(folder) == {
        "good": "completed", "bad": "failed", "after-bad": "skipped", "unknown": "skipped", "last": "completed",
    }  # fmt: skip
    assert [each.identifier for each in saved_artifacts(folder)] == ["some-fail/good", "some-fail/last"]
    ran.clear()
    broken = False
    (folder.artifacts / "last" / "file").write_text("cut")  # the disk lost bytes
    run_steps(folder, steps)
    assert ran == ["bad", "after-bad", "unknown", "last"], "completed and undamaged results are not made again"
    assert {state for name, state in states(folder).items() if name != "unknown"} == {StepState.COMPLETED}
    assert (folder.artifacts / "last" / "file").read_text() == "last"


def test_what_is_needed_for_others_alone_is_not_made_again_for_nobody(trained: Run) -> None:
    folder = asked(trained, "work", merged=True)
    folder.work.mkdir()
    ran: list[str] = []

    def step(name: str, **more: Any) -> PlannedStep:
        def run() -> Done:
            ran.append(name)
            for left in more.get("leaves", ()):
                left.mkdir()
                checkpoints.write_checksums(left, 1)
            return Done()

        return PlannedStep(name, run, **more)

    steps = [step("base", leaves=[folder.work / "base"], lasts=False), step("user", needs=["base"])]
    run_steps(folder, steps)
    shutil.rmtree(folder.work / "base")  # at the job's end, before the process was killed
    run_steps(folder, steps)
    assert ran == ["base", "user"]
    more = [*steps, step("another", needs=["base"])]
    run_steps(folder, more)
    assert ran == ["base", "user", "base", "another"]


# Killed and stopped.


def _killed_at(folder: JobFolder, moment: int) -> None:
    """In a fork: run the export until it syncs a file for the n-th time, then die."""
    count = 0
    sync, rename = os.fsync, os.rename

    def die_at(what: Any) -> Any:
        def counted(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return what(*arguments, **more)

        return counted

    os.fsync, os.rename = die_at(sync), die_at(rename)
    os._exit(train(folder))


def test_killed_at_any_moment_it_lists_nothing_half_and_ends_whole_when_tried_again(trained: Run) -> None:
    torch.set_num_threads(1)  # a fork has no other threads
    expected = None
    kills = 0
    for moment in range(1, MOST_KILLS, 2):  # every second one: the sync of a file or its folder, or a renaming
        folder = asked(trained, "killed", merged=True)
        process = FORK.Process(target=_killed_at, args=(folder, moment))
        process.start()
        process.join()
        listed = saved_artifacts(folder)
        assert all(verify_files(Path(each.path)) is None for each in listed), moment
        assert all(each.identifier == "killed/merged" for each in listed), moment
        if process.exitcode == COMPLETED:
            break
        assert process.exitcode == -signal.SIGKILL, moment
        assert folder.read_manifest() is None or len(listed) == 1, "a completed job has everything that was asked for"
        kills += 1
        assert done(folder) == COMPLETED, (moment, reason(folder))
        manifest = folder.read_manifest()
        assert manifest is not None
        assert [each.identifier for each in manifest.artifacts] == ["killed/merged"]
        assert verify_files(folder.merged) is None
        assert [path.name for path in folder.artifacts.iterdir()] == ["merged"], "no unfinished files are left"
        found = tensors(folder.merged)
        expected = found if expected is None else expected
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    else:
        pytest.fail("it was never left alone until its end")
    assert kills > 8, "files, folders, states and manifest are all synced"


def test_stopped_it_says_which_step_is_left(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = asked(trained, "stopped", merged=True)

    def stops(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as during:
        during.setattr(export_steps, "merge", stops)
        assert done(folder) == STOPPED
    assert states(folder) == {"merged": StepState.SCHEDULED}
    assert saved_artifacts(folder) == ()
    assert done(folder) == COMPLETED
