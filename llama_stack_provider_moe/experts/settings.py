"""A job's `moe` block and a model's layout -> what will be done; then doing it to the model.

`None` in the block means "decide from the model". What was asked for and can't be given is an error here, before
the first step, and names the setting.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from llama_stack_provider_moe.errors import ModelError, shorten
from llama_stack_provider_moe.experts.backend import (
    ALL_OURS,
    OURS,
    OURS_PARTIAL,
    TRITON,
    TRITON_PARTIAL,
    kernels_of,
    route_llama4,
)
from llama_stack_provider_moe.experts.dropout import add_expert_dropout
from llama_stack_provider_moe.experts.layout import ExpertLayout, text_config, without_adapters
from llama_stack_provider_moe.spec import LoadBalancing, Moe

ExpertsImplementation = Literal[
    "moe_torch", "moe_torch_partial", "moe_triton", "moe_triton_partial", "grouped_mm", "eager", "unsloth"
]


@dataclass(frozen=True)
class ResolvedMoe:
    """Every setting of the `moe` block, decided; of a dense model all are off.

    Attributes:
        aux_coef: weight of the balance loss.
        own_aux: the balance loss is computed here, and the model's own, where it has one, is off.
        bias_rate: of `aux_free`, else 0.
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
    notes: tuple[str, ...] = ()

    @property
    def models_aux_coef(self) -> float:
        """Weight of the balance loss that the model itself computes; 0 where ours takes its place."""
        return 0.0 if self.own_aux else self.aux_coef

    def text(self) -> str:
        """What was decided, for the start of a job's log."""
        if not self.is_moe:
            return "dense model: no Mixture-of-Experts settings apply"
        parts = [
            self._balance(),
            f"z-loss x {self.z_coef:g}" if self.z_coef else "no z-loss",
            f"expert dropout {self.expert_dropout:g}" if self.expert_dropout else "no expert dropout",
            f"router jitter {self.router_jitter:g}" if self.router_jitter else "no router jitter",
            f"experts {self.experts_implementation}",
            f"routers {'train' if self.train_router else 'frozen'}",
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
    """Values that a model's config had before `apply_moe`, which what is saved should have again."""

    config: Any
    values: dict[str, Any]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The config as shipped, for the time of a `save_pretrained`."""
        training = {key: getattr(self.config, key) for key in self.values}
        _set(self.config, self.values)
        try:
            yield
        finally:
            _set(self.config, training)


def resolve_moe(
    moe: Moe, layout: ExpertLayout | None, full: bool, models_loss: bool = True, shared: bool = False
) -> ResolvedMoe:
    """Decide every setting.

    Args:
        moe: what the job says; None in a field leaves it to the model.
        layout: of the model; None: dense.
        full: all weights train, not an adapter.
        models_loss: training computes the model's own loss; false: it may not even run all layers, so balance is kept
            where a job asks for it alone, and computed here.
        shared: processes share each batch: the model's own loss, which sees one process's part, is computed here too.

    Raises:
        ModelError: something was asked for that this model can't give.
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
            f"'switch', 'gshard' or 'expert_choice': routers of {layout.family} have no bias to move, so what was "
            "trained with one would run without it",
        )
    implementation = _implementation(moe, layout)
    notes = []
    if not layout.aux_loss and not own_aux:
        notes.append(f"{layout.family} models compute no aux loss")
    if implementation == "eager" and moe.enable_moe_optimizations:
        notes.append(f"{layout.family} has no grouped implementation of its experts in transformers")
    train_router = full if moe.train_router is None else moe.train_router
    if not train_router and (aux_coef > 0 or moe.router_z_loss_coef > 0):
        notes.append("routers are frozen (moe.train_router), so the aux and z-loss move what goes into them alone")
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
        experts_implementation=implementation,
        train_router=train_router,
        notes=tuple(notes),
    )


def _implementation(moe: Moe, layout: ExpertLayout) -> ExpertsImplementation:
    if not moe.enable_moe_optimizations:
        return "eager"
    if moe.experts_backend == "peft":
        return "grouped_mm" if layout.grouped_mm else "eager"
    some_have_fewer = moe.moe_load_balancing == "expert_choice"
    if moe.experts_backend == "triton":
        return TRITON_PARTIAL if some_have_fewer else TRITON
    return OURS_PARTIAL if some_have_fewer else OURS


def apply_moe(model: nn.Module, layout: ExpertLayout | None, resolved: ResolvedMoe) -> ShippedConfig:
    """Make the model do what was decided; the answer puts its config back for saving.

    Raises:
        ModelError: the model did not take the experts implementation.
    """
    config = text_config(model)
    if layout is None:
        return ShippedConfig(config, {})
    base = without_adapters(model)
    values: dict[str, Any] = {"output_router_logits": resolved.output_router_logits}
    if layout.aux_loss:
        values["router_aux_loss_coef"] = resolved.models_aux_coef
        # The model copied the coefficient from its config when it was built, and weighs its own loss by the copy.
        base.router_aux_loss_coef = resolved.models_aux_coef
    shipped = ShippedConfig(config, {key: getattr(config, key) for key in values})
    _set(config, values)
    if layout.needs_num_experts:
        _alias_num_experts(type(config))
    if not layout.grouped_mm:
        if resolved.experts_implementation in ALL_OURS:
            route_llama4(model, layout, resolved.experts_implementation)
    elif resolved.experts_implementation is not None:
        if resolved.experts_implementation in ALL_OURS:
            kernels_of(resolved.experts_implementation)
        base.set_experts_implementation(resolved.experts_implementation)
        if config._experts_implementation != resolved.experts_implementation:
            raise ModelError(
                f"moe.enable_moe_optimizations: {layout.family} experts run as {config._experts_implementation!r}, "
                f"not as {resolved.experts_implementation!r}"
            )
    if resolved.expert_dropout:
        add_expert_dropout(model, layout, resolved.expert_dropout)
    return shipped


def _resolve_dense(moe: Moe) -> ResolvedMoe:
    for field in (
        "output_router_logits",
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "router_jitter",
        "expert_dropout",
        "train_router",
    ):
        if value := getattr(moe, field):
            raise _refusal(field, value, "nothing (or off): the model is dense, it has no experts and no router")
    if moe.moe_load_balancing != "switch":
        raise _refusal("moe_load_balancing", moe.moe_load_balancing, "nothing: the model is dense, it has no experts")
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
            "0 or nothing beside output_router_logits false: the aux loss is made of the router logits",
        )
    return asked


def _alias_num_experts(config_class: Any) -> None:
    # TRL 1.16 (trainer/utils.py) reads `config.num_experts`; transformers 5.23 maps that name to the real one for
    # Mixtral and others, not for Granite and Phi. On the class, as there: an attribute of the instance would be
    # written to config.json. Remove when transformers maps it for them too.
    if "num_experts" not in config_class.attribute_map:
        config_class.attribute_map = {**config_class.attribute_map, "num_experts": "num_local_experts"}


def _set(config: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        setattr(config, key, value)


def _refusal(field: str, value: object, expected: str) -> ModelError:
    return ModelError(f"moe.{field}: {shorten(value)} is not valid for this model; expected {expected}")
