"""Files in this package: run configs, job templates, and the versions that it was tested with."""

import difflib
import re
from importlib.resources.abc import Traversable

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.job_templates import home, job_templates, packaged_files, pipeline_templates

CONSTRAINTS = "constraints.txt"
_SHOWN = 3  # names that are similar to a wrong one


def run_configs() -> dict[str, Traversable]:
    """Return run configs by name."""
    return packaged_files("run_configs", ".yaml")


def constraints(name: str = CONSTRAINTS) -> str:
    """Return exact versions of the dependencies that this package was tested with, for `pip install -c`.

    Args:
        name: the file of a host.
    """
    return home().joinpath(name).read_text(encoding="utf-8")


def beside_run_configs(folder: str) -> dict[str, str]:
    """Return the files in a folder of the run configs, by name: external APIs, or rules of shields."""
    found = home().joinpath("run_configs", folder).iterdir()
    return {each.name: each.read_text(encoding="utf-8") for each in found if each.name.endswith(".yaml")}


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


def pipeline_template(name: str, option: str, prefix: str = "") -> Traversable:
    """Return the YAML of a pipeline; see `job_template`."""
    return _chosen(name, option, pipeline_templates(), "pipeline template", prefix)


def headline(run_config: Traversable) -> str:
    """Return the first sentence of the comment at the top of a run config."""
    comment = []
    for line in run_config.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line[2:].strip())
    return re.split(r"(?<=\.) ", " ".join(comment), maxsplit=1)[0].removesuffix(".")


def _chosen(name: str, option: str, known: dict[str, Traversable], what: str, prefix: str = "") -> Traversable:
    if name in known:
        return known[name]
    # A slip of a letter or two means one name; part of a name may mean several.
    slip = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    near = [prefix + each for each in slip or difflib.get_close_matches(name, known, n=_SHOWN)]
    hint = f"did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}? " if near else ""
    raise InvalidInput(option, prefix + name, f"the name of a {what}; {hint}`moe-train templates` lists them")
