"""Mix branches into a model's folder, one tensor at a time: see `compute.methods.mixing` for the formulas.

The folder is written under another name beside the output, and renamed when it is complete.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from llama_stack_provider_moe.compute.ablation.fingerprint import fingerprint
from llama_stack_provider_moe.compute.export.card import side_files
from llama_stack_provider_moe.compute.export.shard_files import Progress, write_shards
from llama_stack_provider_moe.compute.export.tensors import append, copy_bytes, shards
from llama_stack_provider_moe.compute.export.whole_folder import check_room, complete_or_nothing
from llama_stack_provider_moe.compute.methods.mixing import mean_of_branches, rows_of_branches
from llama_stack_provider_moe.compute.mixing.alike import cosine_to_base, require_frozen_anchors
from llama_stack_provider_moe.compute.mixing.known import Known, known
from llama_stack_provider_moe.compute.mixing.report import MIX_FILE, MixedExpert, MixReport
from llama_stack_provider_moe.compute.mixing.sources import Sources, open_sources
from llama_stack_provider_moe.compute.mixing.tensors import OF_BASE, Made, made_of
from llama_stack_provider_moe.compute.models.upcycle import SHARD_BYTES, generator_of, moe_config
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.spec.mixing import ANCHOR, MixPlan

# Puts its own rows into the routers of a model's folder; gets the names of the routers by layer.
StartRouters = Callable[[Path, dict[int, str]], None]
_SMALL_FILES_BYTES = 64 << 10  # config.json and mix.json
TOP_1 = (
    "top_k is 1, and the chosen expert's weight is always 1, so training gives routers no gradient of the language "
    "loss; 2 or more does"
)


@dataclass
class _Moved:
    """Sums of squares of one branch: of its distance from the base, and of the base."""

    distance: float = 0.0
    base: float = 0.0

    def add(self, branch: Tensor, base: Tensor) -> None:
        self.distance += float(torch.linalg.vector_norm(branch.float() - base.float())) ** 2
        self.base += float(torch.linalg.vector_norm(base.float())) ** 2

    @property
    def share(self) -> float:
        return sqrt(self.distance / self.base) if self.base else 0.0


@dataclass
class _Mix:
    """A mix that is under way.

    Attributes:
        sources: what it reads.
        made: the tensors of the result.
        cosines: of each branch and the base.
        known: what is known about each branch.
        shared, experts: how far each branch moved.
    """

    sources: Sources
    made: list[Made]
    cosines: list[float]
    known: list[Known]
    shared: list[_Moved] = field(default_factory=list)
    experts: list[_Moved] = field(default_factory=list)


def dry_run(model: str, plan: MixPlan) -> MixReport:
    """What `mix` would make, after all its checks.

    Raises:
        InvalidInput, ModelError: see `mix`.
    """
    return _report(model, _planned(model, plan), None, None)


def mix(
    model: str,
    plan: MixPlan,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total: None,
    start_routers: StartRouters | None = None,
) -> MixReport:
    """Mix the branches of `plan` and write the result to the new folder `out`.

    Args:
        model: the base: folder with config.json and safetensors in 16 or 32 bits, or a hub id.
        plan: of the mix; the models of its branches are folders or hub ids.
        out: new folder; it appears when it is complete.
        say: gets a line for each file.
        progress: called with the number of tensors that are written and their total.
        start_routers: with `router` domains: puts the rows of domains into the written model.

    Raises:
        InvalidInput: branches don't fit the base or each other, or `out` exists.
        ModelError: a model can't be read, can't be mixed, or has numbers that are not finite.
        NoRoom: the disk has too few free bytes.
    """
    if os.path.lexists(out):
        raise InvalidInput("out", str(out), "a folder that does not exist yet")
    assert (start_routers is not None) == (plan.start == "domains"), "routers begin as the plan says"
    work = _planned(model, plan)
    sources = work.sources
    by_name = {each.entry.name: each for each in work.made}
    parts = shards([each.entry for each in work.made], SHARD_BYTES)
    beside = side_files(sources.base.folder, sources.branches[0].folder)
    with complete_or_nothing(out, "mixing", "a folder that no other mix is writing") as written:
        size = sum(entry.nbytes for part in parts for entry in part)
        check_room(out, size + sum(file.stat().st_size for file in beside.values()) + _SMALL_FILES_BYTES)
        start = time.monotonic()
        work.shared = [_Moved() for _ in sources.branches]
        work.experts = [_Moved() for _ in sources.branches]
        write_shards(
            parts, written, "mixing", lambda entry, file: _write_tensor(work, by_name[entry.name], file), say, progress
        )
        for name, file in beside.items():
            shutil.copyfile(file, written / name)
        _config(sources).save_pretrained(written)
        if start_routers is not None:
            start_routers(written, {each.layer: each.entry.name for each in work.made if each.kind == "router"})
        report = _report(model, work, str(out), time.monotonic() - start)
        (written / MIX_FILE).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return report


def _planned(model: str, plan: MixPlan) -> _Mix:
    sources = open_sources(model, plan)
    made = made_of(sources)
    found = [known(branch, sources.base) for branch in sources.branches]
    cosines = [cosine_to_base(branch, sources.base) for branch in sources.branches]
    if plan.method == "bar":
        require_frozen_anchors(sources)
    return _Mix(sources, made, cosines, found)


def _write_tensor(work: _Mix, made: Made, out: IO[bytes]) -> None:
    base, branches = work.sources.base.entries, work.sources.branches
    if made.kind == "expert" and made.branch == OF_BASE:
        copy_bytes(base[made.source], out)
        return
    if made.kind == "expert":
        numbers = branches[made.branch].entries[made.source].tensor()
        work.experts[made.branch].add(numbers, base[made.source].tensor())
    elif made.kind == "router":
        numbers = _router(work.sources, made)
    else:
        start, weights = base[made.source].tensor(), [work.sources.plan.branches[at].weight
                                                      for at in work.sources.plan.kept]  # fmt: skip

        def read(at: int) -> Tensor:
            found = branches[at].entries[made.source].tensor()
            work.shared[at].add(found, start)
            return found

        numbers = mean_of_branches(start, map(read, range(len(branches))), weights)
    numbers = numbers.to(made.entry.dtype)
    if not bool(torch.isfinite(numbers).all()):
        raise ModelError(f"model: {made.entry.name} is not finite in the mix")
    append(numbers, out)


def _router(sources: Sources, made: Made) -> Tensor:
    plan = sources.plan
    if plan.start == "branches":
        return rows_of_branches(torch.stack([each.entries[made.source].tensor() for each in sources.branches]))
    generator = generator_of(plan.seed, made.entry.name)
    return plan.router_std * torch.randn(made.entry.shape, generator=generator)


def _config(sources: Sources) -> PreTrainedConfig:
    plan, rule, base = sources.plan, sources.rule, sources.base
    if plan.method == "btx":
        return moe_config(base.config, rule, len(plan.experts), plan.top_k)
    config = AutoConfig.from_pretrained(base.folder)
    setattr(config, rule.experts_field, len(plan.experts))
    config.num_experts_per_tok = plan.top_k
    return config


def _report(model: str, work: _Mix, out: str | None, seconds: float | None) -> MixReport:
    sources, plan = work.sources, work.sources.plan
    sizes = {kind: sum(prod(each.entry.shape) for each in work.made if each.kind == kind)
             for kind in ("shared", "expert", "router")}  # fmt: skip
    chosen = sizes["expert"] * plan.top_k // len(plan.experts)
    base = fingerprint(sources.base.folder)
    experts = [_expert(work, at, number) for number, at in enumerate(range(len(sources.branches)))]
    if plan.method == "bar":
        anchor = MixedExpert(
            expert=0, name=ANCHOR, model=model, weight=0, trained_on=None, job=None, base=None, dataset_sha256=None,
            fingerprint=base, cosine_to_base=1,
        )  # fmt: skip
        experts = [anchor, *(each.model_copy(update={"expert": each.expert + 1}) for each in experts)]
    return MixReport(
        method=plan.method,
        model=model,
        fingerprint=base,
        folder=out,
        source_type=str(sources.base.config.model_type),
        model_type=sources.rule.model_type,
        layers=int(sources.base.config.num_hidden_layers),
        top_k=plan.top_k,
        router=plan.start,
        experts=experts,
        left_out=[name for name in (branch.name for branch in plan.branches) if name in plan.leave_out],
        parameters=sum(sizes.values()),
        active=sizes["shared"] + sizes["router"] + chosen,
        bytes=sum(each.entry.nbytes for each in work.made),
        seconds=seconds,
        warnings=[TOP_1] if plan.top_k == 1 else [],
    )


def _expert(work: _Mix, at: int, number: int) -> MixedExpert:
    plan, found = work.sources.plan, work.known[at]
    branch = plan.branches[plan.kept[at]]
    return MixedExpert(
        expert=number,
        name=branch.name,
        model=branch.model,
        weight=branch.weight / sum(plan.branches[each].weight for each in plan.kept),
        trained_on=branch.trained_on or found.dataset_id,
        job=found.job,
        base=found.base,
        dataset_sha256=found.dataset_sha256,
        fingerprint=fingerprint(work.sources.branches[at].folder),
        cosine_to_base=work.cosines[at],
        moved_shared=work.shared[at].share if work.shared else None,
        moved_experts=work.experts[at].share if work.experts else None,
    )
