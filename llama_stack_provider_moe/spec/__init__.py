"""What a job is asked to do: `JobSpec`, one union tagged by `recipe`.

Every default, range and one-line meaning of a job's options is defined here and nowhere else. A template states the few
fields that differ from the defaults; `spec.json` in the job's folder states all of them. A default of `None` means
"decide from the model"; the training process writes what it decided to `resolved.json`.

Importing this package loads none of its modules: each name loads its own. A server needs few of them at its start, and
pydantic takes most of the time of importing the others.
"""

from typing import TYPE_CHECKING

from llama_stack_provider_moe.ground.lazy_package import loader

if TYPE_CHECKING:
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
    from llama_stack_provider_moe.spec.job_spec import (
        JOB_SPEC,
        AnalysisSpec,
        EditingSpec,
        JobSpec,
        LoadingSpec,
        Recipe,
        TrainingSpec,
        WritingSpec,
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

# Module -> the names that it has for this package.
_NAMES = {
    "ablation_jobs": ("AblationMeasureSpec", "AblationSpec"),
    "adapter": ("Adapter", "AdapterGroup", "AttentionModule", "ExpertRule", "FromAnalysis", "RulesFrom"),
    "blocks": (
        "Block",
        "DType",
        "Efficiency",
        "JOB_ID_PATTERN",
        "Optimizer",
        "Resources",
        "RowFormat",
        "Training",
        "numbers",
        "ranges",
    ),
    "breaker": ("CircuitBreaker", "Curve", "MixedData", "RepBend"),
    "data": ("Data", "Domain"),
    "defaults": ("JobDefaults",),
    "distill": ("Distill",),
    "distill_jobs": ("DistillSpec",),
    "evaluation": ("Gate", "RefusalJudge", "SafetyEvaluation"),
    "exports": ("ExportSpec", "Exports"),
    "generation": ("Generation",),
    "inference_jobs": ("AnalysisJob", "InferenceJob", "PlaygroundSpec", "RoutingAnalysisSpec"),
    "job_spec": (
        "AnalysisSpec",
        "EditingSpec",
        "JOB_SPEC",
        "JobSpec",
        "LoadingSpec",
        "Recipe",
        "TrainingSpec",
        "WritingSpec",
    ),
    "mixing": ("MixSpec",),
    "moe": ("LoadBalancing", "Moe"),
    "options": (
        "DPOOptions",
        "MLflow",
        "Options",
        "PROJECT_PATTERN",
        "RLOptions",
        "TensorBoard",
        "Trackers",
        "Trackio",
        "WandB",
    ),
    "playground": ("Playground",),
    "preference_jobs": ("KTOSpec",),
    "probe": ("Probe", "ProbeSpec"),
    "reward_jobs": ("RewardSpec",),
    "rl": ("RL",),
    "rl_jobs": ("GRPOSpec",),
    "routing": ("Analysis", "AnalysisData", "AnalysisOptions", "AnalysisTraining"),
    "row_sources": ("RowKind", "RowSource"),
    "surgery_jobs": ("SurgerySpec",),
    "training_jobs": (
        "BreakerSpec",
        "DPOLoss",
        "DPOSpec",
        "DPO_LOSSES",
        "SFTSpec",
        "SMOOTHED_LOSSES",
        "TrainingJob",
        "TrainingRecipe",
    ),
    "unsloth_limits": ("Loader",),
}

if not TYPE_CHECKING:  # a type checker would take every name for one of ours
    __getattr__ = loader(__name__, _NAMES, globals())
