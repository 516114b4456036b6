"""Experiment trackers: the figures of a job's events, where other tools show them (`logger_config` in the API).

Everything is written below the job's own folder, unless the server's operator names another place in `child_env`;
a job can't, and neither keys nor addresses are part of its spec. A tracker that can't be opened ends the job at its
start. One that stops working later (a lost network) costs its figures and a warning, never the run.

Names: `train/<metric>` of each step, `routing/<figure>` of its experts, `eval/<metric>` of each evaluation. Of a job's
`eval`: `safety/<figure>` and the ends of its interval, `.../low` and `.../high`, at step 0 before training and at the
last step after it; `safety/masked/<figure>`, without the masked experts; `safety/change/<figure>`, after less before
(of perplexities the ratio). Steps that a later start repeats are written again by trackers that can't take a figure
back (trackio, MLflow).
"""

import importlib.util
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_stack_provider_moe.errors import TrainingError
from llama_stack_provider_moe.jobs.events import Assessed, Evaluation, Routing, Step
from llama_stack_provider_moe.spec import MLflow, TensorBoard, Trackers, Trackio, WandB
from llama_stack_provider_moe.training.session import AnySession


class Tracker(ABC):
    """One tracker of one job, open from its making on.

    Args:
        settings: its block of the job.
        folder: of its own, in the job's.
        session: of the job.
        first_step: steps taken before this start.
    """

    @abstractmethod
    def __init__(self, settings: Any, folder: Path, session: AnySession, first_step: int) -> None: ...

    @abstractmethod
    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write figures of a step."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """Write all that is left; `finished` tells a run that reached its end from one that did not."""


class TensorBoardTracker(Tracker):
    """https://www.tensorflow.org/tensorboard, by `torch.utils.tensorboard`."""

    def __init__(self, settings: TensorBoard, folder: Path, session: AnySession, first_step: int) -> None:
        from torch.utils import tensorboard

        new_writer: Any = tensorboard.SummaryWriter  # has no annotations
        # The steps after the checkpoint that a start goes on from come again: the older ones, from this one on, are
        # hidden. The checkpoint's own step does not.
        self._writer = new_writer(str(folder), purge_step=first_step + 1 if first_step else None)
        self._writer.add_text("job", f"```json\n{session.spec.model_dump_json(indent=2)}\n```", first_step)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._writer.close()


class TrackioTracker(Tracker):
    """https://huggingface.co/docs/trackio, local first."""

    def __init__(self, settings: Trackio, folder: Path, session: AnySession, first_step: int) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder))  # read at its import
        import trackio

        self._run: Any = trackio.init(
            project=settings.project,
            name=session.job_uuid,
            config=session.spec.model_dump(mode="json"),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(figures), step=step)

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._run.finish()


class MLflowTracker(Tracker):
    """https://mlflow.org/docs/latest/ml/tracking."""

    def __init__(self, settings: MLflow, folder: Path, session: AnySession, first_step: int) -> None:
        from mlflow import MlflowClient

        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=address)
        known = self._client.get_experiment_by_name(settings.experiment)
        experiment = (
            known.experiment_id
            if known is not None
            else self._client.create_experiment(settings.experiment, artifact_location=str(folder / "artifacts"))
        )
        note = folder / "run_id"
        if note.exists():
            self._run_id = note.read_text(encoding="utf-8")
            self._client.update_run(self._run_id, status="RUNNING")
            return
        self._run_id = self._client.create_run(experiment, run_name=session.job_uuid).info.run_id
        note.write_text(self._run_id, encoding="utf-8")
        for name, value in _flat(session.spec.model_dump(mode="json")).items():
            self._client.log_param(self._run_id, name, value)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        moment_ms = int(time.time() * 1000)
        self._client.log_batch(
            self._run_id, metrics=[Metric(name, value, moment_ms, step) for name, value in figures.items()]
        )

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "FAILED")


class WandBTracker(Tracker):
    """https://docs.wandb.ai; without a key in the environment nothing is sent."""

    def __init__(self, settings: WandB, folder: Path, session: AnySession, first_step: int) -> None:
        for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
            os.environ.setdefault(f"WANDB_{name}_DIR", str(folder))
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            id=session.job_uuid,
            name=session.job_uuid,
            config=session.spec.model_dump(mode="json"),
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            # The output is the job's own log, and this machine's programs and repositories are nobody's business.
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_machine_info=True),
        )
        # A start that goes on repeats steps, and wandb's own step never goes back.
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log({**figures, "step": step})

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if finished else 1)


class _Asked(NamedTuple):
    """A tracker that a job asks for."""

    name: str
    kind: type[Tracker]
    settings: Any


def _asked(wanted: Trackers) -> list[_Asked]:
    each = [
        _Asked("tensorboard", TensorBoardTracker, wanted.tensorboard),
        _Asked("trackio", TrackioTracker, wanted.trackio),
        _Asked("mlflow", MLflowTracker, wanted.mlflow),
        _Asked("wandb", WandBTracker, wanted.wandb),
    ]
    return [asked for asked in each if asked.settings is not None]


def require_trackers(wanted: Trackers) -> None:
    """Refuse trackers that this environment lacks, before anything is loaded.

    Raises:
        TrainingError: a package is not installed here.
    """
    missing = [asked.name for asked in _asked(wanted) if not importlib.util.find_spec(asked.name)]
    if missing:
        raise TrainingError(
            f"trackers.{missing[0]}: package {missing[0]!r} is not installed in the training environment; "
            "pip install 'llama-stack-provider-moe[trackers]'"
        )


class OpenTrackers:
    """All trackers of a run.

    Args:
        session: of the job.
        first_step: steps taken before this start.
    """

    def __init__(self, session: AnySession, first_step: int) -> None:
        self._session = session
        self._open: dict[str, Tracker] = {}
        self._lost: dict[str, int] = {}
        try:
            for asked in _asked(session.spec.trackers) if session.peers.leads else ():
                self._open[asked.name] = _opened(asked, session, first_step)
        except BaseException:
            self.close(finished=False)
            raise
        if self._open:
            session.say(f"trackers: {', '.join(self._open)}, in {session.folder.trackers}")

    def tell(self, event: Step | Evaluation | Routing | Assessed) -> None:
        """Write an event's figures to all."""
        figures = _figures(event)
        for name, tracker in self._open.items():
            try:
                tracker.log(figures, event.step)
            except Exception as error:  # noqa: BLE001  whatever a tracker raises, hours of training are worth more
                if name not in self._lost:
                    self._session.say(f"trackers.{name}: {type(error).__name__}: {error}; training goes on", "warning")
                self._lost[name] = self._lost.get(name, 0) + 1

    def close(self, finished: bool) -> None:
        """Close all."""
        for name, tracker in self._open.items():
            try:
                tracker.close(finished)
            except Exception as error:  # noqa: BLE001  as above
                self._session.say(f"trackers.{name}: closing: {type(error).__name__}: {error}", "warning")
        for name, count in self._lost.items():
            self._session.say(f"trackers.{name}: the figures of {count} events were lost", "warning")
        self._open.clear()


def _opened(asked: _Asked, session: AnySession, first_step: int) -> Tracker:
    folder = session.folder.trackers / asked.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return asked.kind(asked.settings, folder, session, first_step)
    except Exception as error:
        raise TrainingError(f"trackers.{asked.name}: can't be opened: {type(error).__name__}: {error}") from error


def _figures(event: Step | Evaluation | Routing | Assessed) -> dict[str, float]:
    if isinstance(event, Step):
        return {f"train/{name}": value for name, value in event.metrics.items()} | {"train/epoch": event.epoch}
    if isinstance(event, Evaluation):
        return {f"eval/{name}": value for name, value in event.metrics.items()}
    if isinstance(event, Assessed):
        return _safety(event)
    by_set = {f"{part}/{name}": value for part, each in event.figures_by_set().items() for name, value in each.items()}
    return {f"routing/{name}": value for name, value in {**event.figures(), **by_set}.items()}


def _safety(event: Assessed) -> dict[str, float]:
    """Of the state that the event is new of: `after` repeats what was measured before."""
    state = "after" if "after" in event.measured else "before"
    told = [
        ("safety", event.measured[state]),
        ("safety/masked", event.measured.get(f"{state}_masked", {})),
        ("safety/change", event.differences.get("after - before", {})),
    ]
    figures: dict[str, float] = {}
    for above, found in told:
        for name, figure in found.items():
            at = f"{above}/{name}"
            figures |= {at: figure["value"], f"{at}/low": figure["low"], f"{at}/high": figure["high"]}
    return figures


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """`{"optimizer.lr": "0.0002"}`: MLflow's parameters are text under dotted names, at most 6,000 characters each."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = str(value)[:6000]
    return flat
