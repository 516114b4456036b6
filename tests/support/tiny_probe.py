"""A probe of a tiny random model, fitted on rows that differ in their words."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from llama_stack_provider_moe.compute.probing.artifact import write_probe
from llama_stack_provider_moe.compute.probing.fit import Fitted, fit_probe
from llama_stack_provider_moe.spec import ProbeSpec
from tests.support import tiny_models

TARGETS = [f"Boil {number} eggs in {number * 7 % 31} minutes." for number in range(45)]
OTHERS = [f"Add {number} to {number * 5 % 37} and tell me." for number in range(60)]
SETTINGS: dict[str, Any] = {
    "recipe": "probe",
    "data": {"sets": {"target": "boil", "baseline": "add"}},
    "probe": {"false_positive_rate": 0.1, "layers": "0-1"},
    "training": {"dtype": "fp32"},
    "options": {"max_length": 128},
}


def write_rows(folder: Path, **sets: list[Any]) -> dict[str, Path]:
    """Files of canonical rows; a text is a user's message, a list a conversation of user and assistant in turns."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, rows in sets.items():
        files[name] = folder / f"{name}.jsonl"
        lines = [json.dumps({"messages": messages(row)}) + "\n" for row in rows]
        files[name].write_text("".join(lines), encoding="utf-8")
    return files


def messages(row: str | list[str]) -> list[dict[str, str]]:
    """The messages of such a row."""
    turns = [row] if isinstance(row, str) else row
    return [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]


def fitted_in(
    folder: Path, model: Path, targets: list[Any] = TARGETS, others: list[Any] = OTHERS, **probe: Any
) -> tuple[Fitted, list[str]]:
    """Fit a probe, and the lines that were said; `probe` changes the block of settings."""
    rows = write_rows(folder, target=targets, baseline=others)
    body = SETTINGS | {"model": str(model), "probe": SETTINGS["probe"] | probe}
    said: list[str] = []
    fitted, _ = fit_probe(ProbeSpec.model_validate(body), rows, said.append, lambda done, total: None)
    return fitted, said


@cache
def tiny_probe() -> tuple[Path, Path, Fitted]:
    """The folders of a model and of a probe of it, kept for this process."""
    root = Path(mkdtemp(prefix="tiny-probe-"))
    model = tiny_models.build("granitemoe", root / "model")
    fitted, _ = fitted_in(root / "rows", model)
    write_probe(root / "probe", fitted.card, fitted.regressions)
    return model, root / "probe", fitted
