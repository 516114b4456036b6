"""A vLLM server as engine, over the routes that `vllm serve` has with VLLM_SERVER_DEV_MODE=1.

It takes weights by `POST /collective_rpc` with vLLM's own `reload_weights(weights_path)`, which reads a Hugging Face
checkpoint into the running model. TRL 1.16's client sends them over NCCL, for which the training process would need
the package vllm and a GPU. Token ids go both ways: the server's tokenizer and its end tokens have no effect.
"""

import base64
import io
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from llama_stack_provider_moe.compute.recipes.grpo.engines import Answer, Routes, Sampling, checked
from llama_stack_provider_moe.errors import EngineFailed, shorten
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.serving.wire import object_in, reason_in
from llama_stack_provider_moe.spec.engines_config import ENGINES, ENGINES_VARIABLE, EngineConfig, engine_named
from llama_stack_provider_moe.spec.rl_engines import VllmServerEngine

_AT_ONCE = 64  # prompts that are asked for at the same time
_WAIT_S = 0.5  # between looks whether a lost server is back, or whether the wait is to end
_CONNECT_S = 5.0
_GONE = (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE)
_PROCESSED = "processed_logprobs"


class _Lost(Exception):
    """The server does not answer now; it may come back."""


def server_named(engine: VllmServerEngine) -> EngineConfig:
    """The server that the operator has under the job's name for it.

    Raises:
        InvalidInput: the operator names none of this name.
    """
    given = os.environ.get(ENGINES_VARIABLE)
    return engine_named(engine.server, ENGINES.validate_json(given) if given else {}, "rl.engine.server")


class VllmServer:
    """See `Engine`.

    Args:
        engine: the job's choice.
        server: where it is.
        vocabulary: number of the policy's tokens.
        positions: most tokens of a prompt with its answer.
        look: called at least each half second of a wait for answers, or for a lost server; its error ends the wait.
    """

    def __init__(
        self, engine: VllmServerEngine, server: EngineConfig, vocabulary: int, positions: int, look: Callable[[], None]
    ) -> None:
        self._look = look
        self._engine, self._server, self._vocabulary = engine, server, vocabulary
        self._who = f"vLLM at {server.url}"
        key = None if server.key_variable is None else os.environ.get(server.key_variable)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        timeout = httpx.Timeout(engine.deadline_s, connect=min(_CONNECT_S, engine.deadline_s))
        # No proxy and no .netrc of the environment, and no redirect: the operator named this URL.
        self._client = httpx.Client(
            base_url=server.url, headers=headers, timeout=timeout, trust_env=False, follow_redirects=False,
            limits=httpx.Limits(max_connections=_AT_ONCE),
        )  # fmt: skip
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="moe-vllm")
        self._taken: Path | None = None
        self._model = self._opened(positions)

    @property
    def told(self) -> str:
        """See `Engine`."""
        return f"vLLM server {self._engine.server!r} at {self._server.url}, which runs {self._model}"

    def close(self) -> None:
        """End its connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def take(self, folder: Path) -> None:
        """See `Engine`."""
        self._taken = folder
        self._patiently(lambda: self._load(folder))

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, advance: Callable[[], None]
    ) -> list[list[Answer]]:
        """See `Engine`. Prompts whose answers were lost with the server are asked again once it is back."""
        found: dict[int, list[Answer]] = {}

        def ask() -> None:
            missing = [at for at in range(len(prompts)) if at not in found]
            asked: dict[Future[list[Answer]], int] = {
                self._pool.submit(self._answers, prompts[at], sampling, sampling.seeds[at]): at for at in missing
            }
            waiting = set(asked)
            lost: _Lost | None = None
            try:
                while waiting:
                    done, waiting = wait(waiting, _WAIT_S, FIRST_COMPLETED)
                    self._look()
                    for future in done:
                        try:
                            found[asked[future]] = future.result()
                            advance()
                        except _Lost as error:
                            lost = error
            finally:
                for future in waiting:  # no thread asks on after an error
                    future.cancel()
            if lost is not None:
                raise lost

        def again() -> None:
            if self._taken is not None:  # a new process has the weights that it was started with
                self._load(self._taken)
            ask()

        self._patiently(ask, again)
        return [found[at] for at in range(len(prompts))]

    def _opened(self, positions: int) -> str:
        """Check that the server can do what is needed, and return its model's name."""
        self._patiently(lambda: self._ask("GET", "/health", None))
        listed = self._document("GET", "/v1/models").get("data")
        if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict) or not listed[0].get("id"):
            raise EngineFailed(f"{self._who} lists no model at /v1/models")
        longest = listed[0].get("max_model_len")
        if isinstance(longest, int) and longest < positions:
            raise EngineFailed(f"options.max_length: {positions} tokens don't fit {self._who}, which was started with "
                               f"--max-model-len {longest}")  # fmt: skip
        answer = self._ask("GET", "/server_info?config_format=json", None, (httpx.codes.NOT_FOUND,))
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise EngineFailed(f"{self._who} has no /server_info; start it with VLLM_SERVER_DEV_MODE=1")
        config = _at(self._read(answer), "vllm_config", "model_config")
        mode = config.get("logprobs_mode") if isinstance(config, dict) else None
        if mode != _PROCESSED:
            raise EngineFailed(f"{self._who} has --logprobs-mode {mode}; expected {_PROCESSED}, as its ratios to the "
                               "policy would be of another temperature")  # fmt: skip
        return str(listed[0]["id"])

    def _load(self, folder: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._ask("POST", "/collective_rpc", body)
        self._ask("POST", "/reset_prefix_cache", {})

    def _answers(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> list[Answer]:
        body: dict[str, object] = {
            "model": self._model, "prompt": list(prompt), "n": sampling.answers, "seed": seed,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.most_tokens,
            "logprobs": 0, "ignore_eos": True, "stop_token_ids": list(sampling.ends),
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        choices = self._document("POST", "/v1/completions", body).get("choices")
        try:
            ordered = sorted(choices or [], key=lambda choice: int(choice["index"]))
            found = [_answer(choice, prompt, sampling.with_routes) for choice in ordered]
        except (LookupError, TypeError, ValueError, AttributeError, EOFError) as error:
            raise EngineFailed(f"{self._who} gave an answer that can't be read ({type(error).__name__}: "
                               f"{shorten(str(error))})") from None  # fmt: skip
        if len(found) != sampling.answers:
            raise EngineFailed(f"{self._who} gave {len(found)} answers to a prompt; expected {sampling.answers}")
        return [checked(self._who, each, prompt, sampling, self._vocabulary) for each in found]

    def _patiently(self, act: Callable[[], object], again: Callable[[], object] | None = None) -> None:
        """Do something; if the server is lost, wait until it is back, and do `again`, until the deadline."""
        until_s = time.monotonic() + self._engine.deadline_s
        try:
            act()
            return
        except _Lost as error:
            lost = error
        with liveness.stage(f"waiting for {self._who}", unit="tries") as counter:
            while time.monotonic() < until_s:
                time.sleep(_WAIT_S)
                self._look()
                counter.advance()
                try:
                    self._ask("GET", "/health", None, patience_s=_CONNECT_S)
                    (again or act)()
                    return
                except _Lost as error:
                    lost = error
        raise EngineFailed(f"{self._who} {lost}, and was not back within {self._engine.deadline_s:g} s "
                           "(rl.engine.deadline_s)") from lost  # fmt: skip

    def _ask(
        self, method: str, path: str, body: Mapping[str, object] | None, also: tuple[int, ...] = (),
        patience_s: float | None = None,
    ) -> httpx.Response:  # fmt: skip
        timeout = httpx.USE_CLIENT_DEFAULT if patience_s is None else httpx.Timeout(patience_s)
        try:
            answer = self._client.request(method, path, json=body, timeout=timeout)
        except httpx.ReadTimeout as error:
            if patience_s is not None:
                raise _Lost("does not answer") from error
            raise EngineFailed(f"{self._who} did not answer {path} within {self._engine.deadline_s:g} s "
                               "(rl.engine.deadline_s)") from error  # fmt: skip
        except httpx.TransportError as error:
            raise _Lost(f"can't be reached ({' '.join(str(error).split()) or type(error).__name__})") from error
        if answer.status_code in _GONE:
            raise _Lost(f"answers {path} with {answer.status_code}")
        if answer.is_success or answer.status_code in also:
            return answer
        raise EngineFailed(f"{self._who} refused {path} with {answer.status_code}: {reason_in(answer)}")

    def _document(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        return self._read(self._ask(method, path, body))

    def _read(self, answer: httpx.Response) -> dict[str, Any]:
        content = object_in(answer)
        if content is None:
            raise EngineFailed(f"{self._who} answered {answer.url.path} with {shorten(answer.text, 200)}; expected a "
                               "JSON object")  # fmt: skip
        return content


def _at(document: object, *keys: str) -> object:
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _answer(choice: Mapping[str, Any], prompt: Sequence[int], with_routes: bool) -> Answer:
    """An answer of `/v1/completions`; raises what reading a malformed one does."""
    if choice["prompt_token_ids"] != list(prompt):
        raise ValueError("its prompt is another than the one that was sent")
    tokens = [int(each) for each in choice["token_ids"]]
    logps = [None if each is None or math.isnan(each) else float(each) for each in choice["logprobs"]["token_logprobs"]]
    if any(each is not None and (each > 1e-3 or each == -math.inf) for each in logps):
        raise ValueError("a log-probability of a sampled token is above 0 or infinite")
    encoded = choice.get("routed_experts") if with_routes else None
    return Answer(tokens, logps, None if encoded is None else decoded(encoded))


def decoded(encoded: str) -> Routes:
    """The routes of an answer, which vLLM sends as a base64 text of a numpy file.

    Raises:
        ValueError: it is none, or holds no integers.
    """
    found = np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False)
    if not isinstance(found, np.ndarray) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError("routes that are no integers")
    return found
