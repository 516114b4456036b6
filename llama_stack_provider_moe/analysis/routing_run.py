"""A routing analysis from its settings and rows to its files: a job's, or that of `moe-train analyze routing`."""

import json
from collections.abc import Callable, Mapping
from itertools import batched
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.analysis.plots import MISSING, heat_maps, installed
from llama_stack_provider_moe.analysis.routing_report import Counts, Prompt, compare, count
from llama_stack_provider_moe.errors import DataError, ModelError
from llama_stack_provider_moe.experts.layout import ExpertLayout, find_layout
from llama_stack_provider_moe.experts.steering import restore_biases
from llama_stack_provider_moe.jobs.folder import write_atomic
from llama_stack_provider_moe.spec import RoutingAnalysisSpec
from llama_stack_provider_moe.spec.routing import REPORT_FILE, RoutingReport, SetSummary, TokenChoice
from llama_stack_provider_moe.training.loader import load, pick_device
from llama_stack_provider_moe.training.rendering import Renderer, Unrenderable

Say = Callable[[str], None]
CHUNK = 256
SHOWN = 8  # layers and experts in a text for a person


def load_routed(spec: RoutingAnalysisSpec) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, ExpertLayout]:
    """The model, with its adapter where one is named, in evaluation mode; its tokenizer; where its experts are.

    Raises:
        ModelError: it is dense, or the adapter is not for it.
    """
    model, tokenizer = load(spec, pick_device(spec.training.dtype))
    layout = find_layout(model)
    if layout is None:
        raise ModelError(f"model: {spec.model!r} is dense; it has no experts whose routing could be analysed")
    if spec.adapter_folder is None:
        return model.eval(), tokenizer, layout
    folder = Path(spec.adapter_folder)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: tensors of other shapes
        raise ModelError(f"adapter_folder: {str(folder)!r} is no adapter of this model: {error}") from error
    restore_biases(folder, adapted, layout)
    return adapted.eval(), tokenizer, layout


def read_prompts(
    path: Path, source: str, spec: RoutingAnalysisSpec, tokenizer: PreTrainedTokenizerBase, vocabulary: int, say: Say
) -> list[Prompt]:
    """The canonical rows of `path` as tokens; rows without an answer end with the template's generation prompt.

    Raises:
        DataError: rows that can't be rendered, or have no token that counts.
    """
    renderer, length = Renderer(tokenizer), spec.options.max_length
    prompts: list[Prompt] = []
    problems: list[str] = []
    cut = 0
    with path.open(encoding="utf-8") as file:
        for numbered in batched(enumerate(file, start=1), CHUNK):
            rendered = {}
            for number, line in numbered:
                messages = json.loads(line)["messages"]
                try:
                    answered = messages[-1]["role"] == "assistant"
                    rendered[number] = renderer.conversation(messages) if answered else renderer.prompt(messages)
                except Unrenderable as problem:
                    problems.append(f"row {number}: {problem}")
            for number, tokens in zip(rendered, renderer.tokens(list(rendered.values())), strict=True):
                ids, counts = tokens.ids[:length], _counting(tokens.said[:length], spec.analysis.tokens)
                cut += len(tokens.ids) > length
                if not any(counts):
                    what = "token" if spec.analysis.tokens == "all" else f"token of the {spec.analysis.tokens}"
                    problems.append(f"row {number}: no {what} within options.max_length = {length}")
                elif max(ids) >= vocabulary:
                    raise DataError(
                        f"dataset {source!r}: the tokenizer gives id {max(ids)}, but the model's embedding has "
                        f"{vocabulary} rows; tokenizer and model do not belong together"
                    )
                prompts.append(Prompt(ids, counts))
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(
            f"dataset {source!r}: {len(problems)} row(s) can't be used: {'; '.join(problems[:SHOWN])}{more}"
        )
    if cut:
        say(
            f"{cut} of {len(prompts)} rows of {source!r} were longer than options.max_length = {length} tokens; cut off"
        )
    return prompts


def _counting(said: list[bool], tokens: TokenChoice) -> list[bool]:
    if tokens == "all":
        return [True] * len(said)
    return said if tokens == "response" else [not one for one in said]


def analyse(
    spec: RoutingAnalysisSpec,
    rows: Mapping[str, Path],
    routed: tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, ExpertLayout],
    say: Say,
    tell: Callable[[int, int], None],
) -> RoutingReport:
    """Count and compare.

    Args:
        spec: the settings.
        rows: name of a set -> its canonical rows.
        routed: of `load_routed`.
        say: is given lines for a person.
        tell: is given the rows done and all rows, after each pass.
    """
    model, tokenizer, layout = routed
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    prompts = {
        name: read_prompts(path, spec.data.sets[name], spec, tokenizer, vocabulary, say) for name, path in rows.items()
    }
    total, done = sum(map(len, prompts.values())), 0
    counted: dict[str, Counts] = {}
    for name, each in prompts.items():

        def tell_all(rows_done: int, before: int = done) -> None:
            tell(before + rows_done, total)

        counted[name] = count(model, layout, each, spec.training.batch_size, tell_all)
        done += len(each)
    found = compare(counted, layout.moe_layers, spec.analysis, spec.options.seed)
    report = RoutingReport(
        model=spec.model,
        adapter=spec.adapter_folder,
        family=layout.family,
        moe_layers=list(layout.moe_layers),
        num_experts=layout.num_experts,
        top_k=layout.top_k,
        tokens=spec.analysis.tokens,
        confidence=spec.analysis.confidence,
        resamples=spec.analysis.resamples,
        permutations=spec.analysis.permutations,
        seed=spec.options.seed,
        sets={
            name: SetSummary(source=spec.data.sets[name], rows=len(each), tokens=int(counted[name].tokens_N.sum()))
            for name, each in prompts.items()
        },
        layers=found,
        top={},
    )
    top = {name: [one for one in report.ranked(name) if one.difference > 0][: spec.analysis.top] for name in prompts}
    return report.model_copy(update={"top": top})


def write_report(report: RoutingReport, folder: Path, say: Say) -> None:
    """`routing.json` and its charts into `folder`; without matplotlib no charts, which is said."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / REPORT_FILE, report)
    if installed():
        heat_maps(report, folder)
    else:
        say(MISSING)


def text(report: RoutingReport) -> str:
    """What a person wants to know first."""
    sets = ", ".join(f"{name} ({each.rows:,} rows, {each.tokens:,} tokens)" for name, each in report.sets.items())
    most = sorted(report.layers, key=lambda layer: -layer.mutual_information)[:SHOWN]
    lines = [
        f"{report.family}: {report.num_experts} experts, top-{report.top_k}, in {len(report.moe_layers)} layers",
        f"sets: {sets}; {report.tokens} tokens count",
        "mutual information of set and expert, nats (by chance: mean, and what it stays below at "
        f"{report.confidence:.0%}):",
        *(
            f"  layer {layer.layer:3d}  {layer.mutual_information:.5f}  ({layer.chance_mean:.5f}, "
            f"{layer.chance_high:.5f})"
            for layer in most
        ),
    ]
    for name, ranked in report.top.items():
        sure = sum(one.is_sure for one in report.ranked(name))
        confidence = f"{report.confidence:.0%}"
        lines.append(
            f"experts that {name} uses more than the others, {sure} beyond chance (*); difference [{confidence}]:"
        )
        for one in ranked[:SHOWN]:
            figures = f"{one.difference:+.4f} [{one.low:+.4f}, {one.high:+.4f}]  rate {one.rate:.4f}"
            lines.append(f"{'*' if one.is_sure else ' '} layer {one.layer:3d} expert {one.expert:3d}  {figures}")
    return "\n".join(lines)
