"""The jobs that train: SFT, DPO and circuit breakers."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from llama_stack_provider_moe.spec.adapter import (
    Adapter,
)
from llama_stack_provider_moe.spec.blocks import (
    Efficiency,
    Optimizer,
    Training,
)
from llama_stack_provider_moe.spec.breaker import CircuitBreaker, MixedData
from llama_stack_provider_moe.spec.data import Data, Domain
from llama_stack_provider_moe.spec.distill import Distill, check_distill
from llama_stack_provider_moe.spec.evaluated_job import EvaluatedJob
from llama_stack_provider_moe.spec.exports import Exports
from llama_stack_provider_moe.spec.moe import Moe
from llama_stack_provider_moe.spec.notify import Notify
from llama_stack_provider_moe.spec.optimizer_limits import refuse_beside_optimizer
from llama_stack_provider_moe.spec.options import (
    DPOOptions,
    Options,
    Trackers,
)
from llama_stack_provider_moe.spec.row_sources import DomainColumn, RowSource
from llama_stack_provider_moe.spec.strategy_limits import refuse_beside_offload, refuse_beside_sharding
from llama_stack_provider_moe.spec.unsloth_limits import Loader, refuse_beside_unsloth

TrainingRecipe = Literal["sft", "dpo", "circuit_breaker", "grpo", "kto", "reward", "distill"]
DPOLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
]  # fmt: skip

# The losses that use label smoothing: "sigmoid" in our formula (cDPO), the others in TRL 1.16's.
SMOOTHED_LOSSES = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")


class TrainingJob(EvaluatedJob):
    """The fields that all jobs that train have in common."""

    if TYPE_CHECKING:
        options: Options  # every recipe declares its own kind

    loader: Loader = Field(
        default="hf",
        description="Library that loads and runs the model. hf: transformers; unsloth: Unsloth's FastModel, in the "
        "environment that the server's operator has set up for it (`unsloth_python`).",
    )
    data: Data = Field(description="Rows to train on: a block, its fields follow.")
    training: Training = Field(default_factory=Training)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    efficiency: Efficiency = Field(default_factory=Efficiency)
    adapter: Adapter | None = Field(default=None, description="LoRA settings; null: train all weights.")
    moe: Moe = Field(default_factory=Moe)
    trackers: Trackers = Field(default_factory=Trackers)
    checkpoint_dir: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Folder that gets a subfolder with this job's checkpoints; left out: the job's own folder.",
    )
    export: Exports | None = Field(
        default=None,
        description="Exports to make from the result, in a separate job once this one has completed; left out: none.",
    )
    notify: Notify | None = Field(
        default=None, description="Whom to tell when the job has ended, by a webhook; left out: nobody."
    )
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict,
        max_length=16,
        description="Your own keys (at most 64 characters) and texts (at most 512); they change nothing, and the "
        "fine-tuning API's list of jobs can be filtered by them.",
    )

    @model_validator(mode="after")
    def _weights_are_trainable(self) -> "TrainingJob":
        refuse_beside_sharding(self)
        refuse_beside_unsloth(self)
        refuse_beside_offload(self)
        refuse_beside_optimizer(self)
        if self.training.dtype == "fp16" and self.adapter is None:
            raise ValueError("training.dtype: 'fp16' is not valid without an adapter (updates of fp16 weights "
                             "underflow); expected 'bf16' or 'fp32', or an adapter")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _only_sft_extends_the_context(self) -> "TrainingJob":
        if self.options.rope_scaling is not None and not isinstance(self, SFTSpec):
            raise ValueError("options.rope_scaling: is for SFT only; the other recipes compare with the model as it is")
        return self

    @model_validator(mode="after")
    def _something_trains(self) -> "TrainingJob":
        if self.adapter is None:
            return self
        if self.moe.train_router_only:
            raise ValueError("moe.train_router_only: true is for adapter null, and trains all weights of the routers; "
                             "for LoRA on routers alone set adapter.lora_attn_modules [], adapter.apply_lora_to_mlp "
                             "false and moe.train_router true")  # fmt: skip
        if self.adapter.is_for_routers_alone and not (self.moe.train_router or self.adapter.init_from):
            raise ValueError("adapter: an adapter without a target trains nothing; set lora_attn_modules, "
                             "apply_lora_to_mlp or apply_lora_to_output, or moe.train_router true for the routers "
                             "alone")  # fmt: skip
        if self.adapter.use_dora and self.moe.train_router:
            raise ValueError("adapter.use_dora: true is not valid with moe.train_router true, because PEFT has no DoRA "
                             "on the parameters that routers are")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _only_adapters_are_merged(self) -> "TrainingJob":
        if self.export is not None and self.adapter is None:
            self.export.check_without_adapter("export.")
        return self

    @model_validator(mode="after")
    def _early_stopping_needs_held_out_rows(self) -> "TrainingJob":
        options = self.options
        if options.early_stopping_patience and not (self.data.has_validation_sets or options.validation_split):
            raise ValueError("options.early_stopping_patience: needs held-out rows; set data.validation_dataset_id "
                             "or options.validation_split > 0")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _all_domains_are_held_out_or_none(self) -> "TrainingJob":
        if not self.options.validation_split:
            named = [domain.validation_dataset_id is not None for domain in self.data.domains or []]
            if any(named) and not all(named):
                raise ValueError(f"data.domains.{named.index(False)}.validation_dataset_id: is missing, but other "
                                 "domains have one; name one, or set options.validation_split > 0")  # fmt: skip
        return self

    def teacher_named(self) -> tuple[str, str] | None:
        """The field that names another model as the teacher, by its dotted name, and its value; None: none does."""
        return None

    def with_teacher(self, model: str) -> dict[str, object]:
        """The fields of a job that names a teacher with another name of it."""
        raise AssertionError("the job names no teacher")

    def row_sources(self) -> list[RowSource]:
        """The data sets that the job reads; the server copies each into the job's folder."""
        return [*self._training_sources(), *self.evaluation_sources()]

    def _training_sources(self) -> list[RowSource]:
        data = self.data
        if data.domains is None:
            return self._sources("data", "train", "validation", data)
        named = zip(data.domains, data.parts("train"), data.parts("validation"), strict=True)
        return [
            source
            for index, (domain, part, held_out) in enumerate(named)
            for source in self._sources(f"data.domains.{index}", part, held_out, domain)
        ]

    def _sources(self, block: str, part: str, held_out: str, data: Data | Domain | MixedData) -> list[RowSource]:
        assert data.dataset_id is not None, "only a block with domains has none"
        validation_id, row_format = data.validation_dataset_id, data.format
        split = validation_id is None and self.options.validation_split > 0
        few = "at least 2 rows, because one is held out; or a validation data set, or options.validation_split 0"
        least = (2, few) if split else (1, "")
        columns = None if isinstance(data, MixedData) else data.columns
        domains = None
        if isinstance(data, Data) and data.domain_column is not None:
            values = None if data.domain_ratios is None else tuple(data.domain_ratios)
            domains = DomainColumn(data.domain_column, f"{block}.domain_column", values, least[0])
        field = f"{block}.dataset_id"
        sources = [RowSource(field, data.dataset_id, row_format, part, *least, columns=columns, domains=domains)]
        if validation_id is not None:
            field = f"{block}.validation_dataset_id"
            others = None if domains is None else domains._replace(least=1, rows="held-out")
            sources.append(RowSource(field, validation_id, row_format, held_out, columns=columns, domains=others))
        return sources


class SFTSpec(TrainingJob):
    """Supervised fine-tuning."""

    recipe: Literal["sft"] = Field(description="Supervised fine-tuning on conversations.")
    options: Options = Field(default_factory=Options)
    distill: Distill | None = Field(
        default=None,
        description="Train toward a teacher's probabilities too: a block, its fields follow; left out: no teacher.",
    )

    @model_validator(mode="after")
    def _teacher_is_possible(self) -> "SFTSpec":
        check_distill(self)
        return self

    def teacher_named(self) -> tuple[str, str] | None:
        """The field that names another model as the teacher, and its value; None: there is none, or it is this one."""
        if self.distill is None or self.distill.model is None:
            return None
        return "distill.model", self.distill.model

    def with_teacher(self, model: str) -> dict[str, object]:
        """The fields of the job with another name of the teacher."""
        assert self.distill is not None, "the job names a teacher"
        return {"distill": self.distill.model_copy(update={"model": model})}


class DPOSpec(TrainingJob):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    recipe: Literal["dpo"] = Field(description="Direct preference optimisation on pairs of answers.")
    beta: float = Field(
        default=0.1,
        gt=0,
        le=100,
        description="Weight of the penalty that keeps the model near the reference model; larger stays nearer.",
    )
    loss_type: DPOLoss = Field(default="sigmoid", description="Preference loss, by TRL's name.")
    options: DPOOptions = Field(default_factory=DPOOptions)

    @field_validator("loss_type", mode="before")
    @classmethod
    def _trl_has_no_kto_pair(cls, loss: object) -> object:
        if loss == "kto_pair":
            raise ValueError(f"'kto_pair' is not implemented by TRL; expected one of {', '.join(DPO_LOSSES)}")
        return loss

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> "DPOSpec":
        if self.options.label_smoothing > 0 and self.loss_type not in SMOOTHED_LOSSES:
            raise ValueError(f"options.label_smoothing: {self.options.label_smoothing} has no effect with loss_type "
                             f"{self.loss_type!r}; only {', '.join(SMOOTHED_LOSSES)} use it")  # fmt: skip
        if self.loss_type == "exo_pair" and self.options.label_smoothing == 0:
            raise ValueError("options.label_smoothing: 0.0 is not valid with loss_type 'exo_pair'; expected > 0")
        if self.data.packed:
            raise ValueError("data.packed: true is for SFT only; preference pairs can't be packed")
        if self.data.train_on_input:
            raise ValueError("data.train_on_input: true is for SFT only; DPO compares two answers to one prompt")
        if self.moe.expert_dropout > 0:
            raise ValueError("moe.expert_dropout: is for SFT only; DPO compares two passes, which must not differ")
        ahead, balancing = self.options.precompute_ref_log_probs, self.moe.moe_load_balancing
        if (balancing == "aux_free" and ahead is False) or (balancing == "expert_choice" and ahead is True):
            raise ValueError(f"options.precompute_ref_log_probs: {str(ahead).lower()} is not valid with "
                             f"moe.moe_load_balancing {balancing!r}, which would change the reference")  # fmt: skip
        if self.moe.router_jitter > 0:
            raise ValueError("moe.router_jitter: is for SFT only; DPO compares two passes, which must not differ")
        return self


class BreakerSpec(TrainingJob):
    """Circuit breakers (Zou et al. 2024, arXiv 2406.04313); the job reroutes the representations of `data`'s rows."""

    recipe: Literal["circuit_breaker"] = Field(
        description="Circuit breakers: reroute the representations of one data set, retain those of another."
    )
    circuit_breaker: CircuitBreaker = Field(description="Settings of circuit breakers: a block, its fields follow.")
    # The LoRA of the official code is the default.
    adapter: Adapter | None = Field(
        default_factory=lambda: Adapter(rank=16, alpha=16, dropout=0.05),
        description="LoRA settings; left out: rank 16, alpha 16, dropout 0.05, as in the official code.",
    )
    options: Options = Field(default_factory=Options)

    @model_validator(mode="after")
    def _no_setting_is_without_effect(self) -> "BreakerSpec":
        if self.adapter is None:
            raise ValueError("adapter: null is not valid with recipe 'circuit_breaker'; expected LoRA settings, "
                             "because the reference is the model with its adapter switched off")  # fmt: skip
        if self.data.domains is not None:
            raise ValueError("data.domains: is for SFT and DPO; circuit breakers mix data, circuit_breaker.retain and "
                             "circuit_breaker.safe, and report each")  # fmt: skip
        if self.data.domain_column is not None:
            raise ValueError("data.domain_column: is for SFT and DPO; circuit breakers mix data, "
                             "circuit_breaker.retain and circuit_breaker.safe, and report each")  # fmt: skip
        if self.data.packed:
            raise ValueError("data.packed: true is for SFT only; circuit breakers must know each row's answer")
        if self.data.train_on_input:
            raise ValueError("data.train_on_input: true is for SFT only; set circuit_breaker.mask instead")
        if self.moe.moe_load_balancing in ("expert_choice", "aux_free"):
            raise ValueError(f"moe.moe_load_balancing: {self.moe.moe_load_balancing!r} is not valid with recipe "
                             "'circuit_breaker', whose reference routes as the base does; expected 'switch' or "
                             "'gshard'")  # fmt: skip
        for name in ("expert_dropout", "router_jitter"):
            if getattr(self.moe, name) > 0:
                raise ValueError(f"moe.{name}: is for SFT only; circuit breakers compare two passes, which must not "
                                 "differ")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _all_sets_are_held_out_or_none(self) -> "BreakerSpec":
        named = {"data": self.data.validation_dataset_id}
        for name, data in self.circuit_breaker.parts().items():
            named[f"circuit_breaker.{name}"] = data.validation_dataset_id
        without = [name for name, validation_id in named.items() if validation_id is None]
        if without and len(without) < len(named) and not self.options.validation_split:
            raise ValueError(f"{without[0]}.validation_dataset_id: is missing, but other sets have one; name one, or "
                             "set options.validation_split > 0")  # fmt: skip
        return self

    def row_sources(self) -> list[RowSource]:
        """The rows to reroute, the rows to retain, and the held-out rows of each."""
        sources = super().row_sources()
        for name, data in self.circuit_breaker.parts().items():
            sources += self._sources(f"circuit_breaker.{name}", name, f"{name}-validation", data)
        return sources


DPO_LOSSES: tuple[str, ...] = DPOLoss.__args__  # type: ignore[attr-defined]
