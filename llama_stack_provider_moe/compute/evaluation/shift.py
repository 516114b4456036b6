"""How far an edited model is from its base on the same texts: KL divergence of the next token, and routing.

Both models are never in memory together. The base leaves what its output head read, and which experts it chose; the
head of an edited model is the base's, so the base's logits come from a second pass of the edited model whose head reads
those states instead of its own.

Shapes: B texts of a batch, T their length, A tokens of a text that are predicted and count, H width, V vocabulary, L
layers with experts, K experts chosen for a token.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_stack_provider_moe.compute.evaluation.generate import Around, LocalModel
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, without_adapters
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder
from llama_stack_provider_moe.spec.rows import Conversation

_STATES, _CHOSEN = "states", "chosen"
_SET = "retain"


def record(
    subject: LocalModel,
    conversations: Sequence[Conversation],
    model: PreTrainedModel | PeftModel,
    layout: ExpertLayout | None,
    path: Path,
) -> None:
    """Write what `compare` needs of the base model, complete or not at all.

    Args:
        subject: the base, ready to answer.
        conversations: with the answers whose tokens count.
        model: the same model.
        layout: of its experts; None: it is dense.
        path: the new file; it has A x H numbers and T x L x K short integers for each text.
    """
    texts = subject.texts(_SET, conversations)
    kept: dict[str, Tensor] = {}
    with _routing(model, layout) as recorder, _head_inputs(model) as read:
        for rows, logits_BTV in subject.passes(f"{_SET} of the base", texts.ids, _recorded(recorder)):
            chosen_BTLK = None if recorder is None or layout is None else _chosen(recorder, layout, logits_BTV)
            for at, row in enumerate(rows):
                kept[f"{_STATES}.{row}"] = read[-1][at][_predicting(texts.said[row])].cpu()
                if chosen_BTLK is not None:
                    kept[f"{_CHOSEN}.{row}"] = chosen_BTLK[at, : len(texts.ids[row])].contiguous()
            read.clear()
    writing = path.with_name(f".{path.name}.writing")
    save_file(kept, writing)
    os.replace(writing, path)


def compare(
    subject: LocalModel,
    conversations: Sequence[Conversation],
    model: PreTrainedModel | PeftModel,
    layout: ExpertLayout | None,
    path: Path,
) -> Mapping[str, list[float]]:
    """The fields `kl`, `rerouted` and `read` of a `Measurement`, for each conversation.

    Args:
        subject: the edited model, ready to answer.
        conversations: those of `record`.
        model: the same model.
        layout: of its experts; None: it is dense.
        path: what `record` wrote.
    """
    base = load_file(path)
    texts = subject.texts(_SET, conversations)
    found = {name: [0.0] * len(conversations) for name in ("kl", "rerouted", "read")}
    with _routing(model, layout) as recorder, _head_inputs(model) as read:
        for rows, logits_BTV in subject.passes(f"{_SET} beside the base", texts.ids, _recorded(recorder)):
            chosen_BTLK = None if recorder is None or layout is None else _chosen(recorder, layout, logits_BTV)
            states_BTH = torch.zeros_like(read[-1])
            for at, row in enumerate(rows):
                states_BTH[at, _predicting(texts.said[row])] = base[f"{_STATES}.{row}"].to(states_BTH)
            with _replaced(model, states_BTH):
                base_BTV = subject.logits([texts.ids[row] for row in rows])
            read.clear()
            for at, row in enumerate(rows):
                owner, places_A = texts.owners[row], _predicting(texts.said[row])
                found["kl"][owner] += kl(base_BTV[at][places_A], logits_BTV[at][places_A])
                if chosen_BTLK is not None:
                    now_TLK = chosen_BTLK[at, : len(texts.ids[row])]
                    found["rerouted"][owner] += rerouted(base[f"{_CHOSEN}.{row}"], now_TLK)
                    found["read"][owner] += len(now_TLK)
    return found if layout is not None else {"kl": found["kl"]}


def kl(base_AV: Tensor, edited_AV: Tensor) -> float:
    """Sum over tokens of KL(base || edited), in nats."""
    base_AV, edited_AV = base_AV.float().log_softmax(-1), edited_AV.float().log_softmax(-1)
    return float((base_AV.exp() * (base_AV - edited_AV)).double().sum())


def rerouted(base_TLK: Tensor, edited_TLK: Tensor) -> float:
    """Sum over tokens of the share of the base's choices, over all layers, that the edited model does not make."""
    kept_TLK = (base_TLK[..., :, None] == edited_TLK[..., None, :]).any(dim=-1)
    return float((1 - kept_TLK.double().flatten(1).mean(dim=1)).sum())


def _predicting(said: Sequence[bool]) -> Tensor:
    """Positions whose next token counts."""
    return torch.tensor(said[1:]).nonzero()[:, 0]


@contextmanager
def _routing(model: nn.Module, layout: ExpertLayout | None) -> Iterator[RoutingRecorder | None]:
    if layout is None:
        yield None
        return
    recorder = RoutingRecorder(model, layout)
    try:
        yield recorder
    finally:
        recorder.close()


def _recorded(recorder: RoutingRecorder | None) -> Around:
    def around(mask_BT: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if recorder is None else recorder.recording(mask_BT)

    return around


def _chosen(recorder: RoutingRecorder, layout: ExpertLayout, logits_BTV: Tensor) -> Tensor:
    batch, length, _ = logits_BTV.shape
    made = [recorder.chosen_in(layer).reshape(batch, length, -1) for layer in layout.moe_layers]
    return torch.stack(made, dim=2).to(device="cpu", dtype=torch.int16)


def _head(model: nn.Module) -> nn.Module:
    head: nn.Module = without_adapters(model).get_output_embeddings()
    return head


@contextmanager
def _head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the output head read in each pass, (B, T, H)."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])

    handle = _head(model).register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _replaced(model: nn.Module, states_BTH: Tensor) -> Iterator[None]:
    handle = _head(model).register_forward_pre_hook(lambda module, inputs: (states_BTH, *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
