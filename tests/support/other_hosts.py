"""Every host that this package runs on, each started from an environment of its own.

`make hosts` makes the environments of OGX and of Llama Stack 0.7, without torch, from our extras and their constraints;
MOE_TEST_HOSTS names another folder with such environments. Llama Stack 0.6.1 is in the environment of the tests.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from llama_stack_provider_moe.control.cli.hosts import HOSTS, HostName
from tests.support.host_harness import RUN_CONFIGS, Server, merged, run_config, serving

ENVIRONMENTS = Path(os.environ.get("MOE_TEST_HOSTS", RUN_CONFIGS.parent / ".cache" / "hosts"))
CRUD = ["create", "read", "update", "delete"]
POLICY = [
    {"permit": {"actions": CRUD}, "when": "user with admin in roles"},
    {"permit": {"actions": CRUD}, "when": "user is owner"},
    {"permit": {"actions": ["create"]}},
]
# The quickstart of 0.6.1 has no files; this is what a run YAML needs for them.
FILES = {
    "provider_id": "localfs", "provider_type": "inline::localfs",
    "config": {"storage_dir": "${env.MOE_STATE_DIR}/host-files",
               "metadata_store": {"table_name": "files_metadata", "backend": "sql_default"}},
}  # fmt: skip


class HostUnderTest(NamedTuple):
    """A host, and what differs between hosts for a test.

    Attributes:
        name: of `moe-train init --host`.
        has_datasets: whether it has data sets.
        has_tenants: whether users may have a tenant.
        purpose: of an uploaded file.
    """

    name: HostName
    has_datasets: bool
    has_tenants: bool
    purpose: str

    @property
    def folder(self) -> Path:
        """The programs of its environment."""
        if self.name is HostName.LLAMA_STACK_0_6:
            return Path(sys.executable).parent
        return ENVIRONMENTS / HOSTS[self.name].extra / "bin"

    @property
    def command(self) -> list[str | Path]:
        """Starts it."""
        program, *words = HOSTS[self.name].command.partition(" {file}")[0].split()
        insecure = ["--insecure"] if self.name is HostName.OGX else []
        return [self.folder / program, *words, *insecure]


ALL = [
    HostUnderTest(HostName.LLAMA_STACK_0_6, has_datasets=True, has_tenants=False, purpose="assistants"),
    HostUnderTest(HostName.LLAMA_STACK_0_7, has_datasets=True, has_tenants=False, purpose="assistants"),
    HostUnderTest(HostName.OGX, has_datasets=False, has_tenants=True, purpose="fine-tune"),
]


def hosts(*kept: HostName, among: Sequence[HostUnderTest] = ALL) -> list[Any]:
    """Parameters for tests on each host; those on others than `kept` are wide. Each host is kept in some file."""
    return [pytest.param(host, id=host.name, marks=[] if host.name in kept else pytest.mark.wide) for host in among]


def required(host: HostUnderTest) -> HostUnderTest:
    """The host, whose environment is there; else the test is skipped."""
    if not host.command[0].exists():  # type: ignore[union-attr]
        pytest.skip(f"no environment of {HOSTS[host.name].title} in {ENVIRONMENTS}; `make hosts` makes it")
    return host


@contextmanager
def serving_on(
    host: HostUnderTest,
    folder: Path,
    provider: dict[str, Any],
    stack: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server on a host, from the run config for it.

    Args:
        host: the host.
        folder: for the run YAML and the state.
        provider: changes to the `config:` of our provider.
        stack: changes to the run YAML.
        env: added to this process's environment.
    """
    about = HOSTS[host.name]
    own: dict[str, Any] = {"external_apis_dir": str(RUN_CONFIGS / "external_apis")} if about.is_external else {}
    if host.name is HostName.LLAMA_STACK_0_6:
        own = {"apis": ["datasetio", "files", "post_training"], "providers": {"files": [FILES]}}
    config = run_config(RUN_CONFIGS / f"{about.server}.yaml", folder, provider, merged(own, stack or {}))
    with serving(config, folder / "state", env=env, command=host.command) as running:
        yield running


def upload(server: Server, host: HostUnderTest, content: bytes, name: str = "rows.jsonl", token: str = "") -> str:
    """Upload a file to the host; returns its id."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answer = httpx.post(
        server.url + "/v1/files", headers=headers, data={"purpose": host.purpose}, files={"file": (name, content)},
        timeout=60,
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def register(server: Server, host: HostUnderTest, dataset_id: str, rows: list[dict[str, Any]], token: str = "") -> str:
    """Register rows as a data set of the host; returns its id."""
    is_old = host.name is HostName.LLAMA_STACK_0_6  # the purpose is gone in 0.7
    body = {"dataset_id": dataset_id, "purpose": "post-training/messages" if is_old else "eval/messages-answer",
            "source": {"type": "rows", "rows": rows}}  # fmt: skip
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    httpx.post(server.url + "/v1beta/datasets", json=body, headers=headers, timeout=60).raise_for_status()
    return dataset_id
