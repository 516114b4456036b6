"""Maps requests of the post-training API to the body of a JobSpec, and the names in error texts back again.

One table says where each field goes. A test fails for a field that is neither in the table nor refused below, because
nothing would read it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_stack_provider_moe.control.server.wire_requests import PreferenceOptimizeRequest, SupervisedFineTuneRequest
from llama_stack_provider_moe.control.store.wait_rows import Wait
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import JobSpec
from llama_stack_provider_moe.spec.validation_errors import validated

_BOTH = {
    "job_uuid": "job_uuid",
    "training_config.n_epochs": "training.n_epochs",
    "training_config.max_steps_per_epoch": "training.max_steps_per_epoch",
    "training_config.gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "training_config.max_validation_steps": "training.max_validation_steps",
    "training_config.dtype": "training.dtype",
    "training_config.data_config.dataset_id": "data.dataset_id",
    "training_config.data_config.batch_size": "training.batch_size",
    "training_config.data_config.shuffle": "data.shuffle",
    "training_config.data_config.data_format": "data.format",
    "training_config.data_config.validation_dataset_id": "data.validation_dataset_id",
    "training_config.data_config.packed": "data.packed",
    "training_config.data_config.train_on_input": "data.train_on_input",
    "training_config.optimizer_config.optimizer_type": "optimizer.optimizer_type",
    "training_config.optimizer_config.lr": "optimizer.lr",
    "training_config.optimizer_config.weight_decay": "optimizer.weight_decay",
    "training_config.optimizer_config.num_warmup_steps": "optimizer.num_warmup_steps",
    "training_config.efficiency_config.enable_activation_checkpointing": "efficiency.enable_activation_checkpointing",
    "logger_config": "trackers",
    "moe": "moe",
    "options": "options",
    "eval": "eval",
    "export": "export",
    "resources": "resources",
    "labels": "labels",
    "note": "note",
    "notify": "notify",
}
SFT_FIELDS = _BOTH | {
    "model": "model",
    "checkpoint_dir": "checkpoint_dir",
    "algorithm_config.lora_attn_modules": "adapter.lora_attn_modules",
    "algorithm_config.apply_lora_to_mlp": "adapter.apply_lora_to_mlp",
    "algorithm_config.apply_lora_to_output": "adapter.apply_lora_to_output",
    "algorithm_config.rank": "adapter.rank",
    "algorithm_config.alpha": "adapter.alpha",
    "algorithm_config.use_dora": "adapter.use_dora",
    "algorithm_config.quantize_base": "adapter.quantize_base",
}
DPO_FIELDS = _BOTH | {
    "finetuned_model": "model",
    "algorithm_config.beta": "beta",
    "algorithm_config.loss_type": "loss_type",
}
# Fields of the API that this provider does not support, and the values that it accepts: empty, false or null.
REFUSED = {
    "training_config.efficiency_config.enable_activation_offloading": "false, or leave it out: activations stay on the "
    "device (enable_activation_checkpointing saves memory)",
    "training_config.efficiency_config.memory_efficient_fsdp_wrap": "false, or leave it out: resources.strategy fsdp "
    "always wraps each layer",
    "training_config.efficiency_config.fsdp_cpu_offload": "false, or leave it out: use resources.cpu_offload with "
    "resources.strategy fsdp instead",
    "hyperparam_search_config": "{}: this route makes one job; POST sweeps (moe-train sweep) runs one for each "
    "combination of settings",
}


@dataclass
class Waits:
    """The jobs that a job will wait for, and what is needed to resolve its names once they have completed.

    Attributes:
        jobs: the jobs, by id.
        names: names in the job that stand for what those jobs will leave.
        asked: the job with the server's defaults, before any name was resolved.
        whose: the owner whose jobs it may name; None for every owner's.
    """

    jobs: dict[str, Wait] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    asked: JobSpec | None = None
    whose: str | None = None


@dataclass(frozen=True)
class Draft:
    """A job's body before the server adds its defaults and validates it.

    Attributes:
        body: the fields that the caller stated, by their names in `spec`, without defaults.
        names: dotted name in `spec` -> the caller's name for the field, where it differs; "" is the body itself.
        notes: remarks for the caller beside the answer: how names were resolved, and what could not be checked.
        may_wait: whether the job may name jobs that have not completed, and wait for them.
        siblings: jobs by id that are created together with this one, and before it.
        waits: what it waits for.
        hints: names that were taken for hub ids -> what else the caller may have meant, if the hub has no such model.
    """

    body: object
    names: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    may_wait: bool = True
    siblings: Mapping[str, JobSpec] = field(default_factory=dict)
    waits: Waits = field(default_factory=Waits)
    hints: dict[str, str] = field(default_factory=dict)

    def name(self, path: str) -> str:
        """Return the caller's name for `path`, a dotted name in `spec`; the known name may be a prefix of it."""
        head = path
        while head:
            if head in self.names:
                return (self.names[head] + path[len(head) :]).removeprefix(".")
            head = head.rpartition(".")[0]
        return path

    def reworded(self, text: str) -> str:
        """Return the text of an error with the caller's names in it."""
        dotted = sorted((name for name in self.names if "." in name), key=len, reverse=True)  # none of these is ""
        if not dotted:
            return text
        pattern = r"(?<![\w.])(" + "|".join(map(re.escape, dotted)) + r")(?![\w.]*\w)"
        return re.sub(pattern, lambda found: self.names[found[0]], text)


def drafted(kind: type[SupervisedFineTuneRequest | PreferenceOptimizeRequest], body: object) -> Draft:
    """Validate `body` as a request of that kind and return its job.

    Raises:
        InvalidInput: the body is not such a request, or as in `draft`.
    """
    return draft(validated(kind, body))


def draft(request: SupervisedFineTuneRequest | PreferenceOptimizeRequest) -> Draft:
    """Return the job that `request` asks for.

    Raises:
        InvalidInput: a field that this provider does not support, or two fields that contradict each other.
    """
    given = request.model_dump(exclude_unset=True)
    for path, expected in REFUSED.items():
        value = _get(given, path)
        if value:
            shown = list(value) if isinstance(value, dict) else value
            raise InvalidInput(path, shown, expected)
    if request.training_config.data_config is None:
        raise InvalidInput("training_config.data_config", None, "an object with the data set")
    sft = isinstance(request, SupervisedFineTuneRequest)
    body: dict[str, Any] = {"recipe": "sft" if sft else "dpo"}
    names: dict[str, str] = {}
    for path, target in (SFT_FIELDS if sft else DPO_FIELDS).items():
        value = _get(given, path)
        if value is None:  # in this API null means the same as left out
            continue
        _put(body, target, value)
        if path != target:
            names[target] = path
    if sft:
        _become_circuit_breaker(body, names)
    if "model" not in body:
        raise InvalidInput(
            "model", None, "a job's name, a hub id, or a folder under an allowed root; this server has no default"
        )
    _add_adapter(body, given)
    if given.get("eval", {}) is None:  # our field, not the API's: null turns off the server's default
        body["eval"] = None
    return Draft(body, names)


def _become_circuit_breaker(body: dict[str, Any], names: dict[str, str]) -> None:
    """Make the job a `circuit_breaker` job where the options have a block of that name."""
    options = body.get("options")
    if not isinstance(options, dict) or options.get("circuit_breaker") is None:
        return
    body["recipe"] = "circuit_breaker"
    body["circuit_breaker"] = options["circuit_breaker"]
    body["options"] = {key: value for key, value in options.items() if key != "circuit_breaker"}
    names["circuit_breaker"] = "options.circuit_breaker"


def _add_adapter(body: dict[str, Any], given: dict[str, Any]) -> None:
    """Merge the block `adapter` with `algorithm_config`; raise where they contradict each other."""
    if "adapter" not in given:
        return
    block, standard = given["adapter"], body.get("adapter")
    if standard is None:
        body["adapter"] = block
        return
    if block is None:
        raise InvalidInput("adapter", None, "an object, or leave it out: algorithm_config asks for LoRA")
    for key, value in block.items():
        if key in standard and standard[key] != value:
            raise InvalidInput(f"adapter.{key}", value, f"{standard[key]!r}, as in algorithm_config, or leave it out")
    body["adapter"] = {**standard, **block}


def _get(tree: Mapping[str, object], path: str) -> object:
    value: object = tree
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _put(tree: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value
