"""`JobSpec`, the union of all recipes, and the parts of it that have a name."""

from typing import Annotated, Literal

from pydantic import Discriminator, TypeAdapter

from llama_stack_provider_moe.spec.ablation_jobs import AblationMeasureSpec, AblationSpec
from llama_stack_provider_moe.spec.distill_jobs import DistillSpec
from llama_stack_provider_moe.spec.exports import ExportSpec
from llama_stack_provider_moe.spec.inference_jobs import PlaygroundSpec, RoutingAnalysisSpec
from llama_stack_provider_moe.spec.mixing import MixSpec
from llama_stack_provider_moe.spec.preference_jobs import KTOSpec
from llama_stack_provider_moe.spec.probe import ProbeSpec
from llama_stack_provider_moe.spec.reward_jobs import RewardSpec
from llama_stack_provider_moe.spec.rl_jobs import GRPOSpec
from llama_stack_provider_moe.spec.surgery_jobs import SurgerySpec
from llama_stack_provider_moe.spec.training_jobs import BreakerSpec, DPOSpec, SFTSpec, TrainingRecipe

# The names for type checkers; at run time `spec.recipes.RECIPES` has them, with their classes.
Recipe = Literal[
    TrainingRecipe, "routing_analysis", "ablation_measure", "probe", "ablation", "mix", "surgery", "playground",
    "export",
]  # fmt: skip

TrainingSpec = SFTSpec | DPOSpec | BreakerSpec | GRPOSpec | KTOSpec | RewardSpec | DistillSpec
WritingSpec = GRPOSpec | DistillSpec  # the jobs that learn from answers which the model writes
AnalysisSpec = RoutingAnalysisSpec | AblationMeasureSpec | ProbeSpec
EditingSpec = AblationSpec | MixSpec | SurgerySpec  # the jobs that write a changed model and train nothing
LoadingSpec = TrainingSpec | AnalysisSpec | PlaygroundSpec  # the jobs whose process loads the model
JobSpec = Annotated[TrainingSpec | AnalysisSpec | EditingSpec | PlaygroundSpec | ExportSpec, Discriminator("recipe")]
JOB_SPEC: TypeAdapter[TrainingSpec | AnalysisSpec | EditingSpec | PlaygroundSpec | ExportSpec] = TypeAdapter(JobSpec)
