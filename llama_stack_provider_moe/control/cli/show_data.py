"""Documents about uploaded data sets -> text for users."""

from rich.console import Group, RenderableType

from llama_stack_provider_moe.client.dataset_documents import (
    Dataset,
    DatasetList,
    DeletedDataset,
    ErasedFeedback,
    KeptFeedback,
    PushedDataset,
)
from llama_stack_provider_moe.control.cli.screen import table, text
from llama_stack_provider_moe.control.cli.show import moment, size

VERSION_DIGITS = 12
LISTED = 12  # names of columns


def pushed(document: PushedDataset) -> RenderableType:
    """Say which version an upload made, and how a job names it."""
    name, version = document["name"], document["sha256"][:VERSION_DIGITS]
    again = "" if document["is_new"] else "; the same rows were stored before"
    names = list(document["columns"])
    columns = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    return Group(
        text(f"data set {name}, version {version}: {document['rows']:,} rows, {size(document['bytes'])}{again}"),
        text(f"columns: {columns}"),
        text(f"in a job: data.dataset_id: {name}, or {name}@{version} for this version"),
    )


def datasets(listed: DatasetList) -> RenderableType:
    """Render one line per data set, by name."""
    used = text(f"{size(listed['used_bytes'])} of {size(listed['quota_bytes'])} used")
    if not listed["data"]:
        return Group(text("no data sets"), used)
    rows = [
        (each["name"], each["sha256"][:VERSION_DIGITS], f"{each['rows']:,}", size(each["bytes"]),
         moment(each["created_at"]), str(each["versions"]), size(each["total_bytes"]))
        for each in listed["data"]
    ]  # fmt: skip
    shown = table(("NAME", "VERSION", "ROWS", "SIZE", "CREATED", "VERSIONS", "ALL VERSIONS"), rows)
    more = [text(f"there are more: moe-train data ls --after {rows[-1][0]}")] if listed["has_more"] else []
    return Group(shown, used, *more)


def dataset(document: Dataset) -> RenderableType:
    """Render the versions of a data set, the current one first, and the columns of each."""
    rows = [
        (each["sha256"][:VERSION_DIGITS], f"{each['rows']:,}", size(each["bytes"]), moment(each["created_at"]),
         ", ".join(_column(name, count, each["rows"]) for name, count in each["columns"].items()))
        for each in document["versions"]
    ]  # fmt: skip
    current = text(f"{document['name']}: jobs read version {rows[0][0]}, unless they name another")
    more = [text("there are older versions")] if document["has_more"] else []
    return Group(current, table(("VERSION", "ROWS", "SIZE", "CREATED", "COLUMNS"), rows), *more)


def deleted(document: DeletedDataset) -> RenderableType:
    """Say what was deleted."""
    count = len(document["versions"])
    what = f"version {document['versions'][0][:VERSION_DIGITS]}" if count == 1 else f"{count} versions"
    return f"data set {document['name']}: {what} deleted, {size(document['bytes'])}; jobs keep their copies of the rows"


def flagged(document: KeptFeedback) -> RenderableType:
    """Say how many conversations shields have flagged, and how a job names them."""
    left_out = f"{document['left_out']:,} more that no job could take, such as with a tool call that is not JSON"
    if not document["rows"]:
        none = "none of your conversations is kept as flagged"
        return Group(text(none), text(f"but for {left_out}")) if document["left_out"] else none
    return Group(
        text(f"{document['rows']:,} of your conversations were flagged, {document['answered']:,} of them end with an "
             f"answer; {size(document['bytes'])}"),
        *([text(f"left out: {left_out}")] if document["left_out"] else []),
        text("in a job: data.dataset_id: feedback:all, or feedback:answered; as a data set: --name NAME"),
    )  # fmt: skip


def erased(document: ErasedFeedback) -> RenderableType:
    """Say what was deleted."""
    return f"flagged conversations: {size(document['bytes'])} deleted; data sets and jobs keep their copies"


def _column(name: str, count: int, rows: int) -> str:
    return name if count == rows else f"{name} (in {count:,})"
