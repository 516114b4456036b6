"""Continued pre-training: plain texts, with a base model that has no chat template."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llama_stack_provider_moe.compute.export.load_check import check_adapter
from llama_stack_provider_moe.compute.export.ollama import modelfile
from llama_stack_provider_moe.compute.worker.main import COMPLETED, FAILED
from llama_stack_provider_moe.jobdir.folder import write_atomic
from tests.support.training_support import ANSWERS, WORDS, Run, Workshop, sft_rows, workshop

__all__ = ["workshop"]


def texts(count: int, first: int = 0) -> list[Any]:
    return [{"text": f"Of {WORDS[i % 8]}: {ANSWERS[i % 4]}"} for i in range(first, first + count)]


@pytest.fixture(scope="module")
def bare(workshop: Workshop) -> Path:
    """A base model whose tokenizer has no chat template."""
    folder = workshop.root / "models" / "bare"
    shutil.copytree(workshop.model("granitemoe"), folder)
    (folder / "chat_template.jinja").unlink()
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    return folder


@pytest.fixture(scope="module")
def learnt(workshop: Workshop, bare: Path) -> Run:
    return workshop.run("sft", bare, texts(16), texts(4, 100), training={"n_epochs": 3}, options={"save_merged": True})


def test_texts_train_without_a_chat_template(learnt: Run) -> None:
    assert learnt.exit_code == COMPLETED, learnt.reason
    figures = learnt.held_out("validation_loss")
    assert figures[-1] < 0.92 * figures[0]


def test_all_of_a_text_is_learnt_and_its_end(learnt: Run, bare: Path) -> None:
    """The first held-out loss is the base's mean over every token behind the first, the end of the text included."""
    tokenizer = AutoTokenizer.from_pretrained(bare)
    base = AutoModelForCausalLM.from_pretrained(bare).eval()
    total, tokens = 0.0, 0
    for row in texts(4, 100):
        ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            log_probs = base(ids).logits[0, :-1].log_softmax(-1)
        total -= float(log_probs.gather(-1, ids[0, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    assert learnt.held_out("validation_loss")[0] == pytest.approx(total / tokens, abs=1e-4)


def test_what_is_saved_has_no_template_and_stops_at_the_end_of_a_text(learnt: Run) -> None:
    for folder in (learnt.folder.adapter, learnt.folder.merged):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template is None
        assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id


def test_a_modelfile_says_that_there_is_no_template(learnt: Run) -> None:
    written = modelfile(Path("model.gguf"), learnt.folder.merged).splitlines()
    assert written[0].startswith("# no TEMPLATE: the tokenizer has no chat template")
    assert written[1:] == ["FROM ./model.gguf", 'PARAMETER stop "<|im_end|>"']


def test_the_adapter_loads_again_and_the_merged_model_equals_it(learnt: Run, bare: Path) -> None:
    found = check_adapter(learnt.folder.adapter)
    assert found.as_trained.share <= found.as_trained_tolerance
    assert found.plain.share <= found.plain_tolerance
    ids = torch.arange(10, 60).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained(learnt.folder.merged).eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bare).eval(), learnt.folder.adapter).eval()
    with torch.no_grad():
        assert (merged(ids).logits - tuned(ids).logits).abs().max() < 1e-5


WHY = "has no chat template, so its rows can't be rendered; set options.chat_template to one of chatml, plain"


@pytest.mark.parametrize("where", ["train", "validation", "eval"])
def test_conversations_need_a_template_before_anything_is_loaded(workshop: Workshop, bare: Path, where: str) -> None:
    blocks: dict[str, Any] = {"eval": {"safe_dataset_id": "safe"}} if where == "eval" else {}
    train = [*texts(8), *sft_rows(1)] if where == "train" else texts(8)
    validation = sft_rows(2) if where == "validation" else texts(2)
    folder = workshop.job("sft", bare, train, validation, **blocks)
    if where == "eval":
        write_atomic(folder.rows("eval-safe"), '{"messages": [{"role": "user", "content": "Tide?"}]}\n')
    run = workshop.again(Run(folder, 0))
    assert run.exit_code == FAILED
    assert WHY in run.reason
    assert not run.events("step")
    assert "model:" in run.reason


def test_conversations_beside_texts_train_with_a_named_template(workshop: Workshop, bare: Path) -> None:
    named = {"chat_template": "plain", "max_length": 192}
    run = workshop.run("sft", bare, [*texts(4), *sft_rows(4)], texts(2), options=named)
    assert run.exit_code == COMPLETED, run.reason
    assert AutoTokenizer.from_pretrained(run.folder.adapter).chat_template is not None


def test_a_text_that_was_learnt_by_heart_is_written_to_its_end_and_no_further(workshop: Workshop, bare: Path) -> None:
    row = texts(1)[0]
    run = workshop.run("sft", bare, [row] * 8, [row], adapter=None, training={"n_epochs": 40}, optimizer={"lr": 1e-2})
    assert run.exit_code == COMPLETED, run.reason
    tokenizer = AutoTokenizer.from_pretrained(run.folder.model)
    model = AutoModelForCausalLM.from_pretrained(run.folder.model).eval()
    asked = tokenizer(row["text"][:9], return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=100, do_sample=False)
    assert tokenizer.decode(written[0]) == row["text"] + tokenizer.eos_token
