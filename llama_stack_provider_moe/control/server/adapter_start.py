"""`adapter.init_from`: a new adapter starts from the weights of an existing one, which also sets its layout.

Ranks, scales and targets must be the same in both: otherwise the weights don't fit, or add something else than before.
Fields that a job leaves out come from the existing adapter, not from the server's defaults; fields that it states must
agree with it. The training process loads the model and compares every tensor again (`compute.models.adapter_start`).
"""

import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from llama_stack_provider_moe.control.server import model_names
from llama_stack_provider_moe.control.server.api_requests import Draft
from llama_stack_provider_moe.control.server.model_names import Names
from llama_stack_provider_moe.errors import InvalidBody, InvalidInput, shorten
from llama_stack_provider_moe.spec import AblationSpec, Adapter, ExpertRule, TrainingSpec, numbers, ranges
from llama_stack_provider_moe.spec.error_words import reason
from llama_stack_provider_moe.spec.moe import ROUTER_BIAS_FILE

# Fields of `adapter` that say where LoRA is and what it adds; the other fields say how it learns.
LAYOUT = (
    "plan", "rules", "rules_from", "rank", "router_rank", "alpha", "alphas", "lora_attn_modules", "apply_lora_to_mlp",
    "expert_modules", "apply_lora_to_output", "layers", "use_rslora", "use_dora",
)  # fmt: skip
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
_HEAD = "lm_head"
_LAYER = re.compile(r"\.layers\.(\d{1,4})\.")


def resolved(spec: TrainingSpec, names: Names, request: Draft) -> dict[str, object]:
    """Return the fields of a job that `adapter.init_from` changes: `adapter`, and `moe` where routers have LoRA.

    Args:
        spec: the job, with `model` and the rules of an analysis already resolved.
        names: resolves the names of adapters.
        request: says which fields the caller stated.

    Raises:
        InvalidInput, Forbidden, NotFound, Conflict: the adapter does not exist, is not the caller's or has another
            base, or the job contradicts its layout.
    """
    adapter = spec.adapter
    assert adapter is not None
    assert adapter.init_from is not None
    folder, config, source = names.adapter(adapter.init_from, "adapter.init_from")
    if isinstance(source, AblationSpec):
        raise InvalidInput(request.name("adapter.init_from"), adapter.init_from, "an adapter that a job has trained; "
                           "an ablation's is on other parameters than any job trains: export it merged, and name the "
                           "result as `model`")  # fmt: skip
    if not folder.is_absolute() and (source is None or _is_open(source)):  # known once the other job has completed
        return {"adapter": adapter.model_copy(update={"init_from": str(folder)})}
    _check_base(spec, config, source, request)
    _check_biases(spec, folder, request)
    if source is None:
        layout = _layout_from_config(config, adapter.init_from, request)
    else:
        layout = _layout_from_job(source, config, spec)
    stated = _stated(request.body, "adapter")
    if "from_analysis" in stated:
        stated |= {"rules", "rules_from"}
    problems = [
        f"{request.name(f'adapter.{name}')}: {shorten(getattr(adapter, name))} is not valid; expected "
        f"{shorten(value)}, as in the adapter that {request.name('adapter.init_from')} names, or leave it out"
        for name, value in layout.items()
        if name in stated and not _agrees(name, getattr(adapter, name), value, adapter, layout)
    ]
    changes: dict[str, object] = {}
    if source is not None and bool(spec.moe.train_router) != bool(source.moe.train_router):
        trains_router = bool(source.moe.train_router)
        if "train_router" in _stated(request.body, "moe"):
            problems.append(
                f"{request.name('moe.train_router')}: {str(spec.moe.train_router).lower()} is not valid; expected "
                f"{str(trains_router).lower()}, because the adapter that {request.name('adapter.init_from')} names has "
                f"{'LoRA' if trains_router else 'no LoRA'} on routers"
            )
        changes["moe"] = spec.moe.model_copy(update={"train_router": trains_router})
    if problems:
        raise InvalidBody(problems)
    inherited = {name: value for name, value in layout.items() if name not in stated}
    try:
        made = Adapter.model_validate({**dict(adapter), **inherited, "init_from": str(folder)})
    except ValidationError as error:
        why = "; ".join(reason(each) for each in error.errors()[:3])
        raise InvalidInput(request.name("adapter.init_from"), adapter.init_from, "an adapter that a job on this server "
                           f"could have made ({shorten(why, 300)[1:-1]})") from None  # fmt: skip
    return changes | {"adapter": made}


def _is_open(source: TrainingSpec) -> bool:
    """Whether the base or the layout of an adapter depends on jobs that have not completed."""
    adapter = source.adapter
    waits = adapter is not None and adapter.from_analysis is not None and adapter.rules_from is None
    return waits or model_names.may_be_later(source.model)


def _stated(body: object, block: str) -> set[str]:
    """Fields of a block that the caller wrote, without the server's defaults."""
    given = body.get(block) if isinstance(body, dict) else None
    return set(given) if isinstance(given, dict) else set()


def _check_base(spec: TrainingSpec, config: Mapping[str, object], source: TrainingSpec | None, request: Draft) -> None:
    field = request.name("adapter.init_from")
    if source is not None:
        if source.model != spec.model:
            raise InvalidInput(request.name("model"), spec.model,
                               f"{source.model!r}, the base of the adapter in {field}")  # fmt: skip
        return
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and base and base != spec.model:
        request.notes.append(
            f"{field}: the adapter says that its base is {shorten(base)}; the server did not check whether that is the "
            f"same model as {shorten(spec.model)}"
        )


def _check_biases(spec: TrainingSpec, folder: Path, request: Draft) -> None:
    """Refuse an adapter with biases from `aux_free` where they would get lost, or change the reference model."""
    if not folder.is_absolute() or not (folder / ROUTER_BIAS_FILE).is_file():
        return
    if spec.recipe != "sft" or spec.moe.moe_load_balancing != "aux_free":
        raise InvalidInput(
            request.name("adapter.init_from"), spec.adapter and spec.adapter.init_from,
            "an adapter without moved router biases, or recipe 'sft' with moe.moe_load_balancing 'aux_free'; "
            "alternatively export it merged and name the result as `model`",
        )  # fmt: skip


def _layout_from_job(source: TrainingSpec, config: Mapping[str, object], spec: TrainingSpec) -> dict[str, object]:
    """The layout of an adapter, from the job that trained it."""
    adapter = source.adapter
    assert adapter is not None, "the job has trained an adapter"
    layout: dict[str, object] = {name: getattr(adapter, name) for name in LAYOUT}
    if adapter.layers is None and "circuit_breaker" in (source.recipe, spec.recipe):
        # A circuit breaker chooses layers by its targets where the job names none.
        layout["layers"] = _layers(config)
    return layout


def _layout_from_config(config: Mapping[str, object], given: str, request: Draft) -> dict[str, object]:
    """The layout of an adapter that no job here trained, as far as PEFT's adapter_config.json says."""
    field = request.name("adapter.init_from")
    for name, nothing in (("rank_pattern", {}), ("alpha_pattern", {}), ("modules_to_save", None), ("bias", "none")):
        if config.get(name) not in (nothing, None, [], {}):
            raise InvalidInput(field, given, f"an adapter without {name} in its adapter_config.json, or an adapter "
                               "in the folder of the job that trained it")  # fmt: skip
    kinds: dict[str, tuple[str, type | tuple[type, ...]]] = {
        "rank": ("r", int), "alpha": ("lora_alpha", (int, float)), "use_rslora": ("use_rslora", bool),
        "use_dora": ("use_dora", bool),
    }  # fmt: skip
    layout: dict[str, object] = {}
    for name, (theirs, kind) in kinds.items():
        value = config.get(theirs, False if kind is bool else None)
        if not isinstance(value, kind):
            raise InvalidInput(field, given, f"a readable adapter_config.json; its {theirs} is {shorten(value)}")
        layout[name] = value
    modules, parameters = config.get("target_modules"), config.get("target_parameters") or []
    if not isinstance(modules, list) or not isinstance(parameters, list):
        return layout  # a pattern: the training process finds what it matches
    if not all(isinstance(each, str) for each in [*modules, *parameters]):
        return layout
    leaves = {each.rpartition(".")[2] for each in modules}
    layout["lora_attn_modules"] = [ours for theirs, ours in _ATTENTION.items() if theirs in leaves]
    layout["apply_lora_to_output"] = _HEAD in leaves
    in_mlp = bool(leaves - {*_ATTENTION, _HEAD} or [each for each in parameters if ".experts." in each])
    # Another parameter is a router's, or of an MLP beside the experts: the training process compares.
    if in_mlp or not parameters:
        layout["apply_lora_to_mlp"] = in_mlp
    layout["layers"] = _layers(config)
    return layout


def _layers(config: Mapping[str, object]) -> str | None:
    """The layers in the targets' full names; None where the targets are not full names."""
    targets: list[object] = []
    for name in ("target_modules", "target_parameters"):
        named = config.get(name)
        targets += named if isinstance(named, list) else []
    found = {int(match[1]) for each in targets if (match := _LAYER.search(f".{each}"))}
    return ",".join(ranges(sorted(found))) or None


def _agrees(name: str, stated: object, inherited: object, adapter: Adapter, layout: Mapping[str, object]) -> bool:
    """Whether a field that the caller stated means the same as the layout of the existing adapter."""
    if name == "rules_from":
        return True  # only the name of a source; `rules` has its content
    if isinstance(stated, list) and isinstance(inherited, list):
        return _same_rules(stated, inherited) if name == "rules" else set(stated) == set(inherited)
    if name == "plan":
        experts = layout.get("apply_lora_to_mlp", adapter.apply_lora_to_mlp)
        return _plan(stated, adapter.apply_lora_to_mlp) == _plan(inherited, experts)
    if name == "layers" and isinstance(stated, str) and isinstance(inherited, str):
        return set(numbers(stated)) == set(numbers(inherited))
    return stated == inherited


def _plan(plan: object, experts: object) -> object:
    return plan or ("all_experts" if experts else "trunk")


def _same_rules(stated: list[ExpertRule], inherited: list[ExpertRule]) -> bool:
    """Compare two lists of rules; True where one names layers and the other means all, which only the model can tell.

    The training process compares those.
    """
    both = (*stated, *inherited)
    if any(rule.layers is None for rule in both) and any(rule.layers for rule in both):
        return True
    return _ranks(stated) == _ranks(inherited)


def _ranks(rules: list[ExpertRule]) -> dict[tuple[int | None, int], int]:
    """(layer, expert) -> rank; the later of two rules for the same expert counts. Learning rates may differ."""
    return {
        (layer, expert): rank
        for rule in rules
        for layer in ([None] if rule.layers is None else numbers(rule.layers))
        for text, rank in rule.experts.items()
        for expert in numbers(text)
    }
