"""The laws of `family_laws` that say what jobs and reports do with a family: files, resuming, analysis, planning."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from llama_stack_provider_moe.compute.planning.lora_report import report
from llama_stack_provider_moe.compute.planning.memory import Batch
from llama_stack_provider_moe.compute.train import checkpoints
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models
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
    assert found.as_trained.greatest == 0, "bit by bit"
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
    assert (together.rate_LE().sum(axis=1) == layout.top_k).all(), together.rate_LE().sum(axis=1)
    assert together.routed_NLE.shape[1:] == (len(layout.moe_layers), layout.choices)


def planned(subject: Subject, folder: Path) -> None:
    """From the config alone, the LoRA report counts what the modules have and get, and the memory of each recipe.

    Experts, layers, the shapes of LoRA, the numbers of parameters, and the bytes of weights, gradients and optimiser.
    """
    whole = subject.model()
    whole.config.save_pretrained(folder)
    found = report(str(folder), EVERYTHING, Moe(), Batch(1, 16), (16,), None, "cpu", load=False)
    model, _ = subject.adapted(Moe(), EVERYTHING)
    reported: Counter[tuple[object, ...]] = Counter()
    for row in found.targets:
        reported[row.name, row.experts, row.weight_shape, row.lora_a_shape, row.lora_b_shape] += row.count
    given: Counter[tuple[object, ...]] = Counter()
    for name, lora in injected(model).items():
        weight = lora.get_param() if isinstance(lora, ParamWrapper) else lora.get_base_layer().weight
        shapes = [tuple(part["default"].weight.shape) for part in (lora.lora_A, lora.lora_B)]
        experts = weight.shape[0] if weight.dim() == 3 else 0
        given[below_layer(name), experts, tuple(weight.shape), *shapes] += 1
    assert reported == given
    layout = subject.layout
    assert found.layers == len(layout.moe_layers) + len(layout.dense_layers)
    assert f"{layout.num_experts} experts" in found.experts
    assert f"top-{layout.top_k}" in found.experts
    assert found.base_parameters == sum(each.numel() for each in whole.parameters())
    trained = [each for each in model.parameters() if each.requires_grad]
    assert found.trainable_parameters == sum(each.numel() for each in trained)
    loaded = subject.kind.from_pretrained(subject.files.base, dtype=torch.bfloat16)
    tensors = [*loaded.parameters(), *loaded.buffers()]
    stored = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
    for each in found.memory:
        assert each.terms.weights == sum(stored.values()), (each.recipe, each.terms.weights, sum(stored.values()))
        assert each.terms.adapter == sum(parameter.nbytes for parameter in trained)
        assert each.peak_bytes >= each.terms.weights + 3 * each.terms.adapter
    assert {each.recipe for each in found.memory} == {"sft", "dpo", "circuit_breaker"}


LAWS: dict[str, Callable[[Subject, Path], None]] = {
    "saved and merged": saved,
    "load check": load_checked,
    "resume": resumed,
    "states of blocks": states_of_blocks,
    "routing analysis": routing_analysed,
    "LoRA report": planned,
}
