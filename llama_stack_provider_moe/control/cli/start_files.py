"""`moe-train init` and `moe-train templates`: the files that a user starts from."""

import json
import re
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from llama_stack_provider_moe.control.cli import hosts, packaged
from llama_stack_provider_moe.control.cli.act import answer, end
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.options import Json
from llama_stack_provider_moe.control.cli.screen import Screen, table, text
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec.job_templates import job_templates, pipeline_templates, summary

# The files refer to each other by their paths in a checkout.
_RUN_CONFIG = re.compile(r"run_configs/(\w+\.yaml)")
_EXTERNAL_APIS = re.compile(r"^external_apis_dir: .*$", re.MULTILINE)
# Folders beside the run configs that a run config names, and what `init` calls their files.
_FOLDERS = {"external_apis": "external_api", "external_apis_guarded": "external_api", "shields": "rules"}
_FOLDER = re.compile(r"run_configs/(\w+)(?=[/}])")
_RUNS_JOBS = re.compile(r"^  post_training:", re.MULTILINE)
_NEEDS_PROBE = re.compile(r"env\.MOE_PROBE\b")
_FIRST_JOB = "granite_moe_sft"
_JOB_TEMPLATE = re.compile(r"job_templates/(\w+)\.json")


def register(app: typer.Typer) -> None:
    """Add both commands to `moe-train`."""
    app.command()(init)
    app.command()(templates)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the files; created if it does not exist.")],
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="NAME",
            help="Run config; `moe-train templates` lists them. "
            "By default that of the host: quickstart, llama_stack_0_7 or ogx.",
        ),
    ] = None,
    job: Annotated[
        str | None,
        typer.Option(
            "--job",
            metavar="NAME",
            help="Job template, as NAME or @NAME; `moe-train templates` lists them. By default granite_moe_sft, and "
            "none for a server without the post-training API.",
        ),
    ] = None,
    host: Annotated[
        hosts.HostName | None,
        typer.Option("--host", help="Host of the server: Llama Stack 0.6.1 (default), Llama Stack 0.7.3 or OGX 1.5.0."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a server's YAML, a job file and constraints.txt into a folder. Files that differ are never overwritten."""

    def act(screen: Screen) -> Exit:
        on, config_name = hosts.chosen(host, server)
        config = packaged.run_config(config_name, "--server")
        content = config.read_text(encoding="utf-8")
        contents = {config.name: _for_folder(content, folder)}
        named = {"server": config.name}
        template = _template(job, config_name, content)
        if template is not None:
            contents[template.name] = template.read_text(encoding="utf-8")
            named["job"] = template.name
        contents[packaged.CONSTRAINTS] = packaged.constraints(on.constraints)
        named["constraints"] = packaged.CONSTRAINTS
        for inner in dict.fromkeys(_FOLDER.findall(content)):
            for file, text_of_it in packaged.beside_run_configs(inner).items():
                contents[f"{inner}/{file}"] = text_of_it
                named[_FOLDERS[inner]] = f"{inner}/{file}"
        kept = _write(folder, contents, f"--server {config_name}")
        document: dict[str, object] = {name: str(folder / file) for name, file in named.items()}
        document["kept"] = [str(folder / file) for file in kept]
        is_probe_needed = _NEEDS_PROBE.search(content) is not None
        return answer(screen, document, lambda files: _written(files, on, is_probe_needed))

    end(as_json, act)


def templates(as_json: Json = False) -> None:
    """List the run configs, job templates and pipeline templates of this package."""

    def act(screen: Screen) -> Exit:
        document = {
            "run_configs": {name: packaged.headline(file) for name, file in packaged.run_configs().items()},
            "job_templates": {name: summary(file) for name, file in job_templates().items()},
            "pipeline_templates": {name: packaged.headline(file) for name, file in pipeline_templates().items()},
        }
        return answer(screen, document, _listed)

    end(as_json, act)


def _for_folder(content: str, folder: Path) -> str:
    """Replace paths in `content` by the names that the files have after `init`.

    Hosts look for `external_apis_dir` and rules where they are started, so these are written whole.
    """

    def whole(line: re.Match[str]) -> str:
        (inner,) = _FOLDER.findall(line[0])
        return f"external_apis_dir: {json.dumps(str(folder.resolve() / inner))}"

    content = _FOLDER.sub(lambda found: str(folder.resolve() / found[1]), _EXTERNAL_APIS.sub(whole, content))
    return _JOB_TEMPLATE.sub(r"@\1", _RUN_CONFIG.sub(r"\1", content))


def _template(job: str | None, config_name: str, config: str) -> Traversable | None:
    """The job template to write; None for a server that runs no jobs."""
    if _RUNS_JOBS.search(config) is None:
        if job is not None:
            raise InvalidInput("--job", job, f"no --job, because server {config_name!r} runs no jobs: it has no "
                               "post-training API")  # fmt: skip
        return None
    asked = job or _FIRST_JOB
    name = asked.removeprefix("@")  # as `submit` takes it
    return packaged.job_template(name, "--job", asked.removesuffix(name))


def _write(folder: Path, contents: dict[str, str], server: str) -> list[str]:
    """Write the files; if one of them exists with other content, write none.

    Args:
        folder: where.
        contents: of each file, by name.
        server: option that chooses the same server, for an error.

    Returns:
        Names of the files that exist with the same content, and were kept.
    """
    kept: list[str] = []
    others: list[str] = []
    for name, content in contents.items():
        if (folder / name).exists() or (folder / name).is_symlink():
            (kept if _holds(folder / name, content) else others).append(name)
    if others:
        exist = "exists with other content" if len(others) == 1 else "exist with other content"
        told = f"{', '.join(str(folder / name) for name in others)} {exist}"
        raise InvalidInput("DIR", str(folder), f"a folder without these files; {told}, and nothing was written. "
                           f"`moe-train init DIR {server}` writes into another folder")  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (each for each in contents if each not in kept):
            (folder / name).parent.mkdir(exist_ok=True)
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(contents[name])
    except OSError as error:
        raise InvalidInput("DIR", str(folder), f"a folder that can be written ({error.strerror})") from None
    return kept


def _holds(path: Path, content: str) -> bool:
    """Whether this is a file, rather than a link, with exactly this content."""
    try:
        return not path.is_symlink() and path.read_bytes() == content.encode()
    except OSError:
        return False


def _written(document: dict[str, object], host: hosts.Host, is_probe_needed: bool) -> str:
    kept = document["kept"]
    assert isinstance(kept, list)
    files = {name: str(file) for name, file in document.items() if name != "kept"}
    # A server that trains serves the dashboard, whose charts need a package.
    needed = {"dashboard": "job" in files, host.extra: True, "train": "job" in files or is_probe_needed}
    extras = ",".join(extra for extra, is_needed in needed.items() if is_needed)
    serve = host.command.format(file=files["server"])
    lines = [
        f"{'kept' if file in kept else 'wrote'} {file}{' (unchanged)' * (file in kept)}" for file in files.values()
    ]
    lines += ["", f"Install:  pip install 'llama-stack-provider-moe[{extras}]' -c {files['constraints']}"]
    if "rules" in files:
        lines.append(f"Rules:    moe-train guard check {files['rules']}")
    if is_probe_needed:
        lines.append("Probe:    moe-train probe fit MODEL --help")
        serve = f"MOE_PROBE=PROBE {serve}"
    lines.append(f"Serve:    {serve}")
    if "job" in files:
        lines.append(f"Train:    moe-train submit {files['job']} --follow")
    return "\n".join(lines)


def _listed(document: dict[str, dict[str, str]]) -> RenderableType:
    parts: list[RenderableType] = []
    for heads, block, use in (
        (("RUN CONFIG", ""), "run_configs", "Write one into a folder: moe-train init DIR --server NAME"),
        (("JOB TEMPLATE", ""), "job_templates", "Submit one: moe-train submit @NAME"),
        (("PIPELINE TEMPLATE", ""), "pipeline_templates", "Run one: moe-train pipeline @NAME"),
    ):
        parts += [table(heads, document[block].items()), text(use), ""]
    return Group(*parts[:-1])
