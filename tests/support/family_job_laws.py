"""The laws of `family_laws` that say what jobs and reports do with a family: files, resuming, analysis, planning."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers import AutoConfig

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt, count
from llama_stack_provider_moe.compute.export.load_check import check_adapter, check_merged
from llama_stack_provider_moe.compute.models.hidden_states import EMBEDDINGS, Blocks
from llama_stack_provider_moe.compute.models.saved_weights import restore_weights
from llama_stack_provider_moe.compute.moe.adapters import below_layer, injected
from llama_stack_provider_moe.compute.moe.model_types import class_of
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.planning.dry_run import Rehearsal
from llama_stack_provider_moe.compute.planning.lora_report import targets_of
from llama_stack_provider_moe.compute.planning.memory import Batch, rehearse, step_of
from llama_stack_provider_moe.compute.planning.meta_model import MetaModel, blank, read_config
from llama_stack_provider_moe.compute.planning.per_process import process_memory, weights_of
from llama_stack_provider_moe.compute.train import checkpoints
from llama_stack_provider_moe.spec import Adapter, Moe, Optimizer
from tests.support import tiny_models
from tests.support.every_family import tiny_config
from tests.support.family_subject import ALPHA, CLOSE, IDS, RANK, Subject, answer, loss_of, off_by

EVERYTHING = Adapter(rank=RANK, alpha=ALPHA, plan="all_experts")


def saved(subject: Subject, folder: Path) -> None:
    """An adapter, saved and loaded in plain PEFT, and merged on disk, gives what was trained; so does the class."""
    files, kind = subject.files, subject.kind
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=r".*(rank_pattern|alpha_pattern)")
        plain = PeftModel.from_pretrained(kind.from_pretrained(files.base), files.adapter).eval()
        gap = off_by(answer(plain), files.expected)
        assert gap < CLOSE, f"plain PEFT: {gap:.1e}"
    assert class_of(AutoConfig.from_pretrained(files.merged)) is kind
    merged, loading = kind.from_pretrained(files.merged, output_loading_info=True)
    assert not loading["missing_keys"], loading
    assert not loading["mismatched_keys"], loading
    with torch.no_grad():
        gap = off_by(answer(merged.eval()), files.expected)
        assert gap < CLOSE, f"merged: {gap:.1e}"


def load_checked(subject: Subject, folder: Path) -> None:
    """The load check finds what was trained in the saved adapter and in the merged model."""
    files = subject.files
    found = check_adapter(files.adapter, str(files.base))
    assert found.effect is not None
    assert found.effect.share > 100 * found.as_trained.share
    assert found.as_trained.share < 1e-6
    check_merged(files.merged, files.adapter, str(files.base))


def resumed(subject: Subject, folder: Path) -> None:
    """Two steps, saved, and two more from the files, give the weights that four steps give, bit for bit."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        for _ in range(number):
            optimizer.zero_grad()
            loss_of(model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def begun(seed: int) -> tuple[PeftModel, Any, torch.optim.Optimizer]:
        model, shipped = subject.adapted(Moe(), EVERYTHING, seed=seed)
        return model, shipped, torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01)

    model, shipped, optimizer = begun(1)
    steps(model, optimizer, 2)
    checkpoints.save(model, tiny_models.tokenizer(), folder / "checkpoint-2", shipped.restored(), step=2)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    steps(model, optimizer, 2)
    again, _, optimizer = begun(2)
    restore_weights(again, folder / "checkpoint-2")
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
    steps(again, optimizer, 2)
    expected = dict(model.named_parameters())
    other = [name for name, found in again.named_parameters() if not torch.equal(found, expected[name])]
    assert not other, f"{len(other)} weights differ, {other[:2]}"


def states_of_blocks(subject: Subject, folder: Path) -> None:
    """What a circuit breaker compares: a pass that ends at a block has the states that the whole pass has there."""
    model, layout = subject.model(), subject.layout
    apply_moe(model, layout, resolve_moe(Moe(), layout, full=False))
    blocks, mask = Blocks(model), torch.ones_like(IDS)
    last = blocks.final - 1
    with torch.no_grad():
        whole = blocks.states({EMBEDDINGS, 0, last}, IDS, mask, whole=True)
        part = blocks.states({EMBEDDINGS, 0}, IDS, mask)
    assert all(torch.equal(states, whole[block]) for block, states in part.items())
    assert len({tuple(each.shape) for each in whole.values()}) == 1
    assert not torch.equal(whole[EMBEDDINGS], whole[0])
    model.requires_grad_(True)
    blocks.states({0}, IDS, mask)[0].square().mean().backward()  # type: ignore[no-untyped-call]
    trained = {name for name, each in model.named_parameters() if each.grad is not None}
    path = layout.layers_path
    assert any(name.startswith(f"{path}.0.") for name in trained)
    assert not any(name.startswith(f"{path}.{last}.") for name in trained), "blocks above the last wanted one run"


def routing_analysed(subject: Subject, folder: Path) -> None:
    """Rows of several lengths, padded together, are counted as each is alone, and a token counts top-k times."""
    model, layout = subject.model(), subject.layout
    apply_moe(model, layout, resolve_moe(Moe(), layout, full=False))
    lengths = (12, 5, 9, 3)
    rows = [Prompt(row[:length], [at > 0 for at in range(length)])
            for row, length in zip(torch.cat([IDS, IDS.flip(0)]).tolist(), lengths, strict=True)]  # fmt: skip
    together = count(model, layout, rows, batch_size=4)
    alone = [count(model, layout, [row], batch_size=1).routed_NLE[0] for row in rows]
    assert (together.routed_NLE == alone).all()
    assert together.rate_LE().sum(axis=1) == pytest.approx(layout.top_k)
    assert together.routed_NLE.shape[1:] == (len(layout.moe_layers), layout.choices)


def lora_reported(subject: Subject, folder: Path) -> None:
    """From the config alone, the LoRA report counts what the modules of a whole model have and get.

    Experts, layers, top-k, the shapes of weights and of LoRA, and the numbers of parameters.
    """
    adapted = _blank(subject, folder)
    reported: Counter[tuple[object, ...]] = Counter()
    for row in targets_of(adapted):
        reported[row.name, row.experts, row.weight_shape, row.lora_a_shape, row.lora_b_shape] += row.count
    model, _ = subject.adapted(Moe(), EVERYTHING)
    given: Counter[tuple[object, ...]] = Counter()
    for name, lora in injected(model).items():
        weight = lora.get_param() if isinstance(lora, ParamWrapper) else lora.get_base_layer().weight
        shapes = [tuple(part["default"].weight.shape) for part in (lora.lora_A, lora.lora_B)]
        experts = weight.shape[0] if weight.dim() == 3 else 0
        given[below_layer(name), experts, tuple(weight.shape), *shapes] += 1
    assert reported == given
    assert adapted.layout == subject.layout
    assert adapted.report.trainable_parameters == sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert adapted.report.total_parameters == sum(each.numel() for each in model.parameters())


def memory_planned(subject: Subject, folder: Path) -> None:
    """From the config alone, a plan has the bytes of the modules, and runs every layer of a step without weights."""
    adapted = _blank(subject, folder)
    weights = weights_of(adapted)
    static = process_memory(weights, "ddp", 1, Optimizer())
    loaded = subject.kind.from_pretrained(subject.files.base, dtype=torch.bfloat16)
    tensors = [*loaded.parameters(), *loaded.buffers()]
    stored = {each.data_ptr(): each.nbytes for each in tensors}
    # Buffers that are read may be in another dtype, which is a share only of a tiny model.
    assert static.weights == pytest.approx(sum(stored.values()), rel=0.01)
    lora = sum(each.nbytes for each in subject.adapted(Moe(), EVERYTHING)[0].parameters() if each.requires_grad)
    assert (static.adapter, static.gradients, static.optimizer) == (lora, lora, 2 * lora)
    layout, batch = subject.layout, Batch(2, 16)
    experts = sum(each.bytes for each in weights if each.kind == "expert" and not each.added)
    stacks = [experts.get_parameter(name) for experts in layout.experts(loaded).values()
              for name in (layout.gate_up, layout.down)]  # fmt: skip
    assert experts >= sum(each.nbytes for each in stacks)
    run = rehearse(Rehearsal(adapted.model, "cpu"), adapted, "sft", batch, "cpu")
    assert len(run.layers) == len(layout.moe_layers) + len(layout.dense_layers)
    assert all(min(each.output, each.kept, each.forward, each.backward) > 0 for each in run.layers)
    assert sum(each.gradients for each in run.layers) == lora
    step = step_of(adapted, "sft", run, (0,), batch, 16, "cpu")
    least = static.weights + static.adapter + static.optimizer
    assert all(step.peak(static, 16, checkpointing).peak_bytes > least for checkpointing in (False, True))


def _blank(subject: Subject, folder: Path) -> MetaModel:
    tiny_config(subject.model_type).save_pretrained(folder)
    config, _ = read_config(str(folder))
    return blank(config, EVERYTHING, Moe())


LAWS: dict[str, Callable[[Subject, Path], None]] = {
    "saved and merged": saved,
    "load check": load_checked,
    "resume": resumed,
    "states of blocks": states_of_blocks,
    "routing analysis": routing_analysed,
    "LoRA report": lora_reported,
    "memory plan": memory_planned,
}
