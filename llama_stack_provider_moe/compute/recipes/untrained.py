"""What recipes that train nothing share: their plan, their steps, and a result that appears when it is complete."""

import time
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter

from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Finished, Plan, Resumed, Saved, Step
from llama_stack_provider_moe.jobdir.folder import Artifact, ArtifactKind, write_atomic
from llama_stack_provider_moe.spec import AblationMeasureSpec, AblationSpec, MixSpec, RoutingAnalysisSpec
from llama_stack_provider_moe.spec.surgery_jobs import SurgerySpec

_JSON: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])
_MOST_STEPS = 100  # events of a job whose steps are tensors


class Untrained[Spec: AblationMeasureSpec | AblationSpec | MixSpec | RoutingAnalysisSpec | SurgerySpec]:
    """A job of such a recipe, from now on."""

    def __init__(self, session: Session[Spec]) -> None:
        self._session = session
        self._began = time.monotonic()

    def planned(self, plan: dict[str, object]) -> None:
        """Record what the job decided; recipe and model come first."""
        session, spec = self._session, self._session.spec
        whole = {"recipe": spec.recipe, "model": spec.model, "model_from": spec.model_from, **plan}
        write_atomic(session.folder.resolved, _JSON.dump_json(whole, indent=2).decode())
        session.events.append(Plan(plan=_JSON.dump_python(whole, mode="json")))
        if session.started_before:
            session.events.append(Resumed(step=0, checkpoint=None))

    def record_step(self, done: int, total: int) -> None:
        """Record that `done` of `total` units of work are done; it is a sign of life."""
        left_s = (time.monotonic() - self._began) / done * (total - done)
        self._session.events.append(Step(step=done, max_steps=total, epoch=done / total, metrics={}, eta_s=left_s))
        liveness.heard()

    def record_some(self, done: int, total: int) -> None:
        """The same, with an event for each hundredth of many small units."""
        liveness.heard()
        if done == total or done % max(1, total // _MOST_STEPS) == 0:
            self.record_step(done, total)

    def published(self, kind: ArtifactKind, final: Path, write: Callable[[Path], None]) -> Artifact:
        """Have a folder written under a hidden name, and publish it as an artifact.

        Args:
            kind: of the artifact.
            final: the folder.
            write: gets the hidden name, of a folder that does not exist.
        """
        final.parent.mkdir(exist_ok=True)
        written = final.with_name(f".{final.name}.writing")
        remove(written)
        write(written)
        publish(written, final, step=0)
        artifact = describe(self._session.job_uuid, kind, final, epoch=0, step=0)
        self._session.events.append(Saved(artifact=artifact.model_dump(mode="json")))
        return artifact

    def finished(self) -> None:
        """Record the job's end."""
        self._session.events.append(Finished(train_seconds=time.monotonic() - self._began))
