"""A GGUF file served by llama.cpp's own server, and a chat with it through Llama Stack's inference API."""

import json
import math
import shutil
import sys
from pathlib import Path

import gguf
import httpx
import numpy
import pytest

from examples import serve_models
from examples.serve_gguf import MODEL, ServingFailed, chat, llama_cpp, llama_stack
from tests.support import tiny_models

pytest.importorskip("xllamacpp", reason="llama.cpp's server: pip install 'llama-stack-provider-moe[serve]'")
HIDDEN, INNER, HEADS, LAYERS = 32, 48, 4, 2


def tiny_gguf(path: Path) -> Path:
    """A random dense Llama with the tiny tokenizer; it only matters that it answers, not what."""
    tokenizer = tiny_models.tokenizer()
    vocabulary = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda one: one[1])]
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 256), (writer.add_embedding_length, HIDDEN), (writer.add_block_count, LAYERS),
        (writer.add_feed_forward_length, INNER), (writer.add_head_count, HEADS), (writer.add_head_count_kv, HEADS),
        (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_vocab_size, len(vocabulary)),
        (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "default"),
        (writer.add_token_list, vocabulary), (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_chat_template, tiny_models.CHATML), (writer.add_add_bos_token, False),
    ):  # fmt: skip
        add(value)
    special = set(tokenizer.all_special_tokens) | {"<|im_start|>"}
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    generator = numpy.random.default_rng(0)
    shapes = {"token_embd": (len(vocabulary), HIDDEN), "output": (len(vocabulary), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        named = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "ffn_down": (HIDDEN, INNER)}
        named |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (HIDDEN, HIDDEN))
        named |= dict.fromkeys(("ffn_gate", "ffn_up"), (INNER, HIDDEN))
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in named.items()}
    for name, shape in shapes.items():
        numbers = numpy.ones(shape) if len(shape) == 1 else generator.normal(0, 1 / math.sqrt(shape[-1]), shape)
        writer.add_tensor(f"{name}.weight", numbers.astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.e2e
def test_a_chat_through_llama_stack(tmp_path: Path) -> None:
    """Llama Stack's answer equals the server's own answer; both are greedy."""
    with llama_cpp(tiny_gguf(tmp_path / "tiny.gguf"), tmp_path, context=256, threads=1) as native:
        body = {"messages": [{"role": "user", "content": "Write a letter."}], "temperature": 0, "max_tokens": 12}
        direct = httpx.post(f"{native}/v1/chat/completions", json=body, timeout=60).json()
        with llama_stack(native, tmp_path) as stack:
            assert chat(stack, "Write a letter.", 12) == direct["choices"][0]["message"]["content"].strip()
            models = httpx.get(f"{stack}/v1/models", timeout=60).json()["data"]
            assert f"llama-cpp/{MODEL}" in [model["id"] for model in models]
    with pytest.raises(httpx.TransportError):  # nothing is left running
        httpx.get(f"{native}/health", timeout=5)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{stack}/v1/health", timeout=5)


def test_what_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(ServingFailed, match="there is no file"), llama_cpp(tmp_path / "none.gguf", tmp_path, 256, 1):
        pass
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ServingFailed, match="ended with exit code"), llama_cpp(tmp_path / "bad.gguf", tmp_path, 256, 1):
        pass
    with (
        pytest.raises(ServingFailed, match="ended with exit code"),
        llama_cpp(tiny_gguf(tmp_path / "tiny.gguf"), tmp_path, 256, 1, Path(sys.executable)),
    ):
        pass


@pytest.mark.e2e
def test_a_folder_of_models_is_served(tmp_path: Path) -> None:
    """Two models, of which one may be in memory: each answers by its name, and files come and go."""
    models = tmp_path / "models"
    models.mkdir()
    one = tiny_gguf(models / "one.gguf")
    body = {"messages": [{"role": "user", "content": "Write a letter."}], "temperature": 0, "max_tokens": 6}
    with (
        serve_models.serving(models, 0, most=1, context=256, threads=1) as url,
        httpx.Client(base_url=url, timeout=300, trust_env=False) as http,
    ):
        assert http.get("/health").json() == {"status": "ok"}
        assert "default_generation_settings" in http.get("/props").json()
        shutil.copy(one, models / "two.gguf")
        assert [each["id"] for each in http.get("/models?reload=1").json()["data"]] == ["one", "two"]
        said = [
            http.post("/v1/chat/completions", json={"model": name, **body}).json() for name in ("one", "two", "one")
        ]
        texts = [each["choices"][0]["message"]["content"] for each in said]
        assert texts[0] == texts[1] == texts[2] != ""
        with http.stream("POST", "/v1/chat/completions", json={"model": "one", "stream": True, **body}) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        pieces = [json.loads(line)["choices"] for line in lines[:-1]]
        assert "".join(each[0]["delta"].get("content") or "" for each in pieces if each) == texts[0]
        one.unlink()
        for model, told in (("one", "there is no model 'one'"), ("../one", "there is no model '../one'")):
            refused = http.post("/v1/chat/completions", json={"model": model, **body})
            assert (refused.status_code, refused.json()["error"]["message"]) == (404, told)
        assert http.post("/v1/chat/completions", content=b"{").status_code == 400
        assert http.get("/v1/nothing").status_code == 404
        (models / "bad.gguf").write_bytes(b"GGUF and nothing else")
        failed = http.post("/v1/chat/completions", json={"model": "bad", **body})
        assert (failed.status_code, "ended with exit code" in failed.text) == (500, True)
        assert http.post("/v1/chat/completions", json={"model": "two", **body}).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health", timeout=5, trust_env=False)
