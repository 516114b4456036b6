"""Split experts without a server: the code of `moe-train experts split`.

$ moe-train experts split MODEL --factor 2 --out split [--dry-run]
"""

import sys
from collections.abc import Sequence

from llama_stack_provider_moe.compute.surgery.command import run
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.surgery_commands import SplitCommand


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train experts split`; returns 0 if OUT was written, or the dry run is shown."""
    return answered(SplitCommand, argv, "experts split", run)


if __name__ == "__main__":
    sys.exit(main())
