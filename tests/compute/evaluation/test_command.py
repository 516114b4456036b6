"""`moe-train eval` on tiny models in memory, and on a real HTTP server that speaks OpenAI's protocol."""

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llama_stack_provider_moe.compute.evaluation.command import main
from llama_stack_provider_moe.compute.evaluation.judges import NO, QUESTION, YES, Exchange, ModelJudge
from llama_stack_provider_moe.compute.evaluation.lm_eval_tasks import run_tasks
from llama_stack_provider_moe.compute.evaluation.served import Endpoint, ServedJudge, ServedModel, request_of
from llama_stack_provider_moe.errors import InvalidInput, ModelError, ServerLost, ServerRefused
from llama_stack_provider_moe.spec.rows import Conversation
from tests.support import tiny_models
from tests.support.routing_reports import report_of

KEY = "a-key"


class Server(BaseHTTPRequestHandler):
    """Refuses prompts with `please refuse`, calls a tool if there is one, and judges by whether an answer says No."""

    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        text = body["messages"][-1]["content"]
        status, answer = 200, {"choices": [self.choice(body, text)]}
        if body["model"] == "broken":
            status, answer = 503, {"error": "no room"}
        if body["model"] == "strange":
            answer = {"choices": []}
        if body["model"] == "slow":
            time.sleep(1.0)
        data = json.dumps(answer).encode()
        if body["model"] == "elsewhere":
            status = 307
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "/v1/other")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def choice(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        if body.get("logprobs"):
            likely = "Yes" if "<answer>\nNo" in text else " no"
            if "Silence" in text:
                likely = "Perhaps"
            top = [{"token": likely, "logprob": math.log(0.6)}, {"token": "Maybe", "logprob": math.log(0.3)}]
            return {"message": {"content": likely}, "logprobs": {"content": [{"top_logprobs": top}]}}
        if "tools" in body:
            made = {"function": {"name": body["tools"][0]["function"]["name"], "arguments": '{"path": "b.txt"}'}}
            return {"message": {"content": None, "tool_calls": [made]}}
        return {"message": {"content": "I can't do that." if "please refuse" in text else "Gladly."}}

    def log_message(self, *_: Any) -> None:
        """Write nothing to the tests' output."""


@pytest.fixture
def server() -> Iterator[str]:
    Server.seen = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_address[1]}/v1"
    running.shutdown()
    running.server_close()
    thread.join()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def scenario(forbidden: dict[str, Any], **more: Any) -> dict[str, Any]:
    tools = [{"name": "read_file", "parameters": {"type": "object", "properties": {}}}]
    return {"messages": [{"role": "user", "content": "Read."}], "tools": tools, "forbidden": [forbidden], **more}


def test_a_served_model_is_measured_over_http(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EVAL_API_KEY", KEY)
    refuse = write(tmp_path / "r.jsonl", [{"prompt": f"{i}: please refuse"} for i in range(3)] + [{"prompt": "Go on."}])
    safe = write(tmp_path / "s.jsonl", [{"prompt": "A tree?"}, {"prompt": "please refuse"}])
    retain = write(tmp_path / "k.jsonl", [{"prompt": "A tree?", "completion": "An oak."}])
    calls = write(tmp_path / "c.jsonl", [scenario({"name": "read_file", "arguments": {"path": "^b"}}),
                                        scenario({"name": "read_file", "arguments": {"path": "^a"}})])  # fmt: skip
    out = tmp_path / "out"
    code = main([
        "served", "--url", server, "--refuse", refuse, "--safe", safe, "--retain", retain, "--scenarios", calls,
        "--judge-model", "asked", "--judge-url", server, "--out", str(out), "--dtype", "fp32", "--resamples", "100",
    ])  # fmt: skip
    assert code == 0
    report = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    measured = report["measured"]["before"]
    # This server's judge says Yes to answers that begin with No; "I can't" does not.
    assert (measured["refusal_rate"]["n"], measured["refusal_rate"]["value"]) == (4, 0.0)
    assert (measured["forbidden_calls_rate"]["n"], measured["forbidden_calls_rate"]["value"]) == (2, 0.5)
    assert report["skipped"] == ["retain: a server does not give the likelihood of given answers"]
    assert report["judge"] == f"model asked at {server}"
    assert {each["key"] for each in Server.seen} == {f"Bearer {KEY}"}
    assert {each["path"] for each in Server.seen} == {"/v1/chat/completions"}
    assert all(each["temperature"] == 0 for each in Server.seen)


def test_a_reply_that_is_not_an_answer_is_reported(server: str) -> None:
    with pytest.raises(ServerRefused, match=r"HTTP 503: .*no room"):
        Endpoint(server, "broken").choice(messages=[{"role": "user", "content": "?"}])
    with pytest.raises(ServerRefused, match="the answer is not a completion"):
        Endpoint(server, "strange").choice(messages=[{"role": "user", "content": "?"}])
    with pytest.raises(ServerLost, match="no answer in time"):
        Endpoint(server, "slow", timeout_s=0.1).choice(messages=[{"role": "user", "content": "?"}])
    with pytest.raises(ServerRefused, match="HTTP 307"):  # the API key is not sent elsewhere either
        Endpoint(server, "elsewhere", KEY).choice(messages=[{"role": "user", "content": "?"}])
    with pytest.raises(ServerLost):
        Endpoint("http://127.0.0.1:9/v1", "m").choice(messages=[{"role": "user", "content": "?"}])
    for url in ("file:///etc/passwd", "127.0.0.1:8000", "http://"):
        with pytest.raises(InvalidInput, match="http or https URL"):
            Endpoint(url, "m")


def test_a_served_judge_reads_log_probabilities(server: str) -> None:
    judge = ServedJudge(Endpoint(server, "asked"), QUESTION)
    assert judge.refusals([("Do.", "No."), ("Do.", "Done.")]) == [True, False]
    with pytest.raises(ServerRefused, match="neither Yes nor No"):
        judge.refusals([("Do.", "Silence.")])


def test_a_server_gets_calls_and_tools_as_openai_writes_them() -> None:
    tools: list[dict[str, object]] = [{"type": "function", "function": {"name": "tide"}}]
    row: Conversation = {
        "messages": [
            {"role": "user", "content": "Tide?"},
            {"role": "assistant", "content": None, "reasoning": "A table.", "weight": 0, "tool_calls": [
                {"type": "function", "id": "c1", "function": {"name": "tide", "arguments": {"port": "Brest"}}}]},
            {"role": "tool", "content": "5 m", "tool_call_id": "c1"},
        ],
        "tools": tools,
        "chat_template_kwargs": {"parallel_tool_calls": False, "enable_thinking": True},
    }  # fmt: skip
    call = {"type": "function", "id": "c1", "function": {"name": "tide", "arguments": '{"port": "Brest"}'}}
    assert request_of(row) == {
        "messages": [
            {"role": "user", "content": "Tide?"},
            {"role": "assistant", "content": None, "reasoning_content": "A table.", "tool_calls": [call]},
            {"role": "tool", "content": "5 m", "tool_call_id": "c1"},
        ],
        "tools": tools,
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": True},
    }


def test_a_served_model_skips_what_it_cannot_measure(server: str) -> None:
    subject = ServedModel(Endpoint(server, "m"), 8, lambda *_: None)
    skipped: list[str] = []
    assert subject.tasks(["hellaswag"], skipped.append) == {}
    assert subject.likelihoods("retain", []) is None
    assert skipped


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has Yes and No as tokens."""
    folder = tmp_path_factory.mktemp("judge")
    tiny_models.model("llama", vocab_size=400).save_pretrained(folder)
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens(["Yes", "No"])
    assert len(tokenizer) <= 400
    tokenizer.save_pretrained(folder)
    return folder


def test_a_judges_margin_is_the_models_own_whatever_the_batch(judging: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(judging).eval()
    tokenizer = AutoTokenizer.from_pretrained(judging)
    exchanges = [Exchange("A tree?", "An oak."), Exchange("Two words about spring, please?", "No."), Exchange("?", "")]
    found = ModelJudge("j", model, tokenizer, 2, 4096).margins(exchanges)
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    for exchange, margin in zip(exchanges, found, strict=True):
        question = QUESTION.format(prompt=exchange.prompt, answer=exchange.answer)
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                             add_generation_prompt=True)  # fmt: skip
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, -1].log_softmax(-1)
        assert margin == pytest.approx((log_probs[yes] - log_probs[no]).item(), abs=1e-4)
    verdicts = ModelJudge("j", model, tokenizer, 3, 4096).refusals(exchanges)
    assert verdicts == [margin > 0 for margin in found]


def test_a_judge_without_words_for_its_verdict_is_refused() -> None:
    assert {"Yes", "No"} <= {*YES, *NO}
    with pytest.raises(ModelError, match="different single tokens for Yes and No"):
        ModelJudge("j", tiny_models.model("llama"), tiny_models.tokenizer(), 2, 512)


def test_with_an_adapter_it_measures_without_and_with(
    judging: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that changes nothing: every difference is 0, every ratio 1; masked experts change the figures.

    The report is written, but the exit code says that a task which was asked for has no score.
    """
    folder = tiny_models.build("mixtral", tmp_path / "model")
    adapted = get_peft_model(tiny_models.model("mixtral"), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    rows = [{"prompt": f"Name {i} trees.", "completion": "The capital of France is Paris."} for i in range(3)]
    analysis = report_of({(0, 1): 0.4, (1, 3): 0.3, (0, 0): 0.2})
    (tmp_path / "routing.json").write_text(analysis.model_dump_json(), encoding="utf-8")
    code = main([
        str(folder), "--adapter", str(tmp_path / "adapter"), "--refuse", write(tmp_path / "r.jsonl", rows),
        "--retain", str(tmp_path / "r.jsonl"), "--labelled",
        write(tmp_path / "l.jsonl", [{"prompt": "?", "answer": "I cannot.", "refusal": True}]),
        "--judge-model", str(judging), "--mask-from", str(tmp_path / "routing.json"), "--mask-set", "a",
        "--mask-top", "2", "--fail-if", "capability_drop=0.02", "--task", "no_such_task", "--dtype", "fp32",
        "--max-new-tokens", "4", "--max-length", "4096", "--resamples", "100", "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    assert code == 1
    assert "eval: --task: no score of no_such_task" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "eval.json").read_text(encoding="utf-8"))
    assert report["masked_experts"] == {"0": [1], "1": [3]}
    change = report["differences"]["after - before"]
    assert change["perplexity_ratio"] == {"n": 3, "value": 1.0, "low": 1.0, "high": 1.0}
    assert change["refusal_rate"]["value"] == 0
    assert report["differences"]["after_masked - after"]["perplexity_ratio"]["value"] != 1
    assert [(each["labelled_by"], each["n"]) for each in report["agreement"]][1] == ("your labels", 1)
    assert report["gate"][0]["exceeded"] is False


def test_tasks_without_lm_eval_are_named_as_skipped() -> None:
    import importlib.util

    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed here")
    skipped: list[str] = []
    assert run_tasks(tiny_models.model("llama"), tiny_models.tokenizer(), ["arc_easy"], 1, skipped.append) == {}
    assert skipped == ["tasks arc_easy: lm-eval is not installed (pip install 'llama-stack-provider-moe[eval]')"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["m"], "names nothing to measure"),
        (["m", "--refuse", "missing.jsonl"], "missing.jsonl"),
        (["m", "--refuse", "x", "--fail-if", "mood=1"], "--fail-if"),
        (["m", "--retain", "x", "--fail-if", "capability_drop=0.1"], "also --adapter"),
        (["m", "--refuse", "x", "--mask", "3"], "--mask"),
        (["m", "--refuse", "x", "--judge-url", "http://h/v1"], "--judge-model"),
        (["m", "--refuse", "x", "--batch-size", "0"], "batch_size"),
        (["m", "--refuse", "x", "--mask-from", "missing.json", "--mask-set", "a"], "--mask-from"),
        (["m", "--refuse", "x", "--mask-from", "missing.json"], "also --mask-set"),
        (["m", "--refuse", "x", "--mask-from", "m.json", "--mask-set", "a", "--mask-top", "0"], "--mask-top"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err


def test_a_template_that_ignores_tools_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models.build("llama", tmp_path / "model")
    rows = write(tmp_path / "c.jsonl", [scenario({"name": "read_file"})])
    assert main([str(folder), "--scenarios", rows, "--dtype", "fp32", "--out", str(tmp_path / "out")]) == 1
    assert "the chat template leaves out `tools` (describe them in a system message" in capsys.readouterr().err
