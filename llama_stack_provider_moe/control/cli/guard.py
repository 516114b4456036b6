"""`moe-train guard`: check a file of rules for tool calls, and try a conversation on shields."""

from pathlib import Path
from typing import Annotated, TypedDict

import typer
from rich.console import Group, RenderableType

from llama_stack_provider_moe.client.guard_documents import ShieldVerdict
from llama_stack_provider_moe.control.cli.act import Where, answer, end, run
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.help_words import App
from llama_stack_provider_moe.control.cli.job_file import read_value
from llama_stack_provider_moe.control.cli.options import DEFAULT_URL, Json, Key, Url
from llama_stack_provider_moe.control.cli.screen import Screen, table, text
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground.counting import number_of
from llama_stack_provider_moe.ground.json_kinds import content_of

RULES = "rules"  # how `run --rules` names its only shield
app = App(help="Check rules for tool calls, and try conversations on shields.", no_args_is_help=True)


class CheckedTool(TypedDict):
    """What rules say about one tool."""

    tool: str
    arguments: list[str]
    principals: list[str]
    rules: int


class CheckedRules(TypedDict):
    """A file of rules."""

    file: str
    tools: list[CheckedTool]
    examples: int
    failures: list[str]
    warnings: list[str]


class Verdicts(TypedDict):
    """What shields say about a conversation."""

    file: str
    messages: int
    verdicts: list[ShieldVerdict]


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML of rules for tool calls.")], as_json: Json = False
) -> None:
    """Check a file of rules, and try its examples. Exit code 1 if an example gets another verdict than it says."""

    def act(screen: Screen) -> Exit:
        document = checked(file)
        answer(screen, document, _shown_rules)
        return Exit.FAILED if document["failures"] else Exit.OK

    end(as_json, act)


@app.command(name="run")
def try_out(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="JSON or YAML: messages, or an object with them; - for standard input."),
    ],
    shield: Annotated[
        list[str] | None,
        typer.Option("--shield", metavar="ID", help="Shield of the server; default: all of them. Repeatable."),
    ] = None,
    session: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the session, which a trajectory needs.")
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option("--rules", metavar="FILE", help="YAML of rules for tool calls; then no server is asked."),
    ] = None,
    principal: Annotated[
        str, typer.Option(metavar="NAME", help="With --rules: who would run the tool calls.")
    ] = "anonymous",
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Try a conversation on the shields of a server. Exit code 1 if one objects with level error."""

    def alone(screen: Screen) -> Exit:
        assert rules is not None
        if shield or session is not None:
            raise InvalidInput("--rules", str(rules), "no --shield and no --session, because no server is asked")
        return _told(screen, _by_rules(file, rules, principal))

    def ask(server: Client, screen: Screen) -> Exit:
        messages = _messages(file)
        names = shield or [each["identifier"] for each in server.shields()["data"]]
        if not names:
            raise InvalidInput.missing("--shield", f"a shield of {server.url}, which has none")
        found = [server.run_shield(name, messages, session) for name in names]
        return _told(screen, Verdicts(file=file, messages=len(messages), verdicts=found))

    if rules is not None:
        end(as_json, alone)
    run(Where(url, key), as_json, ask)


def checked(file: Path) -> CheckedRules:
    """Return what a file of rules says, and which of its examples fail.

    Raises:
        InvalidInput: the file can't be read, or rules are not valid.
    """
    # jsonschema and yaml take longer to import than other commands take to run.
    from llama_stack_provider_moe.shields.examples import failures
    from llama_stack_provider_moe.shields.rules import open_places, read_rules

    rules = read_rules(file, "FILE")
    tools = []
    for name, tool in rules.tools.items():
        properties = tool.parameters.get("properties")
        arguments = list(properties) if isinstance(properties, dict) else []
        tools.append(CheckedTool(tool=name, arguments=arguments, principals=tool.principals, rules=len(tool.rules)))
    warnings = [f"tools.{each.tool}: nothing limits the text {each.argument!r}" for each in open_places(rules)]
    if not rules.examples:
        warnings.append("examples: there are none, so nothing shows that the rules do what you mean")
    return {"file": str(file), "tools": tools, "examples": len(rules.examples), "failures": failures(rules),
            "warnings": warnings}  # fmt: skip


def _by_rules(file: str, rules: Path, principal: str) -> Verdicts:
    from llama_stack_provider_moe.shields.messages import canonical
    from llama_stack_provider_moe.shields.rules import read_rules
    from llama_stack_provider_moe.shields.tool_guard import ToolGuard

    messages = _messages(file)
    found = ToolGuard(read_rules(rules, "--rules")).verdict(canonical(messages), principal).violation
    verdict = ShieldVerdict(
        shield_id=RULES,
        violation=None if found is None else {
            "violation_level": found.level, "user_message": found.user_message, "metadata": found.metadata,
        },
    )  # fmt: skip
    return {"file": file, "messages": len(messages), "verdicts": [verdict]}


def _messages(file: str) -> list[object]:
    content = read_value(file, "messages, or an object with messages")
    found = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(found, list):
        raise InvalidInput("FILE", file, f"a list of messages, or an object with messages; {content_of(content)}")
    return found


def _told(screen: Screen, document: Verdicts) -> Exit:
    answer(screen, document, _shown_verdicts)
    levels = [each["violation"]["violation_level"] for each in document["verdicts"] if each["violation"] is not None]
    return Exit.FAILED if "error" in levels else Exit.OK


def _shown_rules(document: CheckedRules) -> RenderableType:
    rows = [
        (each["tool"], ", ".join(each["arguments"]) or "none", ", ".join(each["principals"]), str(each["rules"]))
        for each in document["tools"]
    ]
    held = document["examples"] - len(document["failures"])
    tools = number_of(len(document["tools"]), "tool")
    lines = [f"{document['file']}: {tools}; {held} of {document['examples']} examples hold"]
    lines += [f"  failed: {each}" for each in document["failures"]]
    lines += [f"  warning: {each}" for each in document["warnings"]]
    return Group(table(("TOOL", "ARGUMENTS", "FOR", "RULES"), rows), *map(text, lines))


def _shown_verdicts(document: Verdicts) -> RenderableType:
    rows = []
    for each in document["verdicts"]:
        violation = each["violation"]
        if violation is None:
            rows.append((each["shield_id"], "none", "", ""))
            continue
        rule = str(violation["metadata"].get("rule", ""))
        rows.append((each["shield_id"], violation["violation_level"], rule, violation["user_message"] or ""))
    return table(("SHIELD", "VIOLATION", "RULE", "MESSAGE"), rows)


def register(moe_train: typer.Typer) -> None:
    """Add `guard` to `moe-train`."""
    moe_train.add_typer(app, name="guard")
