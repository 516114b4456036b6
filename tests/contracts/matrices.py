"""The pages docs/reference/hosts.md and sdks.md: tables of what the tests on hosts and with SDKs have shown.

`make test-hosts` and `make test-sdks` write the results; a test that is newer than the results is shown as not run.
"""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import host_results, sdk_results

SYSTEM = Path(__file__).parents[1] / "system"
type Table = Callable[[list[str], list[list[str]]], list[str]]


def hosts(table: Table) -> list[str]:
    """Every test that runs on each host, and its outcome there."""
    results = read(host_results.FILE)
    titles = [each["title"] for each in results["hosts"].values()]
    lines = [
        "# Tests on each host",
        "",
        f"The tests of `make test-hosts` on {results['date']}. Each uses a real server of the host, in an environment "
        "of its own; `yes` with a number stands for as many cases. [Hosts](../getting-started/hosts.md) says how to "
        "start a server on each.",
        *table(["Host", "Versions"], [[each["title"], listed(each["versions"])] for each in results["hosts"].values()]),
    ]
    notes: list[str] = []
    for file, title in host_results.FILES.items():
        found = results["tests"].get(file, {})
        rows = [
            [sentence(name), *(outcome(found.get(name, {}).get(host), notes) for host in results["hosts"])]
            for name in tests_of(file)
        ]
        lines += [f"## {title}", *table(["Test", *titles], rows)]
    return [*lines, *(f"({number}) {note}.\n" for number, note in enumerate(notes, start=1))]


def sdks(table: Table) -> list[str]:
    """Every SDK, and what it did on a live server."""
    results = read(sdk_results.FILE)
    rows = results["rows"]
    return [
        "# Tests of each SDK",
        "",
        f"The tests of `make test-sdks` on {results['date']}. Each SDK is alone in an environment of its own, from the "
        "package registries, and does what a user does on a live server: it submits jobs, follows, cancels and lists "
        "them, and meets errors. [Clients](../getting-started/clients.md) says how to use them.",
        *table(["Host", "Versions"], [[each["title"], listed(each["versions"])] for each in results["hosts"].values()]),
        "## Llama Stack's SDKs",
        *table(
            ["SDK", "Version", "Calls", "Host", "Resource", "Name of a job", "SFT", "DPO", "Cancel", "Artifacts",
             "List", "Errors"],
            [llama_stack_row(row, results) for row in rows if row["sdk"] in ("Python", "npm")],
        ),
        "## OpenAI's packages",
        "",
        "The last column counts answers (npm: the objects in them) that were checked against OpenAI's published types, "
        "with no field converted, missing or extra: for Python by pydantic in strict mode, for npm by the TypeScript "
        "compiler.",
        *table(
            ["SDK", "Version", "Calls", "Host", "Training file", "Create, events", "Pause, resume, cancel",
             "Checkpoints", "Succeeds", "List by metadata", "Result file", "Errors", "Strict"],
            [openai_row(row, results) for row in rows if row["sdk"].startswith("openai")],
        ),
    ]  # fmt: skip


def read(path: Path) -> Any:
    """The results in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def listed(versions: dict[str, str]) -> str:
    """Versions, for a cell."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def tests_of(file: str) -> list[str]:
    """The names of the tests in a file of tests/system."""
    tree = ast.parse((SYSTEM / f"{file}.py").read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def sentence(name: str) -> str:
    """What a test says, by its name."""
    words = name.removeprefix("test_").replace("_", " ")
    return words[0].upper() + words[1:].replace(" s3", " S3")


def outcome(counts: dict[str, Any] | None, notes: list[str]) -> str:
    """The cell for a test on a host; why it was left out becomes a note."""
    if counts is None:
        return "not run"
    if counts.get("failed"):
        return "**no**"
    if why := counts.get("why"):
        if why not in notes:
            notes.append(why)
        return f"- ({notes.index(why) + 1})"
    passed = counts.get("passed", 0)
    return "yes" if passed == 1 else f"yes ({passed})"


def llama_stack_row(row: dict[str, Any], results: Any) -> list[str]:
    """One of Llama Stack's SDKs on a host."""
    found = row["found"]
    named = "`job_uuid`" if found["style"] == "job_uuid" else "`extra_query`"
    return [
        row["sdk"], found["version"], row["mode"], results["hosts"][row["host"]]["title"], f"`{found['resource']}`",
        named,
        yes(found["sft"] and found["status"] in ("in_progress", "completed")),
        yes(found["dpo"] and found["completed"] == "completed"), yes(found["cancelled"] == "cancelled"),
        yes(found["artifacts"] > 0), yes(found["listed"]), yes(found.get("error")),
    ]  # fmt: skip


def openai_row(row: dict[str, Any], results: Any) -> list[str]:
    """One of OpenAI's packages on a host."""
    found = row["found"]
    return [
        row["sdk"], found["version"], row["mode"], results["hosts"][row["host"]]["title"],
        "uploaded" if found["uploaded"] else "a data set", yes(found["created"] and found["events"]),
        yes(found["paused"] == found["cancelled"] == "cancelled" and found["resumed"]), yes(found["checkpoints"] > 0),
        yes(found["succeeded"]), yes(found["listed"]), yes(found["result_file"]), yes(found["errors"]),
        str(found["strict"]),
    ]  # fmt: skip


def yes(worked: object) -> str:
    """A cell."""
    return "yes" if worked else "**no**"
