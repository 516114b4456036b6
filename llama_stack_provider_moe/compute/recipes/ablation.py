"""Step 3 of directional ablation: take measured directions out of a model's weights. Nothing is trained."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from llama_stack_provider_moe.compute.ablation.apply import apply, dry_run
from llama_stack_provider_moe.compute.ablation.apply_report import AppliedReport, text
from llama_stack_provider_moe.compute.ablation.lora import write_adapter
from llama_stack_provider_moe.compute.ablation.measurements import of_job, read
from llama_stack_provider_moe.compute.models.adapted import with_adapter
from llama_stack_provider_moe.compute.models.loader import load_for_inference, pick_device
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.recipes.untrained import Untrained
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.compute.train.safety_eval import Assessment, require_gate
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.spec import AblationSpec


@contextmanager
def _assessment(session: Session[AblationSpec], model: str, adapter: Path | None = None) -> Iterator[Assessment]:
    """The job's evaluation of one model, which is in memory inside the `with` alone."""
    training, options = session.spec.training, session.spec.options
    device = pick_device(training.dtype)
    loaded, tokenizer = load_for_inference(model, training.dtype, device, options.chat_template)
    layout = find_layout(loaded)
    made = loaded if adapter is None else with_adapter(loaded, adapter, layout).eval()
    try:
        yield Assessment(session, made, tokenizer, layout)
    finally:
        del loaded, made
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run(session: Session[AblationSpec]) -> Manifest:
    """Plan the edits, write the edited model or the adapter, and publish it as the job's."""
    spec, folder, job = session.spec, session.folder, Untrained(session)
    found = read(of_job(folder, spec.measurements), "measurements")
    planned = dry_run(spec.model, spec, found)
    job.planned({
        "measurements": spec.measurements,
        "output": spec.output,
        "tensors": len(planned.touched),
        "bytes": planned.bytes,
        "missed": planned.missed,
    })  # fmt: skip
    if spec.eval is not None:
        with _assessment(session, spec.model) as assessment:
            assessment.before()
    reports: list[AppliedReport] = []
    is_adapter = spec.output == "lora"
    write, final = (write_adapter, folder.adapter) if is_adapter else (apply, folder.model)

    def write_result(written: Path) -> None:
        reports.append(write(spec.model, spec, found, written, session.say, job.record_some, named=final))

    artifacts = [job.published("adapter" if is_adapter else "model", final, write_result)]
    (report,), evaluated = reports, None
    print(text(report), flush=True)
    if spec.eval is not None:
        made = (spec.model, final) if is_adapter else (str(final), None)
        with _assessment(session, *made) as assessment:
            evaluation, evaluated, _ = assessment.after(epoch=0, step=0)
            artifacts.append(evaluation)
    job.finished()
    if evaluated is not None:
        require_gate(evaluated)
    along = [each.along_after or 0.0 for each in report.touched if each.kind != "router"]
    summary = {"tensors": float(len(report.touched)), "greatest_along_after": max(along)}
    return Manifest(job_uuid=session.job_uuid, artifacts=artifacts, summary=summary)
