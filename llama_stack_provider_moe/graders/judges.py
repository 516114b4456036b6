"""Models at URLs that judge, for `score_model` and `label_model`: only those that the operator names.

A judge answers `{"result": ...}` alone. Nothing is searched in its answer, so a text that it quotes is no result; and
what an answer under judgement says of itself stays in its own message.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.graders.bench import Limits
from llama_stack_provider_moe.graders.samples import (
    TRANSIENT,
    BadAnswer,
    GradeFailed,
    Outcome,
    Sample,
)
from llama_stack_provider_moe.graders.templates import Text
from llama_stack_provider_moe.spec.graders_config import JUDGES, JUDGES_VARIABLE, JudgeConfig
from llama_stack_provider_moe.spec.judged_graders import LabelModel, ScoreModel

MOST_BYTES = 1 << 20
_WAIT_S = 0.5  # before another try
type Judges = Mapping[str, JudgeConfig]


def judges_of_environment() -> Judges:
    """Return the judges that the server named for this training process; none outside one."""
    given = os.environ.get(JUDGES_VARIABLE)
    return JUDGES.validate_json(given) if given else {}


SERVER = "`graders.judges` of the server's configuration"


def judge_named(name: str, judges: Judges, field: str, where: str = SERVER) -> JudgeConfig:
    """Return a judge.

    Args:
        name: that a grader has for it.
        judges: that the operator names.
        field: the caller's name for the name.
        where: the place that names judges, for errors.

    Raises:
        InvalidInput: the operator names none of this name.
    """
    if name in judges:
        return judges[name]
    named = f"one of {', '.join(judges)}, which {where} names" if judges else f"a judge that {where} names; it has none"
    raise InvalidInput(field, name, named)


class _Said(NamedTuple):
    result: object
    tokens: int


class Judged:
    """A grader that asks a judge.

    Args:
        grader: its spec.
        judge: whom it asks.
        limits: of each question.
        transport: of httpx; None: the network.
    """

    def __init__(
        self,
        grader: ScoreModel | LabelModel,
        judge: JudgeConfig,
        limits: Limits,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._grader, self._judge, self._limits = grader, judge, limits
        self._texts = [(message.role, Text(message.content)) for message in grader.input]
        key = None if judge.key_variable is None else os.environ.get(judge.key_variable)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # No proxy and no .netrc of the environment: the operator named this URL.
        self._client = httpx.Client(headers=headers, transport=transport, trust_env=False, follow_redirects=False)
        self._pool = ThreadPoolExecutor(limits.processes, thread_name_prefix="moe-judge")

    def grade(self, samples: Sequence[Sample]) -> list[Outcome]:
        """See `Grades`."""
        return list(self._pool.map(self._tried, samples))

    def close(self) -> None:
        """See `Grades`."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _tried(self, sample: Sample) -> Outcome:
        outcome = self._once(sample)
        for number in range(self._limits.retries):
            if outcome.failure is None or outcome.failure.code not in TRANSIENT:
                break
            time.sleep(_WAIT_S * 2**number)
            outcome = self._once(sample)
        return outcome

    def _once(self, sample: Sample) -> Outcome:
        try:
            messages = [{"role": role, "content": text.of(sample)} for role, text in self._texts]
            said = self._said(messages)
            return Outcome(self._value(said.result), tokens=said.tokens)
        except BadAnswer:
            return Outcome(self._grader.limits()[0], bad_answer=True)
        except GradeFailed as error:
            return Outcome(None, error.failure)

    def _value(self, result: object) -> float:
        if isinstance(self._grader, LabelModel):
            if result not in self._grader.labels:
                raise GradeFailed("judge_answer", f"the judge gave {str(result)[:80]!r}, which is no label")
            return float(result in self._grader.passing_labels)
        if isinstance(result, bool) or not isinstance(result, int | float):
            raise GradeFailed("judge_answer", f"the judge gave {str(result)[:80]!r}, which is no number")
        return float(result)

    def _schema(self) -> dict[str, object]:
        if isinstance(self._grader, LabelModel):
            result: dict[str, object] = {"type": "string", "enum": self._grader.labels}
        else:
            result = {"type": "number"}
        return {"type": "object", "properties": {"result": result}, "required": ["result"],
                "additionalProperties": False}  # fmt: skip

    def _asked(self, messages: list[dict[str, str]]) -> dict[str, object]:
        form = json.dumps(self._schema())
        last = {"role": "system", "content": f"Reply with one JSON object of this schema and nothing else: {form}"}
        body: dict[str, object] = {
            "model": self._judge.model,
            "messages": [last, *messages],
            "response_format": {
                "type": "json_schema", "json_schema": {"name": "result", "strict": True, "schema": self._schema()}
            },
        }  # fmt: skip
        if isinstance(self._grader, ScoreModel):
            given = self._grader.sampling_params
            chosen = {
                "max_completion_tokens": given.max_completions_tokens, "reasoning_effort": given.reasoning_effort,
                "seed": given.seed, "temperature": given.temperature, "top_p": given.top_p,
            }  # fmt: skip
            body |= {name: value for name, value in chosen.items() if value is not None}
        return body

    def _said(self, messages: list[dict[str, str]]) -> _Said:
        until_s = time.monotonic() + self._limits.deadline_s
        try:
            with self._client.stream(
                "POST", self._judge.url, json=self._asked(messages), timeout=self._limits.deadline_s
            ) as answer:
                content = bytearray()
                for piece in answer.iter_bytes(1 << 14):
                    content += piece
                    if len(content) > MOST_BYTES:
                        raise GradeFailed("judge_answer", f"the judge's answer has more than {MOST_BYTES:,} bytes")
                    if time.monotonic() > until_s:
                        raise GradeFailed("deadline", f"the judge took longer than {self._limits.deadline_s:g} s")
                status = answer.status_code
        except httpx.TimeoutException:
            raise GradeFailed("deadline", f"the judge did not answer within {self._limits.deadline_s:g} s") from None
        except httpx.HTTPError as error:
            raise GradeFailed("judge_server", f"the judge can't be asked ({type(error).__name__})") from None
        if status != 200:
            raise GradeFailed("judge_server", f"the judge answered with status {status}")
        return _read(bytes(content))


def _read(content: bytes) -> _Said:
    try:
        document: Any = json.loads(content)
        message = document["choices"][0]["message"]
        tokens = (document.get("usage") or {}).get("total_tokens", 0)
        refusal, text = message.get("refusal"), message.get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise GradeFailed("judge_answer", "the judge's answer is no chat completion") from None
    if refusal:
        raise GradeFailed("judge_refused", "the judge refused to judge")
    try:
        found = json.loads(text)
        result = found["result"] if isinstance(found, dict) else found
    except (ValueError, TypeError, LookupError, RecursionError):
        raise GradeFailed("judge_answer", "the judge did not answer with a JSON object that has `result`") from None
    return _Said(result, tokens if isinstance(tokens, int) else 0)
