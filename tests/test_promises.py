"""Promises are tested: templates load, every field is documented and read, the package says what it needs."""

import ast
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.spec import JOB_SPEC
from tests import reference

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted((ROOT / "job_templates").glob("*.json"))
SOURCES = sorted((ROOT / "llama_stack_provider_moe").rglob("*.py"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_template_is_a_valid_job(path: Path) -> None:
    body = json.loads(path.read_text(encoding="utf-8"))
    spec = JOB_SPEC.validate_python(body)
    assert path.stem.endswith(spec.recipe)
    # Sparse in, full out: what the template states arrives, and every other field has its default.
    assert arrives(body, spec.model_dump())


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


def test_readme_reference_is_current() -> None:
    text = reference.README.read_text(encoding="utf-8")
    assert text == reference.embedded(text), "run `python -m tests.reference`"


def test_every_field_says_what_it_does() -> None:
    silent = [name for _, name, field in reference.fields() if not field.description and field.is_required()]
    silent += [
        name
        for _, name, field in reference.fields()
        if not field.description and reference.default(field) != "see below"
    ]
    assert not silent


def test_every_field_is_read_by_code() -> None:
    read: set[str] = set()
    for path in SOURCES:
        if path.name == "spec.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    unread = {name for _, name, _ in reference.fields() if name.rpartition(".")[2] not in read}
    assert not unread, f"settings that nobody reads: {sorted(unread)}"


def test_readme_names_the_two_commands_first() -> None:
    text = reference.README.read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", text, flags=re.MULTILINE)
    assert commands[:2] == ["demo", "test"]


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
