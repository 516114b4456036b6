"""Experiment trackers: send the figures of a job's events to other tools (`logger_config` in the API).

Everything is written into the job's folder, unless the server's operator names another place in `child_env`. A job
can't name one, and its spec has neither keys nor addresses. If a tracker can't be opened, the job fails at its start.
If it stops working later (a lost network), its figures are lost and there is a warning, but the run continues.

Names: `train/<metric>` of each step, `routing/<figure>` of its experts, `eval/<metric>` of each evaluation. For a job's
`eval`: `safety/<figure>` and the ends of its interval, `.../low` and `.../high`, at step 0 before training and at the
last step after it; `safety/masked/<figure>`, without the masked experts; `safety/change/<figure>`, after minus before
(the ratio, for perplexities). Trackers that can't delete a figure (trackio, MLflow) get the steps that a later start
repeats twice.
"""

import importlib.util
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.errors import TrainingError
from llama_stack_provider_moe.jobdir.events import Assessed, Evaluation, Routing, Step
from llama_stack_provider_moe.spec import MLflow, TensorBoard, Trackers, Trackio, WandB


class Tracker(ABC):
    """One tracker of one job. Its constructor opens it.

    The constructors' arguments: the tracker's block of the job; its own folder in the job's; the job's session; the
    number of steps before this start.
    """

    @abstractmethod
    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write the figures of a step."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """Write what is pending, and close; `finished`: the run reached its end."""


class TensorBoardTracker(Tracker):
    """https://www.tensorflow.org/tensorboard, by `torch.utils.tensorboard`."""

    def __init__(self, settings: TensorBoard, folder: Path, session: AnySession, first_step: int) -> None:
        from torch.utils import tensorboard

        new_writer: Any = tensorboard.SummaryWriter  # has no annotations
        # A resumed start repeats the steps after its checkpoint, so `purge_step` hides the older ones, without the
        # checkpoint's step, which is not repeated.
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
        wanted = Path(os.environ.setdefault("TRACKIO_DIR", str(folder)))  # read once, when trackio is imported
        import trackio
        from trackio.utils import TRACKIO_DIR

        if wanted != TRACKIO_DIR:
            raise TrainingError(f"trackio was imported for {TRACKIO_DIR}; expected {wanted}")
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
            # The job keeps its own log; this machine's programs and repositories stay private.
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, x_disable_machine_info=True),
        )
        # A resumed start repeats steps, but wandb's own step can't go back.
        self._run.define_metric("*", step_metric="step")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log({**figures, "step": step})

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if finished else 1)


Opener = Callable[[Path, AnySession, int], Tracker]  # see `Tracker`


def _openers(wanted: Trackers) -> dict[str, Opener]:
    """The trackers that a job asks for, by name."""
    found: dict[str, Opener] = {}
    if wanted.tensorboard is not None:
        found["tensorboard"] = partial(TensorBoardTracker, wanted.tensorboard)
    if wanted.trackio is not None:
        found["trackio"] = partial(TrackioTracker, wanted.trackio)
    if wanted.mlflow is not None:
        found["mlflow"] = partial(MLflowTracker, wanted.mlflow)
    if wanted.wandb is not None:
        found["wandb"] = partial(WandBTracker, wanted.wandb)
    return found


def require_trackers(wanted: Trackers) -> None:
    """Check that the job's trackers are installed, before anything is loaded.

    Raises:
        TrainingError: a package is not installed.
    """
    missing = [name for name in _openers(wanted) if not importlib.util.find_spec(name)]
    if missing:
        raise TrainingError(
            f"trackers.{missing[0]}: package {missing[0]!r} is not installed in the training environment; "
            "pip install 'llama-stack-provider-moe[trackers]'"
        )


class OpenTrackers:
    """All trackers of a run.

    Args:
        session: the job's.
        first_step: steps before this start.
    """

    def __init__(self, session: AnySession, first_step: int) -> None:
        self._session = session
        self._open: dict[str, Tracker] = {}
        self._lost: dict[str, int] = {}
        try:
            for name, opener in _openers(session.spec.trackers).items() if session.peers.leads else ():
                self._open[name] = _opened(name, opener, session, first_step)
        except BaseException:
            self.close(finished=False)
            raise
        if self._open:
            session.say(f"trackers: {', '.join(self._open)}, in {session.folder.trackers}")

    def log(self, event: Step | Evaluation | Routing | Assessed) -> None:
        """Write an event's figures to all trackers."""
        figures = _figures(event)
        for name, tracker in self._open.items():
            try:
                tracker.log(figures, event.step)
            except Exception as error:  # noqa: BLE001  no error of a tracker may end the run
                if name not in self._lost:
                    self._session.say(
                        f"trackers.{name}: {type(error).__name__}: {error}; training continues", "warning"
                    )
                self._lost[name] = self._lost.get(name, 0) + 1

    def close(self, finished: bool) -> None:
        """Close all trackers."""
        for name, tracker in self._open.items():
            try:
                tracker.close(finished)
            except Exception as error:  # noqa: BLE001  as above
                self._session.say(f"trackers.{name}: closing: {type(error).__name__}: {error}", "warning")
        for name, count in self._lost.items():
            self._session.say(f"trackers.{name}: the figures of {count} events were lost", "warning")
        self._open.clear()


def _opened(name: str, opener: Opener, session: AnySession, first_step: int) -> Tracker:
    folder = session.folder.trackers / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return opener(folder, session, first_step)
    except Exception as error:
        raise TrainingError(f"trackers.{name}: can't be opened: {type(error).__name__}: {error}") from error


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
    """The figures of the state that this event adds; an event of `after` repeats those of `before`."""
    state = "after" if "after" in event.measured else "before"
    parts = [
        ("safety", event.measured[state]),
        ("safety/masked", event.measured.get(f"{state}_masked", {})),
        ("safety/ablated", event.measured.get(f"{state}_ablated", {})),
        ("safety/change", event.differences.get("after - before", {})),
    ]
    figures: dict[str, float] = {}
    for above, found in parts:
        for name, figure in found.items():
            at = f"{above}/{name}"
            figures |= {at: figure["value"], f"{at}/low": figure["low"], f"{at}/high": figure["high"]}
    return figures


def _flat(tree: Mapping[str, object], above: str = "") -> dict[str, str]:
    """Flatten a job to `{"optimizer.lr": "0.0002"}`: MLflow's parameters are text, at most 6,000 characters each."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[f"{above}{name}"] = str(value)[:6000]
    return flat
