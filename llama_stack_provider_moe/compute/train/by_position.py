"""Perplexity by position of a job that extends its model's context: of the model as it came, scaled, and trained.

The longest held-out rows run through the model one by one, and each token counts, be it learnt or not. A bucket of
positions ends at a fraction or a multiple of the positions that the model was trained on, so that a reader sees where
the model as it came fails, and what scaling and training repair.

N tokens of a row, V vocabulary.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from datasets import Dataset
from pydantic import BaseModel
from torch import Tensor, nn

from llama_stack_provider_moe.compute.analysis import plots
from llama_stack_provider_moe.compute.evaluation.generate import evaluating
from llama_stack_provider_moe.compute.models.rope import Extension, as_shipped, extension_of
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.compute.train.checkpoints import describe, publish, remove
from llama_stack_provider_moe.compute.train.trainer import RecordingTrainer
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.events import Saved
from llama_stack_provider_moe.jobdir.folder import Artifact

MOST_ROWS = 32
CHUNK = 1024  # tokens whose logits become fp32 at once
STATES = ("as shipped", "scaled", "trained")
REPORT, CHART = "positions.json", "positions.png"


class Sums(NamedTuple):
    """Sums over the tokens of one bucket: negative log-likelihood in nats, and their number."""

    nll: float
    tokens: int

    @property
    def perplexity(self) -> float | None:
        """Of the bucket; None without a token."""
        return math.exp(min(self.nll / self.tokens, 700.0)) if self.tokens else None


class Bucket(BaseModel):
    """Perplexities at the positions from `first` to `last`, which counts."""

    first: int
    last: int
    tokens: int
    perplexity: dict[str, float]


class PositionReport(BaseModel):
    """What `positions.json` has.

    Attributes:
        trained_positions: positions that the model was trained on before the job.
        positions: that the job's model has.
        rows: the number of rows that were measured.
        of: where they come from: `held-out rows`, or `training rows` if none is held out.
        buckets: of positions, those with tokens.
    """

    rope_parameters: dict[str, object]
    trained_positions: int
    positions: int
    rows: int
    of: str
    buckets: list[Bucket]

    def text(self) -> str:
        """The report as lines for a job's log."""
        head = f"{'positions':>15}  {'tokens':>8}  " + "  ".join(f"{state:>11}" for state in STATES)
        lines = [f"perplexity by position, {self.rows} {self.of}:", head]
        for each in self.buckets:
            figures = "  ".join(f"{each.perplexity[state]:>11.4g}" for state in STATES)
            lines.append(f"{f'{each.first:,} to {each.last:,}':>15}  {each.tokens:>8,}  {figures}")
        return "\n".join(lines)


class ByPosition:
    """Measures a job's model before and after its training; None of it without `options.rope_scaling`.

    If processes share the model, all must make the same calls.

    Args:
        session: the job's.
        trainer: with the scaled model, not trained yet.
    """

    def __init__(self, session: AnySession, trainer: RecordingTrainer) -> None:
        change = extension_of(trainer.model)
        assert change is not None, "the job extends the context"
        self._session = session
        self._trainer = trainer
        self._change: Extension = change
        held_out = trainer.eval_dataset
        rows: Dataset = trainer.train_dataset if held_out is None else held_out
        self._of = "training rows" if held_out is None else "held-out rows"
        lengths = [len(row) for row in rows["input_ids"]]
        longest = sorted(range(len(lengths)), key=lambda at: -lengths[at])[:MOST_ROWS]
        self._rows = [list(rows[at]["input_ids"]) for at in longest]
        self.edges = edges(change.positions[0], max(map(len, self._rows)))
        self._found: dict[str, list[Sums]] = {}

    def before(self) -> None:
        """Measure the model as it came, and the scaled one."""
        with as_shipped(self._trainer.model):
            self._found["as shipped"] = self._measure("as shipped")
        self._found["scaled"] = self._measure("scaled")

    def after(self) -> PositionReport:
        """Measure the trained model; the report of all."""
        self._found["trained"] = self._measure("trained")
        buckets = [
            Bucket(
                first=first,
                last=min(self.edges[at + 1], max(map(len, self._rows))) - 1,
                tokens=self._found["trained"][at].tokens,
                perplexity={
                    state: figure for state in STATES if (figure := self._found[state][at].perplexity) is not None
                },
            )
            for at, first in enumerate(self.edges[:-1])
            if self._found["trained"][at].tokens
        ]
        return PositionReport(
            rope_parameters=self._change.rope_parameters,
            trained_positions=self._change.positions[0],
            positions=self._change.positions[1],
            rows=len(self._rows),
            of=self._of,
            buckets=buckets,
        )

    def _measure(self, state: str) -> list[Sums]:
        model = self._trainer.model
        total = [Sums(0.0, 0) for _ in self.edges[1:]]
        what = f"perplexity by position, {state}"
        with liveness.stage(what, len(self._rows), "rows") as counter, evaluating(model):
            for number, ids in enumerate(self._rows):
                own = in_buckets(_nll(model, ids), self.edges)
                total = [Sums(a.nll + b.nll, a.tokens + b.tokens) for a, b in zip(total, own, strict=True)]
                counter.at(number + 1)
        return total


def edges(positions: int, longest: int) -> list[int]:
    """First positions of the buckets, and their end: quarters and halves of the known positions, then doublings.

    >>> edges(1024, 3000)
    [0, 256, 512, 1024, 2048, 4096]

    Args:
        positions: that the model was trained on.
        longest: tokens of the longest row.
    """
    found = [0, positions // 4, positions // 2, positions]
    while found[-1] < longest:
        found.append(2 * found[-1])
    return sorted(set(found))


def in_buckets(nll_N: Tensor, ends: Sequence[int]) -> list[Sums]:
    """Sums of the buckets; element n is of the token at position n + 1, which the model predicts from those before."""
    found = []
    for first, end in pairwise(ends):
        part = nll_N[max(first - 1, 0) : max(end - 1, 0)]
        found.append(Sums(float(part.double().sum()), len(part)))
    return found


def _nll(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """(N - 1,): the negative log-likelihood of each token but the first."""
    device = next(model.parameters()).device
    ids_1N = torch.tensor([list(ids)], device=device)
    with torch.no_grad():
        logits_NV = model(input_ids=ids_1N, use_cache=False).logits[0, :-1]
        parts = [
            nn.functional.cross_entropy(
                logits_NV[at : at + CHUNK].float(), ids_1N[0, at + 1 : at + 1 + CHUNK], reduction="none"
            )
            for at in range(0, len(logits_NV), CHUNK)
        ]
    return torch.cat(parts).cpu() if parts else torch.zeros(0)


def keep(session: AnySession, report: PositionReport, epoch: int, step: int) -> Artifact:
    """Write the report and its chart as an artifact of the job.

    Args:
        session: the job's.
        report: of `ByPosition`.
        epoch: whole epochs that were trained.
        step: optimiser steps that were taken.
    """
    folder = session.folder.positions
    written = folder.with_name(f".{folder.name}.writing")
    remove(written)
    written.mkdir(parents=True)
    (written / REPORT).write_text(report.model_dump_json(indent=2), encoding="utf-8")
    if plots.installed():
        draw(report).savefig(written / CHART, dpi=plots.DPI)
    else:
        session.say(plots.MISSING)
    publish(written, folder, step)
    session.show(report.text())
    artifact = describe(session.job_uuid, "analysis", folder, epoch, step)
    session.events.append(Saved(artifact=artifact.model_dump(mode="json")))
    return artifact


def draw(report: PositionReport) -> plots.Drawing:
    """Perplexity over position, a line for each state; both axes logarithmic."""
    figure = plots.new_figure(7.5, 3.8)
    axis = figure.subplots()
    places = [each.last + 1 for each in report.buckets]
    for state, colour in zip(STATES, ("0.5", "#2166ac", "#b2182b"), strict=True):
        axis.plot(places, [each.perplexity[state] for each in report.buckets], "o-", color=colour, label=state)
    axis.axvline(report.trained_positions, color="0.6", linestyle="--", linewidth=1, label="positions before")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(places, [f"{place:,}" for place in places])
    axis.set_xlabel("positions up to")
    axis.set_ylabel("perplexity")
    axis.set_title(f"perplexity by position ({report.rows} {report.of})", fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    return figure
