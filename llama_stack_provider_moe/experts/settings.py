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
from llama_stack_provider_moe.experts.bucketed import BUCKETED
from llama_stack_provider_moe.experts.dropout import add_expert_dropout
from llama_stack_provider_moe.experts.layout import ExpertLayout, text_config, without_adapters
from llama_stack_provider_moe.spec import LoadBalancing, Moe

ExpertsImplementation = Literal["grouped_mm", "bucketed_mm", "eager"]


@dataclass(frozen=True)
class ResolvedMoe:
    """Every setting of the `moe` block, decided; of a dense model all are off."""

    is_moe: bool
    output_router_logits: bool
    aux_coef: float
    load_balancing: LoadBalancing
    z_coef: float
    expert_dropout: float
    experts_implementation: ExpertsImplementation | None
    train_router: bool
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """What was decided, for the start of a job's log."""
        if not self.is_moe:
            return "dense model: no Mixture-of-Experts settings apply"
        parts = [
            f"aux loss {self.load_balancing} x {self.aux_coef:g}" if self.aux_coef else "no aux loss",
            f"z-loss x {self.z_coef:g}" if self.z_coef else "no z-loss",
            f"expert dropout {self.expert_dropout:g}" if self.expert_dropout else "no expert dropout",
            f"experts {self.experts_implementation}",
            f"routers {'train' if self.train_router else 'frozen'}",
            *self.notes,
        ]
        return "; ".join(parts)


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


def resolve_moe(moe: Moe, layout: ExpertLayout | None, full: bool, few_shapes: bool = False) -> ResolvedMoe:
    """Decide every setting.

    Args:
        moe: what the job says; None in a field leaves it to the model.
        layout: of the model; None: dense.
        full: all weights train, not an adapter.
        few_shapes: a matrix product of a new shape is costly where the model runs, see `bucketed`.

    Raises:
        ModelError: something was asked for that this model can't give.
    """
    if layout is None:
        return _resolve_dense(moe)
    if not moe.auto_detect_moe:
        raise _refusal("auto_detect_moe", False, f"true: the model has experts ({layout.text()})")
    aux_coef = _aux_coef(moe, layout)
    notes = []
    if not layout.aux_loss:
        notes.append(f"{layout.family} models compute no aux loss")
    if moe.enable_moe_optimizations and not layout.grouped_mm:
        notes.append(f"{layout.family} has no grouped implementation of its experts")
    grouped: ExpertsImplementation = BUCKETED if few_shapes else "grouped_mm"
    return ResolvedMoe(
        is_moe=True,
        output_router_logits=True if moe.output_router_logits is None else moe.output_router_logits,
        aux_coef=aux_coef,
        load_balancing=moe.moe_load_balancing,
        z_coef=moe.router_z_loss_coef,
        expert_dropout=moe.expert_dropout,
        experts_implementation=grouped if moe.enable_moe_optimizations and layout.grouped_mm else "eager",
        train_router=full if moe.train_router is None else moe.train_router,
        notes=tuple(notes),
    )


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
        values["router_aux_loss_coef"] = resolved.aux_coef
        # The model copied the coefficient from its config when it was built, and weighs its own loss by the copy.
        base.router_aux_loss_coef = resolved.aux_coef
    shipped = ShippedConfig(config, {key: getattr(config, key) for key in values})
    _set(config, values)
    if layout.needs_num_experts:
        _alias_num_experts(type(config))
    if resolved.experts_implementation is not None:
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
        "expert_dropout",
        "train_router",
    ):
        if value := getattr(moe, field):
            raise _refusal(field, value, "nothing (or off): the model is dense, it has no experts and no router")
    return ResolvedMoe(
        is_moe=False,
        output_router_logits=False,
        aux_coef=0.0,
        load_balancing=moe.moe_load_balancing,
        z_coef=0.0,
        expert_dropout=0.0,
        experts_implementation=None,
        train_router=False,
    )


def _aux_coef(moe: Moe, layout: ExpertLayout) -> float:
    asked = moe.router_aux_loss_coef
    if asked is None:
        return 0.0 if moe.output_router_logits is False else layout.default_aux_coef
    if asked > 0 and not layout.aux_loss:
        raise _refusal("router_aux_loss_coef", asked, f"0 or nothing: {layout.family} models compute no aux loss")
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
