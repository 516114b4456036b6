"""A model behind an OpenAI-compatible server (vLLM and others), over HTTP: as the evaluated model, and as a judge.

Only `moe-train eval` uses it, with URLs that its user gives: a job's settings have no field for a URL, so no job can
make a server's machine call other machines.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from llama_stack_provider_moe.compute.evaluation.agent import Call, call_of, tool_calls
from llama_stack_provider_moe.compute.evaluation.report import TaskScore
from llama_stack_provider_moe.errors import InvalidInput, ServerLost, ServerRefused
from llama_stack_provider_moe.ground.redaction import without_passwords
from llama_stack_provider_moe.spec.evaluation_rows import ScenarioRow
from llama_stack_provider_moe.spec.rows import Conversation, Message

CONNECT_S = 10.0
TOP_LOGPROBS = 20  # the most that OpenAI's API and vLLM give
SHOWN = 300  # characters of a server's error
QUESTION_TOKENS = 1

Progress = Callable[[str, int, int], None]


class Endpoint:
    """`POST /chat/completions` of one server, for one of its models.

    Args:
        base_url: of the server, up to and including `/v1`.
        model: its name on the server.
        api_key: sent as bearer token; None: none.
        timeout_s: seconds to wait for one answer.
        transport: for tests of the protocol; None: the network.

    Raises:
        InvalidInput: it is not an http or https URL.
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
            raise InvalidInput("url", without_passwords(base_url), f"an http or https URL ({error})") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise InvalidInput(
                "url", without_passwords(base_url), "an http or https URL, such as http://127.0.0.1:8000/v1"
            )
        self._address, self.model = base_url.rstrip("/"), model
        self.url = without_passwords(self._address)  # the form for messages and reports
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        # A redirect could send the bearer token elsewhere; the environment's proxies are for the internet.
        self._client = httpx.Client(
            headers=headers, timeout=timeout, transport=transport, follow_redirects=False, trust_env=False
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def choice(self, **body: object) -> dict[str, Any]:
        """The first choice of a completion.

        Raises:
            ServerLost: the server does not answer, or not in time.
            ServerRefused: the answer is not a completion.
        """
        where = f"{self.url}/chat/completions"
        try:
            answered = self._client.post(
                f"{self._address}/chat/completions", json={"model": self.model, "temperature": 0, **body}
            )
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
            raise ServerRefused(f"{where}: the answer is not a completion: {said}", answered.status_code) from None
        found: dict[str, Any] = choice
        return found


def request_of(row: Conversation) -> dict[str, object]:
    """A conversation as the fields of a chat completion's request."""
    body: dict[str, object] = {"messages": [_sent(message) for message in row["messages"]]}
    if "tools" in row:
        body["tools"] = row["tools"]
    variables = dict(row.get("chat_template_kwargs", {}))
    if "parallel_tool_calls" in variables:
        body["parallel_tool_calls"] = variables.pop("parallel_tool_calls")
    if variables:
        body["chat_template_kwargs"] = variables
    return body


def _sent(message: Message) -> dict[str, object]:
    sent: dict[str, object] = {key: value for key, value in message.items() if key not in ("weight", "reasoning")}
    if "reasoning" in message:
        sent["reasoning_content"] = message["reasoning"]
    if "tool_calls" in message:
        sent["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return sent


class ServedModel:
    """A `Subject` behind a server; it has no likelihoods, and lm-eval does not run on it."""

    def __init__(self, endpoint: Endpoint, max_new_tokens: int, progress: Progress) -> None:
        self._endpoint = endpoint
        self._max_new_tokens = max_new_tokens
        self._progress = progress

    def answers(self, name: str, conversations: Sequence[Conversation]) -> list[str]:
        """The answers, one request each."""
        found = []
        for row in conversations:
            choice = self._endpoint.choice(**request_of(row), max_tokens=self._max_new_tokens)
            found.append((choice["message"]["content"] or "").strip())
            self._progress(name, len(found), len(conversations))
        return found

    def calls(self, name: str, scenarios: Sequence[ScenarioRow]) -> list[list[Call]]:
        """The calls that the server has parsed, and those that are still in the text."""
        found = []
        for scenario in scenarios:
            asked: Conversation = {"messages": scenario["messages"]}
            if scenario["tools"]:
                asked["tools"] = scenario["tools"]
            message = self._endpoint.choice(**request_of(asked), max_tokens=self._max_new_tokens)["message"]
            parsed = [
                call_of(each.get("function")) for each in message.get("tool_calls") or [] if isinstance(each, dict)
            ]
            found.append([call for call in parsed if call is not None] + tool_calls(message["content"] or ""))
            self._progress(name, len(found), len(scenarios))
        return found

    def likelihoods(self, name: str, conversations: Sequence[Conversation]) -> tuple[list[float], list[int]] | None:
        """None: the chat API does not give the likelihood of a given answer."""
        return None

    def tasks(self, names: Sequence[str], skip: Callable[[str], None]) -> dict[str, TaskScore]:
        """No scores."""
        if names:
            skip(f"tasks {', '.join(names)}: run lm-eval itself against the server (its model local-chat-completions)")
        return {}


class ServedJudge:
    """Puts the question of `ModelJudge` to a server; the log-probabilities of the first token decide."""

    def __init__(self, endpoint: Endpoint, question: str) -> None:
        self.name = f"model {endpoint.model} at {endpoint.url}"
        self._endpoint = endpoint
        self._question = question

    def refusals(self, exchanges: Sequence[tuple[str, str]]) -> list[bool]:
        """One verdict for each exchange.

        Raises:
            ServerRefused: the server gives no log-probabilities, or neither Yes nor No is among the most likely tokens.
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
                f"{self._endpoint.url}: the answer has no log-probabilities, which the judge needs", 200
            ) from None
        if not any(shares.values()):
            raise ServerRefused(
                f"{self._endpoint.url}: neither Yes nor No is among the {TOP_LOGPROBS} most likely tokens", 200
            )
        return shares["yes"] > shares["no"]
