"""Keep the planner's results for the jobs that a run config names in a comment of that run config.

    python -m tests.support.planned_configs [NAME]...     rewrite the comments of all or of the given run configs

A comment is between the two marks and has a line for each template that the lines above it submit; the model's
config is the published one in `tests/configs`.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.compute.planning.meta_model import read_config
from llama_stack_provider_moe.compute.planning.planner import Machine, MemoryPlan, Planner
from llama_stack_provider_moe.spec import JOB_SPEC

ROOT = Path(__file__).parents[2]
H100 = Machine("cuda", 80 * 10**9)
# The templates' models -> the file that has their sizes; an instruction-tuned model has its base's.
CONFIGS = {
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b",
    "zai-org/GLM-4.5-Air": "glm-4.5-air",
    "ibm-granite/granite-3.0-1b-a400m-instruct": "granite-3.0-1b-a400m",
}
FIRST = "# Expected at the peak in each H100 of 80 GB, by the planner (python -m tests.support.planned_configs):\n"
LAST = "# These are estimates: measured on a CPU, not on an H100.\n"
_COMMENT = re.compile(re.escape(FIRST) + ".*?" + re.escape(LAST), re.DOTALL)
_SUBMITTED = re.compile(r"^#\s+moe-train submit (job_templates/\S+\.json)", re.MULTILINE)


def run_configs() -> list[Path]:
    """The run configs that have a comment."""
    return [path for path in sorted((ROOT / "run_configs").glob("*.yaml")) if FIRST in path.read_text("utf-8")]


def templates(path: Path) -> list[str]:
    """The templates that a run config's comments submit."""
    return _SUBMITTED.findall(path.read_text(encoding="utf-8"))


@cache
def planned(template: str) -> MemoryPlan:
    """The plan of a template's job on H100s."""
    spec: Any = JOB_SPEC.validate_python(json.loads((ROOT / template).read_text(encoding="utf-8")))
    config, _ = read_config(str(ROOT / "tests" / "configs" / f"{CONFIGS[spec.model]}.json"))
    return Planner(config, H100).plan(spec)


def line(template: str) -> str:
    """The line of one template."""
    plan = planned(template)
    assert plan.chosen is not None
    assert plan.chosen.estimate is not None, template
    estimate = plan.chosen.estimate
    terms = ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.1f}" for name, value in vars(estimate.terms).items()
                      if value >= 5e7)  # fmt: skip
    gpus = "1 GPU" if plan.processes == 1 else f"{plan.processes} GPUs, {plan.chosen.strategy}"
    name = Path(template).stem
    return f"#   {name}: {gpus}: {estimate.peak_bytes / 1e9:.1f} GB, {plan.verdict}\n#     ({terms})\n"


def comment(path: Path) -> str:
    """The whole comment."""
    return FIRST + "".join(map(line, templates(path))) + LAST


def main() -> None:
    """Rewrite the comments."""
    asked = sys.argv[1:]
    for path in (path for path in run_configs() if not asked or path.stem in asked):
        text = path.read_text(encoding="utf-8")
        made = comment(path)
        path.write_text(_COMMENT.sub(lambda _, made=made: made, text), encoding="utf-8")  # type: ignore[misc]
        print(path.name, file=sys.stderr)


if __name__ == "__main__":
    main()
