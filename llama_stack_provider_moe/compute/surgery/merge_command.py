"""Merge experts without a server: the code of `moe-train experts merge`.

$ moe-train experts merge MODEL --keep 6 --rows FILE --out merged-experts [--dry-run]
"""

import sys
from collections.abc import Sequence

from llama_stack_provider_moe.compute.surgery.command import run
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.surgery_commands import MERGE_EXPERTS_COMMAND


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train experts merge`; returns 0 if OUT was written, or the dry run is shown."""
    return answered(MERGE_EXPERTS_COMMAND, argv, "experts merge", run)


if __name__ == "__main__":
    sys.exit(main())
