"""Which tests of the hosts pass on which host: a plugin of pytest that writes `tests/results/hosts.json`.

`make test-hosts` loads it (`-p tests.support.host_results`). A run of a part of the tests changes the outcomes of these
alone, if the hosts have the versions that the file says. `tests.contracts.matrices` makes the page
docs/reference/hosts.md from the file.
"""

import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.cli.hosts import HOSTS
from llama_stack_provider_moe.jobdir.events import now
from tests.support.other_hosts import ALL, HostUnderTest

FILE = Path(__file__).parents[1] / "results" / "hosts.json"
# The files whose tests run on every host, and what their table is called.
FILES = {
    "test_hosts": "Jobs that train, owners, tenants and the access policy",
    "test_hosts_life": "Files, restarts and open streams",
    "test_openai_hosts": "OpenAI's fine-tuning API",
    "test_guard_hosts": "Shields",
}
PACKAGES = ("ogx", "ogx-api", "llama-stack", "llama-stack-api", "fastapi", "mcp", "openai", "pydantic", "uvicorn")
VERSIONS = """
import importlib.metadata, json, platform, sys
found = {"Python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
type Counts = dict[str, int | str]

_found: dict[str, dict[str, dict[str, Counts]]] = defaultdict(lambda: defaultdict(dict))  # file, test, host
_is_part = False


def versions(host: HostUnderTest) -> dict[str, str]:
    """Versions of a host and of the packages that it needs, in its environment."""
    command = [str(host.folder / "python"), "-c", VERSIONS, *PACKAGES]
    found: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Note for which host each test is, so that its report says so."""
    for item in items:
        params = getattr(item, "callspec", None)
        for value in params.params.values() if params else ():
            if isinstance(value, HostUnderTest):
                item.user_properties.append(("host", str(value.name)))
                item.user_properties.append(("test", item.originalname))


def pytest_deselected(items: list[pytest.Item]) -> None:
    """A run of a part of the tests."""
    global _is_part
    _is_part = _is_part or bool(items)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the outcome; what fails or is skipped in its set-up counts too."""
    of = dict(report.user_properties)
    if "host" not in of or (report.when != "call" and report.outcome == "passed"):
        return
    file = Path(report.nodeid.partition("::")[0]).stem
    counts: Counts = _found[file][str(of["test"])].setdefault(str(of["host"]), {})
    counts[report.outcome] = int(counts.get(report.outcome, 0)) + 1
    if report.skipped and isinstance(report.longrepr, tuple):
        counts["why"] = report.longrepr[2].removeprefix("Skipped: ")


def document() -> dict[str, Any]:
    """The content of the file."""
    return {
        "date": f"{now():%Y-%m-%d}",
        "hosts": {str(host.name): {"title": HOSTS[host.name].title, "versions": versions(host)} for host in ALL},
        "tests": {file: _found[file] for file in FILES if file in _found},
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old results with the new outcomes in them."""
    tests: dict[str, Any] = {file: dict(found) for file, found in old["tests"].items()}
    for file, found in new["tests"].items():
        for name, hosts in found.items():
            tests.setdefault(file, {})[name] = {**tests.get(file, {}).get(name, {}), **hosts}
    return {**new, "tests": tests}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the file after a run of all tests on all hosts, whether they passed or not; or change it after another."""
    if exitstatus not in (0, 1) or not _found:
        return
    ran = {host for tests in _found.values() for hosts in tests.values() for host in hosts}
    whole = not _is_part and set(_found) == set(FILES) and ran == {str(host.name) for host in ALL}
    new = document()
    if not whole:
        old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else None
        if old is None or old["hosts"] != new["hosts"]:
            return
        new = merged(old, new)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
