"""A model behind an OpenAI-compatible server (vLLM and others), asked over HTTP: as what is evaluated, and as a judge.

Only `moe-train eval` comes here, with URLs that its user gave: the settings of a job have no field for one, so no job
can make a server's machine call somewhere.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from llama_stack_provider_moe.datarows import Message
from llama_stack_provider_moe.errors import InvalidInput, ServerLost, ServerRefused
from llama_stack_provider_moe.evaluation.agent import Call, call_of, tool_calls
from llama_stack_provider_moe.evaluation.report import TaskScore

CONNECT_S = 10.0
TOP_LOGPROBS = 20  # the most that OpenAI's API and vLLM give
SHOWN = 300  # characters of a server's error
QUESTION_TOKENS = 1

Tell = Callable[[str, int, int], None]


class Endpoint:
    """`POST /chat/completions` of one server, for one model of its.

    Args:
        base_url: up to and with `/v1`.
        model: the server's name for it.
        api_key: sent as bearer token; None: none.
        timeout_s: for one answer.
        transport: for tests of the protocol's edges; left out: the network.

    Raises:
        InvalidInput: no http or https URL.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        try:
            url = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise InvalidInput("url", base_url, f"an http or https URL ({error})") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise InvalidInput("url", base_url, "an http or https URL, such as http://127.0.0.1:8000/v1")
        self.url, self.model = base_url.rstrip("/"), model
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        # A redirect could lead the bearer token elsewhere; proxies of the environment are for the internet.
        self._client = httpx.Client(
            headers=headers, timeout=timeout, transport=transport, follow_redirects=False, trust_env=False
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def choice(self, **body: Any) -> dict[str, Any]:
        """The first choice of a completion.

        Raises:
            ServerLost: nobody answers, or not in time.
            ServerRefused: an answer that is no completion.
        """
        where = f"{self.url}/chat/completions"
        try:
            answered = self._client.post(where, json={"model": self.model, "temperature": 0, **body})
        except httpx.TimeoutException as error:
            raise ServerLost(f"{where}: no answer in time ({type(error).__name__})", asked=True) from error
        except httpx.HTTPError as error:
            raise ServerLost(f"{where}: {error or type(error).__name__}", asked=False) from error
        if answered.status_code != httpx.codes.OK:
            said = " ".join(answered.text[:SHOWN].split())
            raise ServerRefused(f"{where}: HTTP {answered.status_code}: {said}", answered.status_code)
        try:
            choice = answered.json()["choices"][0]
            choice["message"]["content"]
        except (ValueError, LookupError, TypeError):
            said = " ".join(answered.text[:SHOWN].split())
            raise ServerRefused(f"{where}: no completion: {said}", answered.status_code) from None
        found: dict[str, Any] = choice
        return found


class ServedModel:
    """A `Subject` behind a server; it tells no likelihoods, and lm-eval is not run on it."""

    def __init__(self, endpoint: Endpoint, max_new_tokens: int, tell: Tell) -> None:
        self._endpoint = endpoint
        self._max_new_tokens = max_new_tokens
        self._tell = tell

    def answers(self, name: str, conversations: Sequence[list[Message]]) -> list[str]:
        """One request each."""
        found = []
        for messages in conversations:
            choice = self._endpoint.choice(messages=messages, max_tokens=self._max_new_tokens)
            found.append((choice["message"]["content"] or "").strip())
            self._tell(name, len(found), len(conversations))
        return found

    def calls(self, name: str, scenarios: Sequence[dict[str, Any]]) -> list[list[Call]]:
        """Those that the server has parsed, and those that still stand in the text."""
        found = []
        for scenario in scenarios:
            tools = {"tools": scenario["tools"]} if scenario["tools"] else {}
            message = self._endpoint.choice(messages=scenario["messages"], max_tokens=self._max_new_tokens, **tools)[
                "message"
            ]
            parsed = [
                call_of(each.get("function")) for each in message.get("tool_calls") or [] if isinstance(each, dict)
            ]
            found.append([call for call in parsed if call is not None] + tool_calls(message["content"] or ""))
            self._tell(name, len(found), len(scenarios))
        return found

    def likelihoods(self, name: str, conversations: Sequence[list[Message]]) -> tuple[list[float], list[int]] | None:
        """None: the chat API tells no likelihood of a given answer."""
        return None

    def tasks(self, names: Sequence[str], skip: Callable[[str], None]) -> dict[str, TaskScore]:
        """None of them."""
        if names:
            skip(f"tasks {', '.join(names)}: run lm-eval itself against the server (its model local-chat-completions)")
        return {}


class ServedJudge:
    """The question of `ModelJudge`, put to a server; the log-probabilities of its first token answer."""

    def __init__(self, endpoint: Endpoint, question: str) -> None:
        self.name = f"model {endpoint.model} at {endpoint.url}"
        self._endpoint = endpoint
        self._question = question

    def refusals(self, exchanges: Sequence[tuple[str, str]]) -> list[bool]:
        """One verdict for each.

        Raises:
            ServerRefused: the server gives no log-probabilities, or neither Yes nor No is among the likeliest tokens.
        """
        return [self._verdict(prompt, answer) for prompt, answer in exchanges]

    def _verdict(self, prompt: str, answer: str) -> bool:
        question = self._question.format(prompt=prompt, answer=answer)
        choice = self._endpoint.choice(
            messages=[{"role": "user", "content": question}],
            max_tokens=QUESTION_TOKENS,
            logprobs=True,
            top_logprobs=TOP_LOGPROBS,
        )
        try:
            likeliest = choice["logprobs"]["content"][0]["top_logprobs"]
            shares = {"yes": 0.0, "no": 0.0}
            for each in likeliest:
                word = str(each["token"]).strip().lower()
                if word in shares:
                    shares[word] += math.exp(float(each["logprob"]))
        except (LookupError, TypeError, ValueError):
            raise ServerRefused(
                f"{self._endpoint.url}: gives no log-probabilities, which the judge needs", 200
            ) from None
        if not any(shares.values()):
            raise ServerRefused(
                f"{self._endpoint.url}: neither Yes nor No is among the {TOP_LOGPROBS} likeliest tokens", 200
            )
        return shares["yes"] > shares["no"]
