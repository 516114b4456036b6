"""What each tracker has written at the end, read back with the tracker's own reader."""

import importlib
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED, QUIET, be_quiet
from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support.training_support import Row, Run, Workshop, said, sft_rows, workshop

__all__ = ["workshop"]

STEPS = 6
# Training on English makes this less likely.
ODD: list[Row] = [{"messages": [said("user", "?"), said("assistant", "%{9}#~@8|7^ <0>")]}] * 3


@pytest.fixture(autouse=True)
def no_settings_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers set environment variables that would send the next test's figures to this one's folder."""
    for name in ("TRACKIO_DIR", "MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # its folder is fixed when it is imported, and TRL's GRPO imports it


def evaluation(workshop: Workshop, rows: list[Row] | None = None, **more: Any) -> dict[str, Any]:
    """An `eval` block for the next job, whose rows are in its folder."""
    rows = sft_rows(3, first=200) if rows is None else rows
    retained = JobFolder(workshop.next_folder("sft")).rows("eval-retain")
    retained.parent.mkdir(parents=True)
    retained.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"retain_dataset_id": "retain", "masked_experts": {"1": "0"}, "resamples": 100, **more}


def tracked(workshop: Workshop, **trackers: dict[str, Any]) -> Run:
    run = workshop.run(
        "sft", "granitemoe", trackers=trackers, training={"n_epochs": 1, "max_steps_per_epoch": STEPS, "batch_size": 2},
        eval=evaluation(workshop),
    )  # fmt: skip
    assert run.exit_code == COMPLETED, run.reason
    (said,) = [event.text for event in run.events("message") if event.text.startswith("trackers: ")]
    assert said == f"trackers: {', '.join(trackers)}, in {run.folder.trackers}"
    return run


def losses(run: Run) -> dict[int, float]:
    return {event.step: event.metrics["ce"] for event in run.events("step")}


def safety(run: Run) -> dict[str, dict[int, float]]:
    """The evaluation's figures that trackers must have, from the artifact: name -> step -> value."""
    report = json.loads((run.folder.evaluation / "eval.json").read_text(encoding="utf-8"))
    found: dict[str, dict[int, float]] = {}
    for state, above, step in (
        ("before", "safety", 0), ("before_masked", "safety/masked", 0),
        ("after", "safety", STEPS), ("after_masked", "safety/masked", STEPS),
    ):  # fmt: skip
        figure = report["measured"][state]["perplexity"]
        for end, value in (("", "value"), ("/low", "low"), ("/high", "high")):
            found.setdefault(f"{above}/perplexity{end}", {})[step] = figure[value]
    change = report["differences"]["after - before"]["perplexity_ratio"]
    for end, value in (("", "value"), ("/low", "low"), ("/high", "high")):
        found[f"safety/change/perplexity_ratio{end}"] = {STEPS: change[value]}
    before, after = (found["safety/perplexity"][step] for step in (0, STEPS))
    assert change["value"] == pytest.approx(after / before)
    assert before != after
    return found


def approximately(by_name: dict[str, dict[int, float]]) -> dict[str, Any]:
    return {name: pytest.approx(by_step, rel=1e-6) for name, by_step in by_name.items()}


def same(written: dict[int, float], run: Run) -> bool:
    """In single precision, because TensorBoard keeps no more."""
    return written.keys() == losses(run).keys() and all(
        written[step] == pytest.approx(loss, rel=1e-6) for step, loss in losses(run).items()
    )


def test_tensorboard(workshop: Workshop) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tracked(workshop, tensorboard={})
    events = EventAccumulator(str(run.folder.trackers / "tensorboard"))
    events.Reload()
    assert same({point.step: point.value for point in events.Scalars("train/ce")}, run)
    assert [point.step for point in events.Scalars("routing/load_entropy")] == list(losses(run))
    assert [point.step for point in events.Scalars("eval/validation_loss")] == [0, STEPS]
    names = [name for name in events.Tags()["scalars"] if name.startswith("safety/")]
    written = {name: {point.step: point.value for point in events.Scalars(name)} for name in names}
    assert written == approximately(safety(run))


def test_mlflow(workshop: Workshop) -> None:
    from mlflow import MlflowClient

    run = tracked(workshop, mlflow={"experiment": "routers"})
    client = MlflowClient(tracking_uri=f"sqlite:///{run.folder.trackers / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("routers")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == (run.folder.root.name, "FINISHED")
    assert found.data.params["training.batch_size"] == "2"
    assert same({point.step: point.value for point in client.get_metric_history(found.info.run_id, "train/ce")}, run)
    names = [name for name in found.data.metrics if name.startswith("safety/")]
    written = {
        name: {point.step: point.value for point in client.get_metric_history(found.info.run_id, name)}
        for name in names
    }
    assert written == approximately(safety(run))


def test_trackio(workshop: Workshop) -> None:
    run = tracked(workshop, trackio={"project": "routers"})
    with sqlite3.connect(run.folder.trackers / "trackio" / "routers.db") as database:
        rows = database.execute("select step, metrics from metrics where run_name = ?", [run.folder.root.name])
        written = [(step, json.loads(metrics)) for step, metrics in rows]
    assert same({step: figures["train/ce"] for step, figures in written if "train/ce" in figures}, run)
    assert by_name(written) == approximately(safety(run))


def test_trackio_writes_into_the_jobs_folder_though_another_library_imported_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's GRPO does, before the job's trackers are opened."""
    for name in ("HF_DATASETS_CACHE", *QUIET):
        monkeypatch.setenv(name, "")  # set back at the end
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.delenv("TRACKIO_DIR")
    folder = JobFolder(tmp_path / "job")
    be_quiet(folder)
    found = subprocess.run(
        [sys.executable, "-c", "import trackio; print(trackio.utils.TRACKIO_DIR)"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.split() == [str(folder.trackers / "trackio")]


def test_trackio_of_another_folder_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    os.environ["TRACKIO_DIR"] = str(tmp_path / "elsewhere")
    importlib.import_module("trackio")
    del os.environ["TRACKIO_DIR"]
    one_step = {"n_epochs": 1, "max_steps_per_epoch": 1}
    run = workshop.run("sft", "granitemoe", trackers={"trackio": {}}, training=one_step)
    assert run.exit_code == FAILED
    assert run.reason == (
        f"trackers.trackio: can't be opened: TrainingError: trackio was imported for {tmp_path / 'elsewhere'}; "
        f"expected {run.folder.trackers / 'trackio'}"
    )


def by_name(written: list[tuple[int, dict[str, float]]]) -> dict[str, dict[int, float]]:
    """The figures of the evaluation."""
    found: dict[str, dict[int, float]] = {}
    for step, figures in written:
        for name in figures:
            if name.startswith("safety/"):
                found.setdefault(name, {})[step] = figures[name]
    return found


def records(content: bytes) -> Iterator[bytes]:
    """Records of a wandb transaction log: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB)."""
    assert content[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(content):
        if position % 32768 > 32768 - 7:  # no header fits into the rest of the block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_wandb_offline(workshop: Workshop) -> None:
    from wandb.proto import wandb_internal_pb2

    run = tracked(workshop, wandb={"project": "routers", "entity": "us"})
    (file,) = (run.folder.trackers / "wandb").glob("wandb/offline-run-*/*.wandb")
    written, names = {}, set()
    history: list[tuple[int, dict[str, float]]] = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            names.add((record.run.entity, record.run.project, record.run.run_id))
        figures = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "train/ce" in figures:
            written[figures["step"]] = figures["train/ce"]
        if "step" in figures:
            history.append((figures["step"], figures))
    assert names == {("us", "routers", run.folder.root.name)}
    assert same(written, run)
    assert by_name(history) == approximately(safety(run))


def test_a_run_ends_at_a_tracker_as_its_job_does(workshop: Workshop) -> None:
    """A job that fails its gate has failed there too, with all its figures; a resumed job hides none of them."""
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = workshop.run(
        "sft", "granitemoe", trackers={"mlflow": {}, "tensorboard": {}}, optimizer={"lr": 3e-2}, adapter=None,
        eval=evaluation(workshop, ODD, fail_if={"capability_drop": 0}),
    )  # fmt: skip
    assert run.exit_code == FAILED
    assert run.reason.startswith("eval.fail_if.capability_drop: ")
    client = MlflowClient(tracking_uri=f"sqlite:///{run.folder.trackers / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("moe")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FAILED"
    assert [point.step for point in client.get_metric_history(found.info.run_id, "safety/perplexity")] == [0, 2]

    body = json.loads(run.folder.spec.read_text(encoding="utf-8"))
    body["eval"]["fail_if"] = {}
    write_atomic(run.folder.spec, JOB_SPEC.validate_python(body))
    assert workshop.again(run).exit_code == COMPLETED
    assert client.get_run(found.info.run_id).info.status == "FINISHED"
    events = EventAccumulator(str(run.folder.trackers / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/ce")] == [1, 2]
    assert {point.step for point in events.Scalars("safety/perplexity")} == {0, 2}


def test_a_tracker_that_is_missing_or_lost(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # not only missing: MLflow creates missing folders
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    run = workshop.run("sft", "granitemoe", trackers={"mlflow": {}})
    assert run.exit_code == FAILED
    assert run.reason.startswith("trackers.mlflow: can't be opened: ")
    assert not run.events("step"), "the job fails before the training, not after it"
