"""Make LoRA or all weights of a model trainable, and check that exactly those train.

PEFT provides LoRA (arXiv 2106.09685). On fused experts it uses `target_parameters`, and each expert gets its own
update: for E experts of rank r, `lora_A` is (E*r, in) with rows e*r + k, `lora_B` is (out, r*E) with columns
k*E + e. (peft 0.21.)
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from llama_stack_provider_moe.compute.moe.backend import ALL_OURS
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, outside_text, without_adapters
from llama_stack_provider_moe.compute.moe.lora_ranks import TargetSettings, settings_by_target
from llama_stack_provider_moe.compute.moe.model_types import is_classifier
from llama_stack_provider_moe.compute.moe.rates import Rates, expert_multipliers
from llama_stack_provider_moe.compute.moe.resolve_settings import ResolvedMoe
from llama_stack_provider_moe.compute.moe.split_lora import split_lora
from llama_stack_provider_moe.compute.moe.targets import GROUPS, Targets, find_targets
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import Adapter

ADAPTER_NAME = "default"
HEAD = "score"  # of a classifier: new, so it trains whole beside LoRA
EXPERT_RANKS = "expert_ranks"  # key in an adapter's file: one rank per expert for each padded tensor
_RANKS = "_expert_ranks"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class AdapterReport:
    """What trains: `targets` counts layers by path below a decoder layer, `by_group` counts parameters."""

    method: str
    targets: dict[str, int]
    by_group: dict[str, int]
    trainable_parameters: int
    total_parameters: int
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The report for the start of a job's log."""
        share = 100 * self.trainable_parameters / self.total_parameters
        targets = ", ".join(f"{name} x{count}" for name, count in self.targets.items())
        groups = ", ".join(f"{name} {count:,}" for name, count in self.by_group.items())
        lines = [
            f"{self.method} on {targets}",
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({share:.2f}%): {groups}",
            *self.notes,
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        """The report for `resolved.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Adapted:
    """A model with LoRA on it."""

    model: PeftModel
    report: AdapterReport
    rates: Rates


Put = Callable[[nn.Module, LoraConfig], PeftModel]


def put_by_peft(model: nn.Module, config: LoraConfig) -> PeftModel:
    """PEFT's own injection."""
    wrapped: PeftModel = get_peft_model(model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=True)
    return wrapped


def add_lora(
    model: nn.Module,
    adapter: Adapter,
    layout: ExpertLayout | None,
    resolved: ResolvedMoe,
    put: Put = put_by_peft,
) -> Adapted:
    """Add LoRA to everything the job asks for, and check that it is there and that nothing else trains.

    The adapter's weights have the dtype that the job names, whatever the dtype of the model.

    Args:
        model: the base model; it is changed in place.
        adapter: the job's adapter block.
        layout: where the experts are; None: a dense model.
        resolved: the job's `moe` block, resolved.
        put: adds LoRA where a config says.

    Raises:
        AdapterError: a target does not exist, can't have the adapter as asked, or did not get it.
    """
    targets = find_targets(model, adapter, layout, resolved.train_router)
    if layout is not None and set(targets.all.values()) == {"router"}:
        require_gradient(layout)
    settings = settings_by_target(adapter, targets, layout)
    ours = resolved.experts_implementation in ALL_OURS
    _refuse_on_parameters(adapter, targets, ours)
    heads = [HEAD] if is_classifier(without_adapters(model)) else None
    config = LoraConfig(
        task_type="SEQ_CLS" if heads else "CAUSAL_LM",
        modules_to_save=heads,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        rank_pattern={name: each.rank for name, each in settings.items() if each.rank != adapter.rank},
        alpha_pattern={name: each.alpha for name, each in settings.items() if each.alpha != adapter.alpha},
        # PEFT refuses dropout if parameters are targets; it is added below.
        lora_dropout=0.0 if targets.parameters else adapter.dropout,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        target_modules=sorted(targets.modules),
        target_parameters=sorted(targets.parameters) or None,
    )
    with warnings.catch_warnings():
        # peft 0.21 looks for the patterns' names among modules only, not parameters; the result is checked below.
        warnings.filterwarnings("ignore", message=r".*(rank_pattern|alpha_pattern)")
        peft_model = put(model, config)
    for weight in _whole_heads(peft_model).values():  # PEFT leaves the model's dtype, in which small steps are lost
        weight.data = weight.data.to(_DTYPES[adapter.dtype])
    found = injected(peft_model)
    if adapter.dtype != "fp32":  # which PEFT has made it
        for weight in (weight for layer in found.values() for _, weight in _weights(layer)):
            weight.data = weight.data.to(_DTYPES[adapter.dtype])
    _zero_unused_ranks(found, settings)
    report = _check(peft_model, found, adapter, targets, settings)
    notes = list(report.notes)
    if adapter.dtype == "bf16":
        notes.append("LoRA's weights and gradients are bf16; each step is in fp32, and rounded at random")
    if ours and split_lora(peft_model, adapter.dropout):
        notes.append("LoRA on experts is computed beside their weights, not folded into them")
    if adapter.dropout and targets.parameters:
        notes += _add_dropout(found, targets, adapter.dropout)
    return Adapted(peft_model, replace(report, notes=tuple(notes)), _rates(found, settings))


def expert_ranks(model: nn.Module) -> dict[str, list[int]]:
    """Name of each LoRA weight that is padded with zeros, as saved -> the ranks of its experts."""
    return {
        f"{name}.{part}.weight": list(module.__dict__[_RANKS])
        for name, module in model.named_modules()
        if _RANKS in module.__dict__
        for part in ("lora_A", "lora_B")
    }


def _zero_unused_ranks(found: dict[str, LoraLayer], settings: dict[str, TargetSettings]) -> None:
    """Zero the rows of A beyond each expert's rank; all of B is zero too, so no gradient ever changes them."""
    for name, layer in found.items():
        if ranks := settings[name].expert_ranks if name in settings else ():
            weight = layer.lora_A[ADAPTER_NAME].weight
            with torch.no_grad():
                by_expert = weight.view(len(ranks), -1, weight.shape[1])
                for expert, rank in enumerate(ranks):
                    by_expert[expert, rank:] = 0
            layer.__dict__[_RANKS] = ranks


def _add_dropout(found: dict[str, LoraLayer], targets: Targets, p: float) -> list[str]:
    """Add dropout on the input of LoRA on modules, as PEFT would; for experts it is in the offer (`split_lora`)."""
    for name in targets.modules:
        found[name].lora_dropout[ADAPTER_NAME] = nn.Dropout(p)
    without = sorted({group for group in targets.parameters.values() if group != "experts"})
    return [f"no dropout on the LoRA of {', '.join(without)}: PEFT has none on parameters"] if without else []


def _rates(found: dict[str, LoraLayer], settings: dict[str, TargetSettings]) -> Rates:
    rates = Rates()
    for name, each in settings.items():
        for part, weight in _weights(found[name]):
            if each.rate != 1:
                rates.by_parameter[weight] = each.rate
            if each.expert_rates:
                rates.within[weight] = expert_multipliers(part, each.expert_rates, weight)
    return rates


def train_whole(model: nn.Module, layout: ExpertLayout | None, resolved: ResolvedMoe) -> AdapterReport:
    """Make every weight trainable, or those of the routers alone; biases that only affect the choice of experts never
    train.

    Raises:
        AdapterError: routers alone would train, and the loss has no gradient for them.
    """
    model.requires_grad_(True)
    others = outside_text(model)
    frozen: set[str] = set()
    alone: tuple[str, ...] | None = None
    if resolved.routers_alone and layout is not None:
        require_gradient(layout)
        alone = tuple(f"{layout.path(layer, layout.router_path)}." for layer in layout.moe_layers)
    if layout is not None:
        below = [*layout.frozen] if resolved.train_router else [*layout.frozen, f"{layout.router_path}."]
        frozen = {layout.path(layer, path) for layer in layout.moe_layers for path in below}
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        kept = name in others or any(name.startswith(path) for path in frozen)
        if kept or (alone is not None and not name.startswith(alone)):
            parameter.requires_grad_(False)
        else:
            counts[_part(name, layout)] += parameter.numel()
    notes = [] if layout is None or resolved.train_router else ["routers are frozen"]
    if alone is not None:
        notes.append("routers train alone; every other weight is frozen")
    elif others:
        notes.append(f"only the language model trains; {len(others)} other tensors of the model are frozen")
    return AdapterReport(
        method="full training" if alone is None else "full training of the routers",
        targets={"all weights": 1} if layout is None or alone is None else {layout.router_path: len(alone)},
        by_group=dict(counts),
        trainable_parameters=sum(counts.values()),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        notes=tuple(notes),
    )


def require_gradient(layout: ExpertLayout) -> None:
    """Check that routers that train alone have a gradient: one expert's weight, renormalised over itself, is always 1.

    Raises:
        AdapterError: the language loss does not depend on the routers' weights.
    """
    if layout.top_k == 1 and layout.weighing == "chosen":
        raise AdapterError(
            "moe: routers alone would train, and the loss has no gradient for them: this model sends each token to one "
            "expert, whose weight is always 1; expected a model with top-k of 2 or more, or more to train"
        )


def _refuse_on_parameters(adapter: Adapter, targets: Targets, ours: bool) -> None:
    """Refuse what PEFT can't do on a bare parameter, where it does not see the input."""
    what = ", ".join(sorted(set(targets.parameters.values())))
    if adapter.use_dora and what:
        raise AdapterError(
            f"adapter.use_dora: true is not valid on parameters ({what}); a Mixture-of-Experts model can have it on "
            "attention only (apply_lora_to_mlp false, train_router false)"
        )
    if adapter.dropout > 0 and "experts" in targets.parameters.values() and not ours:
        raise AdapterError(
            f"adapter.dropout: {adapter.dropout} is not valid on experts that PEFT adapts; expected 0, or "
            "moe.experts_backend 'torch'"
        )


def _check(
    peft_model: PeftModel,
    found: dict[str, LoraLayer],
    adapter: Adapter,
    targets: Targets,
    settings: dict[str, TargetSettings],
) -> AdapterReport:
    """Compare the LoRA that the model has with the LoRA that was asked for."""
    wanted = targets.all
    if missing := sorted(set(wanted) - set(found)):
        raise AdapterError(f"adapter: these targets got no LoRA: {', '.join(missing)}")
    if extra := sorted(set(found) - set(wanted)):
        raise AdapterError(f"adapter: these got LoRA and are not targets: {', '.join(extra)}")
    weights = {name: [weight for _, weight in _weights(layer)] for name, layer in found.items()}
    heads = _whole_heads(peft_model)
    weights |= {name: [weight] for name, weight in heads.items()}
    ours = {id(weight): name for name, its in weights.items() for weight in its}
    training = {id(parameter) for parameter in peft_model.parameters() if parameter.requires_grad}
    if frozen := sorted({name for key, name in ours.items() if key not in training}):
        raise AdapterError(f"adapter: LoRA of these targets would not train: {', '.join(frozen)}")
    if len(training) > len(ours):
        others = [name for name, p in peft_model.named_parameters() if p.requires_grad and id(p) not in ours]
        raise AdapterError(f"adapter: these would train beside LoRA: {', '.join(others)}")
    dtype = _DTYPES[adapter.dtype]
    if other := sorted({name for name, its in weights.items() for p in its if p.dtype != dtype}):
        raise AdapterError(f"adapter: LoRA of these targets is not {adapter.dtype}: {', '.join(other)}")
    for name, layer in found.items():
        _check_scale(name, layer, settings[name], adapter.use_rslora)
    by_group: Counter[str] = Counter()
    in_order = sorted(found, key=lambda name: GROUPS.index(wanted[name]))
    for name in in_order:
        by_group[wanted[name]] += sum(map(_trainable_count(settings[name]), weights[name]))
    if heads:
        by_group["new head"] = sum(weight.numel() for weight in heads.values())
    return AdapterReport(
        method=_method(adapter, settings),
        targets=dict(Counter(below_layer(name) for name in [*in_order, *heads])),
        by_group=dict(by_group),
        trainable_parameters=sum(by_group.values()),
        total_parameters=sum(parameter.numel() for parameter in peft_model.parameters()),
        notes=tuple(targets.notes),
    )


def _check_scale(name: str, layer: LoraLayer, wanted: TargetSettings, use_rslora: bool) -> None:
    scale = wanted.alpha / (math.sqrt(wanted.rank) if use_rslora else wanted.rank)
    rank, scaling = layer.r[ADAPTER_NAME], layer.scaling[ADAPTER_NAME]
    if rank != wanted.rank or not math.isclose(scaling, scale):
        raise AdapterError(
            f"adapter: LoRA of {name} has rank {rank} and scale {scaling:g}, expected {wanted.rank} and {scale:g}"
        )


def _trainable_count(settings: TargetSettings) -> Callable[[Tensor], int]:
    """Counts the numbers of a weight that train: all, or with unequal experts those that are not fixed at zero."""
    if not settings.expert_ranks:
        return Tensor.numel
    used = sum(settings.expert_ranks) / (settings.rank * len(settings.expert_ranks))
    return lambda weight: round(weight.numel() * used)


def _method(adapter: Adapter, settings: dict[str, TargetSettings]) -> str:
    kind = "DoRA" if adapter.use_dora else "LoRA"
    ranks = sorted({each.rank for each in settings.values()})
    alphas = sorted({each.alpha for each in settings.values()})
    scale = ", scaled by its root (rsLoRA)" if adapter.use_rslora else ""
    plan = f", plan {adapter.plan}" if adapter.plan else ""
    return f"{kind} r={_span(ranks)}, alpha={_span(alphas)}{scale}{plan}"


def _span(numbers: Sequence[float]) -> str:
    return f"{numbers[0]:g}" if len(numbers) == 1 else f"{numbers[0]:g} to {numbers[-1]:g}"


def injected(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """Name of each adapted module or parameter in the model without adapters -> its LoRA."""
    found: dict[str, LoraLayer] = {}
    for name, module in peft_model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            name = f"{name}.{module.parameter_name}"
        found[name] = module
    return found


def _whole_heads(peft_model: PeftModel) -> dict[str, nn.Parameter]:
    """The name of a new head and its weight: PEFT's copy, which trains."""
    heads = {name: module for name, module in peft_model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    return {
        name.rpartition(".")[2]: weight
        for name, module in heads.items()
        for weight in module.modules_to_save[ADAPTER_NAME].parameters()
    }


def _weights(layer: LoraLayer) -> Iterator[tuple[str, nn.Parameter]]:
    for part in ("lora_A", "lora_B", "lora_magnitude_vector"):
        yield from ((part, weight) for weight in getattr(layer, part).parameters())


def below_layer(name: str) -> str:
    """`model.layers.3.mlp.gate.weight` -> `mlp.gate.weight`; a name outside the layers does not change."""
    _, number, below = name.partition(".layers.")
    return below.partition(".")[2] if number else name


def _part(name: str, layout: ExpertLayout | None) -> str:
    below = below_layer(name)
    if below == name:
        return "embeddings, head, norms"
    if layout is None:
        return "layers"
    if below.startswith(f"{layout.experts_path}."):
        return "experts"
    if below.startswith(f"{layout.router_path}."):
        return "router"
    if layout.shared_path and below.startswith(f"{layout.shared_path}."):
        return "shared experts"
    return "other weights of the layers"
