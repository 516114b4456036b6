"""`moe-train plan`'s other half, which imports torch: a job's body on standard input -> its plan as one JSON object.

    python -m llama_stack_provider_moe.analysis.plan_command --memory BYTES [--model CONFIG] < job.json

prints `{"job": ..., "plan": ..., "changes": [...]}`, or `{"error": ...}`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, get_args

from pydantic import ValidationError

from llama_stack_provider_moe.analysis.blank import read_config
from llama_stack_provider_moe.analysis.planner import Machine, Planner
from llama_stack_provider_moe.errors import InvalidInput, MoeError, shorten
from llama_stack_provider_moe.spec import JOB_SPEC, TrainingSpec


def planned(body: dict[str, Any], memory_bytes: int, config: str | None = None) -> dict[str, Any]:
    """The plan of a job.

    Args:
        memory_bytes: of each GPU; of a job on the CPU, of the machine.
        config: where the model's config is; left out: where its weights are.

    Raises:
        MoeError, ValidationError: there is no such job or model.
    """
    spec = JOB_SPEC.validate_python(body)
    if not isinstance(spec, get_args(TrainingSpec)):
        raise InvalidInput("recipe", spec.recipe, "sft, dpo or circuit_breaker: others train nothing")
    training: TrainingSpec = spec
    resources = training.resources
    on_cpu = resources.gpus == 0
    machine = Machine("cpu", memory_bytes // resources.ranks) if on_cpu else Machine("cuda", memory_bytes)
    planner = Planner(read_config(config or training.model)[0], machine)
    plan = planner.plan(training)
    changes = () if plan.verdict == "fits" else planner.changes(training)
    return {
        "job": {
            "recipe": training.recipe,
            "model": training.model,
            "trains": "all weights" if training.adapter is None else _adapter(training.adapter),
            "batch_size": training.training.batch_size,
            "max_length": training.options.max_length,
            "checkpointing": training.efficiency.enable_activation_checkpointing,
            "dtype": training.training.dtype,
            "optimizer": training.optimizer.optimizer_type,
        },
        "plan": plan.as_json(),
        "changes": [{**asdict(change), "text": change.text()} for change in changes],
    }


def _adapter(adapter: Any) -> str:
    base = f", base in {adapter.quantize_bits} bits" if adapter.quantize_base else ""
    return f"LoRA r={adapter.rank}, plan {adapter.plan or 'by the model'}{base}"


def main(argv: Sequence[str] | None = None) -> int:
    """The plan as JSON, and exit code 0; or what is wrong, and 2."""
    parser = argparse.ArgumentParser(prog="plan_command", description="Which strategy a job fits with.")
    parser.add_argument("--memory", type=int, required=True)
    parser.add_argument("--model")
    options = parser.parse_args(argv)
    try:
        print(json.dumps(planned(json.load(sys.stdin), options.memory, options.model)))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc'][1:]))}: {shorten(each['input'])}: {each['msg']}"
                    for each in error.errors()]  # fmt: skip
        print(json.dumps({"error": "; ".join(problems)}))
        return 2
    except MoeError as error:
        print(json.dumps({"error": str(error)}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
