"""What each tracker has written in the end, read back with its own reader."""

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.training.main import COMPLETED, FAILED
from tests.training_support import Run, Workshop, workshop

__all__ = ["workshop"]

STEPS = 6


@pytest.fixture(autouse=True)
def no_settings_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers leave environment variables behind, which would lead the next test's to the folder of this one's."""
    for name in ("TRACKIO_DIR", "MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def tracked(workshop: Workshop, **trackers: dict[str, Any]) -> Run:
    run = workshop.run(
        "sft", "granitemoe", trackers=trackers, training={"n_epochs": 1, "max_steps_per_epoch": STEPS, "batch_size": 2}
    )
    assert run.exit_code == COMPLETED, run.reason
    (said,) = [event.text for event in run.events("message") if event.text.startswith("trackers: ")]
    assert said == f"trackers: {', '.join(trackers)}, in {run.folder.trackers}"
    return run


def losses(run: Run) -> dict[int, float]:
    return {event.step: event.metrics["ce"] for event in run.events("step")}


def same(written: dict[int, float], run: Run) -> bool:
    """In single precision, which is all that TensorBoard keeps."""
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


def test_trackio(workshop: Workshop) -> None:
    run = tracked(workshop, trackio={"project": "routers"})
    with sqlite3.connect(run.folder.trackers / "trackio" / "routers.db") as database:
        rows = database.execute("select step, metrics from metrics where run_name = ?", [run.folder.root.name])
        written = [(step, json.loads(metrics)) for step, metrics in rows]
    assert same({step: figures["train/ce"] for step, figures in written if "train/ce" in figures}, run)


def records(content: bytes) -> Iterator[bytes]:
    """Of a wandb transaction log: 7 bytes of its own, then LevelDB's log format (blocks of 32 KiB)."""
    assert content[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(content):
        if position % 32768 > 32768 - 7:  # no header fits into what is left of a block
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
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            names.add((record.run.entity, record.run.project, record.run.run_id))
        figures = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "train/ce" in figures:
            written[figures["step"]] = figures["train/ce"]
    assert names == {("us", "routers", run.folder.root.name)}
    assert same(written, run)


def test_a_tracker_that_is_missing_or_lost(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # not merely missing: MLflow makes folders that are
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    run = workshop.run("sft", "granitemoe", trackers={"mlflow": {}})
    assert run.exit_code == FAILED
    assert run.reason.startswith("trackers.mlflow: can't be opened: ")
    assert not run.events("step"), "asked for and not to be had is told before the training, not after it"
