"""`moe-train report job`: one HTML file about a job, for people who were not there."""

import json
from pathlib import Path
from typing import Annotated

import typer

from llama_stack_provider_moe.client.documents import Job
from llama_stack_provider_moe.control.cli.act import Where, run
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidInput


def job(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="Name of the job, in any state.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="HTML file to write; it needs no other file.")
    ] = Path("report.html"),
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file about a job: figures, curves, experts, evaluation, settings. It runs no scripts."""

    def act(server: Client, screen: Screen) -> Exit:
        from llama_stack_provider_moe.control.dashboard import report  # it loads Jinja, which other commands don't need

        found = server.job(job_id)
        sources = report.Sources(
            found,
            server.metrics(job_id, limit=report.POINTS),
            server.routing(job_id, limit=report.COLUMNS),
            {name: shown for name in report.SHOWN if (shown := _shown(server, found, name)) is not None},
        )
        text = report.render(sources)
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InvalidInput("--out", str(out), f"a file that can be written: {error.strerror}") from error
        if screen.as_json:
            screen.document({"job_uuid": job_id, "file": str(out), "bytes": len(text.encode())})
        else:
            screen.say(f"wrote {out}, {len(text.encode()):,} bytes; open it in a browser")
        return Exit.OK

    run(Where(url, key), as_json, act)


def _shown(server: Client, found: Job, name: str) -> dict[str, object] | None:
    """The file of an artifact that a report shows; None if the job has none, or has not measured anything yet."""
    from llama_stack_provider_moe.control.dashboard.report import SHOWN, SHOWN_BYTES

    if not any(each["name"] == name and each["bytes"] < SHOWN_BYTES for each in found["checkpoints"]):
        return None
    listed = server.artifact_files(found["job_uuid"], name)["files"]
    file = next((each for each in listed if each["path"] == SHOWN[name]), None)
    if file is None:
        return None
    with server.artifact_file(found["job_uuid"], name, SHOWN[name], 0, file["sha256"]) as sent:
        content: dict[str, object] = json.loads(b"".join(sent.chunks))
    return content
