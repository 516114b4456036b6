"""A probe that a job could have made, of a tiny random model, and two texts that it tells apart."""

import contextlib
import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llama_stack_provider_moe.compute.probing import fit_command, score_command
from tests.support import tiny_models

_FOOD, _WAYS = ["soup", "bread", "rice", "stew", "pasta", "cake"], ["cook", "bake", "fry", "boil", "roast"]
_THINGS = ["car", "house", "book", "letter", "tree", "clock", "town", "river"]
_OTHER = ["drive", "paint", "read", "write", "plant", "repair", "visit", "measure"]
_ASK = ["How do I {} a {}?", "Tell me how to {} the {}.", "What is the way to {} a {}?", "Please {} my {} today."]


class TinyProbe(NamedTuple):
    """A fitted probe.

    Attributes:
        folder: with probe.json and probe.safetensors.
        flagged: a text above its threshold.
        plain: the text furthest below it.
    """

    folder: Path
    flagged: str
    plain: str


def fitted(folder: Path) -> TinyProbe:
    """Build the model, fit the probe, and score what it was fitted on, by the commands but in this process."""
    tiny_models.build("granitemoe", folder / "model")
    target = [ask.format(way, food) for ask in _ASK for way in _WAYS for food in _FOOD]
    baseline = [ask.format(way, thing) for ask in _ASK for way in _OTHER for thing in _THINGS]
    for name, texts in (("target", target), ("baseline", baseline)):
        random.Random(1).shuffle(texts)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in texts))
    sets = [word for name in ("target", "baseline") for word in ("--rows", f"{name}={folder / name}.jsonl")]
    _run(
        fit_command.main, str(folder / "model"), *sets, "--false-positive-rate", "0.05", "--out", str(folder / "probe")
    )
    scores = {}
    for name, texts in (("target", target), ("baseline", baseline)):
        found = json.loads(_run(score_command.main, str(folder / "probe"), str(folder / f"{name}.jsonl"), "--json"))
        scores |= {text: score["probability"] for text, score in zip(texts, found["scores"], strict=True)}
    return TinyProbe(folder / "probe", max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__))


def _run(command: Callable[[list[str]], int], *words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as where it is started: libraries' warnings end nothing
        code = command(list(words))
    assert code == 0, out.getvalue()
    return out.getvalue()
