"""What a job is asked to do: `JobSpec`, one union tagged by `recipe`.

Every default, range and one-line meaning of a job's options is defined here and nowhere else. A template states the few
fields that differ from the defaults; `spec.json` in the job's folder states all of them. A default of `None` means
"decide from the model"; the training process writes what it decided to `resolved.json`.
"""

from typing import Annotated, Literal

from pydantic import Discriminator, TypeAdapter

from llama_stack_provider_moe.spec.ablation_jobs import AblationMeasureSpec, AblationSpec
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
    DType,
    Efficiency,
    Optimizer,
    Resources,
    RowFormat,
    Training,
    numbers,
    ranges,
)
from llama_stack_provider_moe.spec.breaker import CircuitBreaker, Curve, MixedData, RepBend
from llama_stack_provider_moe.spec.data import Data, Domain
from llama_stack_provider_moe.spec.defaults import JobDefaults
from llama_stack_provider_moe.spec.distill import Distill
from llama_stack_provider_moe.spec.distill_jobs import DistillSpec
from llama_stack_provider_moe.spec.evaluation import Gate, RefusalJudge, SafetyEvaluation
from llama_stack_provider_moe.spec.exports import Exports, ExportSpec
from llama_stack_provider_moe.spec.generation import Generation
from llama_stack_provider_moe.spec.inference_jobs import (
    AnalysisJob,
    InferenceJob,
    PlaygroundSpec,
    RoutingAnalysisSpec,
)
from llama_stack_provider_moe.spec.mixing import MixSpec
from llama_stack_provider_moe.spec.moe import LoadBalancing, Moe
from llama_stack_provider_moe.spec.options import (
    PROJECT_PATTERN,
    DPOOptions,
    MLflow,
    Options,
    RLOptions,
    TensorBoard,
    Trackers,
    Trackio,
    WandB,
)
from llama_stack_provider_moe.spec.playground import Playground
from llama_stack_provider_moe.spec.preference_jobs import KTOSpec
from llama_stack_provider_moe.spec.probe import Probe, ProbeSpec
from llama_stack_provider_moe.spec.reward_jobs import RewardSpec
from llama_stack_provider_moe.spec.rl import RL
from llama_stack_provider_moe.spec.rl_jobs import GRPOSpec
from llama_stack_provider_moe.spec.routing import Analysis, AnalysisData, AnalysisOptions, AnalysisTraining
from llama_stack_provider_moe.spec.row_sources import RowKind, RowSource
from llama_stack_provider_moe.spec.surgery_jobs import SurgerySpec
from llama_stack_provider_moe.spec.training_jobs import (
    DPO_LOSSES,
    SMOOTHED_LOSSES,
    BreakerSpec,
    DPOLoss,
    DPOSpec,
    SFTSpec,
    TrainingJob,
    TrainingRecipe,
)
from llama_stack_provider_moe.spec.unsloth_limits import Loader

__all__ = [
    "DPO_LOSSES",
    "JOB_ID_PATTERN",
    "JOB_SPEC",
    "PROJECT_PATTERN",
    "RL",
    "SMOOTHED_LOSSES",
    "AblationMeasureSpec",
    "AblationSpec",
    "Adapter",
    "AdapterGroup",
    "Analysis",
    "AnalysisData",
    "AnalysisJob",
    "AnalysisOptions",
    "AnalysisSpec",
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
    "Distill",
    "DistillSpec",
    "Domain",
    "EditingSpec",
    "Efficiency",
    "ExpertRule",
    "ExportSpec",
    "Exports",
    "FromAnalysis",
    "GRPOSpec",
    "Gate",
    "Generation",
    "InferenceJob",
    "JobDefaults",
    "JobSpec",
    "KTOSpec",
    "LoadBalancing",
    "Loader",
    "LoadingSpec",
    "MLflow",
    "MixSpec",
    "MixedData",
    "Moe",
    "Optimizer",
    "Options",
    "Playground",
    "PlaygroundSpec",
    "Probe",
    "ProbeSpec",
    "RLOptions",
    "Recipe",
    "RefusalJudge",
    "RepBend",
    "Resources",
    "RewardSpec",
    "RoutingAnalysisSpec",
    "RowFormat",
    "RowKind",
    "RowSource",
    "RulesFrom",
    "SFTSpec",
    "SafetyEvaluation",
    "SurgerySpec",
    "TensorBoard",
    "Trackers",
    "Trackio",
    "Training",
    "TrainingJob",
    "TrainingRecipe",
    "TrainingSpec",
    "WandB",
    "WritingSpec",
    "numbers",
    "ranges",
]

# The names for type checkers; at run time `spec.recipes.RECIPES` has them, with their classes.
Recipe = Literal[
    TrainingRecipe, "routing_analysis", "ablation_measure", "probe", "ablation", "mix", "surgery", "playground",
    "export",
]  # fmt: skip

# The paired and unpaired losses of TRL's DPOTrainer that were tested with the pinned version. The post-training
# API also names `kto_pair`, which TRL does not implement.


TrainingSpec = SFTSpec | DPOSpec | BreakerSpec | GRPOSpec | KTOSpec | RewardSpec | DistillSpec
WritingSpec = GRPOSpec | DistillSpec  # the jobs that learn from answers which the model writes
AnalysisSpec = RoutingAnalysisSpec | AblationMeasureSpec | ProbeSpec
EditingSpec = AblationSpec | MixSpec | SurgerySpec  # the jobs that write a changed model and train nothing
LoadingSpec = TrainingSpec | AnalysisSpec | PlaygroundSpec  # the jobs whose process loads the model
JobSpec = Annotated[TrainingSpec | AnalysisSpec | EditingSpec | PlaygroundSpec | ExportSpec, Discriminator("recipe")]
JOB_SPEC: TypeAdapter[TrainingSpec | AnalysisSpec | EditingSpec | PlaygroundSpec | ExportSpec] = TypeAdapter(JobSpec)
