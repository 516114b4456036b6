"""Step 1 of directional ablation: mean hidden states of two sets of prompts. Nothing is trained."""

from pathlib import Path

from llama_stack_provider_moe.compute.ablation.analyze import analyze, text
from llama_stack_provider_moe.compute.ablation.analyze_command import write_report
from llama_stack_provider_moe.compute.ablation.measure import measured, write_measurements
from llama_stack_provider_moe.compute.ablation.subject import load_subject
from llama_stack_provider_moe.compute.recipes.untrained import Untrained
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.spec import AblationMeasureSpec


def run(session: Session[AblationMeasureSpec]) -> Manifest:
    """Load the model, measure, analyse, and write the measurements with their report."""
    spec, folder, job = session.spec, session.folder, Untrained(session)
    subject = load_subject(spec)
    job.planned({
        "architecture": type(subject.model).__name__,
        "device": str(subject.model.device),
        "dtype": spec.training.dtype,
        "quantize_bits": spec.training.quantize_bits,
        "quantize_scales": spec.training.quantize_scales,
        "layout": None if subject.layout is None else subject.layout.as_json(),
        "adapter_folder": spec.adapter_folder,
        "sets": spec.data.sets,
        "position": spec.measure.position,
        "span": spec.measure.span,
    })  # fmt: skip
    print(f"model     {spec.model}", flush=True)

    def record_step(done: int, total: int) -> None:
        job.record_step(done, total)
        counter.at(done, total)

    rows = {name: folder.rows(f"set-{name}") for name in spec.data.sets}
    with liveness.stage("measuring", unit="passes of rows") as counter:
        found, routing = measured(spec, rows, subject, session.say, record_step)
    report = analyze(found)

    def write(written: Path) -> None:
        write_measurements(found, routing, written, session.say)
        write_report(report, written, session.say, with_charts=True)

    artifact = job.published("analysis", folder.measurements, write)
    print(text(report), flush=True)
    job.finished()
    best = max(report.layers, key=lambda layer: layer.quality)
    summary = {"best_layer": float(best.layer), "best_quality": best.quality, "best_auc": best.auc}
    return Manifest(job_uuid=session.job_uuid, artifacts=[artifact], summary=summary)
