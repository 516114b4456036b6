"""Expert surgery: decide what the new experts are, measure what that costs, and write the model. Trains nothing."""

import gc
import time

import torch
from pydantic import TypeAdapter

from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.surgery.actions import choose, prepare
from llama_stack_provider_moe.compute.surgery.prepared import Decision, Prepared, make
from llama_stack_provider_moe.compute.surgery.report import text
from llama_stack_provider_moe.compute.surgery.rows import load_rows
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Finished, Plan, Resumed, Saved, Step
from llama_stack_provider_moe.jobdir.folder import Manifest, write_atomic
from llama_stack_provider_moe.spec.surgery_jobs import GENERAL_ROWS, ROWS, SurgerySpec

_JSON: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


def run(session: Session[SurgerySpec]) -> Manifest:
    """Check the plan, choose, write, and publish the new model as the job's model."""
    spec, folder, began = session.spec, session.folder, time.monotonic()
    checked = prepare(model_folder(spec.model, "model"), spec.surgery)
    layout = checked.before.layout
    plan: dict[str, object] = {
        "recipe": spec.recipe,
        "model": spec.model,
        "model_from": spec.model_from,
        "surgery": spec.surgery.model_dump(mode="json"),
        "layout": layout.as_json(),
        "experts": checked.resized.layout.num_experts,
        "keys": dict(checked.resized.keys),
    }
    write_atomic(folder.resolved, _JSON.dump_json(plan, indent=2).decode())
    session.events.append(Plan(plan=_JSON.dump_python(plan, mode="json")))
    if session.started_before:
        session.events.append(Resumed(step=0, checkpoint=None))
    print(f"model     {spec.model}\nexperts   {layout.text()}", flush=True)
    decision = _decided(session, checked)

    def record_step(done: int, total: int) -> None:
        liveness.heard()
        if done == total or done % max(1, total // 100) == 0:
            left_s = (time.monotonic() - began) / done * (total - done)
            session.events.append(Step(step=done, max_steps=total, epoch=done / total, metrics={}, eta_s=left_s))

    folder.artifacts.mkdir(exist_ok=True)
    written = folder.model.with_name(f".{folder.model.name}.writing")
    remove(written)
    report = make(checked, decision, spec.model, written, session.say, record_step, named=folder.model)
    publish(written, folder.model, step=0)
    print(text(report), flush=True)
    artifact = describe(session.job_uuid, "model", folder.model, epoch=0, step=0)
    session.events.append(Saved(artifact=artifact.model_dump(mode="json")))
    session.events.append(Finished(train_seconds=time.monotonic() - began))
    summary = {"experts_before": float(report.experts_before), "experts_after": float(report.experts_after)}
    if report.loss is not None:
        summary |= {"loss_before": report.loss.before, "loss_after": report.loss.after, "kl": report.loss.kl}
    if report.general_loss is not None:
        summary |= {"general_loss_before": report.general_loss.before, "general_loss_after": report.general_loss.after}
    return Manifest(job_uuid=session.job_uuid, artifacts=[artifact], summary=summary)


def _decided(session: Session[SurgerySpec], prepared: Prepared) -> Decision:
    """What the new model is made of; the old one is in memory only until that is known."""
    spec, data = session.spec, session.spec.data
    if data is None:
        return choose(prepared, None)
    files = {data.dataset_id: session.folder.rows(ROWS)}
    if data.general_dataset_id is not None:
        files[f"{data.general_dataset_id} (general)"] = session.folder.rows(GENERAL_ROWS)
    rows = load_rows(str(prepared.before.folder), files, spec.training, spec.options, session.say)

    def heard(done: int, total: int) -> None:
        liveness.heard()

    decision = choose(prepared, rows, heard)
    del rows
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return decision
