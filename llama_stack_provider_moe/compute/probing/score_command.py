"""Scores without a server: the code of `moe-train probe score`.

$ moe-train probe score PROBE FILE
"""

import json
import sys
from collections.abc import Sequence
from itertools import batched
from pathlib import Path

from transformers.utils import logging

from llama_stack_provider_moe.compute.probing.scoring import ReadProbe, load_probes
from llama_stack_provider_moe.compute.probing.texts import Unscorable, as_conversation
from llama_stack_provider_moe.errors import DataError, InvalidInput
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.shields.intervals import clopper_pearson
from llama_stack_provider_moe.shields.scores import Score
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.local_rows import scored_rows
from llama_stack_provider_moe.spec.probe_commands import ScoreCommand

_NAME = "PROBE"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train probe score`; returns 0 if every conversation has a score."""
    logging.disable_progress_bar()
    return answered(ScoreCommand, argv, "probe score", _run)


def _run(command: ScoreCommand) -> int:
    rows = [as_conversation(json.loads(line)) for line in scored_rows(Path(command.file))]
    probe = ReadProbe.at(_NAME, local_names.probe_folder(command.probe, _NAME))
    loaded, refused = load_probes([probe])
    if refused:
        raise InvalidInput(_NAME, command.probe, refused[_NAME])
    scores: list[Score] = []
    for chunk in batched(enumerate(rows, start=1), command.batch_size):
        views = []
        for number, row in chunk:
            try:
                views.append(loaded[_NAME].reader.prompts(row))
            except Unscorable as problem:
                raise DataError(f"{command.file}: row {number} can't be scored: {problem}") from None
        scores += loaded[_NAME].score(views, command.batch_size)
        if not command.as_json:
            _show(scores, len(scores) - len(views))
    flagged = sum(score.is_flagged for score in scores)
    low, high = clopper_pearson(flagged, len(scores))
    if command.as_json:
        lines = [{**score._asdict(), "flagged": score.is_flagged} for score in scores]
        print(json.dumps({"scores": lines, "flagged": flagged, "rows": len(scores), "low": low, "high": high}))
    else:
        print(f"{flagged} of {len(scores)} flagged: {flagged / len(scores):.1%} ({low:.1%} to {high:.1%}), threshold "
              f"{probe.card.threshold:.6f}")  # fmt: skip
    return 0


def _show(scores: Sequence[Score], first: int) -> None:
    for number, score in enumerate(scores[first:], start=first + 1):
        word = "flagged" if score.is_flagged else "-"
        print(f"row {number:>6}  {score.probability:.6f}  block {score.layer}  {word}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
