"""A measurement from settings and rows to its files, for a job and for `moe-train ablate measure`."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from llama_stack_provider_moe.compute.ablation import prompts as prompt_rows
from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint, sha256
from llama_stack_provider_moe.compute.ablation.measurements import (
    SETS,
    MeasuredSet,
    MeasuredStates,
    Measurements,
    Provenance,
    write,
)
from llama_stack_provider_moe.compute.ablation.states import measure, structure_of
from llama_stack_provider_moe.compute.ablation.structure import Structure
from llama_stack_provider_moe.compute.ablation.subject import Subject
from llama_stack_provider_moe.compute.analysis.routing_report import Counts, Prompt
from llama_stack_provider_moe.compute.analysis.routing_run import report_of, write_report
from llama_stack_provider_moe.compute.data.positions import judge, positions_of
from llama_stack_provider_moe.compute.models.upcycle import model_folder
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.spec import AblationMeasureSpec, Analysis
from llama_stack_provider_moe.spec.ablation import BASELINE, MEASUREMENTS_FILE, TARGET
from llama_stack_provider_moe.spec.routing import RoutingReport

_ADAPTER_WEIGHTS = "adapter_model.safetensors"

Say = Callable[[str], None]
# The routing is counted on the same tokens, which are all the prompt's.
ROUTING = Analysis(tokens="prompt")


def measured(
    spec: AblationMeasureSpec,
    rows: Mapping[str, Path],
    subject: Subject,
    say: Say,
    progress: Callable[[int, int], None],
) -> tuple[Measurements, RoutingReport | None]:
    """Measure; the report is None for a dense model.

    Args:
        spec: the settings.
        rows: name of a set -> its canonical rows.
        subject: what `load_subject` loaded.
        say: called with lines for a person.
        progress: called with the number of passes of rows that are done and their total.
    """
    sets = {
        name: prompt_rows.read(rows[name], spec.data.sets[name], spec, subject.tokenizer, subject.vocabulary)
        for name in SETS
    }
    lengths_R = torch.tensor([len(prompt.ids) for each in sets.values() for prompt in each])
    judge(positions_of(subject.model), lengths_R, say)
    structure = structure_of(subject, sets[TARGET][0])
    states, counts = measure(subject, sets, spec.measure, spec.training.batch_size, progress)
    provenance = _provenance(spec, rows, subject, sets, states, structure)
    found = Measurements(provenance, states[TARGET], states[BASELINE])
    return found, _routing(spec, subject, counts)


def write_measurements(found: Measurements, routing: RoutingReport | None, folder: Path, say: Say) -> Path:
    """Write `measurements.safetensors`, and for a model with experts `routing.json` and its charts, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if routing is not None:
        write_report(routing, folder, say)
    write(found, folder / MEASUREMENTS_FILE)
    return folder / MEASUREMENTS_FILE


def _routing(spec: AblationMeasureSpec, subject: Subject, counts: Mapping[str, Counts]) -> RoutingReport | None:
    if subject.layout is None:
        return None
    sources = {name: spec.data.sets[name] for name in counts}
    return report_of(spec.model, spec.adapter_folder, subject.layout, counts, sources, ROUTING, spec.options.seed)


def _provenance(
    spec: AblationMeasureSpec,
    rows: Mapping[str, Path],
    subject: Subject,
    sets: Mapping[str, list[Prompt]],
    states: Mapping[str, MeasuredStates],
    structure: Structure,
) -> Provenance:
    layers, width = states[TARGET].mean_LH.shape
    adapter = None if spec.adapter_folder is None else sha256(Path(spec.adapter_folder) / _ADAPTER_WEIGHTS)
    return Provenance(
        model=spec.model,
        fingerprint=fingerprint(model_folder(spec.model, "model")),
        adapter=adapter,
        model_type=str(text_config(subject.model).model_type),
        layers=layers,
        width=width,
        position=spec.measure.position,
        span=spec.measure.span,
        dtype=spec.training.dtype,
        quantize_bits=spec.training.quantize_bits,
        quantize_scales=spec.training.quantize_scales,
        chat_template=hashlib.sha256(str(subject.tokenizer.chat_template).encode()).hexdigest(),
        sets={
            name: MeasuredSet(source=spec.data.sets[name], rows=len(sets[name]), sha256=sha256(rows[name]))
            for name in SETS
        },
        router_norms=structure.router_norms,
        normed_outputs=structure.normed_outputs,
        output_norms=structure.output_norms,
    )
