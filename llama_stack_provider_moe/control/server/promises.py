"""What a job will leave once it has completed, as far as its specification tells."""

import re

from llama_stack_provider_moe.control.server import exports
from llama_stack_provider_moe.spec import EditingSpec, ExportSpec, JobSpec, TrainingSpec

_CHECKPOINT = re.compile(r"(epoch|step)-\d+")


def of(spec: JobSpec) -> dict[str, str]:
    """Return the models and adapters that a job will leave: name -> kind of the artifact."""
    found: dict[str, str] = {}
    if isinstance(spec, exports.MakingSpec) and exports.leaves_adapter(spec):
        found["adapter"] = "adapter"
    elif isinstance(spec, EditingSpec | TrainingSpec):
        found["model"] = "model"
    if saves_merged(spec) or is_exported(spec) or (isinstance(spec, ExportSpec) and spec.export.merged):
        found["merged"] = "merged"
    return found


def saves_merged(spec: JobSpec) -> bool:
    """Whether a job saves base plus adapter itself."""
    return isinstance(spec, TrainingSpec) and spec.adapter is not None and spec.options.save_merged


def is_exported(spec: JobSpec) -> bool:
    """Whether the export that a job makes when it completes writes base plus adapter."""
    return isinstance(spec, TrainingSpec) and spec.export is not None and spec.export.merged


def is_checkpoint(name: str, spec: JobSpec) -> bool:
    """Whether a name may be that of a checkpoint of the job; which of them stay is known later."""
    return isinstance(spec, TrainingSpec) and _CHECKPOINT.fullmatch(name) is not None


def is_adapter(name: str, spec: JobSpec) -> bool:
    """Whether one of these artifacts will be an adapter."""
    return name == "adapter" or (is_checkpoint(name, spec) and isinstance(spec, TrainingSpec) and bool(spec.adapter))
