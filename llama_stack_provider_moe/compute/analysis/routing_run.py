"""A routing analysis from settings and rows to its files, for a job and for `moe-train analyze routing`."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import batched, takewhile
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.analysis.plots import MISSING, heat_maps, installed
from llama_stack_provider_moe.compute.analysis.routing_report import Counts, Prompt, compare, count
from llama_stack_provider_moe.compute.data.positions import judge, positions_of
from llama_stack_provider_moe.compute.data.rendering import Rendered, Renderer, Tokens, Unrenderable
from llama_stack_provider_moe.compute.models.adapted import load_adapted
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.errors import DataError, ModelError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.spec import Analysis, RoutingAnalysisSpec
from llama_stack_provider_moe.spec.routing import REPORT_FILE, RoutingReport, SetSummary, TokenChoice
from llama_stack_provider_moe.spec.rows import CanonicalRow, Conversation, TextRow

Say = Callable[[str], None]
CHUNK = 256
SHOWN = 8  # layers and experts in a text for a person


def load_routed(spec: RoutingAnalysisSpec) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, ExpertLayout]:
    """The model in evaluation mode, with its adapter if the spec names one; its tokenizer; the layout of its experts.

    Raises:
        ModelError: the model is dense, or the adapter does not fit it.
    """
    found = load_adapted(spec)
    if found.layout is None:
        raise ModelError(f"model: {spec.model!r} is dense; it has no experts to analyse")
    return found.model, found.tokenizer, found.layout


def read_prompts(
    path: Path,
    source: str,
    which: TokenChoice,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    say: Say,
) -> list[Prompt]:
    """The canonical rows of `path` as tokens; rows without an answer end with the template's generation prompt.

    Args:
        path: the rows.
        source: name of their data set, for messages.
        which: tokens that count.
        length: maximum number of tokens of a row (`options.max_length`).
        tokenizer: of the model.
        vocabulary: rows of the model's embedding.
        say: called with lines for a person.

    Raises:
        DataError: rows that can't be rendered, or have no token that counts.
    """
    renderer = Renderer(tokenizer)
    prompts: list[Prompt] = []
    problems: list[str] = []
    rows = cut = 0
    with path.open(encoding="utf-8") as file, liveness.stage(f"tokenising {source}", unit="rows") as counter:
        for numbered in batched(enumerate(file, start=1), CHUNK):
            rendered: dict[int, list[Rendered]] = {}
            for number, line in numbered:
                counter.advance()
                rows += 1
                try:
                    rendered[number] = _rendered(renderer, json.loads(line))
                except Unrenderable as problem:
                    problems.append(f"row {number}: {problem}")
            for number, pieces in zip(rendered, renderer.tokens_of_rows(list(rendered.values())), strict=True):
                if isinstance(pieces, Unrenderable):
                    problems.append(f"row {number}: {pieces}")
                    continue
                found = _counted(pieces, length, which)
                cut += any(len(piece.ids) > length for piece in pieces)
                greatest = max((max(prompt.ids) for prompt in found), default=0)
                if not found:
                    what = "token" if which == "all" else f"token of the {which}"
                    problems.append(f"row {number}: no {what} within options.max_length = {length}")
                elif greatest >= vocabulary:
                    raise DataError(
                        f"dataset {source!r}: the tokenizer gives id {greatest}, but the model's embedding has "
                        f"{vocabulary} rows; the tokenizer is not that of the model"
                    )
                prompts += found
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(
            f"dataset {source!r}: {len(problems)} row(s) can't be used: {'; '.join(problems[:SHOWN])}{more}"
        )
    if cut:
        say(f"{cut} of {rows} rows of {source!r} were longer than options.max_length = {length} tokens; cut off")
    return prompts


def _rendered(renderer: Renderer, row: CanonicalRow) -> list[Rendered]:
    """A row with its answers marked, or as a prompt if it ends without one."""
    if "text" in row:
        return [renderer.text(cast(TextRow, row)["text"])]
    conversation = cast(Conversation, row)
    answered = conversation["messages"][-1]["role"] == "assistant"
    return renderer.row(conversation) if answered else [renderer.prompt(conversation)]


def _counted(pieces: Sequence[Tokens], length: int, which: TokenChoice) -> list[Prompt]:
    """A row's texts, cut to the length, without those of which nothing counts.

    Where a chat template needs one text for each answer, what a text has in common with the one before counts once.
    """
    found, before = [], list[int]()
    for piece in pieces:
        ids, counts = piece.ids[:length], _counting(piece.said[:length], which)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
        counts = [False] * common + counts[common:]
        if any(counts):
            found.append(Prompt(ids, counts))
        before = ids
    return found


def _counting(said: list[bool], tokens: TokenChoice) -> list[bool]:
    if tokens == "all":
        return [True] * len(said)
    return said if tokens == "response" else [not one for one in said]


def analyse(
    spec: RoutingAnalysisSpec,
    rows: Mapping[str, Path],
    routed: tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, ExpertLayout],
    say: Say,
    progress: Callable[[int, int], None],
) -> RoutingReport:
    """Count and compare.

    Args:
        spec: the settings.
        rows: name of a set -> its canonical rows.
        routed: the result of `load_routed`.
        say: called with lines for a person.
        progress: called with the number of rows that are done and their total, after each pass.
    """
    model, tokenizer, layout = routed
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    prompts = {
        name: read_prompts(
            path, spec.data.sets[name], spec.analysis.tokens, spec.options.max_length, tokenizer, vocabulary, say
        )
        for name, path in rows.items()
    }
    lengths_R = torch.tensor([len(prompt.ids) for each in prompts.values() for prompt in each])
    judge(positions_of(model), lengths_R, say)
    total, done = sum(map(len, prompts.values())), 0
    counted: dict[str, Counts] = {}
    for name, each in prompts.items():

        def progress_of_all(rows_done: int, before: int = done) -> None:
            progress(before + rows_done, total)

        counted[name] = count(model, layout, each, spec.training.batch_size, progress_of_all)
        done += len(each)
    return report_of(spec.model, spec.adapter_folder, layout, counted, spec.data.sets, spec.analysis, spec.options.seed)


def report_of(
    model: str,
    adapter: str | None,
    layout: ExpertLayout,
    counted: Mapping[str, Counts],
    sources: Mapping[str, str],
    settings: Analysis,
    seed: int,
) -> RoutingReport:
    """Compare what was counted.

    Args:
        model: name of the model.
        adapter: folder of the adapter on it, if any.
        layout: of its experts.
        counted: name of a set -> its counts.
        sources: name of a set -> id of its data set, or its file.
        settings: of the analysis.
        seed: of the resampling.
    """
    report = RoutingReport(
        model=model,
        adapter=adapter,
        family=layout.family,
        moe_layers=list(layout.moe_layers),
        num_experts=layout.choices,
        top_k=layout.top_k,
        tokens=settings.tokens,
        confidence=settings.confidence,
        resamples=settings.resamples,
        permutations=settings.permutations,
        seed=seed,
        sets={
            name: SetSummary(source=sources[name], rows=len(each.tokens_N), tokens=int(each.tokens_N.sum()))
            for name, each in counted.items()
        },
        layers=compare(counted, layout.moe_layers, settings, seed),
        top={},
    )
    top = {name: [one for one in report.ranked(name) if one.difference > 0][: settings.top] for name in counted}
    return report.model_copy(update={"top": top})


def write_report(report: RoutingReport, folder: Path, say: Say) -> None:
    """Write `routing.json` and its charts into `folder`; without matplotlib there are no charts, and a line says so."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / REPORT_FILE, report)
    if installed():
        heat_maps(report, folder)
    else:
        say(MISSING)


def _random_line(report: RoutingReport) -> list[str]:
    found = [(layer.random_router, layer.layer) for layer in report.layers if layer.random_router is not None]
    if not found:
        return []
    most, layer = max(found)
    return [f"a random router would show {most:.5f} at most, in layer {layer}"]


def text(report: RoutingReport) -> str:
    """The most important results for a person."""
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
        *_random_line(report),
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
