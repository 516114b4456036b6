"""Step 3 of directional ablation: take measured directions out of a model's weights. Nothing is trained."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import TypeAdapter

from llama_stack_provider_moe.compute.ablation.apply import apply, dry_run
from llama_stack_provider_moe.compute.ablation.apply_report import text
from llama_stack_provider_moe.compute.ablation.measurements import of_job, read
from llama_stack_provider_moe.compute.models.loader import load_for_inference, pick_device
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.compute.train.safety_eval import Assessment, require_gate
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Finished, Plan, Resumed, Saved, Step
from llama_stack_provider_moe.jobdir.folder import Manifest, write_atomic
from llama_stack_provider_moe.spec import AblationSpec

_JSON: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


@contextmanager
def _assessment(session: Session[AblationSpec], model: str) -> Iterator[Assessment]:
    """The job's evaluation of one model, which is in memory inside the `with` alone."""
    training, options = session.spec.training, session.spec.options
    device = pick_device(training.dtype)
    loaded, tokenizer = load_for_inference(model, training.dtype, device, options.chat_template)
    try:
        yield Assessment(session, loaded, tokenizer, find_layout(loaded))
    finally:
        del loaded
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run(session: Session[AblationSpec]) -> Manifest:
    """Plan the edits, write the edited model, and publish it as the job's model."""
    spec, folder, began = session.spec, session.folder, time.monotonic()
    found = read(of_job(folder, spec.measurements), "measurements")
    planned = dry_run(spec.model, spec, found)
    plan: dict[str, object] = {
        "recipe": spec.recipe,
        "model": spec.model,
        "model_from": spec.model_from,
        "measurements": spec.measurements,
        "tensors": len(planned.touched),
        "bytes": planned.bytes,
        "missed": planned.missed,
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

    if spec.eval is not None:
        with _assessment(session, spec.model) as assessment:
            assessment.before()
    folder.artifacts.mkdir(exist_ok=True)
    written = folder.model.with_name(f".{folder.model.name}.writing")
    remove(written)
    report = apply(spec.model, spec, found, written, session.say, record_step, named=folder.model)
    publish(written, folder.model, step=0)
    print(text(report), flush=True)
    artifact = describe(session.job_uuid, "model", folder.model, epoch=0, step=0)
    session.events.append(Saved(artifact=artifact.model_dump(mode="json")))
    artifacts, evaluated = [artifact], None
    if spec.eval is not None:
        with _assessment(session, str(folder.model)) as assessment:
            evaluation, evaluated, _ = assessment.after(epoch=0, step=0)
            artifacts.append(evaluation)
    session.events.append(Finished(train_seconds=time.monotonic() - began))
    if evaluated is not None:
        require_gate(evaluated)
    along = [each.along_after or 0.0 for each in report.touched if each.kind != "router"]
    summary = {"tensors": float(len(report.touched)), "greatest_along_after": max(along)}
    return Manifest(job_uuid=session.job_uuid, artifacts=artifacts, summary=summary)
