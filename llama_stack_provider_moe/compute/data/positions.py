"""How many positions a model supports, and which rows are longer.

With RoPE a longer row trains without an error, although the model has never seen the positions of its tail. If the
positions are a table, a longer row reads past its end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llama_stack_provider_moe.compute.data.datasets import Rows
from llama_stack_provider_moe.compute.data.row_lengths import lengths_of
from llama_stack_provider_moe.compute.moe.layout import text_config, without_adapters
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.errors import DataError


@dataclass(frozen=True)
class Positions:
    """The positions that a model supports.

    Attributes:
        most: the maximum number of tokens in a row.
        table: whether they are rows of a table (learned or precomputed), so that a longer row can't run at all.
        source: where the number comes from, as text.
    """

    most: int
    table: bool
    source: str


def positions_of(model: PreTrainedModel) -> Positions | None:
    """The positions of a loaded model; None if there is no limit to find (ALiBi, state-space models)."""
    inputs, base, others = model.get_input_embeddings(), without_adapters(model), _other_modalities(model)
    for name, module in base.named_modules():
        last = name.rpartition(".")[2]
        if name.startswith(others) or not isinstance(module, nn.Embedding) or module is inputs:
            continue
        if "position" in last or last == "wpe":
            # In OPT and related models, the first rows of the table are not positions.
            most = module.num_embeddings - int(getattr(module, "offset", 0))
            return Positions(most, True, f"{last}, a table of learned positions")
    for name, buffer in base.named_buffers():
        last = name.rpartition(".")[2]
        if last == "embed_positions" and buffer.dim() == 2 and not name.startswith(others):
            return Positions(int(buffer.shape[0]), True, f"{last}, a table of positions")
    return by_config(text_config(model))


def _other_modalities(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of a composite model's towers for images or sound: their tables count patches, not tokens."""
    base = without_adapters(model)
    language = {type(base.config), type(text_config(model))}
    return tuple(
        f"{name}."
        for name, module in base.named_modules()
        if isinstance(module, PreTrainedModel) and type(module.config) not in language
    )


def by_config(config: PreTrainedConfig) -> Positions | None:
    """The positions by `max_position_embeddings` and RoPE's scaling, read as vLLM reads them.

    YaRN: its factor times the original length. Linear and dynamic scaling: the factor times the given length.
    Otherwise (including Llama 3 and LongRoPE) the given length is the scaled model's. A sliding window is not a limit.
    """
    given = getattr(config, "max_position_embeddings", None)
    if not given or getattr(config, "alibi", False):
        return None
    ropes = getattr(config, "rope_parameters", None) or {}
    by_layers = bool(ropes) and all(isinstance(each, dict) for each in ropes.values())  # one for each type of layer
    most, source = int(given), f"max_position_embeddings {given}"
    for rope in ropes.values() if by_layers else [ropes]:
        kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1.0
        original = rope.get("original_max_position_embeddings")
        if kind == "yarn":
            scaled = int((original or given) * factor)
        elif kind in ("linear", "dynamic") and not by_layers:  # Gemma 3's given length is the scaled one
            scaled = int(given * factor)
        else:
            continue
        if scaled > most:
            most, source = scaled, f"max_position_embeddings {given}, RoPE {kind} by {factor:g}"
    return Positions(most, False, source)


def tell_long_rows(session: AnySession, model: PreTrainedModel, rows: Rows, answer: int = 0) -> dict[str, int | None]:
    """Warn of a job's rows, including held-out ones, that are longer than the model's positions; see `judge`.

    Args:
        session: the job's.
        model: that it trains.
        rows: its rows.
        answer: tokens that the model writes after each.
    """
    lengths_R = torch.cat(list(_lengths(rows))) + answer
    return judge(positions_of(model), lengths_R, lambda text: session.say(text, "warning"), answer)


def judge(
    positions: Positions | None, lengths_R: Tensor, warn: Callable[[str], None], answer: int = 0
) -> dict[str, int | None]:
    """Warn of rows that are longer than the model's positions.

    Args:
        positions: of the model; None if no limit is known.
        lengths_R: the number of tokens of each row.
        warn: called with the warning.
        answer: of these, the tokens that the model writes.

    Returns:
        For the plan: the model's positions, the longest row, and the number of rows that are too long.

    Raises:
        DataError: rows are too long, and the model's positions are a table.
    """
    longest, most = int(lengths_R.max()), None if positions is None else positions.most
    beyond = 0 if most is None else int((lengths_R > most).sum())
    if positions is not None and beyond:
        written = f", with an answer of {answer:,}," if answer else ""
        problem = (
            f"{beyond:,} of {len(lengths_R):,} rows have{written} more tokens than the model has positions, {most:,} "
            f"({positions.source}); the longest has {longest:,}"
        )
        if positions.table:
            raise DataError(f"{problem}. options.max_length: expected at most {most}")
        warn(
            f"{problem}. The model was not trained on these positions: set options.max_length to {most} or less, or "
            "options.rope_scaling (recipe sft) to extend them"
        )
    return {"positions": most, "longest_row": longest, "rows_beyond_positions": beyond}


def _lengths(rows: Rows) -> Iterator[Tensor]:
    for part in (rows.train, rows.validation):
        if part is not None:
            sets: dict[str, Dataset] = getattr(part, "sets", {"all": part})  # a circuit breaker has several
            yield from (lengths_of(each) for each in sets.values())
