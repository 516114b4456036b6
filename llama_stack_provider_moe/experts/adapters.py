"""LoRA on a model, or all of its weights: what trains, and a check that it does.

LoRA (arXiv 2106.09685) is PEFT's. On fused experts it goes through `target_parameters`, and each expert has its
own update: for E experts of rank r, `lora_A` is (E*r, in) with rows e*r + k, `lora_B` is (out, r*E) with columns
k*E + e. (peft 0.21.)
"""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn

from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.experts.bucketed import BUCKETED
from llama_stack_provider_moe.experts.layout import ExpertLayout
from llama_stack_provider_moe.experts.settings import ResolvedMoe
from llama_stack_provider_moe.experts.split_lora import split_lora
from llama_stack_provider_moe.experts.targets import GROUPS, Targets, find_targets
from llama_stack_provider_moe.spec import Adapter

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class AdapterReport:
    """What trains: `targets` counts layers by the target's path below a layer, `by_group` counts parameters."""

    method: str
    targets: dict[str, int]
    by_group: dict[str, int]
    trainable_parameters: int
    total_parameters: int
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The same, for the start of a job's log."""
        share = 100 * self.trainable_parameters / self.total_parameters
        targets = ", ".join(f"{name} x{count}" for name, count in self.targets.items())
        groups = ", ".join(f"{name} {count:,}" for name, count in self.by_group.items())
        lines = [
            f"{self.method} on {targets}",
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({share:.2f}%): {groups}",
            *self.notes,
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same, for `resolved.json`."""
        return asdict(self)


def add_lora(
    model: nn.Module, adapter: Adapter, layout: ExpertLayout | None, resolved: ResolvedMoe
) -> tuple[PeftModel, AdapterReport]:
    """Put LoRA on everything the job asks for, and make sure that it is there and alone in training.

    The adapter's weights are fp32 whatever the model's dtype.

    Raises:
        AdapterError: a target does not exist, can't take the adapter as asked, or got none.
    """
    targets = find_targets(model, adapter, layout, resolved.train_router)
    if targets.parameters:
        _refuse_on_parameters(adapter, targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        target_modules=sorted(targets.modules),
        target_parameters=sorted(targets.parameters) or None,
    )
    peft_model = get_peft_model(model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=True)
    report = _check(peft_model, adapter, targets)
    if resolved.experts_implementation == BUCKETED and split_lora(peft_model):
        beside = "LoRA on experts is computed beside their weights, not folded into them"
        report = replace(report, notes=(*report.notes, beside))
    return peft_model, report


def train_whole(model: nn.Module, layout: ExpertLayout | None, resolved: ResolvedMoe) -> AdapterReport:
    """Let every weight train, routers as decided; biases that only steer the choice of experts never do."""
    model.requires_grad_(True)
    kept_still: set[str] = set()
    if layout is not None:
        below = [*layout.frozen] if resolved.train_router else [*layout.frozen, f"{layout.router_path}."]
        kept_still = {layout.path(layer, path) for layer in layout.moe_layers for path in below}
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if any(name.startswith(path) for path in kept_still):
            parameter.requires_grad_(False)
        else:
            counts[_part(name, layout)] += parameter.numel()
    still = "" if layout is None or resolved.train_router else "routers are frozen"
    return AdapterReport(
        method="full training",
        targets={"all weights": 1},
        by_group=dict(counts),
        trainable_parameters=sum(counts.values()),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
        notes=(still,) if still else (),
    )


def _refuse_on_parameters(adapter: Adapter, targets: Targets) -> None:
    """What PEFT can't do on a bare parameter: its input is not at hand there."""
    what = ", ".join(sorted(set(targets.parameters.values())))
    if adapter.use_dora:
        raise AdapterError(
            f"adapter.use_dora: true is not valid on parameters ({what}); on a Mixture-of-Experts model it can be had "
            "for attention only (apply_lora_to_mlp false, train_router false)"
        )
    if adapter.dropout > 0:
        raise AdapterError(
            f"adapter.dropout: {adapter.dropout} is not valid on parameters ({what}), and PEFT has one dropout for all "
            "targets; expected 0, or attention only (apply_lora_to_mlp false, train_router false)"
        )


def _check(peft_model: PeftModel, adapter: Adapter, targets: Targets) -> AdapterReport:
    """Read off the model what got LoRA, and compare it with what was asked for."""
    wanted = targets.all
    found = _injected(peft_model)
    if missing := sorted(set(wanted) - set(found)):
        raise AdapterError(f"adapter: these targets got no LoRA: {', '.join(missing)}")
    if extra := sorted(set(found) - set(wanted)):
        raise AdapterError(f"adapter: LoRA went where it was not asked for: {', '.join(extra)}")
    ours = {id(parameter): name for name, parameters in found.items() for parameter in parameters}
    training = {id(parameter) for parameter in peft_model.parameters() if parameter.requires_grad}
    if frozen := sorted({name for key, name in ours.items() if key not in training}):
        raise AdapterError(f"adapter: LoRA of these targets would not train: {', '.join(frozen)}")
    if len(training) > len(ours):
        others = [name for name, p in peft_model.named_parameters() if p.requires_grad and id(p) not in ours]
        raise AdapterError(f"adapter: these would train beside LoRA: {', '.join(others)}")
    if coarse := sorted({name for name, ps in found.items() for p in ps if p.dtype != torch.float32}):
        raise AdapterError(f"adapter: LoRA of these targets is not fp32: {', '.join(coarse)}")
    by_group: Counter[str] = Counter()
    in_order = sorted(found, key=lambda name: GROUPS.index(wanted[name]))
    for name in in_order:
        by_group[wanted[name]] += sum(parameter.numel() for parameter in found[name])
    return AdapterReport(
        method=f"{'DoRA' if adapter.use_dora else 'LoRA'} r={adapter.rank}, alpha={adapter.alpha:g}",
        targets=dict(Counter(_below_layer(name) for name in in_order)),
        by_group=dict(by_group),
        trainable_parameters=sum(by_group.values()),
        total_parameters=sum(parameter.numel() for parameter in peft_model.parameters()),
        notes=tuple(targets.notes),
    )


def _injected(peft_model: PeftModel) -> dict[str, list[nn.Parameter]]:
    """Name of each adapted module or parameter, as in the model without adapters -> its LoRA weights."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, module in peft_model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            name = f"{name}.{module.parameter_name}"
        parts = (module.lora_A, module.lora_B, module.lora_magnitude_vector)
        found[name] = [parameter for part in parts for parameter in part.parameters()]
    return found


def _below_layer(name: str) -> str:
    """`model.layers.3.mlp.gate.weight` -> `mlp.gate.weight`; the name itself outside the layers."""
    _, number, below = name.partition(".layers.")
    return below.partition(".")[2] if number else name


def _part(name: str, layout: ExpertLayout | None) -> str:
    below = _below_layer(name)
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
