"""Add experts without a server: the code of `moe-train experts add`.

$ moe-train experts add MODEL --count 1 --noise 0.01 --rows FILE --out extended [--dry-run]
"""

import sys
from collections.abc import Sequence

from llama_stack_provider_moe.compute.surgery.command import run
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.surgery_commands import ADD_EXPERTS_COMMAND


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train experts add`; returns 0 if OUT was written, or the dry run is shown."""
    return answered(ADD_EXPERTS_COMMAND, argv, "experts add", run)


if __name__ == "__main__":
    sys.exit(main())
