"""A small server that keeps the rules of `vllm serve` for a GRPO job: a process with a transformers model of its own.

It reads weights as vLLM does: a Hugging Face checkpoint, by the names of its files, into the model that it holds. It
has one route more than vLLM, `POST /logits`, by which tests compare the weights that it has.
"""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

KEY = "small-vllm-key"


@dataclass(frozen=True)
class Asked:
    """What a server is to be.

    Attributes:
        model: folder of its model.
        port: on this machine.
        routes: whether it returns the experts of each token.
        dev_mode: whether it was started with VLLM_SERVER_DEV_MODE=1.
        logprobs_mode: vLLM's option.
        max_model_len: vLLM's option.
        dies_at: number of the request for answers at which it is killed; 0: none.
        hangs_at: number of the request for answers from which on it answers none; 0: it answers all.
        keeps_weights: whether it says that it took weights, and does not.
        choice: fields that replace those of each answer.
        body: an answer to requests for answers, instead of the right one.
    """

    model: str
    port: int
    routes: bool = False
    dev_mode: bool = True
    logprobs_mode: str = "processed_logprobs"
    max_model_len: int = 256
    dies_at: int = 0
    hangs_at: int = 0
    keeps_weights: bool = False
    choice: dict[str, Any] = field(default_factory=dict)
    body: Any = None


class Served:
    """The model, and what it is asked for."""

    def __init__(self, folder: str, routes: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from llama_stack_provider_moe.compute.moe.derive import find_layout
        from llama_stack_provider_moe.compute.moe.replay import Replay

        self.torch, self.source = torch, AutoModelForCausalLM
        self.model = self.source.from_pretrained(folder, dtype=torch.float32).eval()
        self.lock = threading.Lock()
        self.config = self.model.config
        self.replay: Replay | None = None
        if routes:
            layout = find_layout(self.model)
            assert layout is not None
            self.replay = Replay(self.model, layout)

    def reload(self, folder: str) -> None:
        """Take every weight of a checkpoint over; a name or a shape that does not match is an error."""
        found, told = self.source.from_pretrained(
            folder, config=self.config, dtype=self.torch.float32, output_loading_info=True
        )
        wrong = {name: str(each) for name, each in told.items() if each}
        if wrong:
            raise ValueError(f"weights do not fit: {wrong}")
        self.model.load_state_dict(found.state_dict(), strict=True)

    def logits(self, ids: list[int]) -> list[list[float]]:
        with self.lock, self.torch.no_grad():
            answer: list[list[float]] = self.model(self.torch.tensor([ids])).logits[0].tolist()
        return answer

    def complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        with self.lock, self.torch.no_grad():
            return [self._answer(body, index) for index in range(body["n"])]

    def _answer(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        torch, prompt = self.torch, body["prompt"]
        drawn = torch.Generator().manual_seed(body["seed"] * 1009 + index)
        tokens: list[int] = []
        logps: list[float] = []
        while len(tokens) < body["max_tokens"]:
            logits = self.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
            if body["temperature"] == 0:
                token, logp = int(logits.argmax()), logits.log_softmax(-1)
            else:
                scaled = _nucleus(logits / body["temperature"], body["top_p"])
                logp = scaled.log_softmax(-1)
                token = int(torch.multinomial(logp.exp(), 1, generator=drawn))
            tokens.append(token)
            logps.append(float(logp[token]))
            if token in body["stop_token_ids"]:
                break
        choice: dict[str, Any] = {
            "index": index, "text": "", "prompt_token_ids": prompt, "token_ids": tokens,
            "logprobs": {"tokens": [f"token_id:{each}" for each in tokens], "token_logprobs": logps},
        }  # fmt: skip
        if self.replay is not None:
            choice["routed_experts"] = self._routes([*prompt, *tokens][:-1])
        return choice

    def _routes(self, ids: list[int]) -> str:
        """(tokens, all decoder layers, top_k), as vLLM has them: zeros where a layer has no router."""
        import numpy as np

        assert self.replay is not None
        with self.replay.recording(1) as found:
            self.model(self.torch.tensor([ids]))
        (routes,) = found
        whole = self.torch.zeros(len(ids), self.config.num_hidden_layers, routes.shape[-1], dtype=self.torch.int32)
        whole[:, list(self.replay.layers)] = routes[0].int()
        file = io.BytesIO()
        np.save(file, whole.numpy().astype("uint8"))
        return base64.b64encode(file.getvalue()).decode()


def _nucleus(logits: Any, top_p: float) -> Any:
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    dropped = probabilities.cumsum(-1) - probabilities >= top_p
    return logits.masked_fill(dropped.gather(-1, order.argsort(-1)), float("-inf"))


class _Handler(BaseHTTPRequestHandler):
    served: Served
    asked: Asked
    generations = 0

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/health":
            self.answer(200, {})
        elif path == "/v1/models":
            length = self.asked.max_model_len
            self.answer(200, {"data": [{"id": self.asked.model, "max_model_len": length}]})
        elif path == "/server_info" and self.asked.dev_mode:
            config = {"logprobs_mode": self.asked.logprobs_mode}
            self.answer(200, {"vllm_config": {"model_config": config}})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"null")
        if self.path == "/logits":
            self.answer(200, {"logits": self.served.logits(body["ids"])})
        elif self.headers.get("Authorization") != f"Bearer {KEY}":
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/collective_rpc" and body["method"] == "reload_weights":
            self.reload(body["kwargs"]["weights_path"])
        elif self.path == "/reset_prefix_cache":
            self.answer(200, {"success": True})
        elif self.path == "/v1/completions":
            self.complete(body)
        else:
            self.answer(404, {"detail": "Not Found"})

    def reload(self, folder: str) -> None:
        if self.asked.keeps_weights:
            self.answer(200, {"results": [None]})
            return
        try:
            with self.served.lock:
                self.served.reload(folder)
        except (ValueError, OSError, RuntimeError) as error:
            self.answer(500, {"error": {"message": f"EngineCore: {error}"}})
        else:
            self.answer(200, {"results": [None]})

    def complete(self, body: dict[str, Any]) -> None:
        kind = type(self)
        kind.generations += 1
        if kind.generations == self.asked.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if 0 < self.asked.hangs_at <= kind.generations:
            time.sleep(3600)
        choices = [{**choice, **self.asked.choice} for choice in self.served.complete(body)]
        found = {"object": "text_completion", "choices": choices[::-1]}
        self.answer(200, found if self.asked.body is None else self.asked.body)

    def answer(self, status: int, body: Any) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class SmallVllm:
    """A process that has imported torch, and forks a server whenever one is to start: each start takes no import."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.small_vllm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def url(self) -> str:
        """The address of the server."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, model: Path, **asked: Any) -> None:
        """Start a server, see `Asked`; one that runs is killed first."""
        self._tell(asdict(Asked(str(model), self.port, **asked)))
        until_s = time.monotonic() + 600
        while time.monotonic() < until_s:
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("it does not answer")

    def stop(self) -> None:
        """Kill the server, if one runs."""
        self._tell(None)

    def close(self) -> None:
        """End the process too."""
        self.stop()
        self.process.kill()
        self.process.communicate()

    def logits(self, ids: list[int]) -> list[list[float]]:
        """Of a prompt, by the weights that it has."""
        found: list[list[float]] = httpx.post(f"{self.url}/logits", json={"ids": ids}, timeout=600).json()["logits"]
        return found

    def _tell(self, what: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


def serve(asked: Asked) -> None:
    """Serve until the process is killed."""
    kind = type("Bound", (_Handler,), {"served": Served(asked.model, asked.routes), "asked": asked})
    ThreadingHTTPServer(("127.0.0.1", asked.port), kind).serve_forever()


def main() -> None:
    """Read one line of JSON for each server that is to start; null: none is to run."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    assert AutoModelForCausalLM is not None
    child = 0
    for line in sys.stdin:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            child = 0
        what = json.loads(line)
        if what is not None and not (child := os.fork()):
            serve(Asked(**what))
        print("done", flush=True)
    if child:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
