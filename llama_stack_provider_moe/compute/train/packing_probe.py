"""Check that a loaded model keeps packed rows apart: compare two short rows, packed, with each of them alone.

Whether it does depends on the model's code (masks made from position ids, `seq_idx` for convolutions and state-space
layers) and on the installed kernels. So no list of families or layer names can tell, and we run the model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llama_stack_provider_moe.compute.distributed.full_state import reshard
from llama_stack_provider_moe.compute.evaluation.generate import evaluating
from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.errors import ModelError

LENGTHS = (13, 11)  # tokens of the two rows
# How far the second row's logits may differ after another row: norm of the difference, as a share of the norm.
# Measured on tiny models of 15 families that keep rows apart: at most 3.3e-7 in fp32 and 0.0034 in bf16, 0.021 with 12
# layers (a token on the edge between two experts may take the other one); with gpt-oss, which does not keep them apart,
# 1.12.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
MOST = 0.3  # the limit where rounding, measured in the first row, is greater than expected


@dataclass(frozen=True)
class PackingGap:
    """How far packed rows differ from rows alone, as shares of the norm of their logits.

    Attributes:
        first: of the first row, which no row precedes: rounding only.
        second: of the row after it: rounding, and the effect of the first row.
    """

    first: float
    second: float


def require_independent_rows(session: AnySession, model: PreTrainedModel | PeftModel) -> PackingGap:
    """Measure the model, in all of a job's processes. Its weights and modes and the random state don't change.

    Raises:
        ModelError: a packed row sees the row before it, or would in a longer sequence, or the model can't run packed
            rows.
    """
    spec, base = session.spec, text_config(model)
    refusal = "data.packed: true is not valid for this model"
    longest, most = spec.training.batch_size * spec.options.max_length, same_scale(base)
    if most is not None and longest > most:
        raise ModelError(
            f"{refusal}: its layers without RoPE scale attention by the position in the packed sequence, not the row, "
            f"from {most + 1:,} tokens on, and a micro-batch may have {longest:,}; expected at most {most:,} "
            "(training.batch_size times options.max_length), or data.packed false"
        )
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    try:
        found = measure(model, vocabulary)
    except (
        ValueError,
        NotImplementedError,
        TypeError,
    ) as error:  # e.g. convolutions without their kernel
        raise ModelError(f"{refusal}: {' '.join(str(error).split())}. Use data.packed false") from error
    gap = PackingGap(session.peers.maximum(found.first), session.peers.maximum(found.second))
    allowed = max(TOLERANCE[model.dtype], min(4 * gap.first, MOST))
    if not gap.second <= allowed:  # NaN is not
        kinds = sorted(set(getattr(base, "layer_types", None) or ()))
        layers = f" (layers: {', '.join(kinds)}; attention: {base._attn_implementation})"
        raise ModelError(
            f"{refusal}: a row sees the row packed before it. The logits of a row after another differ by "
            f"{gap.second:.2g} of their norm from those of the row alone; expected at most {allowed:.2g}{layers}. "
            "Use data.packed false"
        )
    return gap


def same_scale(config: PreTrainedConfig) -> int | None:
    """The longest sequence in which attention does not depend on the position in it; None: there is no limit.

    Llama 4's layers without RoPE scale queries by that position (transformers 5.23), whatever the position ids are. The
    scale changes once in `floor_scale` tokens, so two short rows don't show it. (Its chunks follow position ids.)
    """
    scaled = getattr(config, "attn_temperature_tuning", False) and 0 in (getattr(config, "no_rope_layers", None) or ())
    return int(config.floor_scale) - 1 if scaled else None


def measure(model: PreTrainedModel, vocabulary: int) -> PackingGap:
    """Compare two rows in one sequence, batched as TRL batches packed rows, with each row alone."""
    rows = [_row(length, place, vocabulary) for place, length in enumerate(LENGTHS)]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    with evaluating(model), torch.no_grad():
        packed = dict(collate([{"input_ids": row} for row in rows]))
        del packed["labels"]
        together = _logits(model, packed)
        alone = [_logits(model, {"input_ids": torch.tensor([row])}) for row in rows]
    reshard(model)
    begins = LENGTHS[0]
    return PackingGap(_gap(together[:begins], alone[0]), _gap(together[begins:], alone[1]))


def _row(length: int, place: int, vocabulary: int) -> list[int]:
    """Tokens spread over the vocabulary, different in each row."""
    return [(7919 * (length * place + index + 1) + 31 * index * index) % vocabulary for index in range(length)]


def _logits(model: PreTrainedModel, batch: Mapping[str, object]) -> Tensor:
    """Logits in fp32, (tokens, vocabulary)."""
    on_device = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    logits: Tensor = model(**on_device, use_cache=False).logits[0].float()
    return logits


def _gap(one: Tensor, other: Tensor) -> float:
    norm = float(other.norm())
    return float((one - other).norm()) / norm if norm > 0 else math.nan
