"""The files of exact versions: every line is an exact pin, and each host's extra is in the file for that host."""

import re
import tomllib
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.cli import packaged
from llama_stack_provider_moe.control.cli.hosts import HOSTS, Host, HostName

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("constraints*.txt"))
EXACT = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.+]*")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def pins(path: Path) -> dict[str, str]:
    """Version by name of a file of constraints."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def extra(host: Host) -> list[str]:
    """What the host's extra requires. In pyproject.toml its name is the normalised one, which wheels have."""
    requirements: list[str] = EXTRAS[host.extra.replace(".", "-")]
    return requirements


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_is_an_exact_pin(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert [line for line in lines if not EXACT.fullmatch(line)] == []
    names = [line.partition("==")[0] for line in lines]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", [HostName.LLAMA_STACK_0_7, HostName.OGX])
def test_the_extra_of_a_later_host_is_exact_and_pinned_alike(name: HostName) -> None:
    found = pins(ROOT / HOSTS[name].constraints)
    for requirement in extra(HOSTS[name]):
        assert EXACT.fullmatch(requirement), requirement
        package, _, version = requirement.partition("==")
        assert found[package] == version


@pytest.mark.parametrize("host", HOSTS.values(), ids=lambda host: host.extra)
def test_each_file_has_its_host_and_no_other(host: Host) -> None:
    found = pins(ROOT / host.constraints)
    packages = {re.split(r"[=<>]", each, maxsplit=1)[0] for each in extra(host)}
    assert packages <= found.keys()
    assert host.title.split()[-1] == found["ogx" if "ogx" in packages else "llama-stack"]
    assert not {"ogx", "llama-stack"} - packages & found.keys()


@pytest.mark.parametrize("host", HOSTS.values(), ids=lambda host: host.extra)
def test_training_has_the_same_versions_on_every_host(host: Host) -> None:
    tested = pins(ROOT / "constraints.txt")
    found = pins(ROOT / host.constraints)
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors"):
        assert found[package] == tested[package]


@pytest.mark.parametrize("host", HOSTS.values(), ids=lambda host: host.extra)
def test_the_package_has_the_file(host: Host) -> None:
    assert packaged.constraints(host.constraints) == (ROOT / host.constraints).read_text(encoding="utf-8")
