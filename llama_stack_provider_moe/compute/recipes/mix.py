"""Branch, train, mix: branches of one model become the experts of a new one. Nothing is trained."""

from pathlib import Path

from llama_stack_provider_moe.compute.mixing.mix import dry_run, mix
from llama_stack_provider_moe.compute.mixing.report import text
from llama_stack_provider_moe.compute.mixing.routers import from_domains
from llama_stack_provider_moe.compute.recipes.untrained import Untrained
from llama_stack_provider_moe.compute.runtime.context import Session
from llama_stack_provider_moe.jobdir.folder import Manifest
from llama_stack_provider_moe.spec import MixSpec
from llama_stack_provider_moe.spec.mixing import part_of


def run(session: Session[MixSpec]) -> Manifest:
    """Compare the branches, write the mixed model, and publish it as the job's model."""
    spec, folder, job = session.spec, session.folder, Untrained(session)
    planned = dry_run(spec.model, spec)
    job.planned({
        "method": spec.method,
        "router": spec.start,
        "experts": {each.name: each.model for each in planned.experts},
        "parameters": planned.parameters,
        "active": planned.active,
        "bytes": planned.bytes,
    })  # fmt: skip
    start = None
    if spec.start == "domains":
        names = [spec.branches[at].name for at in spec.kept]
        start = from_domains(spec, {name: folder.rows(part_of(name)) for name in names}, session.say)

    def write(written: Path) -> None:
        report = mix(spec.model, spec, written, session.say, job.record_some, start)
        print(text(report.model_copy(update={"folder": str(folder.model)})), flush=True)

    artifact = job.published("model", folder.model, write)
    job.finished()
    summary = {"experts": float(len(planned.experts)), "parameters": float(planned.parameters)}
    return Manifest(job_uuid=session.job_uuid, artifacts=[artifact], summary=summary)
