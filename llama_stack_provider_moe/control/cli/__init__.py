"""`moe-train`, the command line: a client of a running server, and tools that need no server.

    commands            which module has which commands, and `main`, which imports the module that it needs
    submit_commands     `moe-train submit` and `validate`, which read job files
    job_commands        commands about jobs that a server has: ls, status, logs, ...
    data_commands       `moe-train data`: upload, list, show and delete data sets
    upload              file of rows -> body of an upload
    upload_progress     shows how far an upload is
    show_data           documents about data sets -> text
    export              `moe-train export`: of a job by the server, or on this machine
    llama_cpp_setup     `moe-train export setup`
    report              `moe-train report`: what a model would train, and the memory it would take
    job_report          `moe-train report job`: one HTML file about a job
    plan                `moe-train plan`: whether a job fits on your GPUs
    planning_documents  types of the JSON of report and plan
    config              `moe-train config check`: checks a server's YAML and this machine
    guard               `moe-train guard`: checks rules for tool calls, tries conversations on shields
    act                 code that all commands share: run an action, report errors, exit
    options             options that most commands have
    help_words          the words for values in help texts
    torch_commands      commands that need torch: upcycle, mix, eval, analyze routing, ablate, export merge, check, gguf
    ablate              `moe-train ablate apply`: reads the plan
    mix                 `moe-train mix`: reads the plan
    typed_options       options of these commands, from pydantic models
    local_checks        checks the arguments of these commands, without torch
    model_checks        checks the models and adapters that they name, without torch
    local               runs these commands in separate processes; runs a supervisor
    supervisor_command  `moe-train supervisor`
    start_files         `moe-train init` and `templates`
    packaged            run configs, job templates and constraints.txt in this package
    template            job file and --set -> the body of a job
    job_file            job file in JSON or YAML -> its content
    client              client of the server's API
    documents           types of the API's documents
    sse                 parses server-sent events
    follow              polls a job until it has ended
    pull                downloads a job's artifacts
    views               shows a job while a user follows it
    show                API documents -> text
    screen              where text, JSON and errors go
    exits               exit codes

Modules here never import torch. SQLAlchemy is imported only by `moe-train supervisor` and `config check`.
"""

from llama_stack_provider_moe.control.cli.commands import main

__all__ = ["main"]
