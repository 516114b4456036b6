"""Checks a server's configuration before the server uses it; `moe-train config check` and the start report the same.

problems      problems that pydantic found in a `config:` -> lines that name path, value and expectation
run_yaml      a host's run YAML -> our providers in it, read as the host reads it
surroundings  what a configuration needs on this machine: folders, database, interpreters, variables
start         a server that can't start ends with these lines instead of a traceback
"""
