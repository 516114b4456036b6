"""The release check: what it says of the wheel of this tree, and that it notices what is wrong."""

import email
import tomllib
from pathlib import Path

import pytest

from tests.contracts import release
from tests.contracts.release import PACKAGE, ROOT, Wheel

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel(file: Path) -> Wheel:
    return release.read(file)


def test_the_wheel_is_what_pyproject_says(wheel: Wheel) -> None:
    assert release.wrong_metadata(wheel, PROJECT) == []
    assert release.missing_sources(wheel) == []
    assert release.missing_templates(wheel) == []
    assert wheel.file.startswith(f"{PACKAGE}-{PROJECT['version']}-py3-none-any")


def test_wrong_metadata_is_noticed(wheel: Wheel) -> None:
    other = email.message_from_string("Name: x\nVersion: 9\n\n# another")
    told = "\n".join(release.wrong_metadata(wheel._replace(metadata=other, entry_points=""), PROJECT))
    for word in ("Name is 'x'", "Version is '9'", "License-Expression is None", "classifiers", "extras", "README"):
        assert word in told
    assert "moe-train" in told


def test_missing_files_are_noticed(wheel: Wheel) -> None:
    names = wheel.names - {f"{PACKAGE}/errors.py", f"{PACKAGE}/py.typed"} | {"tests/x.py"}
    told = release.missing_sources(wheel._replace(names=names))
    assert told == [
        f"the wheel lacks {PACKAGE}/errors.py",
        f"the wheel lacks {PACKAGE}/py.typed",
        "the wheel has tests, which is not of the package",
    ]


def test_run_configs_and_templates_are_looked_for(wheel: Wheel) -> None:
    data = [*(ROOT / "run_configs").iterdir(), *(ROOT / "job_templates").iterdir()]
    whole = frozenset(f"{PACKAGE}/data/{path.name}" for path in data)
    assert release.missing_templates(wheel._replace(names=whole)) == []
    lacking = release.missing_templates(wheel._replace(names=whole - {f"{PACKAGE}/data/quickstart.yaml"}))
    assert lacking == ["the wheel lacks run_configs/quickstart.yaml"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("## [Unreleased]\n\n## [1.2.0] - 2026-01-31\n\n## [1.1.0] - 2025-12-01\n", None),
        ("## [Unreleased]\n", "newest released section is none"),
        ("## [Unreleased]\n\n## [1.1.0] - 2025-12-01\n", "newest released section is 1.1.0"),
        ("## [Unreleased]\n\n## [1.2.0]\n", "no date"),
        ("## [1.2.0] - 2026-01-31\n", "must be [Unreleased]"),
    ],
)
def test_the_change_log_must_fit_the_version(text: str, says: str | None) -> None:
    told = release.wrong_change_log(text, "1.2.0")
    assert told == [] if says is None else says in told[0]


def test_the_change_log_of_this_tree_has_an_unreleased_section_and_ordered_releases() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = [found["version"] for found in release.SECTION.finditer(text)]
    assert versions[0] == "Unreleased"
    released = [tuple(map(int, version.split("."))) for version in versions[1:]]
    assert released == sorted(released, reverse=True)


def test_a_wheel_is_checked_on_the_command_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = release.problems(file)
    assert release.main([str(file)]) == (1 if found else 0)
    assert capsys.readouterr().out.splitlines()[:-1] == found
