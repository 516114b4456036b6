"""The half of `moe-train plan` that imports torch: a job's body on standard input -> its plan as one JSON object.

    python -m llama_stack_provider_moe.compute.planning.plan_command --memory BYTES [--model CONFIG] [--rows N]
        [--images N] [--image-size WxH] < JOB

prints `{"job": ..., "plan": ..., "changes": [...], "time": ..., "vision": ...}`, or `{"error": ...}`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from pydantic import ValidationError

from llama_stack_provider_moe.compute.planning.estimated_time import device_name, estimated
from llama_stack_provider_moe.compute.planning.expected_images import USUAL_IMAGES, ExpectedImages, image_size
from llama_stack_provider_moe.compute.planning.meta_model import read_config
from llama_stack_provider_moe.compute.planning.planner import Machine, Planner
from llama_stack_provider_moe.errors import InvalidInput, MoeError, shorten
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec import JOB_SPEC, Adapter, TrainingSpec
from llama_stack_provider_moe.spec.error_words import reason
from llama_stack_provider_moe.spec.expected_images import IMAGE_SIZE
from llama_stack_provider_moe.spec.recipes import RECIPES


def planned(
    body: object,
    memory_bytes: int,
    config: str | None = None,
    rows: int | None = None,
    images: ExpectedImages = USUAL_IMAGES,
) -> dict[str, object]:
    """The plan of a job.

    Args:
        body: the job.
        memory_bytes: of each GPU; for a job on the CPU, of the machine.
        config: place of the model's config; None: the place of its weights.
        rows: of a whole epoch; None if unknown.
        images: of its rows.

    Raises:
        MoeError, ValidationError: the job or its model is not valid.
    """
    spec = JOB_SPEC.validate_python(body)
    if not isinstance(spec, get_args(TrainingSpec)):
        training_recipes = ", ".join(recipe.name for recipe in RECIPES.values() if recipe.trains)
        raise InvalidInput("recipe", spec.recipe, f"one that trains: {training_recipes}")
    training: TrainingSpec = spec
    if (named := training.teacher_named()) is not None:
        field, teacher = named
        training = training.model_copy(update=training.with_teacher(local_names.whole_model(teacher, field)))
    resources = training.resources
    on_cpu = resources.gpus == 0
    machine = Machine("cpu", memory_bytes // resources.ranks) if on_cpu else Machine("cuda", memory_bytes)
    place = local_names.on_base(config or training.model, option="model")[0]
    model_config = read_config(place)[0]
    seen, without = images.of_job(training, model_config, place)
    planner = Planner(model_config, machine, seen)
    plan = planner.plan(training)
    vision = without if plan.vision is None else plan.vision.text()
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
        "time": estimated(planner, training, device_name(training), rows),
        "vision": vision,
    }


def _adapter(adapter: Adapter) -> str:
    scales = " with 8-bit scales" if adapter.quantize_scales else ""
    base = f", base in {adapter.quantize_bits} bits{scales}" if adapter.quantize_base else ""
    return f"LoRA r={adapter.rank}, plan {adapter.plan or 'by the model'}{base}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan as JSON, and return 0; or print the error, and return 2."""
    parser = argparse.ArgumentParser(prog="plan_command", description="Find the strategy with which a job fits.")
    parser.add_argument("--memory", type=int, required=True, help="bytes of each GPU, or of the machine")
    parser.add_argument("--model", help="place of the model's config")
    parser.add_argument("--rows", type=int, help="number of training rows of a whole epoch")
    parser.add_argument("--images", type=int, help="images in each row")
    parser.add_argument("--image-size", default=IMAGE_SIZE, help="pixels of each, as 1024x768")
    options = parser.parse_args(argv)
    try:
        images = ExpectedImages(options.images, image_size(options.image_size))
        print(json.dumps(planned(json.load(sys.stdin), options.memory, options.model, options.rows, images)))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc'][1:]))}: {shorten(each['input'])}: {reason(each)}"
                    for each in error.errors()]  # fmt: skip
        print(json.dumps({"error": "; ".join(problems)}))
        return 2
    except MoeError as error:
        print(json.dumps({"error": str(error)}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
