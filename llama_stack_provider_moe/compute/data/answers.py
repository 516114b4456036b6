"""Rows of answers to a prompt: pairs of them (DPO, reward models), and single ones with a thumb up or down (KTO)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from llama_stack_provider_moe.compute.data.encoding import (
    Encoded,
    Encoder,
    Problem,
    begins_with_system,
    context_of,
    first_said,
    last_said,
    rendered_rows,
    tokens_of,
)
from llama_stack_provider_moe.compute.data.rendering import Rendered, Renderer, Tokens
from llama_stack_provider_moe.spec.rows import CanonicalRow, Preference, ThumbRow

Answer = Literal["chosen", "rejected", "completion"]


class Fitted(NamedTuple):
    """A prompt, its answers, which of their tokens count, and what was cut to make them fit."""

    prompt: list[int]
    answers: list[list[int]]
    said: list[list[int]]
    cut: bool
    start_cut: bool

    def encoded(self, columns: dict[str, list[int]], row: CanonicalRow) -> Encoded:
        """These as a row for the trainer."""
        greatest = max(map(max, (self.prompt, *self.answers)))
        return Encoded(columns, self.cut, greatest, self.start_cut and begins_with_system(row))


@dataclass(frozen=True)
class AnswersEncoder(Encoder):
    """Base of the encoders of answers.

    The prompt and the longest answer fit into the length. `said` is 1 for the tokens that count: all of an answer of
    one message; of a longer one those of the assistant's messages, not those of tool results in between.
    """

    def tokens(self, rows: Sequence[CanonicalRow], column: Answer) -> list[list[Tokens] | Problem]:
        """The prompt of each row with one of its answers."""
        render = self.renderer
        answered = cast("Sequence[Preference | ThumbRow]", rows)
        return tokens_of(render, rendered_rows(answered, lambda row: [rendered_answer(render, row, column)]))

    def fitted(self, answers: Sequence[Tokens]) -> Fitted | Problem:
        """The answers to one prompt, cut to the length."""
        if not all(any(tokens.said) for tokens in answers):
            return Problem("the chat template does not render the answer")
        # All answers begin where the common part ends: a tokenizer may merge the end of a prompt with an answer's
        # start.
        first = answers[0]
        begins = min(map(first_said, answers))
        while any(tokens.ids[:begins] != first.ids[:begins] for tokens in answers):
            begins -= 1
        if begins == 0:
            return Problem(f"there is no prompt before the answer{'s' * (len(answers) > 1)}")
        ends = [self.end_of(tokens) for tokens in answers]
        if first.images and max(ends) > self.limit.length:
            return self.limit.images_too_long(max(ends), sum(first.pictured))
        if problem := self.limit.too_long(max(ends)):
            return problem
        cut, length = max(ends) > self.limit.length, self.limit.length
        prompt, room = first.ids[:begins], length - begins
        left = cut and self.limit.truncate == "left"
        if left:
            room = max(ends) - begins
            prompt = self._tail(prompt, length - room)
        if room <= 0 or not prompt:
            which = "answers leave no room for a prompt" if left else "prompt leaves no room for an answer"
            return Problem(f"its {which} in options.max_length = {length} tokens", droppable=True)
        ids, said = [], []
        for tokens, end in zip(answers, ends, strict=True):
            behind, starts = min(end, begins + room), first_said(tokens)
            ids.append(tokens.ids[begins:behind])
            said.append([int(index < starts or tokens.said[index]) for index in range(begins, behind)])
        return Fitted(prompt, ids, said, cut, left)

    def end_of(self, tokens: Tokens) -> int:
        """The number of tokens up to the end of an answer."""
        return last_said(tokens) + 1

    def _tail(self, prompt: list[int], room: int) -> list[int]:
        """The last tokens of a prompt, after its beginning-of-sequence token if it has one."""
        if room <= 0:
            return []
        kept = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id and room > 1 else []
        return [*kept, *prompt[len(prompt) - room + len(kept) :]]


@dataclass(frozen=True)
class DpoEncoder(AnswersEncoder):
    """Columns `prompt_ids`, and of both answers `chosen_ids` and `chosen_said`, `rejected_ids` and `rejected_said`."""

    def __call__(self, rows: Sequence[CanonicalRow]) -> list[list[Encoded] | Problem]:
        """One pair for each row."""
        found: list[list[Encoded] | Problem] = []
        both = zip(self.tokens(rows, "chosen"), self.tokens(rows, "rejected"), rows, strict=True)
        for good, bad, row in both:
            if isinstance(good, Problem) or isinstance(bad, Problem):
                found.append(good if isinstance(good, Problem) else cast(Problem, bad))
            else:
                pair = self._pair(good[0], bad[0], row)
                found.append(pair if isinstance(pair, Problem) else [pair])
        return found

    def _pair(self, chosen: Tokens, rejected: Tokens, row: CanonicalRow) -> Encoded | Problem:
        found = self.fitted((chosen, rejected))
        if isinstance(found, Problem):
            return found
        if found.answers[0] == found.answers[1]:
            length = self.limit.length
            return Problem(
                f"chosen and rejected do not differ within options.max_length = {length} tokens", droppable=found.cut
            )
        columns = {"prompt_ids": found.prompt}
        for which, ids, said in zip(("chosen", "rejected"), found.answers, found.said, strict=True):
            columns |= {f"{which}_ids": ids, f"{which}_said": said}
        return found.encoded(columns, row)._replace(texts=self.pictures(chosen))


@dataclass(frozen=True)
class RewardEncoder(DpoEncoder):
    """The columns of `DpoEncoder`, with all that the template writes behind an answer, where graders read a reward."""

    def end_of(self, tokens: Tokens) -> int:
        """The number of tokens of the whole conversation."""
        return len(tokens.ids)


@dataclass(frozen=True)
class KtoEncoder(AnswersEncoder):
    """Columns `prompt_ids`, `completion_ids` and `completion_said`, and `label`: [1] for a thumb up, [0] for down."""

    def __call__(self, rows: Sequence[CanonicalRow]) -> list[list[Encoded] | Problem]:
        """One answer for each row."""
        found: list[list[Encoded] | Problem] = []
        for tokens, row in zip(self.tokens(rows, "completion"), cast(Sequence[ThumbRow], rows), strict=True):
            one = tokens if isinstance(tokens, Problem) else self.fitted(tokens)
            if isinstance(one, Problem):
                found.append(one)
                continue
            columns = {"prompt_ids": one.prompt, "completion_ids": one.answers[0], "completion_said": one.said[0]}
            found.append([one.encoded({**columns, "label": [int(row["label"])]}, row)])
        return found


def rendered_answer(renderer: Renderer, row: Preference | ThumbRow, column: Answer) -> Rendered:
    """One of a row's answers behind its prompt.

    Raises:
        Unrenderable: the chat template can't render it.
    """
    return renderer.answer(context_of(row, row["prompt"]), cast("Preference", row)[column])  # type: ignore[typeddict-item]
