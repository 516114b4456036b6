"""Options that most commands of `moe-train` have."""

from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8321"

Url = Annotated[str, typer.Option("--url", envvar="MOE_TRAIN_URL", help="The server.")]
Key = Annotated[
    str | None,
    typer.Option("--api-key", envvar="MOE_TRAIN_API_KEY", help="Sent as bearer token; better not typed, but set."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, errors as JSON on standard error.")]
