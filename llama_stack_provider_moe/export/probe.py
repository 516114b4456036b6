"""What a trained model says to a few fixed sequences, written beside its weights, for a later process to compare with.

A file of some 100 KB in the artifact's folder. Of each position it holds the `TOP` greatest logits, which decide what
is generated, `SPREAD` at even distances through the vocabulary, which nothing chose, and the log of the sum of all
exponentials, which every logit is in. All of a vocabulary would be 50 MB with a usual one, and would tell no more: an
adapter that is missing, scaled or misplaced moves every number.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.experts.settings import ExpertsImplementation
from llama_stack_provider_moe.spec import Block, DType

PROBE = "load_check.json"
TOP, SPREAD = 16, 16
LENGTH = 32  # tokens of a sequence, at most
_ASKED = (
    "What is the capital of France? Answer in one sentence.",
    "Write a short letter about the garden.",
)
_ANSWER = "The capital of France is Paris."
_PLAIN = (
    "Once upon a time there was a small town by the river, and in it lived",
    "def mean(numbers):\n    return sum(numbers) / len(numbers)\n\n# 3, 14, 159, 2653",
)
TORCH_DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Row(Block):
    """One sequence of T tokens: K logits at each position, by the ids of the tokens that they are of."""

    tokens: list[int] = Field(min_length=1)
    ids: list[list[int]] = Field(description="T x K.")
    logits: list[list[float]] = Field(description="T x K, computed as `dtype` says, kept in fp32.")
    logsumexp: list[float] = Field(description="T.")


class Arithmetic(Block):
    """How a model's passes are computed; where all of it is the same again, so is what they give, to the last bits."""

    dtype: DType
    device: str = Field(description="Kind of the device: cpu, cuda.")
    quantize_bits: int | None = Field(description="Of the frozen base; None: it was not quantised.")
    experts_implementation: ExpertsImplementation | None = Field(description="None: a dense model.")


class Probe(Block):
    """The whole file."""

    arithmetic: Arithmetic
    router_biases: str | None = Field(description="Digest of the biases beside the adapter; None: training moved none.")
    torch: str = Field(description="Its version.")
    rows: list[Row] = Field(min_length=1)

    @property
    def positions(self) -> int:
        """Of all sequences."""
        return sum(len(row.tokens) for row in self.rows)

    def values(self) -> list[Tensor]:
        """Of each sequence (T, K + 1): the logits, and last their log-sum-exp."""
        return [
            torch.cat([torch.tensor(row.logits), torch.tensor(row.logsumexp).unsqueeze(1)], dim=1) for row in self.rows
        ]


def sequences(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of the fixed texts: a question, question and answer, and plain text; `LENGTH` of each at most."""
    found: list[list[int]] = []
    if tokenizer.chat_template is not None:
        asked: list[dict[str, str]] = [{"role": "user", "content": _ASKED[0]}]
        chats = [
            ([{"role": "user", "content": _ASKED[1]}], True),
            ([*asked, {"role": "assistant", "content": _ANSWER}], False),
        ]
        found += [
            tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            for chat, prompt in chats
        ]
    found += [tokenizer(text)["input_ids"] for text in (_PLAIN if found else (*_ASKED, *_PLAIN))]
    return [list(ids)[:LENGTH] for ids in found if ids]


def record(
    model: Any, tokenizer: PreTrainedTokenizerBase, arithmetic: Arithmetic, router_biases: str | None = None
) -> Probe:
    """Ask a model that is in evaluation mode.

    Args:
        model: with its adapter, where it has one.
        tokenizer: its own.
        arithmetic: it runs with.
        router_biases: see `Probe`.

    Raises:
        ModelError: its logits are no numbers.
    """
    rows = []
    for tokens in sequences(tokenizer):
        logits_TV = _logits(model, tokens, autocast=arithmetic.dtype)
        vocabulary = logits_TV.shape[1]
        top_TK = logits_TV.topk(min(TOP, vocabulary), dim=1).indices
        spread_K = torch.linspace(0, vocabulary - 1, min(SPREAD, vocabulary), device=top_TK.device).long()
        ids_TK = torch.cat([top_TK, spread_K.expand(len(tokens), -1)], dim=1)
        values_TK, sums_T = logits_TV.gather(1, ids_TK), logits_TV.logsumexp(dim=1)
        if not bool(torch.isfinite(values_TK).all() and torch.isfinite(sums_T).all()):
            raise ModelError("the trained model's logits are not all finite; it has diverged")
        rows.append(
            Row(tokens=tokens, ids=ids_TK.tolist(), logits=values_TK.tolist(), logsumexp=sums_T.tolist())
        )  # fmt: skip
    return Probe(arithmetic=arithmetic, router_biases=router_biases, torch=str(torch.__version__), rows=rows)


def digest(biases: Mapping[int, Tensor]) -> str:
    """SHA-256 over the routers' biases of a model, layer by layer: few of them change what a few sequences get."""
    found = hashlib.sha256()
    for layer in sorted(biases):
        found.update(biases[layer].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def ask(model: Any, probe: Probe, autocast: DType | None = None) -> list[Tensor]:
    """What a model says where `probe` was taken: `Probe.values` of it, on the CPU.

    Args:
        autocast: dtype of products where a model's parameters have several, as in training; None: their own.

    Raises:
        ModelError: its vocabulary is smaller than the one recorded, or its logits are no numbers.
    """
    found = []
    for row in probe.rows:
        ids_TK = torch.tensor(row.ids)
        if (most := max(max(row.tokens), int(ids_TK.max()))) >= (size := model.get_input_embeddings().weight.shape[0]):
            raise ModelError(
                f"base: its vocabulary has {size} entries, and the recorded logits are of token {most} too"
            )
        logits_TV = _logits(model, row.tokens, autocast).cpu()
        values = torch.cat([logits_TV.gather(1, ids_TK), logits_TV.logsumexp(dim=1, keepdim=True)], dim=1)
        if not bool(torch.isfinite(values).all()):
            raise ModelError("the logits of the model that was loaded again are not all finite")
        found.append(values)
    return found


def read_probe(folder: Path) -> Probe | None:
    """The probe that lies in a folder; None where there is none.

    Raises:
        AdapterError: it can't be read.
    """
    path = folder / PROBE
    try:
        return Probe.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise AdapterError(f"{path} can't be read: {error}") from error


def _logits(model: Any, tokens: list[int], autocast: DType | None) -> Tensor:
    """(T, V) in fp32."""
    device = model.device
    dtype = None if autocast in (None, "fp32") else TORCH_DTYPES[autocast]
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        logits: Tensor = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits
    return logits[0].float()
