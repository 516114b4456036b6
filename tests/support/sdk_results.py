"""What each generation of each SDK did on a live server: the rows of `tests/results/sdks.json`.

`tests/system/test_sdk_matrix.py` writes what has run; a run of a part keeps the other rows, if their host has the same
versions. `tests.contracts.matrices` makes the page docs/reference/sdks.md from the file.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from llama_stack_provider_moe.control.cli.hosts import HOSTS, HostName
from llama_stack_provider_moe.jobdir.events import now
from tests.support.host_results import versions
from tests.support.other_hosts import ALL

FILE = Path(__file__).parents[1] / "results" / "sdks.json"


class Case(NamedTuple):
    """One SDK on one host.

    Attributes:
        host: the host.
        sdk: `Python`, `npm` (Llama Stack's), `openai (Python)` or `openai (npm)`.
        asked: the version, or what the package registry decides: `newest`, or a limit such as `<3`.
        mode: `sync` or `async`.
    """

    host: HostName
    sdk: str
    asked: str
    mode: str

    @property
    def name(self) -> str:
        """Begins the names of its jobs."""
        words = "-".join([self.sdk, self.asked, self.mode])
        return "".join(letter if letter.isalnum() else "-" for letter in words.lower()).strip("-")


def write(cases: list[Case], found: dict[Case, dict[str, Any]]) -> None:
    """Write the file: one object for each case that has run, in the order of the cases."""
    used = {case.host for case in cases}
    hosts = {str(host.name): {"title": HOSTS[host.name].title, "versions": versions(host)} for host in ALL
             if host.name in used}  # fmt: skip
    old = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"hosts": {}, "rows": []}
    kept = {Case(HostName(row["host"]), row["sdk"], row["asked"], row["mode"]): row["found"] for row in old["rows"]
            if old["hosts"].get(row["host"]) == hosts.get(row["host"])}  # fmt: skip
    found = kept | found
    rows = [{**case._asdict(), "host": str(case.host), "found": found[case]} for case in cases if case in found]
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(
        json.dumps({"date": f"{now():%Y-%m-%d}", "hosts": hosts, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
