"""Every setting of jobs and servers with its default and range, read from the pydantic models.

`tests.contracts.docs_reference` makes docs/reference/settings.md of it.
"""

import sys
import types
from collections.abc import Iterator
from typing import Annotated, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo

from llama_stack_provider_moe.shields.argument_tests import ArgumentRule
from llama_stack_provider_moe.shields.rules import Example, ToolRules, ToolRulesFile
from llama_stack_provider_moe.spec import (
    RL,
    AblationMeasureSpec,
    AblationSpec,
    Adapter,
    Analysis,
    AnalysisData,
    AnalysisOptions,
    AnalysisTraining,
    Block,
    BreakerSpec,
    CircuitBreaker,
    Curve,
    Data,
    Distill,
    DistillSpec,
    Domain,
    DPOOptions,
    DPOSpec,
    Efficiency,
    ExpertRule,
    Exports,
    ExportSpec,
    FromAnalysis,
    Gate,
    Generation,
    GRPOSpec,
    JobDefaults,
    KTOSpec,
    MixedData,
    MixSpec,
    MLflow,
    Moe,
    Optimizer,
    Options,
    Playground,
    PlaygroundSpec,
    Probe,
    ProbeSpec,
    RefusalJudge,
    RepBend,
    Resources,
    RewardSpec,
    RLOptions,
    RoutingAnalysisSpec,
    RulesFrom,
    SafetyEvaluation,
    SFTSpec,
    SurgerySpec,
    Trackers,
    Trackio,
    Training,
    WandB,
)
from llama_stack_provider_moe.spec.ablation import (
    AblatedLayers,
    ContrastData,
    Measure,
    MeasureTraining,
    RunTimeAblation,
)
from llama_stack_provider_moe.spec.ablation_jobs import EvaluatedModels
from llama_stack_provider_moe.spec.adapter import MAX_RANK, ExpertsOfAnalysis
from llama_stack_provider_moe.spec.blocks import NUMBERS_PATTERN
from llama_stack_provider_moe.spec.data import DOMAIN_PATTERN
from llama_stack_provider_moe.spec.destinations import HubPush
from llama_stack_provider_moe.spec.engines_config import EngineConfig
from llama_stack_provider_moe.spec.executors_config import ExecutorsConfig, RayConfig
from llama_stack_provider_moe.spec.exports import SHARD_PATTERN, Ollama
from llama_stack_provider_moe.spec.feedback_config import FeedbackConfig, FeedbackFolder
from llama_stack_provider_moe.spec.grader_base import GRADER_NAME_PATTERN, VARIABLE_NAME_PATTERN
from llama_stack_provider_moe.spec.graders import (
    JsonSchema,
    Length,
    Math,
    Monitor,
    Multi,
    Refusal,
    Regex,
    Repetition,
    RewardModel,
    StringCheck,
    TextSimilarity,
    ToolCall,
)
from llama_stack_provider_moe.spec.graders_config import GradersConfig, JudgeConfig
from llama_stack_provider_moe.spec.guard_config import (
    GuardConfig,
    RepMonitorParams,
    SessionsConfig,
    ToolGuardParams,
    TrajectoryParams,
)
from llama_stack_provider_moe.spec.judged_graders import JudgeMessage, LabelModel, SamplingParams, ScoreModel
from llama_stack_provider_moe.spec.limits_config import AuditConfig, LimitsConfig
from llama_stack_provider_moe.spec.mixing import Branch, MixOptions
from llama_stack_provider_moe.spec.notify import Notify, NotifyConfig
from llama_stack_provider_moe.spec.playground import PlaygroundOptions, PlaygroundTraining
from llama_stack_provider_moe.spec.probe import ProbeData
from llama_stack_provider_moe.spec.rewards import Grading, Reward
from llama_stack_provider_moe.spec.rl_engines import TransformersEngine, VllmColocateEngine, VllmServerEngine
from llama_stack_provider_moe.spec.rows.images import ImageLimits
from llama_stack_provider_moe.spec.scorer_config import ScorerConfig
from llama_stack_provider_moe.spec.server_config import (
    ExportsConfig,
    MirrorConfig,
    ModelsConfig,
    ProviderConfig,
    SupervisorConfig,
)
from llama_stack_provider_moe.spec.serving_config import LlamaCppServing, OllamaServing, VllmServing
from llama_stack_provider_moe.spec.surgery import (
    AddedExperts,
    CalibrationData,
    Surgery,
    SurgeryOptions,
    SurgeryTraining,
)

BLOCKS: list[tuple[str, str, type[Block], set[str]]] = [
    # title, prefix, model, fields told elsewhere
    ("Every job", "", SFTSpec, {"options", "distill"}),
    ("SFT jobs also", "", SFTSpec, {*SFTSpec.model_fields} - {"distill"}),
    ("`distill`", "distill.", Distill, set()),
    ("DPO jobs also", "", DPOSpec, {*SFTSpec.model_fields} - {"recipe"}),
    ("KTO jobs also", "", KTOSpec, {*SFTSpec.model_fields} - {"recipe"}),
    ("Reward models' jobs also", "", RewardSpec, {*SFTSpec.model_fields} - {"recipe"}),
    ("GRPO jobs also", "", GRPOSpec, {*SFTSpec.model_fields} - {"recipe"}),
    ("`rl`", "rl.", RL, set()),
    ("`rl.engine` of type transformers", "rl.engine.", TransformersEngine, set()),
    ("`rl.engine` of type vllm_server", "rl.engine.", VllmServerEngine, set()),
    (
        "`rl.engine` of type vllm_colocate: as for vllm_server without `server` and `deadline_s`, but",
        "rl.engine.",
        VllmColocateEngine,
        {*VllmServerEngine.model_fields} - {"type"},
    ),
    ("Each of `reward`", "reward.N.", Reward, set()),
    ("`grading`", "grading.", Grading, set()),
    ("Distillation jobs also", "", DistillSpec, {*SFTSpec.model_fields} - {"recipe"}),
    ("`generation`", "generation.", Generation, set()),
    ("Circuit-breaker jobs also", "", BreakerSpec, {*SFTSpec.model_fields} - {"recipe", "adapter"}),
    ("`circuit_breaker`", "circuit_breaker.", CircuitBreaker, set()),
    ("`circuit_breaker.retain` and `.safe`", "circuit_breaker.retain.", MixedData, set()),
    ("`circuit_breaker.reroute_curve` and `.retain_curve`", "circuit_breaker.reroute_curve.", Curve, set()),
    ("`circuit_breaker.repbend`", "circuit_breaker.repbend.", RepBend, set()),
    ("`data`", "data.", Data, set()),
    ("Each of `data.domains`", "data.domains.N.", Domain, set()),
    ("`training`", "training.", Training, set()),
    ("`optimizer`", "optimizer.", Optimizer, set()),
    ("`efficiency`", "efficiency.", Efficiency, set()),
    ("`adapter`", "adapter.", Adapter, set()),
    ("Each of `adapter.rules`", "adapter.rules.N.", ExpertRule, set()),
    ("`adapter.from_analysis`", "adapter.from_analysis.", FromAnalysis, set()),
    ("`adapter.rules_from`", "adapter.rules_from.", RulesFrom, set()),
    ("`moe`", "moe.", Moe, set()),
    ("`options`", "options.", Options, set()),
    ("`options` of DPO jobs also", "options.", DPOOptions, {*Options.model_fields}),
    (
        "`options` of GRPO and distillation jobs: as above, but",
        "options.",
        RLOptions,
        {*Options.model_fields} - {"truncate"},
    ),
    ("`eval`", "eval.", SafetyEvaluation, set()),
    ("`eval.masked_from_analysis`", "eval.masked_from_analysis.", ExpertsOfAnalysis, set()),
    ("`eval.masked_from`", "eval.masked_from.", RulesFrom, set()),
    (
        "`eval.ablated`, with `ablate` as for ablation jobs",
        "eval.ablated.",
        RunTimeAblation,
        set(),
    ),
    ("`eval.judge`", "eval.judge.", RefusalJudge, set()),
    ("`eval.fail_if`", "eval.fail_if.", Gate, set()),
    ("`export`", "export.", Exports, set()),
    ("`export.ollama`", "export.ollama.", Ollama, set()),
    ("`export.push`", "export.push.", HubPush, set()),
    ("`notify`", "notify.", Notify, set()),
    ("`resources`", "resources.", Resources, set()),
    ("`trackers`", "trackers.", Trackers, set()),
    ("`trackers.trackio`", "trackers.trackio.", Trackio, set()),
    ("`trackers.mlflow`", "trackers.mlflow.", MLflow, set()),
    ("`trackers.wandb`", "trackers.wandb.", WandB, set()),
    (
        "Routing analysis jobs: `job_uuid`, `model`, `labels`, `note` and `resources` (of one process) as above, and",
        "",
        RoutingAnalysisSpec,
        {"job_uuid", "model", "resources", "labels", "note"},
    ),
    ("`data` of routing analysis jobs", "data.", AnalysisData, set()),
    ("`analysis`", "analysis.", Analysis, set()),
    ("`training` of routing analysis jobs", "training.", AnalysisTraining, set()),
    ("`options` of routing analysis jobs", "options.", AnalysisOptions, set()),
    (
        "Playground jobs: `job_uuid`, `model`, `adapter_folder`, `labels`, `note` and `resources` as in routing "
        "analysis jobs, and",
        "",
        PlaygroundSpec,
        {"job_uuid", "model", "model_from", "adapter_folder", "resources", "labels", "note"},
    ),
    ("`playground`", "playground.", Playground, set()),
    ("`training` of playground jobs", "training.", PlaygroundTraining, set()),
    ("`options` of playground jobs", "options.", PlaygroundOptions, set()),
    (
        "Measuring for an ablation: `job_uuid`, `model`, `labels`, `note`, `resources`, `options` and `adapter_folder` "
        "as for routing analysis jobs (but a row longer than `options.max_length` is refused, not cut), and",
        "",
        AblationMeasureSpec,
        {"job_uuid", "model", "model_from", "resources", "labels", "note", "options", "adapter_folder"},
    ),
    ("`data` of measuring jobs", "data.", ContrastData, set()),
    ("`measure`", "measure.", Measure, set()),
    ("`training` of measuring jobs", "training.", MeasureTraining, set()),
    (
        "Probe jobs: `job_uuid`, `model`, `labels`, `note`, `resources`, `training`, `options` and `adapter_folder` as "
        "for routing analysis jobs (but a row longer than `options.max_length` is refused, not cut), and",
        "",
        ProbeSpec,
        {"job_uuid", "model", "model_from", "resources", "labels", "note", "training", "options", "adapter_folder"},
    ),
    ("`data` of probe jobs", "data.", ProbeData, set()),
    ("`probe`", "probe.", Probe, set()),
    (
        "Ablation jobs: `job_uuid`, `model`, `labels`, `note`, `eval` and `resources` (of one process) as above, "
        "`options` as for routing analysis jobs, and",
        "",
        AblationSpec,
        {"job_uuid", "model", "model_from", "resources", "labels", "note", "eval", "options"},
    ),
    ("`training` of ablation jobs", "training.", EvaluatedModels, set()),
    ("Each of `ablate`", "ablate.N.", AblatedLayers, set()),
    (
        "Mix jobs: `job_uuid`, `labels`, `note` and `resources` (of one process) as above; `model` is the model that "
        "every branch was trained from; `training` as for routing analysis jobs, and",
        "",
        MixSpec,
        {"job_uuid", "model", "model_from", "resources", "labels", "note", "training"},
    ),
    ("Each of `branches`", "branches.N.", Branch, set()),
    ("`options` of mix jobs", "options.", MixOptions, set()),
    (
        "Expert surgery jobs: `job_uuid`, `model`, `labels`, `note` and `resources` (of one process) as above, and",
        "",
        SurgerySpec,
        {"job_uuid", "model", "model_from", "resources", "labels", "note"},
    ),
    ("`surgery`", "surgery.", Surgery, set()),
    ("`surgery.add`", "surgery.add.", AddedExperts, set()),
    ("`data` of surgery jobs", "data.", CalibrationData, set()),
    ("`training` of surgery jobs", "training.", SurgeryTraining, set()),
    ("`options` of surgery jobs", "options.", SurgeryOptions, set()),
    (
        "Export jobs: `job_uuid`, `resources` and `export` as above, and",
        "",
        ExportSpec,
        {"job_uuid", "resources", "export"},
    ),
    ("Rewards: each of `reward`", "reward.N.", Reward, set()),
    ("Rewards: `grading`", "grading.", Grading, set()),
    ("Graders: string_check", "grader.", StringCheck, set()),
    *(
        (f"Graders: {get_args(kind.model_fields['type'].annotation)[0]}", "grader.", kind, {"name"})
        for kind in (
            TextSimilarity,
            Regex,
            JsonSchema,
            ToolCall,
            Math,
            Length,
            Repetition,
            Refusal,
            RewardModel,
            Monitor,
            ScoreModel,
            LabelModel,
            Multi,
        )
    ),
    ("Graders: each of `input` of a judge", "grader.input.N.", JudgeMessage, set()),
    ("Graders: `sampling_params`", "grader.sampling_params.", SamplingParams, set()),
    ("Server: `config:` of `inline::moe`", "", ProviderConfig, set()),
    ("Server: `models:`", "models.", ModelsConfig, set()),
    ("Server: `images:`", "images.", ImageLimits, set()),
    ("Server: `limits:`", "limits.", LimitsConfig, set()),
    ("Server: `audit:`", "audit.", AuditConfig, set()),
    ("Server: `exports:`", "exports.", ExportsConfig, set()),
    ("Server: `serving:` of kind llama_cpp", "serving.", LlamaCppServing, set()),
    ("Server: `serving:` of kind ollama", "serving.", OllamaServing, {"answer_s"}),
    ("Server: `serving:` of kind vllm", "serving.", VllmServing, {"answer_s"}),
    ("Server: `mirror:`", "mirror.", MirrorConfig, set()),
    ("Server: `notify:`", "notify.", NotifyConfig, set()),
    ("Server: `feedback:`", "feedback.", FeedbackFolder, set()),
    ("Server: `graders:`", "graders.", GradersConfig, set()),
    ("Server: each of `graders.judges:`", "graders.judges.NAME.", JudgeConfig, set()),
    ("Server: each of `engines:`", "engines.NAME.", EngineConfig, set()),
    ("Server: `supervisor:`", "supervisor.", SupervisorConfig, set()),
    ("Server: `executors:`", "executors.", ExecutorsConfig, set()),
    ("Server: `executors.ray:`", "executors.ray.", RayConfig, set()),
    ("Server: `defaults:`", "defaults.", JobDefaults, set()),
    ("Shields: `config:` of `inline::moe-guard`", "", GuardConfig, set()),
    ("Shields: `scorer:`", "scorer.", ScorerConfig, set()),
    ("Shields: `sessions:`", "sessions.", SessionsConfig, set()),
    ("Shields: `feedback:`", "feedback.", FeedbackConfig, set()),
    ("Shields: `params:` of type tool_guard", "params.", ToolGuardParams, set()),
    ("Shields: `params:` of type rep_monitor", "params.", RepMonitorParams, set()),
    ("Shields: `params:` of type trajectory", "params.", TrajectoryParams, set()),
    ("Shields: a file of rules", "", ToolRulesFile, set()),
    ("Shields: each of `tools:`", "tools.NAME.", ToolRules, set()),
    ("Shields: each of `rules:`", "tools.NAME.rules.N.", ArgumentRule, set()),
    ("Shields: each of `examples:`", "examples.N.", Example, set()),
]


def fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """(title, dotted name, field) of every setting there is."""
    for title, prefix, model, elsewhere in BLOCKS:
        for name, field in model.model_fields.items():
            if name not in elsewhere:
                yield title, prefix + name, field


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Block):
        return "see below"
    if value == sys.executable:
        return "the server's"
    if value is None or value == "":
        return "-"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`"


def allowed(field: FieldInfo) -> str:
    annotation = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    counted = "characters"
    if get_origin(annotation) is list:
        counted = "items"
        annotation = get_args(annotation)[0]
        if isinstance(annotation, type) and issubclass(annotation, Block):
            return "a list of blocks, which follow"
    if get_origin(annotation) is dict:
        key, value = get_args(annotation)
        if get_origin(value) is Annotated:
            value = get_args(value)[0]
        if value not in (float, int):
            return ""
        named = ", ".join(f"`{name}`" for name in get_args(key)) if get_origin(key) is Literal else ""
        groups = f"of {named}" if named else "of each value" if get_args(key) else "of experts"
        return f"{groups}: > 0" if value is float else f"{groups}: 1 to {MAX_RANK}"
    if any(getattr(rule, "pattern", None) == NUMBERS_PATTERN for rule in field.metadata):
        return "numbers and ranges"
    if any(getattr(rule, "pattern", None) == DOMAIN_PATTERN for rule in field.metadata):
        return "1 to 32 of `A-Z a-z 0-9 _ -`"
    if any(getattr(rule, "pattern", None) == SHARD_PATTERN for rule in field.metadata):
        return "at least `1KB`"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{'true' if choice is True else choice}`" for choice in get_args(annotation))
    signs = {Gt: "> {0.gt}", Ge: ">= {0.ge}", Lt: "< {0.lt}", Le: "<= {0.le}"}
    bounds = [sign.format(rule) for rule in field.metadata for kind, sign in signs.items() if isinstance(rule, kind)]
    bounds += [f"at least {rule.min_length} {counted}" for rule in field.metadata if isinstance(rule, MinLen)]
    bounds += [f"at most {rule.max_length} {counted}" for rule in field.metadata if isinstance(rule, MaxLen)]
    if bounds:
        return ", ".join(bounds)
    if annotation is bool:
        return "`true`, `false`"
    patterns = [rule.pattern for rule in field.metadata if hasattr(rule, "pattern")]
    if GRADER_NAME_PATTERN in patterns:
        return "1 to 64 of `A-Z a-z 0-9 . _ -` and spaces"
    if VARIABLE_NAME_PATTERN in patterns:
        return "1 to 64 of `A-Z a-z 0-9 _`"
    return "`A-Z a-z 0-9 . _ -`" if patterns else ""
