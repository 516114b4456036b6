"""An adapter is saved under the names that PEFT finds again, also where PEFT renames what has its right name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from llama_stack_provider_moe.compute.export.load_check import check_adapter
from llama_stack_provider_moe.compute.models.saved_weights import restore_weights
from llama_stack_provider_moe.compute.moe import saved_names
from llama_stack_provider_moe.compute.moe.adapters import add_lora, expert_ranks
from llama_stack_provider_moe.compute.moe.exchange import Shard
from llama_stack_provider_moe.compute.moe.rates import Rates
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.moe.saved_names import names_in_file
from llama_stack_provider_moe.compute.moe.sharding import ShardedExperts
from llama_stack_provider_moe.compute.worker.main import COMPLETED
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models
from tests.support.ep_group import in_processes
from tests.support.family_subject import ALPHA, RANK, Subject
from tests.support.training_support import Workshop, workshop

__all__ = ["workshop"]

# Model type -> part of a name in memory, and what the file has instead.
RENAMED = {
    "laguna": (".mlp.shared_experts.", ".mlp.shared_expert."),
    "mistral_large4": (".mlp.experts.", ".experts."),
    "deepseek_ocr2": (".model.language_model.layers.", ".model.layers."),
    "unlimited_ocr": (".model.language_model.layers.", ".model.layers."),
}
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("model_type", RENAMED)
def test_the_file_has_the_names_that_become_the_right_ones(model_type: str) -> None:
    model, _ = Subject(model_type).adapted(Moe(), Adapter(rank=2, alpha=4, plan="all_experts"))
    in_memory, in_file = RENAMED[model_type]
    names = names_in_file(model)
    changed = {own: name for own, name in names.items() if own != name}
    assert changed
    assert any(in_memory in own and in_file in name and in_memory not in name for own, name in changed.items())
    assert len(set(names.values())) == len(names)


def test_elsewhere_the_names_are_those_of_the_modules() -> None:
    model, _ = Subject("mixtral").adapted(Moe(), Adapter(rank=2, alpha=4, plan="all_experts"))
    assert all(own == name for own, name in names_in_file(model).items())


def test_the_names_are_found_once_for_each_structure_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job asks for them before training and at each checkpoint."""
    model, _ = Subject("laguna").adapted(Moe(), Adapter(rank=2, alpha=4, plan="all_experts"))
    names = names_in_file(model)
    with monkeypatch.context() as patch:
        patch.setattr(saved_names, "_lost", None)  # can't be called
        again = names_in_file(model)
        assert again == names
        again.clear()  # the caller's own
        assert names_in_file(model) == names
    model.register_buffer("new", torch.zeros(1))
    asked: list[str] = []
    monkeypatch.setattr(saved_names, "_lost", lambda *_: asked.append("again") or [])
    names_in_file(model)
    assert asked


def test_an_adapter_that_peft_would_not_find_under_any_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = Subject("laguna").adapted(Moe())
    names_in_file(model)
    monkeypatch.setattr(saved_names, "get_model_conversion_mapping", lambda model: [])
    model, _ = Subject("laguna").adapted(Moe(), Adapter(rank=2, alpha=4, lora_attn_modules=[]))
    with pytest.raises(AdapterError, match=r"PEFT would not find .* because it renames"):
        names_in_file(model)


# peft 0.21 looks for a pattern's names among modules, and parameters are none; it applies them all the same.
@pytest.mark.filterwarnings("ignore")
def test_a_job_starts_from_such_an_adapter_with_unequal_experts(workshop: Workshop) -> None:
    folder = workshop.root / "models" / "mistral_large4"
    Subject("mistral_large4").model().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    unequal = {"plan": "per_expert", "rank": 2, "rules": [{"experts": {"0": 4, "2": 1}}]}
    first = workshop.run("sft", folder, adapter=unequal)
    assert first.exit_code == COMPLETED, first.reason
    saved = load_file(first.folder.adapter / WEIGHTS)
    assert not any(".mlp.experts." in name for name in saved)
    assert check_adapter(first.folder.adapter).as_trained.greatest == 0
    again = workshop.run("sft", folder, adapter={**unequal, "init_from": str(first.folder.adapter)})
    assert again.exit_code == COMPLETED, again.reason
    assert again.held_out("validation_loss")[0] == pytest.approx(first.held_out("validation_loss")[-1], rel=1e-4)
    model, _ = Subject("mistral_large4").adapted(Moe(), Adapter.model_validate(unequal))
    assert expert_ranks(model)
    restore_weights(model, again.folder.adapter)


def test_a_process_takes_its_part_of_an_adapter_with_other_names(tmp_path: Path) -> None:
    """Which tensors belong to experts shows in the names in memory, not in those of the file."""
    subject = Subject("mistral_large4")
    layout, adapter = subject.layout, subject.files.adapter

    def work(rank: int) -> Any:
        model = subject.model()
        experts = ShardedExperts(layout, Shard(rank, 2, layout.num_experts, distributed.group.WORLD))
        experts.set_aside(model, keep=lambda weight: weight.chunk(2)[rank].clone())
        resolved = resolve_moe(Moe(), layout, full=False)
        apply_moe(model, layout, resolved)
        adapted = add_lora(model, Adapter(rank=RANK, alpha=ALPHA, lora_attn_modules=[]), layout, resolved).model
        experts.take(adapted, Rates())
        restore_weights(adapted, adapter, experts)
        lora = {name: each.detach() for name, each in adapted.named_parameters() if "lora_" in name}
        whole = {name.replace(".default", ""): name for name in lora}
        saved, names = load_file(adapter / WEIGHTS), names_in_file(adapted)
        divided = [own for own in names if experts.covers(own)]
        assert divided
        assert all(torch.equal(lora[whole[own]], experts.part(own, saved[names[own]])) for own in divided)
        assert all(torch.equal(lora[whole[own]], saved[names[own]]) for own in names if own not in divided)
        return len(names)

    assert len(set(in_processes(2, work, tmp_path))) == 1
