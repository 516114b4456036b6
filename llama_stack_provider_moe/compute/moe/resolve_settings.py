"""Resolve a job's `moe` block for a model's layout, then apply the result to the model.

`None` in the block means "decide from the model". A setting that this model can't satisfy raises an error here, before
the first step, and the error names the setting.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig

from llama_stack_provider_moe.compute.moe.backend import ALL_OURS
from llama_stack_provider_moe.compute.moe.dropout import add_expert_dropout
from llama_stack_provider_moe.compute.moe.exceptions import KNOWN_LOOPS
from llama_stack_provider_moe.compute.moe.implementation import (
    ExpertsImplementation,
    ImplementationChoice,
    by_settings,
    install,
)
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, text_config, without_adapters
from llama_stack_provider_moe.compute.moe.num_experts import alias_num_experts
from llama_stack_provider_moe.errors import ModelError, shorten
from llama_stack_provider_moe.spec import LoadBalancing, Moe


@dataclass(frozen=True)
class ResolvedMoe:
    """Every setting of the `moe` block, resolved; for a dense model all are off.

    Attributes:
        aux_coef: weight of the balance loss.
        own_aux: this package computes the balance loss, and the model's own loss is off.
        bias_rate: rate of `aux_free`; 0 with any other balancing.
        experts_implementation: see `implementation`; None for a dense model.
        routers_alone: of the model's own weights, those of the routers train and no others.
        notes: remarks for the job's log.
    """

    is_moe: bool
    output_router_logits: bool
    aux_coef: float
    own_aux: bool
    load_balancing: LoadBalancing
    bias_rate: float
    z_coef: float
    expert_dropout: float
    router_jitter: float
    experts_implementation: ExpertsImplementation | None
    train_router: bool
    routers_alone: bool = False
    notes: tuple[str, ...] = ()

    @property
    def models_aux_coef(self) -> float:
        """Weight of the balance loss that the model itself computes; 0 if ours replaces it."""
        return 0.0 if self.own_aux else self.aux_coef

    def with_experts(self, choice: ImplementationChoice) -> "ResolvedMoe":
        """The same settings with experts computed as `choice` says, and its notes at the end."""
        return replace(self, experts_implementation=choice.implementation, notes=(*self.notes, *choice.notes))

    def text(self) -> str:
        """The settings as one line for the start of a job's log."""
        if not self.is_moe:
            return "dense model: no Mixture-of-Experts settings apply"
        parts = [
            self._balance(),
            f"z-loss x {self.z_coef:g}" if self.z_coef else "no z-loss",
            f"expert dropout {self.expert_dropout:g}" if self.expert_dropout else "no expert dropout",
            f"router jitter {self.router_jitter:g}" if self.router_jitter else "no router jitter",
            f"experts {self.experts_implementation}",
            f"routers {('train alone' if self.routers_alone else 'train') if self.train_router else 'frozen'}",
            *self.notes,
        ]
        return "; ".join(parts)

    def _balance(self) -> str:
        form = self.load_balancing if self.load_balancing in ("switch", "gshard") else "switch"
        whose = "computed here" if self.own_aux else "the model's own"
        loss = f"aux loss {form} x {self.aux_coef:g} ({whose})" if self.aux_coef else "no aux loss"
        if self.load_balancing == "expert_choice":
            return f"experts choose tokens in training; {loss}"
        if self.load_balancing == "aux_free":
            return f"aux-loss-free balance, biases move by {self.bias_rate:g} a step; {loss}"
        return loss


@dataclass(frozen=True)
class ShippedConfig:
    """Values that a model's config had before `apply_moe`; saved models get them back."""

    config: PreTrainedConfig
    values: dict[str, object]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the shipped values inside the `with`, for `save_pretrained`."""
        training = {key: getattr(self.config, key) for key in self.values}
        _set(self.config, self.values)
        try:
            yield
        finally:
            _set(self.config, training)


def resolve_moe(
    moe: Moe, layout: ExpertLayout | None, full: bool, models_loss: bool = True, shared: bool = False
) -> ResolvedMoe:
    """Resolve every setting.

    Args:
        moe: the job's block; None in a field leaves the decision to the model.
        layout: the model's layout; None: a dense model.
        full: all weights train, not an adapter.
        models_loss: training computes the model's own loss. False: training may not even run all layers, so there is a
            balance loss only if the job asks for one, and this package computes it.
        shared: processes share each batch, so this package computes the balance loss: the model's own would see only
            the part of one process.

    Raises:
        ModelError: this model can't satisfy a setting.
    """
    if layout is None:
        return _resolve_dense(moe)
    if not moe.auto_detect_moe:
        raise _refusal("auto_detect_moe", False, f"true: the model has experts ({layout.text()})")
    aux_coef = _aux_coef(moe, layout) if models_loss or moe.router_aux_loss_coef is not None else 0.0
    own_aux = aux_coef > 0 and (shared or moe.moe_load_balancing == "gshard" or not (layout.aux_loss and models_loss))
    if moe.moe_load_balancing == "aux_free" and layout.bias_path is None:
        raise _refusal(
            "moe_load_balancing",
            "aux_free",
            f"'switch', 'gshard' or 'expert_choice': routers of {layout.family} have no bias to move, so a model "
            "trained with one would run without it",
        )
    if moe.moe_load_balancing == "expert_choice" and (layout.idle_choices or not _dispatches(layout)):
        raise _refusal(
            "moe_load_balancing",
            "expert_choice",
            f"'switch' or 'gshard': routers of {layout.family} also choose to compute nothing, or their experts run in "
            "a loop of their own",
        )
    choice = by_settings(moe, layout)
    notes = []
    if not layout.aux_loss and not own_aux:
        notes.append(f"{layout.family} models compute no aux loss")
    notes.extend(choice.notes)
    train_router = full if moe.train_router is None else moe.train_router
    if not train_router and (aux_coef > 0 or moe.router_z_loss_coef > 0):
        notes.append("routers are frozen (moe.train_router), so the aux and z-loss only train the layers before them")
    return ResolvedMoe(
        is_moe=True,
        output_router_logits=True if moe.output_router_logits is None else moe.output_router_logits,
        aux_coef=aux_coef,
        own_aux=own_aux,
        load_balancing=moe.moe_load_balancing,
        bias_rate=moe.router_bias_rate if moe.moe_load_balancing == "aux_free" else 0.0,
        z_coef=moe.router_z_loss_coef,
        expert_dropout=moe.expert_dropout,
        router_jitter=moe.router_jitter,
        experts_implementation=choice.implementation,
        train_router=train_router,
        routers_alone=moe.train_router_only,
        notes=tuple(notes),
    )


def apply_moe(model: nn.Module, layout: ExpertLayout | None, resolved: ResolvedMoe) -> ShippedConfig:
    """Apply the settings to the model; the result restores its config for saving.

    Raises:
        ModelError: the model did not accept the experts implementation.
    """
    config = text_config(model)
    if layout is None:
        return ShippedConfig(config, {})
    base = without_adapters(model)
    # Some models have no such switch: their class returns no router logits, and ours are recorded at the routers.
    has_switch = hasattr(config, "output_router_logits")
    values: dict[str, object] = {"output_router_logits": resolved.output_router_logits} if has_switch else {}
    if layout.aux_loss:
        values["router_aux_loss_coef"] = resolved.models_aux_coef
        # The model copied the coefficient from its config when it was built, and uses the copy to weigh its loss.
        base.router_aux_loss_coef = resolved.models_aux_coef
    shipped = ShippedConfig(config, {key: getattr(config, key) for key in values})
    _set(config, values)
    if layout.needs_num_experts:
        alias_num_experts(config, layout.num_experts)
    if resolved.experts_implementation is not None:
        install(model, layout, resolved.experts_implementation)
    if resolved.expert_dropout:
        add_expert_dropout(model, layout, resolved.expert_dropout, ours=resolved.experts_implementation in ALL_OURS)
    return shipped


def _dispatches(layout: ExpertLayout) -> bool:
    return layout.grouped_mm or layout.experts_class in KNOWN_LOOPS


def _resolve_dense(moe: Moe) -> ResolvedMoe:
    for field in (
        "output_router_logits",
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "router_jitter",
        "expert_dropout",
        "train_router",
        "train_router_only",
        "routing_every_n_steps",
    ):
        if value := getattr(moe, field):
            raise _refusal(field, value, "no value (or off): the model is dense and has no experts or routers")
    if moe.moe_load_balancing != "switch":
        raise _refusal("moe_load_balancing", moe.moe_load_balancing, "no value: the model is dense and has no experts")
    return ResolvedMoe(
        is_moe=False,
        output_router_logits=False,
        aux_coef=0.0,
        own_aux=False,
        load_balancing=moe.moe_load_balancing,
        bias_rate=0.0,
        z_coef=0.0,
        expert_dropout=0.0,
        router_jitter=0.0,
        experts_implementation=None,
        train_router=False,
    )


def _aux_coef(moe: Moe, layout: ExpertLayout) -> float:
    asked = moe.router_aux_loss_coef
    if asked is None:
        by_loss = moe.moe_load_balancing in ("switch", "gshard")
        return layout.default_aux_coef if by_loss and moe.output_router_logits is not False else 0.0
    if asked > 0 and moe.output_router_logits is False:
        raise _refusal(
            "router_aux_loss_coef",
            asked,
            "0 or no value with output_router_logits false: the aux loss is computed from the router logits",
        )
    return asked


def _set(config: PreTrainedConfig, values: dict[str, object]) -> None:
    for key, value in values.items():
        setattr(config, key, value)


def _refusal(field: str, value: object, expected: str) -> ModelError:
    return ModelError(f"moe.{field}: {shorten(value)} is not valid for this model; expected {expected}")
