"""Prune experts without a server: the code of `moe-train experts prune`.

$ moe-train experts prune MODEL --keep 6 --rows FILE --out pruned [--dry-run]
"""

import sys
from collections.abc import Sequence

from llama_stack_provider_moe.compute.surgery.command import run
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.surgery_commands import PRUNE_COMMAND


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train experts prune`; returns 0 if OUT was written, or the dry run is shown."""
    return answered(PRUNE_COMMAND, argv, "experts prune", run)


if __name__ == "__main__":
    sys.exit(main())
