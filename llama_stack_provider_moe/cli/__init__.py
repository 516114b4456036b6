"""`moe-train`, the face to a person and to scripts: a client of a running server, and the supervisor by hand.

    commands    what can be typed
    options     what most commands have
    export      `moe-train export`: of a job, or here
    gguf        `moe-train export setup` and `gguf`
    template    FILE and --set -> the body of a job
    server      the API over HTTP
    sse         server-sent events out of lines
    follow      a job's states and output until it has ended
    pull        a job's artifacts into a folder
    views       what is said while a job is followed
    report      `moe-train report`: what a model would train and take
    plan        `moe-train plan`: how a job would fit on GPUs
    show        documents of the API -> text
    screen      where text, JSON and errors go
    run_config  a run YAML -> ProviderConfig

Exit codes are `exits.Exit`. Never imports torch, and SQLAlchemy only for `moe-train supervisor`.
"""

from llama_stack_provider_moe.cli.commands import main

__all__ = ["main"]
