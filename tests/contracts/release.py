"""Whether a release is ready: `python -m tests.contracts.release` builds the wheel, and lists what is wrong with it.

    python -m tests.contracts.release            build the wheel, check it; exit with 1 where something is wrong
    python -m tests.contracts.release FILE.whl   check that wheel

Version, change log and metadata must agree, and the wheel must hold what the README promises of it: types, data, every
run config and every job template.
"""

import email
import email.message
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = "llama_stack_provider_moe"
SECTION = re.compile(r"^## \[(?P<version>[^]]+)\](?: - (?P<date>\S+))?$", re.MULTILINE)


class Wheel(NamedTuple):
    """What is checked of a wheel.

    Attributes:
        file: its file name.
        names: the files in it.
        metadata: its METADATA.
        entry_points: its entry_points.txt.
    """

    file: str
    names: frozenset[str]
    metadata: email.message.Message
    entry_points: str


def build(folder: Path) -> Path:
    """Build the wheel into `folder`, with the setuptools that is installed here; nothing is downloaded."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    with tempfile.TemporaryDirectory() as copied:
        source = Path(copied) / "source"
        # setuptools writes beside what it builds: from a copy, so that nothing old gets into the wheel.
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, source / name)
        subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def read(path: Path) -> Wheel:
    """Read a wheel."""
    with zipfile.ZipFile(path) as archive:
        names = frozenset(archive.namelist())
        info = next(name.rpartition("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    return Wheel(path.name, names, metadata, entry_points)


def wrong_metadata(wheel: Wheel, project: dict[str, Any]) -> list[str]:
    """Where the wheel's metadata is not what `pyproject.toml` says."""
    found = wheel.metadata
    expected = {
        "Name": project["name"],
        "Version": project["version"],
        "Summary": project["description"],
        "Requires-Python": project["requires-python"],
        "License-Expression": project["license"],
    }
    problems = [
        f"METADATA: {field} is {found[field]!r}; expected {value!r}"
        for field, value in expected.items()
        if found[field] != value
    ]
    if sorted(found.get_all("Classifier") or []) != sorted(project["classifiers"]):
        problems.append("METADATA: the classifiers are not those of pyproject.toml")
    if missing := set(project["optional-dependencies"]) - set(found.get_all("Provides-Extra") or []):
        problems.append(f"METADATA: extras {', '.join(sorted(missing))} are missing")
    if not str(found.get_payload()).lstrip().startswith(f"# {project['name']}"):
        problems.append("METADATA: the description is not the README")
    for name, target in project["scripts"].items():
        if f"{name} = {target}" not in wheel.entry_points:
            problems.append(f"entry_points.txt: {name} = {target} is missing")
    return problems


def wrong_change_log(text: str, version: str) -> list[str]:
    """Where the change log does not fit a release of `version`, which needs a dated section above all older ones."""
    sections = [(found["version"], found["date"]) for found in SECTION.finditer(text)]
    if not sections or sections[0][0] != "Unreleased":
        return ["CHANGELOG.md: the first section must be [Unreleased]"]
    if len(sections) < 2 or sections[1][0] != version:
        newest = sections[1][0] if len(sections) > 1 else "none"
        return [f"CHANGELOG.md: the newest released section is {newest}; expected [{version}] - YYYY-MM-DD"]
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", sections[1][1] or ""):
        return [f"CHANGELOG.md: [{version}] has no date; expected [{version}] - YYYY-MM-DD"]
    return []


def missing_sources(wheel: Wheel) -> list[str]:
    """Files of the package that the wheel lacks, and files of nobody that it has."""
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py")}
    ours |= {f"{PACKAGE}/py.typed"}
    ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.jsonl")}
    pages = ROOT / PACKAGE / "control" / "dashboard"
    ours |= {path.relative_to(ROOT).as_posix() for part in ("static", "templates") for path in (pages / part).iterdir()}
    problems = [f"the wheel lacks {name}" for name in sorted(ours - wheel.names)]
    tops = {name.partition("/")[0] for name in wheel.names}
    strange = sorted(top for top in tops if top != PACKAGE and not top.endswith(".dist-info"))
    return problems + [f"the wheel has {name}, which is not of the package" for name in strange]


def missing_templates(wheel: Wheel) -> list[str]:
    """Run configs and job templates of the repository that the wheel lacks."""
    inside = {name.rpartition("/")[2] for name in wheel.names if name.startswith(f"{PACKAGE}/")}
    wanted = [*(ROOT / "run_configs").iterdir(), *(ROOT / "job_templates").iterdir()]
    lacks = sorted(path.relative_to(ROOT).as_posix() for path in wanted if path.is_file() and path.name not in inside)
    return [f"the wheel lacks {name}" for name in lacks]


def problems(path: Path) -> list[str]:
    """All that is wrong with a release of this wheel."""
    wheel = read(path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    change_log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return [
        *wrong_metadata(wheel, project),
        *wrong_change_log(change_log, project["version"]),
        *missing_sources(wheel),
        *missing_templates(wheel),
    ]


def main(words: list[str]) -> int:
    """Check a wheel; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(words[0]) if words else build(Path(folder))
        found = problems(path)
        for problem in found:
            print(problem)
        print(f"{path.name}: {len(found)} problem(s)" if found else f"{path.name}: ready")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
