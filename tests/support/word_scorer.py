"""A scorer for tests, which keeps the protocol and knows words instead of a model."""

from collections.abc import Mapping, Sequence

from llama_stack_provider_moe.shields.scores import Score, ScorerHealth

THRESHOLD, LAYER = 0.5, 3


class WordScorer:
    """Scores a conversation by the worst of the words in it.

    Args:
        words: word -> probability; other words have 0.
    """

    def __init__(self, words: Mapping[str, float]) -> None:
        self._words = words
        self.asked: list[Sequence[Sequence[Mapping[str, str]]]] = []
        self.owners: list[str | None] = []

    async def score(
        self,
        probe: str,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        deadline_s: float,
        owner: str | None = None,
    ) -> list[Score]:
        """Score each conversation."""
        self.asked.append(conversations)
        self.owners.append(owner)
        return [Score(self._of(each), THRESHOLD, LAYER) for each in conversations]

    async def health(self) -> ScorerHealth:
        """Always ready."""
        return ScorerHealth("ready", "", ("cooking",), 0, 0)

    def _of(self, conversation: Sequence[Mapping[str, str]]) -> float:
        text = " ".join(each["content"] for each in conversation)
        return max((score for word, score in self._words.items() if word in text), default=0.0)
