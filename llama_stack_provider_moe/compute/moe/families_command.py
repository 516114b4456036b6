"""`moe-train families`: every model type of transformers with experts, what was found in it, and which laws it holds.

    $ moe-train families

`families.json` says what the tests of this package found, with the version of transformers that they ran on
(`tests.support.family_results` writes it). A type that a newer transformers brings is shown as not tested.
"""

import json
import sys
from collections.abc import Sequence
from importlib.resources import files

import transformers

from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.model_types import types_with_experts
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.local_commands import FamiliesCommand

_NOT_TESTED = "this package was tested with an older transformers, which does not have it"


def features(layout: ExpertLayout) -> list[str]:
    """What a layout says about a family, in words that fit a table; sizes are those of one model, so not here."""
    return [
        each
        for each, holds in (
            (f"{layout.scoring} router", True),
            ("experts without a gate", layout.gate_up == "up_proj"),
            ("own formula of the gate", layout.own_gate),
            ("biases", layout.biased),
            ("transposed weights", layout.transposed),
            ("bias for the choice", layout.bias_path is not None),
            ("choice by groups", layout.groups > 1),
            ("choices that compute nothing", layout.idle_choices > 0),
            ("layers with a fixed choice", bool(layout.by_token_layers)),
            ("shared experts", layout.shared_path is not None),
            ("layers without experts", bool(layout.dense_layers)),
            ("dense MLP beside the experts", _beside(layout)),
            ("own balance loss", layout.aux_loss),
            ("loop of its own", not layout.grouped_mm),
        )
        if holds
    ]


def _beside(layout: ExpertLayout) -> bool:
    layers = {layout.path(layer, "") for layer in layout.moe_layers}
    return any(name.startswith(f"{layer}.") for name in layout.dense_mlps for layer in layers)


def families() -> dict[str, object]:
    """The document that the command prints with `--json`."""
    tested = json.loads(files(__package__).joinpath("families.json").read_text(encoding="utf-8"))
    entries = {
        model_type: {"class": whole, **tested["families"].get(model_type, {"refused": _NOT_TESTED})}
        for model_type, whole in types_with_experts().items()
    }
    return {
        "transformers": transformers.__version__,
        "tested_with": tested["transformers"],
        "laws": tested["laws"],
        "families": entries,
    }


def table(document: dict[str, object]) -> list[list[str]]:
    """A row for each model type: type, class, what was found, and the laws."""
    entries: dict[str, dict[str, object]] = document["families"]  # type: ignore[assignment]
    return [
        [model_type, str(entry["class"]), ", ".join(map(str, entry.get("found", []))), _laws(entry)]  # type: ignore[call-overload]
        for model_type, entry in entries.items()
    ]


def _laws(entry: dict[str, object]) -> str:
    if "refused" in entry:
        return f"refused: {entry['refused']}"
    fails: dict[str, str] = entry["fails"]  # type: ignore[assignment]
    return "; ".join(f"not {law}: {reason}" for law, reason in fails.items()) or "all"


def main(argv: Sequence[str] | None = None) -> int:
    """`moe-train families`; the exit code is 0, or 2 for a mistake in the command line."""
    return answered(FamiliesCommand, argv, "families", _run)


def _run(command: FamiliesCommand) -> int:
    document = families()
    if command.as_json:
        print(json.dumps(document))
        return 0
    rows = table(document)
    for model_type, whole, found, laws in rows:
        print(f"{model_type} ({whole})\n    {found}{'. ' if found else ''}Laws: {laws}")
    held = sum(row[3] == "all" for row in rows)
    print(f"\n{len(rows)} model types of transformers {document['transformers']} have experts; {held} hold all laws "
          f"(tested with transformers {document['tested_with']})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
