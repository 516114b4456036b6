"""Split experts: each becomes several equal ones, and a token uses as many times more, so the output stays the same.

With f twins of each expert and f * K choices, a token chooses the twins of the K experts that it chose before. Their
weights are 1/f of the old ones, whether they are renormalised over the chosen (e^a / (f * sum e^b)) or a softmax over
all f * E, so sum over twins of w/f * f_j(x) = w * f_j(x). That is not so where a weight depends on its logit alone.
"""

from pathlib import Path

from llama_stack_provider_moe.compute.export.shard_files import Progress
from llama_stack_provider_moe.compute.surgery.plan import single
from llama_stack_provider_moe.compute.surgery.prepared import Decision, Prepared, Rows
from llama_stack_provider_moe.compute.surgery.report import LayerOfExperts
from llama_stack_provider_moe.compute.surgery.resized import describe, resize
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.surgery import Surgery

FACTOR = 2


def prepare(folder: Path, asked: Surgery, field: str) -> Prepared:
    """Check everything that can be known from the config.

    Args:
        folder: of the model.
        asked: what to split.
        field: what comes before the names of the fields in errors.

    Raises:
        InvalidInput: the model would compute something else.
        ModelError, LayoutError: see `describe` and `resize`.
    """
    before = describe(folder)
    layout, factor = before.layout, asked.factor or FACTOR
    reason = None
    if layout.weighing == "own":
        reason = "a weight depends on the expert's own score alone, so the twins' weights would add up to too much"
    elif layout.groups_chosen < layout.groups:
        reason = "a group is scored by its two best experts, which twins change"
    elif layout.idle_choices:
        reason = "its router also chooses among choices that compute nothing"
    if reason is not None:
        expected = f"a model whose experts can be split; in {layout.family} {reason}"
        raise InvalidInput(f"{field}factor", factor, expected)
    return Prepared(asked, before, resize(before, layout.num_experts * factor, layout.top_k * factor), field)


def choose(prepared: Prepared, rows: Rows | None, progress: Progress) -> Decision:
    """Every expert becomes twins; nothing is measured, because the model computes the same."""
    layout, factor = prepared.layout, prepared.asked.factor or FACTOR
    # Twins are neighbours, so that every group of experts keeps its own.
    experts = tuple(old for old in range(layout.num_experts) for _ in range(factor))
    layers = [LayerOfExperts(layer=layer, kept=list(experts), dropped=[]) for layer in layout.moe_layers]
    return Decision(dict.fromkeys(layout.moe_layers, single(experts)), layers)
