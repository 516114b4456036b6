"""The hosts that a server can be started on, by the names of `moe-train init --host`."""

from enum import StrEnum
from typing import NamedTuple

from llama_stack_provider_moe.errors import InvalidInput


class HostName(StrEnum):
    """Names for `--host`."""

    LLAMA_STACK_0_6 = "0.6"
    LLAMA_STACK_0_7 = "0.7"
    OGX = "ogx"


class Host(NamedTuple):
    """What differs between hosts for somebody who starts a server.

    Attributes:
        title: name and version.
        extra: of this package, for pip.
        constraints: the packaged file of exact versions.
        server: the run config that starts on it.
        guarded: the run configs with shields: all types of them, and rules for tool calls alone.
        command: starts `{file}`.
        is_external: whether post-training comes in through `external_apis_dir`.
    """

    title: str
    extra: str
    constraints: str
    server: str
    guarded: tuple[str, ...]
    command: str
    is_external: bool


HOSTS = {
    HostName.LLAMA_STACK_0_6: Host(
        "Llama Stack 0.6.1", "llama-stack", "constraints.txt", "quickstart", ("guarded", "tool_guard"),
        "llama stack run {file} --port 8321", False,
    ),
    HostName.LLAMA_STACK_0_7: Host(
        "Llama Stack 0.7.3", "llama-stack-0.7", "constraints-llama-stack-0.7.txt", "llama_stack_0_7",
        ("guarded", "tool_guard"),
        "llama stack run {file} --port 8321", True,
    ),
    HostName.OGX: Host(
        "OGX 1.5.0", "ogx", "constraints-ogx.txt", "ogx", ("ogx_guarded", "ogx_tool_guard"),
        "ogx run {file} --insecure --port 8321", True,
    ),
}  # fmt: skip


def chosen(name: HostName | None, server: str | None) -> tuple[Host, str]:
    """Return the host, and the name of its run config.

    Args:
        name: `--host`.
        server: `--server`; a run config for one host chooses that host.

    Raises:
        InvalidInput: the run config is for another host.
    """
    of_server = [host for host in HOSTS.values() if server in (host.server, *host.guarded)]
    of_server = of_server or [HOSTS[HostName.LLAMA_STACK_0_6]]
    if name is None:
        return of_server[0], server or of_server[0].server
    host = HOSTS[name]
    if server is not None and host not in of_server:
        raise InvalidInput("--server", server, f"{host.server}, the run config for {host.title}, or no --host {name}; "
                           f"this one is for {of_server[0].title}")  # fmt: skip
    return host, server or host.server
