"""Routing analysis: compare how often each expert is chosen on two or more data sets. Nothing is trained."""

from pathlib import Path

from llama_stack_provider_moe.compute.analysis.routing_run import analyse, load_routed, text, write_report
from llama_stack_provider_moe.compute.recipes.untrained import Untrained
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.spec import RoutingAnalysisSpec


def run(session: Session[RoutingAnalysisSpec]) -> Manifest:
    """Load the model, count, compare, and write the report."""
    spec, folder, job = session.spec, session.folder, Untrained(session)
    routed = load_routed(spec)
    model, _, layout = routed
    job.planned({
        "architecture": type(model).__name__,
        "device": str(model.device),
        "dtype": spec.training.dtype,
        "layout": layout.as_json(),
        "adapter_folder": spec.adapter_folder,
        "sets": spec.data.sets,
        "tokens": spec.analysis.tokens,
    })  # fmt: skip
    print(f"model     {spec.model}\nexperts   {layout.text()}", flush=True)

    def record_step(done: int, total: int) -> None:
        job.record_step(done, total)
        counter.at(done, total)

    rows = {name: folder.rows(f"set-{name}") for name in spec.data.sets}
    with liveness.stage("analysing", unit="rows") as counter:
        report = analyse(spec, rows, routed, session.say, record_step)

    def write(written: Path) -> None:
        write_report(report, written, session.say)

    artifact = job.published("analysis", folder.routing, write)
    print(text(report), flush=True)
    job.finished()
    summary = {
        "greatest_difference": max(max(each) for layer in report.layers for each in layer.difference.values()),
        "experts_beyond_chance": sum(one.is_sure for name in report.sets for one in report.ranked(name)),
        "greatest_mutual_information": max(layer.mutual_information for layer in report.layers),
    }
    return Manifest(job_uuid=session.job_uuid, artifacts=[artifact], summary=summary)
