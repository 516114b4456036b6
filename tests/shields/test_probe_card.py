"""A probe's card: what makes a probe unusable, by name and value."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.shields.probe_card import ProbeCard, read_card, require_base, require_negatives
from llama_stack_provider_moe.spec.probe import CARD_FILE, WEIGHTS_FILE, least_negatives
from tests.support.probe_cards import BODY, write_card


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    card = write_card(tmp_path, threshold=0.1 + 0.2)
    assert read_card(tmp_path, "probes.a") == card
    assert read_card(tmp_path, "probes.a").threshold == 0.1 + 0.2


def test_the_fewest_negatives_that_a_rate_needs() -> None:
    assert [least_negatives(rate) for rate in (0.01, 0.005, 0.03, 0.1, 0.001)] == [100, 200, 34, 10, 1000]


def test_too_few_negatives_are_refused_by_name(tmp_path: Path) -> None:
    write_card(tmp_path, negatives=99)
    with pytest.raises(InvalidInput, match=r"probes\.a: 99 is not valid; expected a probe with at least 100 negatives"):
        read_card(tmp_path, "probes.a")
    card = write_card(tmp_path / "b", negatives=150)
    require_negatives(card, 0.01, "probe")
    with pytest.raises(InvalidInput, match=r"probe: 150 is not valid; expected .* 200 .* rate of 0\.005"):
        require_negatives(card, 0.005, "probe")
    looser = write_card(tmp_path / "c", negatives=1000, false_positive_rate=0.05)
    with pytest.raises(InvalidInput, match=r"0\.05 is not valid; .* false-positive rate of at most 0\.01"):
        require_negatives(looser, 0.01, "probe")


def test_a_probe_of_another_base_is_refused(tmp_path: Path) -> None:
    card = write_card(tmp_path)
    require_base(card, "0" * 64, "probe")
    with pytest.raises(InvalidInput, match=r"probe: '000000000000' is not valid; expected a probe of the loaded"):
        require_base(card, "f" * 64, "probe")


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_card(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"others")
    with pytest.raises(InvalidInput, match="was changed"):
        read_card(tmp_path, "probe")
    (tmp_path / CARD_FILE).write_text("{}")
    with pytest.raises(InvalidInput, match=r"probe\.json and probe\.safetensors"):
        read_card(tmp_path, "probe")
    with pytest.raises(InvalidInput, match=r"probe: .*nothing"):
        read_card(tmp_path / "nothing", "probe")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": [4]}, "below 4"),
        ({"layers": [2, 1]}, "ascending"),
        ({"layers": [0, 1, 2]}, "at most 2"),
        ({"threshold": 1.5}, "less than or equal to 1"),
        ({"base": {**BODY["base"], "adapter": "0" * 64}}, "must both be there"),
        ({"surplus": 1}, "Extra inputs"),
    ],
)
def test_a_card_that_is_not_consistent(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ProbeCard.model_validate(BODY | changes)
