"""The tensors of the result: where the numbers of each come from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_stack_provider_moe.compute.export.tensors import TensorEntry
from llama_stack_provider_moe.compute.mixing.sources import Sources

OF_BASE = -1


@dataclass(frozen=True)
class Made:
    """One tensor of the result.

    Attributes:
        entry: name, dtype and shape.
        kind: shared: the mean over branches; expert: a copy from one of them; router.
        source: name in the branches and in the base; of a new router, "".
        branch: place of the branch that an expert is copied from; `OF_BASE`: the base.
        layer: decoder layer of a router; -1: not a router.
    """

    entry: TensorEntry
    kind: Literal["shared", "expert", "router"]
    source: str
    branch: int = OF_BASE
    layer: int = -1


def made_of(sources: Sources) -> list[Made]:
    """The tensors of the result, in the order of the base's files."""
    make = _of_dense if sources.plan.method == "btx" else _of_pairs
    return [made for entry in sources.base.entries.values() for made in make(sources, entry)]


def _of_dense(sources: Sources, entry: TensorEntry) -> Iterator[Made]:
    """btx: an MLP becomes one expert for each branch; a router joins the first of its matrices."""
    match = re.fullmatch(r"(model\.layers\.(\d+))\.mlp\.(gate|up|down)_proj\.weight", entry.name)
    if match is None:
        yield Made(entry, "shared", entry.name)
        return
    rule = sources.rule
    block = f"{match[1]}.{rule.block}"
    for at in range(len(sources.branches)):
        name = f"{block}.experts.{at}.{rule.matrices[match[3]]}.weight"
        yield Made(_named(entry, name, entry.shape), "expert", entry.name, at)
    if match[3] == "gate":
        shape = (len(sources.plan.experts), int(sources.base.config.hidden_size))
        yield Made(_named(entry, f"{block}.gate.weight", shape), "router", "", layer=int(match[2]))


def _of_pairs(sources: Sources, entry: TensorEntry) -> Iterator[Made]:
    """bar: expert 0 is the base's, the anchor; expert 1 of each branch becomes an expert of its own."""
    block = re.escape(sources.rule.block)
    router = re.fullmatch(rf"model\.layers\.(\d+)\.{block}\.gate\.weight", entry.name)
    if router is not None:
        shape = (len(sources.plan.experts), entry.shape[1])
        yield Made(_named(entry, entry.name, shape), "router", entry.name, layer=int(router[1]))
        return
    match = re.fullmatch(rf"(model\.layers\.\d+\.{block}\.experts\.)(\d+)(\.\w+\.weight)", entry.name)
    if match is None:
        yield Made(entry, "shared", entry.name)
    elif match[2] == "0":
        yield Made(entry, "expert", entry.name)
    else:
        for at in range(len(sources.branches)):
            name = f"{match[1]}{at + 1}{match[3]}"
            yield Made(_named(entry, name, entry.shape), "expert", entry.name, at)


def _named(entry: TensorEntry, name: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, entry.dtype, shape, Path(), 0)
