"""How well a probe on SmolLM2-135M-Instruct detects a benign concept, cooking, in prompts of other wording.

    $ python -m benchmarks.probe_quality --keep FOLDER     # some three minutes of processor time

`benchmarks.probe_prompts` has the prompts: both sets begin alike, and the test sets have other frames and other deeds.
The sets are divided in order, so that few deeds are in two thirds. FOLDER keeps the probe, for
`benchmarks.scorer_latency`.
"""

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, machine, versions
from benchmarks.probe_prompts import PromptSets
from llama_stack_provider_moe.compute.probing.artifact import write_probe
from llama_stack_provider_moe.compute.probing.fit import fit_probe
from llama_stack_provider_moe.compute.probing.report import text
from llama_stack_provider_moe.spec import ProbeSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from smollm2 import smollm2

NAME = "SmolLM2-135M-Instruct"
PROBE = {"layers": "5,7,8,9,11,14", "split": "in_order"}


def measure(keep: Path) -> dict[str, Any]:
    """Fit and measure; the probe is kept in a folder."""
    names = PromptSets._fields
    body = {
        "recipe": "probe", "model": str(smollm2()), "data": {"sets": {name: name for name in names}}, "probe": PROBE,
        "training": {"dtype": "fp32", "batch_size": 16}, "options": {"max_length": 256},
    }  # fmt: skip

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        for name, path in PromptSets.made().write(Path(folder)).items():
            prompts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
            lines = [json.dumps({"messages": [{"role": "user", "content": prompt}]}) + "\n" for prompt in prompts]
            path.write_text("".join(lines), encoding="utf-8")
            rows[name] = path
        fitted, _ = fit_probe(ProbeSpec.model_validate(body), rows, say, lambda done, total: None)
    card = write_probe(keep, fitted.card, fitted.regressions)
    print(text(card, fitted.candidates))
    document = card.model_dump(mode="json")
    document["base"]["model"] = NAME
    return {
        "candidates": {
            str(layer): {"detected": detected, "auc": auc} for layer, (detected, auc) in fitted.candidates.items()
        },
        "card": document,
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, required=True, metavar="FOLDER", help="folder for the probe")
    found = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "versions": versions("torch", "transformers"),
        **measure(parser.parse_args().keep),
    }  # fmt: skip
    path = RESULTS / f"probe_quality_{found['date']}.json"
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
