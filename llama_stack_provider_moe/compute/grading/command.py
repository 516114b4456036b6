"""Grades answers where torch is: `moe-train grade`, and a server's tries of graders that load a model.

    standard input: a `GradeRequest` as JSON
    standard output: a `GradeReport` as JSON, the last line

$ python -m llama_stack_provider_moe.compute.grading.command < request.json
"""

import json
import sys

from transformers.utils import logging

from llama_stack_provider_moe.compute.grading.opening import open_rewards
from llama_stack_provider_moe.compute.models.loader import pick_device
from llama_stack_provider_moe.errors import MoeError
from llama_stack_provider_moe.graders.document import report_of
from llama_stack_provider_moe.graders.request import GradeRequest


def main() -> int:
    """Grade the answers on standard input; 0 if each has been graded, whatever its values."""
    logging.disable_progress_bar()
    try:
        asked = GradeRequest.model_validate_json(sys.stdin.buffer.read())
        device = pick_device(asked.dtype)
        with open_rewards(asked.reward, asked.grading, asked.dtype, device, asked.judges) as panel:
            graded = panel.grade([each.sample() for each in asked.answers], limits_failures=False)
    except (MoeError, ValueError) as error:
        print(str(error)[:2000], file=sys.stderr, flush=True)
        return 2
    print("\n" + json.dumps(report_of(asked.reward, graded)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
