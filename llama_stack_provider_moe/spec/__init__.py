"""What a job is asked to do: `JobSpec`, one tagged union by `recipe`.

Every default, every range and every one-line meaning of a job's options stands here and nowhere else.
A template states the few fields a person cares about; `spec.json` in the job's folder states them all.
`None` means "decide from the model" wherever it is a default, and the training process writes what it
decided to `resolved.json`.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, TypeAdapter, field_validator, model_validator

from llama_stack_provider_moe.spec.adapter import (
    Adapter,
    AdapterGroup,
    AttentionModule,
    ExpertRule,
    FromAnalysis,
    RulesFrom,
)
from llama_stack_provider_moe.spec.blocks import (
    JOB_ID_PATTERN,
    Block,
    Data,
    DType,
    Efficiency,
    OneProcess,
    Optimizer,
    Resources,
    RowFormat,
    Training,
    numbers,
    ranges,
)
from llama_stack_provider_moe.spec.breaker import CircuitBreaker, Curve, MixedData, RepBend
from llama_stack_provider_moe.spec.defaults import JobDefaults
from llama_stack_provider_moe.spec.evaluation import Gate, RefusalJudge, SafetyEvaluation
from llama_stack_provider_moe.spec.exports import Exports, ExportSpec
from llama_stack_provider_moe.spec.loading import Loader, refuse_beside_unsloth
from llama_stack_provider_moe.spec.moe import LoadBalancing, Moe
from llama_stack_provider_moe.spec.options import (
    PROJECT_PATTERN,
    DPOOptions,
    MLflow,
    Options,
    TensorBoard,
    Trackers,
    Trackio,
    WandB,
)
from llama_stack_provider_moe.spec.routing import (
    Analysis,
    AnalysisData,
    AnalysisOptions,
    AnalysisTraining,
)
from llama_stack_provider_moe.spec.sharding import refuse_beside_sharding
from llama_stack_provider_moe.spec.sources import RowKind, RowSource

__all__ = [
    "DPO_LOSSES",
    "JOB_ID_PATTERN",
    "JOB_SPEC",
    "PROJECT_PATTERN",
    "SMOOTHED_LOSSES",
    "Adapter",
    "AdapterGroup",
    "Analysis",
    "AnalysisData",
    "AnalysisOptions",
    "AnalysisTraining",
    "AttentionModule",
    "Block",
    "BreakerSpec",
    "CircuitBreaker",
    "Curve",
    "DPOLoss",
    "DPOOptions",
    "DPOSpec",
    "DType",
    "Data",
    "Efficiency",
    "ExpertRule",
    "ExportSpec",
    "Exports",
    "FromAnalysis",
    "Gate",
    "JobDefaults",
    "JobSpec",
    "LoadBalancing",
    "Loader",
    "LoadingSpec",
    "MLflow",
    "MixedData",
    "Moe",
    "Optimizer",
    "Options",
    "Recipe",
    "RefusalJudge",
    "RepBend",
    "Resources",
    "RoutingAnalysisSpec",
    "RowFormat",
    "RowKind",
    "RowSource",
    "RulesFrom",
    "SFTSpec",
    "SafetyEvaluation",
    "TensorBoard",
    "Trackers",
    "Trackio",
    "Training",
    "TrainingSpec",
    "WandB",
    "numbers",
    "ranges",
]

Recipe = Literal["sft", "dpo", "circuit_breaker", "routing_analysis", "export"]

# The paired and unpaired losses of TRL's DPOTrainer that were run on the pinned version. The post-training
# API also names `kto_pair`, which TRL has no twin of.
DPOLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm",
]  # fmt: skip

# Of them, those whose formula has the label smoothing (TRL 1.16): with any other, "sigmoid" too, TRL ignores it.
SMOOTHED_LOSSES = ("exo_pair", "robust", "aot", "aot_unpaired")


class _AnyJob(Block):
    job_uuid: str | None = Field(
        default=None, pattern=JOB_ID_PATTERN, description="Name of the job; left out: one is made."
    )
    model: str = Field(min_length=1, max_length=1024, description="Hub id, or a folder under an allowed root.")
    resources: Resources = Field(default_factory=Resources)


class _Job(_AnyJob):
    loader: Loader = Field(
        default="hf",
        description="What loads and runs the model: hf: transformers; unsloth: Unsloth's FastModel, in an environment "
        "that the server's operator made for it (`unsloth_python`).",
    )
    data: Data = Field(description="A block; its fields follow.")
    training: Training = Field(default_factory=Training)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    efficiency: Efficiency = Field(default_factory=Efficiency)
    adapter: Adapter | None = Field(default=None, description="LoRA settings; null trains all weights.")
    moe: Moe = Field(default_factory=Moe)
    trackers: Trackers = Field(default_factory=Trackers)
    checkpoint_dir: str | None = Field(
        default=None, max_length=1024, description="Checkpoints go to a folder of the job's in this one."
    )
    eval: SafetyEvaluation | None = Field(
        default=None, description="Refusals, capability and tool calls before and after; left out: not measured."
    )
    export: Exports | None = Field(
        default=None, description="What is made of the result by a job of its own, once this one has completed."
    )

    @model_validator(mode="after")
    def _weights_are_trainable(self) -> "_Job":
        refuse_beside_sharding(self)
        refuse_beside_unsloth(self)
        if self.training.dtype == "fp16" and self.adapter is None:
            raise ValueError("training.dtype: 'fp16' weights can't be trained whole (their updates underflow); "
                             "use 'bf16' or 'fp32', or an adapter")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _only_an_adapter_is_merged(self) -> "_Job":
        if self.export is not None and self.adapter is None:
            self.export.check_without_adapter("export.")
        return self

    @model_validator(mode="after")
    def _early_stopping_needs_held_out_rows(self) -> "_Job":
        options: Options = self.options  # type: ignore[attr-defined]  # every recipe has them, of its own kind
        if options.early_stopping_patience and not (self.data.validation_dataset_id or options.validation_split):
            raise ValueError("options.early_stopping_patience: needs held-out rows; give data.validation_dataset_id "
                             "or options.validation_split > 0")  # fmt: skip
        return self

    def row_sources(self) -> list[RowSource]:
        """The data sets that the job reads, each of which is copied into its folder."""
        return [*self._sources("data", "train", "validation", self.data), *self.evaluation_sources()]

    def _sources(self, block: str, part: str, held_out: str, data: Data | MixedData) -> list[RowSource]:
        options: Options = self.options  # type: ignore[attr-defined]
        validation_id, row_format = data.validation_dataset_id, data.format
        split = validation_id is None and options.validation_split > 0
        few = "at least 2 rows, of which one is held out; or a validation data set, or options.validation_split 0"
        least = (2, few) if split else (1, "")
        sources = [RowSource(f"{block}.dataset_id", data.dataset_id, row_format, part, *least)]
        if validation_id is not None:
            sources.append(RowSource(f"{block}.validation_dataset_id", validation_id, row_format, held_out))
        return sources

    def evaluation_sources(self) -> list[RowSource]:
        """Those of `eval`; its parts are `eval-<set>`."""
        if self.eval is None:
            return []
        asked, labelled_id = self.eval, self.eval.judge.labelled_dataset_id
        named: list[tuple[str, str | None, RowKind]] = [
            ("refuse", asked.refuse_dataset_id, "conversation"),
            ("safe", asked.safe_dataset_id, "conversation"),
            ("retain", asked.retain_dataset_id, "conversation"),
            ("scenarios", asked.scenarios_dataset_id, "scenario"),
        ]
        sources = [
            RowSource(f"eval.{name}_dataset_id", dataset_id, asked.format, f"eval-{name}",
                      answered=name == "retain", kind=kind)
            for name, dataset_id, kind in named
            if dataset_id is not None
        ]  # fmt: skip
        if labelled_id is not None:
            field = "eval.judge.labelled_dataset_id"
            sources.append(RowSource(field, labelled_id, "auto", "eval-labelled", kind="judged"))
        return sources


class SFTSpec(_Job):
    """Supervised fine-tuning."""

    recipe: Literal["sft"] = Field(description="Supervised fine-tuning on conversations.")
    options: Options = Field(default_factory=Options)


class DPOSpec(_Job):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    recipe: Literal["dpo"] = Field(description="Direct preference optimisation on pairs of answers.")
    beta: float = Field(default=0.1, gt=0, le=100, description="Strength of the tie to the reference model.")
    loss_type: DPOLoss = Field(default="sigmoid", description="The preference loss, by TRL's name.")
    options: DPOOptions = Field(default_factory=DPOOptions)

    @field_validator("loss_type", mode="before")
    @classmethod
    def _kto_pair_has_no_twin(cls, loss: Any) -> Any:
        if loss == "kto_pair":
            raise ValueError(f"'kto_pair' is not implemented by TRL; choose one of {', '.join(DPO_LOSSES)}")
        return loss

    @model_validator(mode="after")
    def _settings_that_would_not_be_read(self) -> "DPOSpec":
        if self.options.label_smoothing > 0 and self.loss_type not in SMOOTHED_LOSSES:
            raise ValueError(f"options.label_smoothing: {self.options.label_smoothing} is not read by loss_type "
                             f"{self.loss_type!r}; only {', '.join(SMOOTHED_LOSSES)} know it")  # fmt: skip
        if self.loss_type == "exo_pair" and self.options.label_smoothing == 0:
            raise ValueError("options.label_smoothing: 0.0 is not valid with loss_type 'exo_pair'; expected > 0")
        if self.data.packed:
            raise ValueError("data.packed: true is for SFT only; pairs can't be packed")
        if self.data.train_on_input:
            raise ValueError("data.train_on_input: true is for SFT only; DPO compares answers to one prompt")
        if self.moe.expert_dropout > 0:
            raise ValueError("moe.expert_dropout: is for SFT only; DPO compares two passes, which must not differ")
        ahead, balancing = self.options.precompute_ref_log_probs, self.moe.moe_load_balancing
        if (balancing == "aux_free" and ahead is False) or (balancing == "expert_choice" and ahead is True):
            raise ValueError(f"options.precompute_ref_log_probs: {str(ahead).lower()} is not valid with "
                             f"moe.moe_load_balancing {balancing!r}, whose reference would be another")  # fmt: skip
        if self.moe.router_jitter > 0:
            raise ValueError("moe.router_jitter: is for SFT only; DPO compares two passes, which must not differ")
        return self


class BreakerSpec(_Job):
    """Circuit breakers (Zou et al. 2024, arXiv 2406.04313); the rows of `data` are those that are broken."""

    recipe: Literal["circuit_breaker"] = Field(
        description="Circuit breakers: representations of one data set are rerouted, those of another retained."
    )
    circuit_breaker: CircuitBreaker = Field(description="A block; its fields follow.")
    # The official code's LoRA, for a job that says nothing of it.
    adapter: Adapter | None = Field(
        default_factory=lambda: Adapter(rank=16, alpha=16, dropout=0.05),
        description="LoRA settings; left out: rank 16, alpha 16, dropout 0.05, as the official code's.",
    )
    options: Options = Field(default_factory=Options)

    @model_validator(mode="after")
    def _settings_that_would_not_be_read(self) -> "BreakerSpec":
        if self.adapter is None:
            raise ValueError("adapter: null is not valid with recipe 'circuit_breaker'; the reference is the model "
                             "with its adapter off")  # fmt: skip
        if self.data.packed:
            raise ValueError("data.packed: true is for SFT only; the answers of break rows must be known")
        if self.data.train_on_input:
            raise ValueError("data.train_on_input: true is for SFT only; circuit_breaker.mask says what counts")
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
            raise ValueError(f"{without[0]}.validation_dataset_id: is missing, while other sets have one; name one, or "
                             "set options.validation_split > 0")  # fmt: skip
        return self

    def row_sources(self) -> list[RowSource]:
        """The rows that are broken, those that are retained, and what is held out of each."""
        sources = super().row_sources()
        for name, data in self.circuit_breaker.parts().items():
            sources += self._sources(f"circuit_breaker.{name}", name, f"{name}-validation", data)
        return sources


class RoutingAnalysisSpec(_AnyJob):
    """Which experts serve which prompts; trains nothing."""

    recipe: Literal["routing_analysis"] = Field(
        description="Routing analysis: how often each expert is chosen on two or more data sets, compared."
    )
    data: AnalysisData = Field(description="A block; its fields follow.")
    analysis: Analysis = Field(default_factory=Analysis)
    training: AnalysisTraining = Field(default_factory=AnalysisTraining)
    options: AnalysisOptions = Field(default_factory=AnalysisOptions)
    resources: OneProcess = Field(default_factory=OneProcess)
    adapter_folder: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Adapter to put on the model: a folder of this machine's as for `model`, a job's own too.",
    )

    def row_sources(self) -> list[RowSource]:
        """The sets that are compared."""
        answered = self.analysis.tokens == "response"
        few = "at least 2 rows, for what differs between rows tells how sure a figure is"
        return [
            RowSource(f"data.sets.{name}", dataset_id, self.data.format, f"set-{name}", 2, few, answered)
            for name, dataset_id in self.data.sets.items()
        ]


TrainingSpec = SFTSpec | DPOSpec | BreakerSpec
LoadingSpec = TrainingSpec | RoutingAnalysisSpec  # whose training process loads the model
JobSpec = Annotated[TrainingSpec | RoutingAnalysisSpec | ExportSpec, Discriminator("recipe")]
JOB_SPEC: TypeAdapter[TrainingSpec | RoutingAnalysisSpec | ExportSpec] = TypeAdapter(JobSpec)
DPO_LOSSES: tuple[str, ...] = DPOLoss.__args__  # type: ignore[attr-defined]
