"""Keep the planner's results for a pipeline template in a table of docs/guides/pipelines.md.

python -m tests.support.planned_pipelines     rewrites the table
"""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llama_stack_provider_moe.compute.planning.estimated_time import estimated
from llama_stack_provider_moe.compute.planning.meta_model import read_config
from llama_stack_provider_moe.compute.planning.planner import Planner
from llama_stack_provider_moe.ground import strict_yaml
from llama_stack_provider_moe.spec import JOB_SPEC
from llama_stack_provider_moe.spec.pipelines import PipelineSpec
from tests.support.planned_configs import H100, ROOT

PAGE = ROOT / "docs" / "guides" / "pipelines.md"
TEMPLATE = ROOT / "job_templates" / "mistral_nemo_domains_h100.pipeline.yaml"
DENSE = ROOT / "tests" / "configs" / "mistral-nemo-12b.json"
DEVICE = "NVIDIA H100 80GB HBM3"
MARK = "<!-- planned -->\n"
HEAD = "| Part | Weights | At the peak | Tokens |\n|---|---|---|---|\n"
_TABLE = re.compile(re.escape(MARK) + r"(\n\|.*?\n(?=\n))?", re.DOTALL)


def mixed(experts: int) -> dict[str, Any]:
    """The config of the mix: Mixtral's, with the shapes of the dense model."""
    dense: dict[str, Any] = json.loads(DENSE.read_text(encoding="utf-8"))
    names = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    return {**dense, **names, "num_local_experts": experts, "num_experts_per_tok": 2}


def line(part: str) -> str:
    """The line of one part: it trains the dense model or, if it names a part, the mix."""
    pipeline = PipelineSpec.model_validate(strict_yaml.parse(TEMPLATE.read_bytes()))
    names = [each.name for each in pipeline.parts]
    body = pipeline.job_of(names.index(part), "p")
    spec: Any = JOB_SPEC.validate_python(body)
    branches = pipeline.parts[names.index("mix")].job["branches"]
    with TemporaryDirectory() as folder:
        path = DENSE
        if body["model"] == "p-mix":
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(mixed(len(branches))))
        planner = Planner(read_config(str(path))[0], H100)
        plan = planner.plan(spec)
        speed = estimated(planner, spec, DEVICE)["tokens_per_s"]
    assert plan.chosen is not None
    assert plan.chosen.estimate is not None
    assert speed is not None
    estimate, tokens = plan.chosen.estimate, speed * spec.options.max_hours * 3600
    weights = f"{estimate.terms.weights / 1e9:.1f} GB"
    return f"| {part} | {weights} | {estimate.peak_bytes / 1e9:.1f} GB, {plan.verdict} | {tokens / 1e6:.0f} million |\n"


def table() -> str:
    """The table, with the mark before it."""
    return f"{MARK}\n{HEAD}{line('math')}{line('routers')}"


def main() -> None:
    """Rewrite the table."""
    made = table()
    PAGE.write_text(_TABLE.sub(lambda _: made, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
