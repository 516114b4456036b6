"""Options that most commands of `moe-train` have."""

from typing import Annotated

import typer

DEFAULT_URL = "http://127.0.0.1:8321"

Url = Annotated[str, typer.Option("--url", metavar="URL", envvar="MOE_TRAIN_URL", help="URL of the server.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar="MOE_TRAIN_API_KEY",
        help="API key, sent as a bearer token. Set the variable instead of typing it: others can see command lines.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on standard output, and errors as JSON on standard error.")
]
Images = Annotated[
    str | None,
    typer.Option(
        "--images",
        metavar="PATH",
        help="Folder, or tar file, of the images that rows name by their path in it; default: rows name no files.",
    ),
]
