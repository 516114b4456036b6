"""Laws of a mirrored job: its copies match what it keeps, and replace its own checkpoints if they are lost."""

import shutil
from pathlib import Path

import pytest
import torch

from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.jobdir.mirror import Mirror
from llama_stack_provider_moe.spec.server_config import MIRROR_VARIABLE
from tests.support.s3_server import AWS, s3
from tests.support.training_support import Run, Workshop, workshop

__all__ = ["s3", "workshop"]

EPOCHS = {"training": {"n_epochs": 4}, "options": {"keep_checkpoints": 2, "validation_split": 0}}


@pytest.fixture(scope="module")
def run(workshop: Workshop) -> Run:
    """A job of four epochs that keeps two checkpoints, with dropout."""
    with pytest.MonkeyPatch.context() as during:
        during.setenv(MIRROR_VARIABLE, f"file://{workshop.root}/far")
        run = workshop.run("sft", "granitemoe", data={"validation_dataset_id": None}, moe={"expert_dropout": 0.1},
                           **EPOCHS)  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    return run


def mirror_of(run: Run) -> Mirror:
    return Mirror.of(run.folder, f"file://{run.folder.root.parents[1]}/far")


def test_copies_are_what_the_job_keeps(run: Run) -> None:
    kept = {Path(artifact.path) for artifact in run.manifest.artifacts}
    assert {path.name for path in kept} == {"epoch-3", "epoch-4", "adapter"}
    mirror = mirror_of(run)
    assert mirror.names() == ["artifacts/adapter", "checkpoints/epoch-3", "checkpoints/epoch-4"], "pruned there too"
    for path in kept:
        here = {file.name: file.read_bytes() for file in path.iterdir()}
        there = Path(mirror._root) / ("artifacts" if path.name == "adapter" else "checkpoints") / path.name
        assert {file.name: file.read_bytes() for file in there.iterdir()} == here


@pytest.mark.parametrize("lost", ["all", "damaged"])
def test_a_job_whose_disk_is_lost_goes_on_from_its_copy(
    run: Run, workshop: Workshop, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MIRROR_VARIABLE, f"file://{workshop.root}/far")
    folder = workshop.copied(run)
    shutil.copytree(mirror_of(run)._root, workshop.root / "far" / folder.root.name)
    folder.mirror.write_text(f'{{"urls": ["file://{workshop.root}/far/{folder.root.name}"]}}')
    mirror_of(Run(folder, 0)).remove("checkpoints/epoch-4")  # it was written after the disk was lost
    shutil.rmtree(folder.root / "checkpoints" / "epoch-4")
    if lost == "all":
        shutil.rmtree(folder.root / "checkpoints")
    else:
        (folder.root / "checkpoints" / "epoch-3" / "adapter_model.safetensors").write_bytes(b"torn")
    again = workshop.again(Run(folder, 0))
    assert again.exit_code == COMPLETED, again.reason
    assert [event.checkpoint for event in again.events("resumed")] == ["epoch-3"]
    mine, theirs = again.adapter(), run.adapter()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    assert mirror_of(again).names() == mirror_of(run).names()


def test_copies_on_s3_while_it_trains(workshop: Workshop, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**AWS, "AWS_ENDPOINT_URL": s3, MIRROR_VARIABLE: "s3://bucket/jobs"}.items():
        monkeypatch.setenv(name, value)
    run = workshop.run("sft", "llama", **EPOCHS)
    assert run.exit_code == COMPLETED, run.reason
    copies = Mirror.of(run.folder, "s3://bucket/jobs")
    assert copies.names() == ["artifacts/adapter", "checkpoints/epoch-3", "checkpoints/epoch-4"]
    folder = workshop.copied(run)
    shutil.rmtree(folder.root / "checkpoints")
    again = workshop.again(Run(folder, 0))
    assert [event.checkpoint for event in again.events("resumed")] == ["epoch-4"]
    assert all(torch.equal(again.adapter()[name], tensor) for name, tensor in run.adapter().items())


def test_a_mirror_that_takes_nothing_ends_no_job(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    (workshop.root / "no folder").write_text("")
    monkeypatch.setenv(MIRROR_VARIABLE, f"file://{workshop.root}/no folder/far")
    run = workshop.run("sft", "llama", **EPOCHS)
    assert run.exit_code == COMPLETED, run.reason
    told = [event.text for event in run.events("message") if "mirror.url" in event.text]
    assert told
    assert all("for now" in text for text in told)
    assert {event.level for event in run.events("message") if "mirror.url" in event.text} == {"warning"}
