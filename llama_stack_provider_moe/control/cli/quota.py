"""`moe-train quota`: what the user uses of a server, and what is left."""

from typing import Annotated

import typer
from rich.console import Group, RenderableType

from llama_stack_provider_moe.client.documents import Quota, QuotaList, Share
from llama_stack_provider_moe.control.cli.act import Where, answer, run
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen, table, text
from llama_stack_provider_moe.control.cli.show import moment, size

OWNER_DIGITS = 12
_NO_LIMIT = "no limit"


def register(app: typer.Typer) -> None:
    """Add `quota` to `moe-train`."""
    app.command()(quota)


def quota(
    everybody: Annotated[
        bool, typer.Option("--all", help="Show every owner's; only for administrators of the server.")
    ] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show what you use of the server, its limits, and what is left."""

    def act(server: Client, screen: Screen) -> Exit:
        if everybody:
            return answer(screen, server.quotas(), shown_all)
        return answer(screen, server.quota(), shown)

    run(Where(url, key), as_json, act)


def shown(document: Quota) -> RenderableType:
    """Render one line per limit."""
    rows = [
        ("jobs waiting", *_counted(document["waiting_jobs"])),
        ("jobs running", *_counted(document["running_jobs"])),
        ("GPU-hours in 24 h", *(_hours(document["gpu_hours"][name]) for name in ("used", "limit", "left"))),
        ("bytes stored", *(_bytes(document["stored_bytes"][name]) for name in ("used", "limit", "left"))),
    ]
    lines: list[RenderableType] = [table(("", "USED", "LIMIT", "LEFT"), rows)]
    free_at = document["gpu_hours"].get("free_at")
    if free_at:
        lines.append(text(f"GPU-hours are free again at {moment(free_at)}"))
    return Group(*lines)


def shown_all(document: QuotaList) -> RenderableType:
    """Render one line per owner."""
    if not document["data"]:
        return "nobody uses this server"
    rows = [
        (
            each["owner"][:OWNER_DIGITS], f"{each['waiting_jobs']['used']:.0f}", f"{each['running_jobs']['used']:.0f}",
            _hours(each["gpu_hours"]["used"]), _bytes(each["stored_bytes"]["used"]),
        )
        for each in document["data"]
    ]  # fmt: skip
    return table(("OWNER", "WAITING", "RUNNING", "GPU-HOURS IN 24 H", "STORED"), rows)


def _counted(share: Share) -> tuple[str, str, str]:
    limit, left = share["limit"], share["left"]
    return f"{share['used']:.0f}", _NO_LIMIT if limit is None else f"{limit:.0f}", "" if left is None else f"{left:.0f}"


def _hours(hours: float | None) -> str:
    return "" if hours is None else f"{hours:.2f}"


def _bytes(count: float | None) -> str:
    return "" if count is None else size(int(count))
