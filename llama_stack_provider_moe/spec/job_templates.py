"""Files that come with this package; of them the job files, `job_templates/`."""

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

_PACKAGE = "llama_stack_provider_moe"


def home() -> Traversable:
    """Return the folder of the files: the package of a wheel, which setup.py fills, or the top level of a checkout."""
    package = files(_PACKAGE)
    return package if package.joinpath("run_configs").is_dir() else Path(str(package)).parent


def packaged_files(folder: str, suffix: str) -> dict[str, Traversable]:
    """Return the files of a folder of this package, by name without suffix, in alphabetical order."""
    found = (each for each in home().joinpath(folder).iterdir() if each.name.endswith(suffix))
    return {each.name.removesuffix(suffix): each for each in sorted(found, key=lambda each: each.name)}


def job_templates() -> dict[str, Traversable]:
    """Return job templates by name."""
    return packaged_files("job_templates", ".json")


def pipeline_templates() -> dict[str, Traversable]:
    """Return pipeline templates by name."""
    return packaged_files("job_templates", ".pipeline.yaml")


def summary(job_template: Traversable) -> str:
    """Summarize a job template in one line: recipe, model, and what differs from a plain job."""
    job = json.loads(job_template.read_bytes())
    adapter, resources = job.get("adapter", {}), job.get("resources", {})
    nodes, gpus = resources.get("nodes"), resources.get("gpus")
    gpu_text = f"{gpus} GPU{'' if gpus == 1 else 's'}" + (f" of each of {nodes} nodes" if nodes else "")
    told = [
        f"{job['recipe']} of {job.get('model') or 'job ' + job['of']}",
        "all weights" if adapter is None else "",
        "4-bit base" if adapter and adapter.get("quantize_base") else "",
        f"plan {adapter['plan']}" if adapter and adapter.get("plan") else "",
        f"loader {job['loader']}" if "loader" in job else "",
        "with eval" if "eval" in job else "",
        f"exports {', '.join(job['export'])}" if "export" in job else "",
        gpu_text if gpus else "",
    ]
    return ", ".join(filter(None, told))
