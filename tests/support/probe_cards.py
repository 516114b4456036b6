"""Cards of probes for tests, and folders with them."""

import hashlib
from pathlib import Path
from typing import Any

from llama_stack_provider_moe.shields.probe_card import ProbeCard
from llama_stack_provider_moe.spec.probe import CARD_FILE, WEIGHTS_FILE

HASH = "0" * 64
RATE = {"count": 1, "rows": 100, "value": 0.01, "low": 0.0, "high": 0.05}
DETECTION = {
    "auc": {"value": 0.9, "low": 0.8, "high": 0.95},
    "detected": RATE,
    "detected_at_rate": RATE,
    "false_positives": RATE,
}
COMPARED = {"probe": DETECTION, "lexical": DETECTION}
SET = {"source": "a", "rows": 300, "sha256": HASH}
BODY: dict[str, Any] = {
    "base": {"model": "m", "fingerprint": HASH, "model_type": "llama", "layers": 4, "width": 8, "dtype": "fp32",
             "template": None, "chat_template": HASH},
    "layers": [1], "tokens": "position", "split": "shuffled",
    "position": -1, "span": 1, "views": "latest", "max_length": 128, "threshold": 0.5,
    "false_positive_rate": 0.01, "negatives": 100, "fit_rows": {"target": 100, "baseline": 100}, "l2": 0.01,
    "sets": {"target": SET, "baseline": SET}, "held_out": COMPARED, "length_auc": 0.5, "beats_words": True,
    "weights": HASH,
}  # fmt: skip


def write_card(folder: Path, weights: bytes = b"weights", **changes: Any) -> ProbeCard:
    """A folder whose card fits its weights, which are no tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    card = ProbeCard.model_validate(BODY | {"weights": hashlib.sha256(weights).hexdigest()} | changes)
    (folder / CARD_FILE).write_text(card.model_dump_json())
    return card
