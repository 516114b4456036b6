"""The blocks of jobs that a server's defaults are for. `defaults` loads this module only where it reads a job."""

from llama_stack_provider_moe.spec.ablation import MeasureTraining
from llama_stack_provider_moe.spec.ablation_jobs import EvaluatedModels
from llama_stack_provider_moe.spec.adapter import Adapter
from llama_stack_provider_moe.spec.blocks import Block, Efficiency, Optimizer, Training
from llama_stack_provider_moe.spec.evaluation import SafetyEvaluation
from llama_stack_provider_moe.spec.exports import Exports
from llama_stack_provider_moe.spec.mixing import MixOptions
from llama_stack_provider_moe.spec.moe import Moe
from llama_stack_provider_moe.spec.options import Options, Trackers
from llama_stack_provider_moe.spec.playground import PlaygroundOptions, PlaygroundTraining
from llama_stack_provider_moe.spec.routing import AnalysisOptions, AnalysisTraining, WholeRowOptions
from llama_stack_provider_moe.spec.surgery import SurgeryOptions, SurgeryTraining

# The block of a job that each part belongs to.
DEFAULT_BLOCKS: dict[str, type[Block]] = {
    "training": Training, "optimizer": Optimizer, "efficiency": Efficiency, "adapter": Adapter, "moe": Moe,
    "options": Options, "trackers": Trackers, "eval": SafetyEvaluation, "export": Exports,
}  # fmt: skip

# Recipes with few of the blocks, and few of their fields.
FEW_BLOCKS: dict[str, dict[str, type[Block]]] = {
    "routing_analysis": {"training": AnalysisTraining, "options": AnalysisOptions},
    "ablation_measure": {"training": MeasureTraining, "options": WholeRowOptions},
    "probe": {"training": AnalysisTraining, "options": WholeRowOptions},
    "ablation": {"training": EvaluatedModels, "options": AnalysisOptions, "eval": SafetyEvaluation},
    "mix": {"training": AnalysisTraining, "options": MixOptions},
    "surgery": {"training": SurgeryTraining, "options": SurgeryOptions},
    "playground": {"training": PlaygroundTraining, "options": PlaygroundOptions},
}
