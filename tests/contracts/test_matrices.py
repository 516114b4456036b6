"""The tables of hosts and SDKs come from results; what pages say beside them agrees with the results."""

import re

import pytest

from tests.contracts import matrices
from tests.contracts.doc_blocks import ROOT
from tests.support import host_results, sdk_results

CLIENTS = ROOT / "docs" / "getting-started" / "clients.md"
ROW = re.compile(r"^\| (Python|npm) \| ([\d., ]+) \| `([\w.]+)` \| (.+) \|$", re.MULTILINE)


@pytest.mark.parametrize("file", host_results.FILES)
def test_results_are_of_tests_that_exist(file: str) -> None:
    found = matrices.read(host_results.FILE)
    assert set(found["tests"].get(file, {})) <= set(matrices.tests_of(file)), "run `make test-hosts`"
    for name, hosts in found["tests"].get(file, {}).items():
        assert set(hosts) == set(found["hosts"]), name


def test_every_test_of_the_results_has_passed_or_does_not_apply() -> None:
    for tests in matrices.read(host_results.FILE)["tests"].values():
        for name, hosts in tests.items():
            assert not any(counts.get("failed") for counts in hosts.values()), name
            assert any(counts.get("passed") for counts in hosts.values()), name


def test_what_clients_must_write_is_what_was_tested() -> None:
    rows = [row for row in matrices.read(sdk_results.FILE)["rows"] if row["sdk"] in ("Python", "npm")]
    tested = {(row["sdk"], row["found"]["version"], row["found"]["resource"], row["found"]["style"]) for row in rows}
    written = {
        (sdk, version, resource, "extra_query" if "extra_query" in name else "job_uuid")
        for sdk, versions, resource, name in ROW.findall(CLIENTS.read_text(encoding="utf-8"))
        for version in versions.split(", ")
    }
    assert written == tested


def test_cells() -> None:
    notes: list[str] = []
    left_out = {"skipped": 1, "why": "not here"}
    counted = (None, {"passed": 1}, {"passed": 4}, {"passed": 3, "failed": 1}, left_out)
    cells = [matrices.outcome(counts, notes) for counts in counted]
    assert cells == ["not run", "yes", "yes (4)", "**no**", "- (1)"]
    assert notes == ["not here"]
    assert matrices.sentence("test_files_in_s3") == "Files in S3"
