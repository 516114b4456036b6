"""Routing analysis: compare how often each expert is chosen on two or more data sets. Nothing is trained."""

import time

from pydantic import TypeAdapter

from llama_stack_provider_moe.compute.analysis.routing_run import analyse, load_routed, text, write_report
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Finished, Plan, Resumed, Saved, Step
from llama_stack_provider_moe.jobdir.folder import Manifest, write_atomic
from llama_stack_provider_moe.spec import RoutingAnalysisSpec

_JSON: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


def run(session: Session[RoutingAnalysisSpec]) -> Manifest:
    """Load the model, count, compare, and write the report."""
    spec, folder, began = session.spec, session.folder, time.monotonic()
    routed = load_routed(spec)
    model, _, layout = routed
    plan: dict[str, object] = {
        "recipe": spec.recipe,
        "model": spec.model,
        "model_from": spec.model_from,
        "architecture": type(model).__name__,
        "device": str(model.device),
        "dtype": spec.training.dtype,
        "layout": layout.as_json(),
        "adapter_folder": spec.adapter_folder,
        "sets": spec.data.sets,
        "tokens": spec.analysis.tokens,
    }
    write_atomic(folder.resolved, _JSON.dump_json(plan, indent=2).decode())
    session.events.append(Plan(plan=_JSON.dump_python(plan, mode="json")))
    if session.started_before:
        session.events.append(Resumed(step=0, checkpoint=None))
    print(f"model     {spec.model}\nexperts   {layout.text()}", flush=True)

    def record_step(done: int, total: int) -> None:
        left_s = (time.monotonic() - began) / done * (total - done)
        session.events.append(Step(step=done, max_steps=total, epoch=done / total, metrics={}, eta_s=left_s))
        liveness.heard()
        counter.at(done, total)

    rows = {name: folder.rows(f"set-{name}") for name in spec.data.sets}
    with liveness.stage("analysing", unit="rows") as counter:
        report = analyse(spec, rows, routed, session.say, record_step)
    written = folder.routing.with_name(f".{folder.routing.name}.writing")
    remove(written)
    write_report(report, written, session.say)
    publish(written, folder.routing, step=0)
    print(text(report), flush=True)
    artifact = describe(session.job_uuid, "analysis", folder.routing, epoch=0, step=0)
    session.events.append(Saved(artifact=artifact.model_dump(mode="json")))
    session.events.append(Finished(train_seconds=time.monotonic() - began))
    summary = {
        "greatest_difference": max(max(each) for layer in report.layers for each in layer.difference.values()),
        "experts_beyond_chance": sum(one.is_sure for name in report.sets for one in report.ranked(name)),
        "greatest_mutual_information": max(layer.mutual_information for layer in report.layers),
    }
    return Manifest(job_uuid=session.job_uuid, artifacts=[artifact], summary=summary)
