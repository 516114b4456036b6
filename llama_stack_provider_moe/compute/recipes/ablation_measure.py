"""Step 1 of directional ablation: mean hidden states of two sets of prompts. Nothing is trained."""

import time

from pydantic import TypeAdapter

from llama_stack_provider_moe.compute.ablation.analyze import analyze, text
from llama_stack_provider_moe.compute.ablation.analyze_command import write_report
from llama_stack_provider_moe.compute.ablation.measure import measured, write_measurements
from llama_stack_provider_moe.compute.ablation.subject import load_subject
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Finished, Plan, Resumed, Saved, Step
from llama_stack_provider_moe.jobdir.folder import Manifest, write_atomic
from llama_stack_provider_moe.spec import AblationMeasureSpec

_JSON: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


def run(session: Session[AblationMeasureSpec]) -> Manifest:
    """Load the model, measure, analyse, and write the measurements with their report."""
    spec, folder, began = session.spec, session.folder, time.monotonic()
    subject = load_subject(spec)
    plan: dict[str, object] = {
        "recipe": spec.recipe,
        "model": spec.model,
        "model_from": spec.model_from,
        "architecture": type(subject.model).__name__,
        "device": str(subject.model.device),
        "dtype": spec.training.dtype,
        "quantize_bits": spec.training.quantize_bits,
        "layout": None if subject.layout is None else subject.layout.as_json(),
        "adapter_folder": spec.adapter_folder,
        "sets": spec.data.sets,
        "position": spec.measure.position,
        "span": spec.measure.span,
    }
    write_atomic(folder.resolved, _JSON.dump_json(plan, indent=2).decode())
    session.events.append(Plan(plan=_JSON.dump_python(plan, mode="json")))
    if session.started_before:
        session.events.append(Resumed(step=0, checkpoint=None))
    print(f"model     {spec.model}", flush=True)

    def record_step(done: int, total: int) -> None:
        left_s = (time.monotonic() - began) / done * (total - done)
        session.events.append(Step(step=done, max_steps=total, epoch=done / total, metrics={}, eta_s=left_s))
        liveness.heard()
        counter.at(done, total)

    rows = {name: folder.rows(f"set-{name}") for name in spec.data.sets}
    with liveness.stage("measuring", unit="passes of rows") as counter:
        found, routing = measured(spec, rows, subject, session.say, record_step)
    report = analyze(found)
    written = folder.measurements.with_name(f".{folder.measurements.name}.writing")
    remove(written)
    write_measurements(found, routing, written, session.say)
    write_report(report, written, session.say, with_charts=True)
    publish(written, folder.measurements, step=0)
    print(text(report), flush=True)
    artifact = describe(session.job_uuid, "analysis", folder.measurements, epoch=0, step=0)
    session.events.append(Saved(artifact=artifact.model_dump(mode="json")))
    session.events.append(Finished(train_seconds=time.monotonic() - began))
    best = max(report.layers, key=lambda layer: layer.quality)
    summary = {"best_layer": float(best.layer), "best_quality": best.quality, "best_auc": best.auc}
    return Manifest(job_uuid=session.job_uuid, artifacts=[artifact], summary=summary)
