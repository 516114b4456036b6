"""At the end of a job with domains: which experts serve which domain, as a routing analysis of its held-out rows."""

from collections.abc import Sequence

from datasets import Dataset

from llama_stack_provider_moe.compute.analysis.routing_report import Counts, Prompt, count
from llama_stack_provider_moe.compute.analysis.routing_run import report_of, text, write_report
from llama_stack_provider_moe.compute.data.domains import Domains
from llama_stack_provider_moe.compute.evaluation.generate import evaluating
from llama_stack_provider_moe.compute.models.backend import backend_of
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Saved
from llama_stack_provider_moe.jobdir.folder import Artifact
from llama_stack_provider_moe.spec import Analysis
from llama_stack_provider_moe.spec.routing import RoutingReport

MOST_ROWS = 256  # of each domain


def analyse_domains(session: AnySession, trainer: RecordingTrainer) -> RoutingReport | None:
    """Count the experts that the trained model chooses for each domain; None on a dense model, or without domains.

    The rows are the first `MOST_ROWS` held-out ones of each domain; of all domains training rows if one has none. If
    processes share the model, all must call this.

    Args:
        session: the job's.
        trainer: with the trained model, before it is merged.
    """
    domains, layout = trainer.domains, trainer.layout
    if domains is None or layout is None:
        return None
    if not backend_of(session.spec).has_routing_analysis:
        session.say("the routing of domains is not analysed with this loader")
        return None
    trainer.rest()
    prompts = _prompts(domains, trainer)
    counted: dict[str, Counts] = {}
    total, batch_size = sum(map(len, prompts.values())), session.spec.training.batch_size
    with liveness.stage("analysing domains", total, "rows") as counter, evaluating(trainer.model):
        for name, each in prompts.items():
            before = sum(len(one.tokens_N) for one in counted.values())

            def advance(done: int, before: int = before) -> None:
                counter.at(before + done)

            counted[name] = count(trainer.model, layout, each, batch_size, advance)
    ids = session.spec.data.training_ids
    sources = dict(zip(domains.names, ids if len(ids) > 1 else ids * len(domains.names), strict=True))
    return report_of(session.spec.model, None, layout, counted, sources, Analysis(), session.spec.options.seed)


def keep_report(session: AnySession, report: RoutingReport, epoch: int, step: int) -> Artifact:
    """Write the report and its charts as an artifact of the job.

    Args:
        session: the job's.
        report: of `analyse_domains`.
        epoch: whole epochs that were trained.
        step: optimiser steps that were taken.
    """
    folder = session.folder.domains
    written = folder.with_name(f".{folder.name}.writing")
    remove(written)
    write_report(report, written, session.say)
    publish(written, folder, step)
    session.show(text(report))
    artifact = describe(session.job_uuid, "analysis", folder, epoch, step)
    session.events.append(Saved(artifact=artifact.model_dump(mode="json")))
    return artifact


def _prompts(domains: Domains, trainer: RecordingTrainer) -> dict[str, list[Prompt]]:
    has_held_out = all(domains.held_out)
    rows: Dataset = trainer.eval_dataset if has_held_out else trainer.train_dataset
    found: dict[str, list[Prompt]] = {}
    first = 0
    for name, there in zip(domains.names, domains.held_out if has_held_out else domains.rows, strict=True):
        chosen = rows.select(range(first, first + min(there, MOST_ROWS)))
        found[name] = [_prompt(row) for row in chosen]
        first += there
    return found


def _prompt(row: dict[str, Sequence[int]]) -> Prompt:
    ids = [*row["prompt_ids"], *row["chosen_ids"]] if "prompt_ids" in row else list(row["input_ids"])
    return Prompt(ids, [True] * len(ids))
