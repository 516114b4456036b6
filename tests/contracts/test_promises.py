"""Promises are tested: templates load, every field is documented and read, the package says what it needs."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.core
import typer.main

from llama_stack_provider_moe.control.cli import commands
from llama_stack_provider_moe.ground import strict_yaml
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.pipelines import REFERENCES, PipelineSpec
from tests.contracts import reference
from tests.contracts.fields_read import read_fields

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "job_templates").glob("*.json"))
PIPELINES = sorted((ROOT / "job_templates").glob("*.pipeline.yaml"))
README = ROOT / "README.md"
SETTINGS = ROOT / "docs" / "reference" / "settings.md"
COMMANDS = ROOT / "docs" / "reference" / "cli.md"
SOURCES = sorted((ROOT / "llama_stack_provider_moe").rglob("*.py"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_template_is_a_valid_job(path: Path) -> None:
    body = json.loads(path.read_text(encoding="utf-8"))
    spec = JOB_SPEC.validate_python(body)
    assert path.stem.endswith(spec.recipe)
    # Sparse in, full out: what the template states arrives, and every other field has its default.
    assert arrives(body, spec.model_dump())


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_pipeline_template_is_valid(path: Path) -> None:
    asked = PipelineSpec.model_validate(strict_yaml.parse(path.read_bytes()))
    for at, part in enumerate(asked.parts):
        spec = JOB_SPEC.validate_python(asked.job_of(at, "p"))
        stated = {name: value for name, value in part.job.items() if "parts." not in json.dumps(value)}
        assert arrives(stated, spec.model_dump())
    recipes = [part.job["recipe"] for part in asked.parts]
    assert recipes.count("sft") >= 4, "three branches or more, and the routers"
    assert "mix" in recipes


def test_every_setting_that_may_name_a_job_may_name_a_part() -> None:
    """Settings whose descriptions say so; and those of the parts of a job."""
    told = {
        path
        for path, field in every_field(JOB_SPEC)
        if re.search(
            r"one of your jobs|named as in `model`|name of a job|or job that fitted", field.get("description") or ""
        )
        or path.endswith("_analysis.job")
    }
    assert told == {*REFERENCES}


def every_field(adapter: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and schema of each field of each kind of job; * is each entry of a list or an object."""
    schema = adapter.json_schema()

    def inside(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        for option in (*node.get("anyOf", ()), *node.get("oneOf", ())):
            yield from inside(option, path)
        for entries in (node.get("items"), *node.get("patternProperties", {}).values()):
            if entries:
                yield from inside(entries, f"{path}.*")
        for name, field in node.get("properties", {}).items():
            where = f"{path}.{name}".removeprefix(".")
            yield where, field
            yield from inside(field, where)

    yield from inside(schema, "")


def arrives(stated: Any, full: Any) -> bool:
    if isinstance(stated, dict):
        return all(key in full and arrives(value, full[key]) for key, value in stated.items())
    if isinstance(stated, list):
        return len(stated) == len(full) and all(map(arrives, stated, full))
    return bool(stated == full)


def test_there_is_a_template_for_each_recipe_and_family() -> None:
    stems = {path.stem for path in TEMPLATES}
    assert {"granite_moe_sft", "granite_moe_dpo", "mixtral_dpo", "qwen3_moe_sft", "llama_sft"} <= stems
    assert {"qwen3_moe_experts_sft", "qwen3_moe_4bit_sft"} <= stems
    assert {"llama_circuit_breaker", "qwen3_moe_circuit_breaker"} <= stems


def test_every_field_is_documented() -> None:
    """With its default and range; `test_docs` compares the whole page with the models."""
    lines = SETTINGS.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("| `")]
    documented = {(row[0], row[-2], row[-1]) for row in rows}
    told = {
        (f"`{name}`", reference.default(field), reference.allowed(field).replace("|", "\\|"))
        for _, name, field in reference.fields()
    }
    assert told <= documented, sorted(told - documented)


def test_every_field_says_what_it_does() -> None:
    silent = [name for _, name, field in reference.fields() if not field.description and field.is_required()]
    silent += [
        name
        for _, name, field in reference.fields()
        if not field.description and reference.default(field) != "see below"
    ]
    assert not silent


def test_every_field_is_read_by_code() -> None:
    spec = ROOT / "llama_stack_provider_moe" / "spec"
    inside = [path for path in SOURCES if path.is_relative_to(spec)]
    read = read_fields([path for path in SOURCES if path not in inside], inside)
    unread = {name for _, name, _ in reference.fields() if name.rpartition(".")[2] not in read}
    assert not unread, f"settings that nobody reads: {sorted(unread)}"


def test_a_field_that_only_its_validator_reads_is_found(tmp_path: Path) -> None:
    defined, using = tmp_path / "spec.py", tmp_path / "using.py"
    defined.write_text(
        "class Block:\n"
        "    @field_validator('checked')\n"
        "    def _check(self):\n        return self.checked\n"
        "    @property\n"
        "    def used(self):\n        return self.below\n"
        "    @property\n"
        "    def unused(self):\n        return self.dead\n"
    )
    using.write_text("print(block.used, block.direct, checked)\n")
    read = read_fields([using], [defined])
    assert {"used", "below", "direct"} <= read
    assert not {"checked", "dead"} & read


def test_readme_names_the_two_commands_first() -> None:
    text = README.read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", text, flags=re.MULTILINE)
    assert commands[:2] == ["demo", "test"]


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_readme_names_commands_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    known = typer.main.get_command(commands.app_of())
    assert isinstance(known, typer.core.TyperGroup)
    assert set(re.findall(r"`?moe-train ([a-z][a-z-]*)", text)) <= set(known.commands) | {"is"}


def test_every_option_of_a_command_is_documented() -> None:
    known = typer.main.get_command(commands.app_of())
    assert isinstance(known, typer.core.TyperGroup)
    sections = dict(
        re.findall(r"^## moe-train ([a-z-]+)\n(.*?)(?=^## |\Z)", COMMANDS.read_text(encoding="utf-8"), re.M | re.S)
    )
    for name in ("ls", "status", "logs", "cancel", "resume", "artifacts", "rm"):
        options = {option for each in known.commands[name].params for option in each.opts if option.startswith("--")}
        assert options - {"--help"} == set(re.findall(r"^\| `(--[a-z-]+)", sections[name], re.M)), name


def test_base_install_is_light() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {re.split(r"[<>=!\[; ]", line)[0] for line in project["dependencies"]}
    assert not base & {"torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "triton", "llama-stack"}
    assert project["name"] == "llama-stack-provider-moe"
    assert project["license"] == "Apache-2.0"


def test_constraints_pin_exact_versions_and_name_no_host() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 50
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+( ; .*)?", line) for line in pins)
