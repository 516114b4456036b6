"""The names that an adapter's tensors have in its file: those that PEFT finds again when it loads the file.

peft 0.21 renames the tensors of an adapter that it loads as transformers renames those of a checkpoint. In a few
families a renaming also matches names that are right already: Laguna's `shared_expert.` is found in `shared_experts.`.
PEFT then only warns, and the adapter would have no effect. There the file has the name that is renamed to the right
one, `shared_expert.`; everywhere else the names in the file are those of PEFT's own modules.
"""

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from llama_stack_provider_moe.errors import AdapterError

_PREFIX = "base_model.model."
_KNOWN = "_names_in_adapter_file"


def names_in_file(model: PeftModel, adapter_name: str = "default") -> dict[str, str]:
    """Name of each tensor of the adapter, as PEFT's modules have it -> its name in the file.

    They follow from the model's structure, so they are found once for each model: a job checks them before it trains,
    and each checkpoint needs them.

    Raises:
        AdapterError: PEFT would not find some of them under any name.
    """
    known: dict[tuple[str, ...], dict[str, str]] = vars(model).setdefault(_KNOWN, {})
    structure = (adapter_name, *model.state_dict())
    if structure not in known:
        known.clear()
        known[structure] = _names(model, adapter_name)
    return dict(known[structure])


def _names(model: PeftModel, adapter_name: str) -> dict[str, str]:
    # PEFT chooses by name alone, so it gets no weights: of sharded ones it would gather all, which needs every process.
    nothing = dict.fromkeys(model.state_dict(), torch.empty(1, 1, device="cpu"))
    own = list(get_peft_model_state_dict(model, nothing, adapter_name=adapter_name, save_embedding_layers=False))
    names = {name: name for name in own}
    if lost := _lost(model, names, adapter_name):
        renamings = [each for each in get_model_conversion_mapping(model.get_base_model())
                     if isinstance(each, WeightRenaming)]  # fmt: skip
        names |= {name: _before(name, renamings) for name in lost}
        lost = _lost(model, names, adapter_name)
    if lost:
        raise AdapterError(
            f"adapter: PEFT would not find {len(lost)} of its {len(own)} tensors when it loads it, because it "
            f"renames them ({', '.join(lost[:2])}); expected an adapter without these targets, or full training "
            "(adapter null)"
        )
    return names


def _lost(model: PeftModel, names: dict[str, str], adapter_name: str) -> list[str]:
    """The tensors that PEFT does not give their own names when it loads them under those in the file."""
    numbers = {name: torch.tensor(at, device="cpu") for at, name in enumerate(names.values())}
    config = model.peft_config[adapter_name]
    found = convert_peft_adapter_state_dict_for_transformers(model, config, numbers, adapter_name)
    return sorted(own for at, own in enumerate(names) if own not in found or int(found[own]) != at)


def _before(name: str, renamings: list[WeightRenaming]) -> str:
    """The name that the renamings change to `name`: those that would change it are undone, the last one first."""
    below = name.removeprefix(_PREFIX)
    for renaming in reversed(renamings):
        if renaming.rename_source_key(below)[0] != below:
            below, _ = renaming.reverse_transform().rename_source_key(below)
    return f"{_PREFIX}{below}"
