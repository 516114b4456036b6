"""Record a trained model's logits for a few fixed sequences beside its weights, for a later process to compare with.

The file of about 100 KB is in the artifact's folder. For each position it holds the `TOP` largest logits, which decide
what is generated; `SPREAD` logits at even distances in the vocabulary, which nothing selected; and the log of the sum
of all exponentials, which includes every logit. A whole vocabulary would typically take 50 MB and show no more: an
adapter that is missing, scaled or misplaced changes every number.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from pydantic import Field, ValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.export.probe_images import Drawing, asked_about
from llama_stack_provider_moe.compute.moe.implementation import ExpertsImplementation
from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.jobdir.reading import read_as
from llama_stack_provider_moe.spec import Block, DType

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROBE = "load_check.json"
TOP, SPREAD = 16, 16
LENGTH = 32  # most tokens of a sequence
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
    """One sequence with K logits at its last T positions, and the token ids of those logits.

    T is the number of its tokens, in a sequence with an image at most `LENGTH`.
    """

    tokens: list[int] = Field(min_length=1)
    drawing: Drawing | None = Field(default=None, description="Image in the sequence; None: text alone.")
    ids: list[list[int]] = Field(description="T x K; of a classifier 1 x K.")
    logits: list[list[float]] = Field(description="T x K, computed in `dtype`, stored in fp32.")
    logsumexp: list[float] = Field(description="T.")


class Arithmetic(Block):
    """How a model's passes are computed; if all of this is equal, results are equal to the last bits."""

    dtype: DType
    device: str = Field(description="Kind of device: cpu or cuda.")
    quantize_bits: int | None = Field(description="Bits of the frozen base; None: not quantised.")
    quantize_scales: bool = Field(default=False, description="Whether the scales of the base are quantised too.")
    experts_implementation: ExpertsImplementation | None = Field(
        description="Implementation of the experts; None: a dense model."
    )


class Probe(Block):
    """The whole file."""

    arithmetic: Arithmetic
    router_biases: str | None = Field(
        description="Digest of the router biases beside the adapter; None: training moved none."
    )
    torch: str = Field(description="Version of torch.")
    rows: list[Row] = Field(min_length=1)

    @property
    def positions(self) -> int:
        """Number of positions with logits in all sequences."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def has_images(self) -> bool:
        """Whether some sequences have an image."""
        return any(row.drawing is not None for row in self.rows)

    def of_images(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Those of `values` (see `Probe.values`) that answer the same question about two images; None without images.

        Both have the logits of the same token ids.
        """
        found = [each for each, row in zip(values, self.rows, strict=True) if row.drawing is not None]
        return (found[0], found[1]) if found else None

    def values(self) -> list[Tensor]:
        """(T, K + 1) for each sequence: the logits, then their log-sum-exp."""
        return [
            torch.cat([torch.tensor(row.logits), torch.tensor(row.logsumexp).unsqueeze(1)], dim=1) for row in self.rows
        ]


def sequences(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the fixed texts: a question, a question with answer, and plain text; at most `LENGTH` each."""
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
    model: "PreTrainedModel | PeftModel",
    tokenizer: PreTrainedTokenizerBase,
    arithmetic: Arithmetic,
    router_biases: str | None = None,
    processor: Any = None,
) -> Probe:
    """Record the logits of a model in evaluation mode.

    Args:
        model: the model, with its adapter if it has one.
        tokenizer: its tokenizer.
        arithmetic: how it is computed.
        router_biases: see `Probe`.
        processor: of images, if it was trained on some; a question about each of two images is recorded too.

    Raises:
        ModelError: its logits are not finite.
    """
    rows = [_row(tokens, _logits(model, tokens, arithmetic.dtype)) for tokens in sequences(tokenizer)]
    of_image: Row | None = None
    for drawing in get_args(Drawing) if processor is not None else ():
        tokens, inputs = asked_about(processor, drawing)
        # The same ids for each image, so that they can be compared.
        of_image = _row(tokens, _logits(model, tokens, arithmetic.dtype, inputs)[-LENGTH:], drawing, of_image)
        rows.append(of_image)
    return Probe(arithmetic=arithmetic, router_biases=router_biases, torch=str(torch.__version__), rows=rows)


def _row(tokens: list[int], logits_TV: Tensor, drawing: Drawing | None = None, like: Row | None = None) -> Row:
    """What is kept of a sequence; `like` has the token ids to keep, by default those of the largest and some more."""
    vocabulary = logits_TV.shape[1]
    top_TK = logits_TV.topk(min(TOP, vocabulary), dim=1).indices
    spread_K = torch.linspace(0, vocabulary - 1, min(SPREAD, vocabulary), device=top_TK.device).long()
    ids_TK = torch.cat([top_TK, spread_K.expand(len(logits_TV), -1)], dim=1)
    if like is not None:
        ids_TK = torch.tensor(like.ids, device=top_TK.device)
    values_TK, sums_T = logits_TV.gather(1, ids_TK), logits_TV.logsumexp(dim=1)
    if not bool(torch.isfinite(values_TK).all() and torch.isfinite(sums_T).all()):
        raise ModelError("the trained model's logits are not all finite; it has diverged")
    return Row(
        tokens=tokens, drawing=drawing, ids=ids_TK.tolist(), logits=values_TK.tolist(), logsumexp=sums_T.tolist()
    )


def digest(biases: Mapping[int, Tensor]) -> str:
    """SHA-256 of a model's router biases, layer by layer; a few sequences would not show most changes of them."""
    found = hashlib.sha256()
    for layer in sorted(biases):
        found.update(biases[layer].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def ask(
    model: "PreTrainedModel | PeftModel", probe: Probe, autocast: DType | None = None, processor: Any = None
) -> list[Tensor]:
    """The values of `probe` (see `Probe.values`) for another model, on the CPU.

    Args:
        model: a model in evaluation mode.
        probe: the recording to repeat.
        autocast: dtype of products if the parameters have several dtypes, as in training; None: their own dtype.
        processor: of images, as it was saved, for a probe that has some.

    Raises:
        AdapterError: the processor gives other tokens than the one of the training.
        ModelError: its vocabulary is smaller than the recorded one, or its logits are not finite.
    """
    found = []
    for row in liveness.counted("computing logits", probe.rows, len(probe.rows), "rows"):
        ids_TK = torch.tensor(row.ids)
        if (most := max(max(row.tokens), int(ids_TK.max()))) >= (size := model.get_input_embeddings().weight.shape[0]):
            raise ModelError(f"base: its vocabulary has {size} entries, but the recorded logits include token {most}")
        inputs = {} if row.drawing is None else _inputs(processor, row, row.drawing)
        logits_TV = _logits(model, row.tokens, autocast, inputs)[-len(row.ids) :].cpu()
        values = torch.cat([logits_TV.gather(1, ids_TK), logits_TV.logsumexp(dim=1, keepdim=True)], dim=1)
        if not bool(torch.isfinite(values).all()):
            raise ModelError("the logits of the loaded model are not all finite")
        found.append(values)
    return found


def read_probe(folder: Path) -> Probe | None:
    """The probe in a folder; None if there is none.

    Raises:
        AdapterError: it can't be read.
    """
    path = folder / PROBE
    try:
        return read_as(Probe, path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise AdapterError(f"{path} can't be read: {error}") from error


def _inputs(processor: Any, row: Row, drawing: Drawing) -> dict[str, Tensor]:
    assert processor is not None, "a sequence with an image needs the processor"
    tokens, inputs = asked_about(processor, drawing)
    if tokens != row.tokens:
        raise AdapterError(
            f"the saved processor of images gives {len(tokens)} tokens for a question about an image that had "
            f"{len(row.tokens)} in training, or other ones: its files differ from those of the training"
        )
    return inputs


def _logits(
    model: "PreTrainedModel | PeftModel", tokens: list[int], autocast: DType | None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """(T, V) in fp32, of a classifier (1, labels).

    `inputs` are those of an image, floats in the dtype of the embeddings.
    """
    device, own = model.device, model.get_input_embeddings().weight.dtype
    more = {
        name: value.to(device, own if value.is_floating_point() else None) for name, value in (inputs or {}).items()
    }
    dtype = None if autocast in (None, "fp32") else TORCH_DTYPES[autocast]
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        ids = torch.tensor([tokens], device=device)
        logits: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return logits[0].reshape(-1, logits.shape[-1]).float()
