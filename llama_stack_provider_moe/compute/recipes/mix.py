"""Branch, train, mix: branches of one model become the experts of a new one. Nothing is trained."""

import time

from pydantic import TypeAdapter

from llama_stack_provider_moe.compute.mixing.mix import dry_run, mix
from llama_stack_provider_moe.compute.mixing.report import text
from llama_stack_provider_moe.compute.mixing.routers import from_domains
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Finished, Plan, Resumed, Saved, Step
from llama_stack_provider_moe.jobdir.folder import Manifest, write_atomic
from llama_stack_provider_moe.spec import MixSpec
from llama_stack_provider_moe.spec.mixing import part_of

_JSON: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


def run(session: Session[MixSpec]) -> Manifest:
    """Compare the branches, write the mixed model, and publish it as the job's model."""
    spec, folder, began = session.spec, session.folder, time.monotonic()
    planned = dry_run(spec.model, spec)
    plan: dict[str, object] = {
        "recipe": spec.recipe,
        "model": spec.model,
        "model_from": spec.model_from,
        "method": spec.method,
        "router": spec.start,
        "experts": {each.name: each.model for each in planned.experts},
        "parameters": planned.parameters,
        "active": planned.active,
        "bytes": planned.bytes,
    }
    write_atomic(folder.resolved, _JSON.dump_json(plan, indent=2).decode())
    session.events.append(Plan(plan=_JSON.dump_python(plan, mode="json")))
    if session.started_before:
        session.events.append(Resumed(step=0, checkpoint=None))

    def record_step(done: int, total: int) -> None:
        liveness.heard()
        if done == total or done % max(1, total // 100) == 0:
            left_s = (time.monotonic() - began) / done * (total - done)
            session.events.append(Step(step=done, max_steps=total, epoch=done / total, metrics={}, eta_s=left_s))

    start = None
    if spec.start == "domains":
        names = [spec.branches[at].name for at in spec.kept]
        start = from_domains(spec, {name: folder.rows(part_of(name)) for name in names}, session.say)
    folder.artifacts.mkdir(exist_ok=True)
    written = folder.model.with_name(f".{folder.model.name}.writing")
    remove(written)
    report = mix(spec.model, spec, written, session.say, record_step, start)
    publish(written, folder.model, step=0)
    print(text(report.model_copy(update={"folder": str(folder.model)})), flush=True)
    artifact = describe(session.job_uuid, "model", folder.model, epoch=0, step=0)
    session.events.append(Saved(artifact=artifact.model_dump(mode="json")))
    session.events.append(Finished(train_seconds=time.monotonic() - began))
    summary = {"experts": float(len(report.experts)), "parameters": float(report.parameters)}
    return Manifest(job_uuid=session.job_uuid, artifacts=[artifact], summary=summary)
