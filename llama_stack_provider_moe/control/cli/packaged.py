"""Files in this package: run configs, job templates, and the versions that it was tested with."""

import difflib
import json
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from llama_stack_provider_moe.errors import InvalidInput

_PACKAGE = "llama_stack_provider_moe"
CONSTRAINTS = "constraints.txt"
_SHOWN = 3  # names that are similar to a wrong one


def run_configs() -> dict[str, Traversable]:
    """Return run configs by name."""
    return _files("run_configs", ".yaml")


def job_templates() -> dict[str, Traversable]:
    """Return job templates by name."""
    return _files("job_templates", ".json")


def constraints(name: str = CONSTRAINTS) -> str:
    """Return exact versions of the dependencies that this package was tested with, for `pip install -c`.

    Args:
        name: the file of a host.
    """
    return _home().joinpath(name).read_text(encoding="utf-8")


def external_api() -> str:
    """Return the YAML that tells a host without a post-training API where this one is."""
    return _home().joinpath("run_configs", "external_apis", "post_training.yaml").read_text(encoding="utf-8")


def run_config(name: str, option: str) -> Traversable:
    """Return the YAML of a server.

    Raises:
        InvalidInput: there is no run config of this name.
    """
    return _chosen(name, option, run_configs(), "run config")


def job_template(name: str, option: str, prefix: str = "") -> Traversable:
    """Return the JSON of a job.

    Args:
        name: name of the template.
        option: option or argument that the user typed, for an error.
        prefix: character that the user typed before the name.

    Raises:
        InvalidInput: there is no job template of this name.
    """
    return _chosen(name, option, job_templates(), "job template", prefix)


def headline(run_config: Traversable) -> str:
    """Return the first sentence of the comment at the top of a run config."""
    comment = []
    for line in run_config.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line[2:].strip())
    return re.split(r"(?<=\.) ", " ".join(comment), maxsplit=1)[0].removesuffix(".")


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


def _home() -> Traversable:
    """The folder of the files: the package of a wheel, which setup.py fills, or the top level of a checkout."""
    package = files(_PACKAGE)
    return package if package.joinpath("run_configs").is_dir() else Path(str(package)).parent


def _files(folder: str, suffix: str) -> dict[str, Traversable]:
    found = (each for each in _home().joinpath(folder).iterdir() if each.name.endswith(suffix))
    return {each.name.removesuffix(suffix): each for each in sorted(found, key=lambda each: each.name)}


def _chosen(name: str, option: str, known: dict[str, Traversable], what: str, prefix: str = "") -> Traversable:
    if name in known:
        return known[name]
    # A slip of a letter or two means one name; part of a name may mean several.
    slip = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    near = [prefix + each for each in slip or difflib.get_close_matches(name, known, n=_SHOWN)]
    hint = f"did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}? " if near else ""
    raise InvalidInput(option, prefix + name, f"the name of a {what}; {hint}`moe-train templates` lists them")
