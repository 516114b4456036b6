"""A probe on hidden states: read, fitted, measured on rows that decided nothing. No weight of the model is trained."""

import time

from pydantic import TypeAdapter

from llama_stack_provider_moe.compute.probing.artifact import write_probe
from llama_stack_provider_moe.compute.probing.fit import fit_probe
from llama_stack_provider_moe.compute.probing.report import text
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Finished, Plan, Resumed, Saved, Step
from llama_stack_provider_moe.jobdir.folder import Manifest, write_atomic
from llama_stack_provider_moe.spec import ProbeSpec

_JSON: TypeAdapter[dict[str, object]] = TypeAdapter(dict[str, object])


def run(session: Session[ProbeSpec]) -> Manifest:
    """Read the states, fit the probe, and write it with its card."""
    spec, folder, began = session.spec, session.folder, time.monotonic()
    plan: dict[str, object] = {
        "recipe": spec.recipe,
        "model": spec.model,
        "model_from": spec.model_from,
        "adapter_folder": spec.adapter_folder,
        "dtype": spec.training.dtype,
        "sets": spec.data.sets,
        "probe": spec.probe.model_dump(mode="json"),
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
    with liveness.stage("reading states", unit="texts") as counter:
        fitted, _ = fit_probe(spec, rows, session.say, record_step)
    written = folder.probe.with_name(f".{folder.probe.name}.writing")
    remove(written)
    card = write_probe(written, fitted.card, fitted.regressions)
    publish(written, folder.probe, step=0)
    print(text(card, fitted.candidates), flush=True)
    artifact = describe(session.job_uuid, "analysis", folder.probe, epoch=0, step=0)
    session.events.append(Saved(artifact=artifact.model_dump(mode="json")))
    session.events.append(Finished(train_seconds=time.monotonic() - began))
    last = card.test or card.held_out
    summary = {
        "threshold": card.threshold,
        "detected": last.probe.detected.value,
        "false_positives": last.probe.false_positives.value,
        "detected_at_rate": last.probe.detected_at_rate.value,
        "auc": last.probe.auc.value,
        "detected_at_rate_by_words": last.lexical.detected_at_rate.value,
    }
    return Manifest(job_uuid=session.job_uuid, artifacts=[artifact], summary=summary)
