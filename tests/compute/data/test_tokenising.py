"""Shards of tokenised rows: the same whoever makes them, kept for the job's next start, made again if they differ."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from llama_stack_provider_moe.compute.data import datasets, shards, tokenising
from llama_stack_provider_moe.compute.data.datasets import SFT_FEATURES, sft_rows
from llama_stack_provider_moe.compute.data.encoding import Limit, SftEncoder
from llama_stack_provider_moe.compute.data.rendering import Rendering
from llama_stack_provider_moe.compute.data.row_counts import Reasons, RowCounts
from llama_stack_provider_moe.compute.data.shards import Recipe, Shard, Task, stretches
from llama_stack_provider_moe.compute.data.tokenising import Source, first_misfit, make_shards
from llama_stack_provider_moe.compute.runtime import cores
from llama_stack_provider_moe.control.supervisor.processes import in_session
from llama_stack_provider_moe.errors import DataError
from llama_stack_provider_moe.ground import liveness
from tests.support import tiny_models
from tests.support.chosen import few
from tests.support.jobs_support import wait_for
from tests.support.rows_support import closed_logs, session
from tests.support.training_support import said
from tests.support.training_support import sft_rows as some_rows

__all__ = ["closed_logs"]

ROOT = Path(__file__).parents[3]
VOCABULARY = tiny_models.VOCAB_SIZE


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_models.tokenizer()


def rows_file(folder: Path, rows: list[Any]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mixed(count: int) -> list[Any]:
    """Rows of several lengths; every tenth has no room for an answer."""
    rows: list[Any] = some_rows(count)
    for i in range(0, count, 10):
        rows[i] = {"messages": [said("user", f"{i} " + "five " * 99), said("assistant", "B")]}
    return rows


def recipe(tokenizer: PreTrainedTokenizerBase, length: int = 60, vocabulary: int = VOCABULARY) -> Recipe:
    return Recipe(SftEncoder(tokenizer, Rendering(), Limit(length)), SFT_FEATURES, vocabulary)


def made(
    how: Recipe, path: Path, folder: Path, helpers: int, told: list[str] | None = None, rows: int = 100
) -> list[tuple[Task, Shard]]:
    folder.mkdir(exist_ok=True)
    found = list(stretches(path, rows))
    held = dict.fromkeys(range(3, sum(each.count for each in found), 7), "validation")
    lines: list[str] = [] if told is None else told

    def say(text: str, level: str) -> None:
        lines.append(text if level == "info" else f"{level}: {text}")

    return make_shards(how, Source(path, "train", found, held), folder, helpers, say)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_stretches_are_the_file(tmp_path: Path) -> None:
    path = rows_file(tmp_path, mixed(23))
    found = list(stretches(path, rows=10))
    assert [(each.number, each.first, each.count) for each in found] == [(0, 0, 10), (1, 10, 10), (2, 20, 3)]
    content = path.read_bytes()
    assert content[found[1].begin :].splitlines()[0] == content.splitlines()[10]
    assert [each.count for each in stretches(path, rows=10, size=1)] == [1] * 23
    assert list(stretches(rows_file(tmp_path, []), rows=10)) == []


def test_several_processes_make_the_same_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "PARALLEL_ROWS", 1)
    path, reports = rows_file(tmp_path, mixed(1000)), list[liveness.Work]()
    alone = made(recipe(tokenizer), path, tmp_path / "alone", 1)
    monkeypatch.setattr(liveness, "EVERY_S", 0.0)
    with liveness.reports_to(reports.append):
        together = made(recipe(tokenizer), path, tmp_path / "together", 2)
    assert files(tmp_path / "alone") == files(tmp_path / "together")
    assert [shard for _, shard in alone] == [shard for _, shard in together]
    counts = datasets.total(shard.counts for _, shard in together)
    assert (counts.source, counts.encoded, counts.dropped.count) == (1000, 900, 100)
    (dropped,) = counts.dropped.named.values()
    assert dropped.rows == list(range(1, 201, 10))
    done = [report.done for report in reports if report.stage == "tokenising"]
    assert done == sorted(done), "progress never goes back"
    assert len(set(done)) > 5, "a helper reports each chunk"
    assert done[-1] == 1000


@pytest.mark.wide
def test_a_token_that_the_model_lacks_is_named_by_its_first_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "PARALLEL_ROWS", 1)
    path = rows_file(tmp_path, mixed(1000))
    greatest = [
        (number, max(max(row.columns["input_ids"]) for row in found))
        for number, found in enumerate(recipe(tokenizer).encode(mixed(1000)), start=1)
        if isinstance(found, list)
    ]
    vocabulary = max(token for _, token in greatest)
    expected = next(number for number, token in greatest if token >= vocabulary)
    for helpers in (1, 2):
        misfit = first_misfit(made(recipe(tokenizer, vocabulary=vocabulary), path, tmp_path / str(helpers), helpers))
        assert misfit is not None
        assert (misfit.row, misfit.token) == (expected, vocabulary)


@pytest.mark.parametrize("helpers", few([1, 2], 1))
def test_a_start_after_a_kill_goes_on_where_it_ended(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, helpers: int
) -> None:
    monkeypatch.setattr(tokenising, "PARALLEL_ROWS", 1)
    path, folder = rows_file(tmp_path, mixed(1000)), tmp_path / "shards"
    whole = made(recipe(tokenizer), path, tmp_path / "whole", 1)
    kept: list[str] = []

    def killed(task: Task, shard: Shard) -> None:
        if len(kept) == 4:
            raise KeyboardInterrupt
        shards.keep(task, shard)
        kept.append(task.name)

    with monkeypatch.context() as patched:
        patched.setattr(tokenising, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            made(recipe(tokenizer), path, folder, helpers)
    assert len(list(folder.glob("*.json"))) == 4
    again: list[str] = []

    def counted(task: Task, shard: Shard) -> None:
        shards.keep(task, shard)
        again.append(task.name)

    monkeypatch.setattr(tokenising, "keep", counted)
    told: list[str] = []
    assert [shard for _, shard in made(recipe(tokenizer), path, folder, helpers, told)] == [s for _, s in whole]
    assert files(folder) == files(tmp_path / "whole")
    assert sorted(kept + again) == sorted(task.name for task, _ in whole), "no shard is made twice"
    assert told == ["400 rows of 'train' were tokenised by an earlier start of this job; they are reused"]


def test_what_differs_is_made_again_and_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path, folder = rows_file(tmp_path, mixed(50)), tmp_path / "shards"
    made(recipe(tokenizer), path, folder, 1, rows=10)
    told: list[str] = []

    def again(how: Recipe) -> str:
        told.clear()
        made(how, path, folder, 1, told, rows=10)
        return "; ".join(told)

    other = (
        "of other rows, another tokenizer, other settings or another version: made again; a checkpoint of this job has "
        "learnt from what was there before"
    )
    reused = "rows of 'train' were tokenised by an earlier start of this job; they are reused"
    assert again(recipe(tokenizer)) == f"50 {reused}"
    assert again(recipe(tokenizer, length=61)) == (
        f"warning: 5 of 5 parts that an earlier start made of 'train' are {other}"
    )
    changed = tiny_models.tokenizer()
    changed.chat_template = tiny_models.CHATML.replace("'<|im_end|>\n'", "'<|im_end|>'")
    assert other in again(recipe(changed, length=61))
    assert "50 rows" in again(recipe(changed, length=61))
    rows = mixed(50)
    rows[45] = rows[44]
    rows_file(tmp_path, rows)
    assert again(recipe(changed, length=61)) == (
        f"40 {reused}; warning: 1 of 5 parts that an earlier start made of 'train' are {other}"
    )
    damaged = folder / "train.000002.train.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (folder / "train.000003.json").write_text("{")
    assert "2 of 5 parts that an earlier start made of 'train' are damaged: made again" in again(
        recipe(changed, length=61)
    )
    rows_file(tmp_path, rows[:20])
    again(recipe(changed, length=61))
    assert sorted({name[:12] for name in files(folder)}) == ["train.000000", "train.000001"]


def test_a_calls_padding_does_not_change_the_fingerprint(tokenizer: PreTrainedTokenizerBase) -> None:
    padded = tiny_models.tokenizer()
    padded(["a", "a longer text"], padding=True, truncation=True, max_length=5)
    assert recipe(padded).encode.fingerprint == recipe(tokenizer).encode.fingerprint


@pytest.mark.wide
def test_a_jobs_second_start_reuses_its_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "stretches", lambda path: shards.stretches(path, 10))
    monkeypatch.setattr(tokenising, "PARALLEL_ROWS", 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    options = {"max_length": 60, "validation_split": 0.2, "max_dropped": 0.2}
    first = sft_rows(session(tmp_path, mixed(95), options=options), tokenizer, VOCABULARY)
    asked = session(tmp_path, mixed(95), options=options)
    second = sft_rows(asked, tokenizer, VOCABULARY)
    assert second.train.to_list() == first.train.to_list()
    assert second.validation is not None
    assert first.validation is not None
    assert second.validation.to_list() == first.validation.to_list()
    assert second.counts == first.counts
    assert "95 rows of 'train' were tokenised by an earlier start" in asked.folder.events.read_text()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = session(tmp_path / "one", mixed(95), options=options)
    monkeypatch.setattr(datasets, "stretches", shards.stretches)
    one = sft_rows(asked, tokenizer, VOCABULARY)
    assert one.train.to_list() == first.train.to_list(), "the order does not depend on shards or processes"


@pytest.mark.wide
def test_a_failing_helper_ends_the_job_with_its_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenising, "PARALLEL_ROWS", 1)
    path = rows_file(tmp_path, mixed(300))
    content = path.read_text().splitlines()
    content[150] = "{broken"
    path.write_text("\n".join(content))
    with pytest.raises(RuntimeError, match=r"tokenises rows failed at train.000001:(.|\n)*JSONDecodeError"):
        made(recipe(tokenizer), path, tmp_path / "shards", 2)


ORPHANS = """
import sys, time
from pathlib import Path
from llama_stack_provider_moe.compute.data import tokenising
from tests.compute.data.test_tokenising import made, recipe
from tests.support import tiny_models

if __name__ == "__main__":
    tokenising.PARALLEL_ROWS = 1
    folder = Path(sys.argv[1])
    made(recipe(tiny_models.tokenizer()), folder / "train.jsonl", folder / "shards", 2, rows=2000)
"""


@pytest.mark.parametrize("number", few([signal.SIGKILL, signal.SIGTERM], 1))
def test_helpers_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    rows_file(tmp_path, mixed(40_000))
    script = tmp_path / "job.py"
    script.write_text(ORPHANS)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment, start_new_session=True)
    folder = tmp_path / "shards"
    try:
        wait_for(lambda: process.poll() is not None or any(folder.glob("*.json")), timeout_s=120)
        assert process.poll() is None
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 3, "the forkserver and its helpers"
        os.kill(process.pid, number)
        process.wait(60)
        wait_for(lambda: not in_session(process.pid), timeout_s=60)
    finally:
        process.kill()
        process.wait()
        for pid in in_session(process.pid):
            os.kill(pid, signal.SIGKILL)


def test_counts_keep_the_first_rows_of_each_reason() -> None:
    counts, later = RowCounts(source=30), RowCounts(source=5, rendering={"chat": 2})
    for row in range(1, 31):
        counts.dropped.add("long" if row % 2 else "same", row)
    later.dropped.add("long", 31)
    later.rendering["chat"] = 3
    counts.merge(later)
    assert (counts.source, counts.dropped.count, counts.rendering) == (35, 31, {"chat": 3})
    assert counts.dropped.text() == (
        f"rows {', '.join(str(i) for i in range(1, 31, 2))}, 31: long; rows 2, 4, 6, 8: same; and 11 more"
    )
    assert RowCounts.from_json(json.loads(json.dumps(counts.as_json()))) == counts
    many = Reasons()
    for row in range(1, 100):
        many.add(f"reason {row}", row)
    assert (many.count, len(many.named)) == (99, 20)


def test_cores_respect_the_operators_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "_LIMIT", tmp_path / "cpu.max")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert cores.cores_of_leader(2) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert (cores.cores_of_leader(1), cores.cores_of_leader(2), cores.cores_of_leader(99)) == (2, 4, 8)
    (tmp_path / "cpu.max").write_text("300000 100000")
    assert cores.cores_of_leader(2) == 3
    (tmp_path / "cpu.max").write_text("max 100000")
    assert cores.cores() == 8


def test_a_row_beyond_the_embedding_ends_the_job(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"row 1: the tokenizer gives id \d+, but the model's embedding has 100 rows"):
        sft_rows(session(tmp_path, some_rows(3)), tokenizer, 100)
