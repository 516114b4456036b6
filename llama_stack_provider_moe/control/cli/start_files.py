"""`moe-train init` and `moe-train templates`: the files that a user starts from."""

import json
import re
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
        str,
        typer.Option("--job", metavar="NAME", help="Job template, as NAME or @NAME; `moe-train templates` lists them."),
    ] = "granite_moe_sft",
    host: Annotated[
        hosts.HostName | None,
        typer.Option("--host", help="Host of the server: Llama Stack 0.6.1 (default), Llama Stack 0.7.3 or OGX 1.5.0."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a server's YAML, a job file and constraints.txt into a folder. Existing files are never overwritten."""

    def act(screen: Screen) -> Exit:
        on, config_name = hosts.chosen(host, server)
        config = packaged.run_config(config_name, "--server")
        name = job.removeprefix("@")  # as `submit` takes it
        template = packaged.job_template(name, "--job", job.removesuffix(name))
        contents = {
            config.name: _for_folder(config.read_text(encoding="utf-8"), folder),
            template.name: template.read_text(encoding="utf-8"),
            packaged.CONSTRAINTS: packaged.constraints(on.constraints),
        }
        named = {"server": config.name, "job": template.name, "constraints": packaged.CONSTRAINTS}
        for inner in dict.fromkeys(_FOLDER.findall(config.read_text(encoding="utf-8"))):
            for file, content in packaged.beside_run_configs(inner).items():
                contents[f"{inner}/{file}"] = content
                named[_FOLDERS[inner]] = f"{inner}/{file}"
        _write(folder, contents)
        written = {name: str(folder / file) for name, file in named.items()}
        return answer(screen, written, lambda files: _written(files, on))

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


def _write(folder: Path, contents: dict[str, str]) -> None:
    """Write all the files; if one of them exists, write none."""
    existing = [str(folder / name) for name in contents if (folder / name).exists() or (folder / name).is_symlink()]
    if existing:
        told = f"{', '.join(existing)} exist{'s' if len(existing) == 1 else ''}"
        raise InvalidInput("DIR", str(folder), f"a folder without these files; {told}, and nothing was written")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(content)
    except OSError as error:
        raise InvalidInput("DIR", str(folder), f"a folder that can be written ({error.strerror})") from None


def _written(files: dict[str, str], host: hosts.Host) -> str:
    return "\n".join(
        [
            *(f"wrote {file}" for file in files.values()),
            "",
            f"Install:  pip install 'llama-stack-provider-moe[{host.extra},train]' -c {files['constraints']}",
            f"Serve:    {host.command.format(file=files['server'])}",
            f"Train:    moe-train submit {files['job']} --follow",
        ]
    )


def _listed(document: dict[str, dict[str, str]]) -> RenderableType:
    parts: list[RenderableType] = []
    for heads, block, use in (
        (("RUN CONFIG", ""), "run_configs", "Write one into a folder: moe-train init DIR --server NAME"),
        (("JOB TEMPLATE", ""), "job_templates", "Submit one: moe-train submit @NAME"),
        (("PIPELINE TEMPLATE", ""), "pipeline_templates", "Run one: moe-train pipeline @NAME"),
    ):
        parts += [table(heads, document[block].items()), text(use), ""]
    return Group(*parts[:-1])
