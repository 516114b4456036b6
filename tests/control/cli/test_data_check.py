"""`moe-train data check`: what it counts is what a job does with the same rows."""

import gzip
import json
from pathlib import Path

import pytest

from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.spec.row_sources import PAIRED
from tests.support import tiny_models
from tests.support.chosen import few
from tests.support.cli_support import moe_train

ROWS: list[dict[str, object]] = [
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."},
                  {"role": "user", "content": "Which sea?"}, {"role": "assistant", "content": "The Baltic."}]},
    {"prompt": "2+2?", "completion": "4", "id": 1},
    {"prompt": "2+2?", "completion": "4", "id": 2},
    *({"prompt": f"Question {number}?", "completion": f"Answer {number}."} for number in range(17)),
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> str:
    return written(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.build("mixtral", tmp_path_factory.mktemp("model") / "mixtral"))


def written(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_without_a_model(file: str) -> None:
    done = moe_train("data", "check", file)
    assert done.code == Exit.OK, done.err
    assert "20: prompt_completion (19), messages (1)" in done.out
    assert "row 3 is the same as row 2" in done.out
    assert "a job would take these rows; --model counts tokens" in done.out


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv", "rows.parquet"])
def test_other_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 2))
    elif name.endswith(".csv"):
        path.write_text("prompt,completion\na,b\na,b\n")
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"prompt": ["a"] * 2, "completion": ["b"] * 2}), path)
    done = moe_train("data", "check", str(path), "--json")
    assert (done.code, done.document["formats"]) == (Exit.OK, {"prompt_completion": 2})


def test_prompts_of_grpo_and_what_graders_read(tmp_path: Path) -> None:
    rows = [{"prompt": f"{number} + 1?", "answer": number + 1} for number in range(12)]
    whole = written(tmp_path / "rows.jsonl", rows)
    assert moe_train("data", "check", whole, "--recipe", "grpo").code == Exit.OK
    few = moe_train("data", "check", whole, "--recipe", "grpo", "--set", "training.batch_size=64")
    assert few.code == Exit.FAILED
    assert "16 fill one generation" in few.out
    grader = {"type": "string_check", "name": "right", "operation": "eq", "reference": "{{item.answer}}"}
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"recipe": "grpo", "data": {"dataset_id": "x"}, "reward": [{"grader": grader}]}))
    assert moe_train("data", "check", whole, "--job", str(job)).code == Exit.OK
    lacks = written(tmp_path / "lacks.jsonl", [*rows, {"prompt": "3 + 1?"}])
    refused = moe_train("data", "check", lacks, "--job", str(job))
    assert refused.code == Exit.FAILED
    assert "row 13: answer is missing; grader 'right' reads {{item.answer}}" in " ".join(refused.out.split())


def test_prompts_of_distillation_fill_a_step(tmp_path: Path) -> None:
    whole = written(tmp_path / "rows.jsonl", [{"prompt": f"{number} + 1?"} for number in range(12)])
    assert moe_train("data", "check", whole, "--recipe", "distill").code == Exit.OK
    few = moe_train("data", "check", whole, "--recipe", "distill", "--set", "training.batch_size=16")
    assert few.code == Exit.FAILED
    assert "16 fill one generation" in few.out


def test_rows_that_a_job_refuses(tmp_path: Path) -> None:
    done = moe_train("data", "check", written(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "only"}]))
    assert done.code == Exit.FAILED
    assert "row 21: completion is missing beside 'prompt'" in done.out
    assert "a job would refuse these rows: 1 of 21 are not valid" in done.out


def test_held_out_rows_that_are_also_here(tmp_path: Path, file: str) -> None:
    held = written(tmp_path / "held.jsonl", [ROWS[1], {"prompt": "new", "completion": "x"}])
    done = moe_train("data", "check", file, "--held-out", held, "--json")
    assert (done.document["held_out_rows"], done.document["overlap"]) == (2, 1)


@pytest.mark.parametrize("recipe", few(["dpo", "sft", "circuit_breaker", "kto", "reward"], 1))
def test_tokens_are_those_that_a_job_learns(tmp_path: Path, model: str, recipe: str) -> None:
    rows: list[dict[str, object]] = (
        ROWS
        if recipe not in PAIRED
        else [{"prompt": f"{n}?", "chosen": "yes, surely", "rejected": "no"} for n in range(20)]
    )
    if recipe == "kto":
        rows = [{**row, "label": number > 2} for number, row in enumerate(ROWS)]
    done = moe_train(
        "data",
        "check",
        written(tmp_path / "rows.jsonl", rows),
        "--model",
        model,
        "--recipe",
        recipe,
        "--show",
        "2",
        "--json",
    )
    assert done.code == Exit.OK, done.err
    found, (first, *_) = done.document["tokens"], done.document["shown"]
    assert any(line.startswith("loss mask: ") for line in found["plan"])
    # KTO holds out some of each class, and leaves a last micro-batch of one row out.
    expected = (3, 16, 4, 4) if recipe == "kto" else (2, 18, 4, 5)
    assert (found["held_out"], found["sequences"], found["rows_a_step"], found["steps"]) == expected
    learnt = tiny_models.tokenizer().decode([label for label in first["labels"] if label != -100])
    assert learnt.split("<|im_end|>")[:2] == {
        "sft": ["Hi.", "The Baltic."], "dpo": ["yes, surely", ""], "circuit_breaker": ["The Baltic.", ""],
        "kto": ["The Baltic.", ""], "reward": ["yes, surely", ""],
    }[recipe]  # fmt: skip
    assert "".join(first["pieces"]) == tiny_models.tokenizer().decode(first["ids"])


@pytest.mark.parametrize(
    ("recipe", "changes", "steps"),
    [
        ("grpo", {"training.batch_size": 4}, 18),  # a prompt with its 4 answers
        ("grpo", {"training.batch_size": 8, "rl.steps_per_generation": 2, "rl.n_iterations": 2}, 16),
        ("grpo", {"training.batch_size": 4, "training.max_steps_per_epoch": 5}, 5),
        ("distill", {"training.batch_size": 4}, 4),  # prompts that fill no step are left out
    ],
)
def test_steps_of_a_job_that_writes_answers(
    file: str, model: str, recipe: str, changes: dict[str, int], steps: int
) -> None:
    """18 of the 20 prompts train. The figures are those of `Generations`, which the job itself uses."""
    words = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    answer = "rl" if recipe == "grpo" else "generation"
    words += ["--recipe", recipe, "--set", f"{answer}.max_completion_length=16", "--set", "options.max_length=128"]
    done = moe_train("data", "check", file, "--model", model, *words)
    assert done.code == Exit.OK, done.err
    assert f"{steps} of {changes['training.batch_size']} answers each on one process" in done.out
    assert "18 prompts" in done.out


def test_long_rows_are_cut_left_out_and_too_many_fail(file: str, model: str) -> None:
    words = ("data", "check", file, "--model", model, "--set", "options.max_length=8")
    done = moe_train(*words)
    assert done.code == Exit.FAILED
    assert "rows are left out; options.max_dropped allows 5%" in done.out
    assert moe_train(*words, "--set", "options.max_dropped=1").code == Exit.OK


def test_rows_are_shown_with_what_is_learnt(file: str, model: str) -> None:
    done = moe_train("data", "check", file, "--model", model, "--show", "1")
    assert "[[Hi.<|im_end|>]]" in done.out
    assert "row 1, " in done.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nosuch.jsonl"], "FILE: 'nosuch.jsonl'"),
        (["{file}", "--show", "2"], "also --model"),
        (["{file}", "--model", "./nosuch"], "--model: './nosuch'"),
        (["{file}", "--set", "options.max_lenth=3"], "options.max_lenth"),
        (["{file}", "--set", "data.columns={\"question\": \"q\"}"], "data.columns"),
        (["{file}", "--job", "@nosuch"], "@nosuch"),
        (["-", "--held-out", "-"], "standard input is read once"),
    ],
)  # fmt: skip
def test_mistakes(file: str, words: list[str], says: str) -> None:
    done = moe_train("data", "check", *(word.replace("{file}", file) for word in words))
    assert done.code == Exit.REFUSED
    assert says in done.err


def test_settings_of_a_job_file_count(file: str, model: str) -> None:
    done = moe_train("data", "check", file, "--model", model, "--job", "@granite_moe_sft", "--json")
    assert done.code == Exit.OK, done.err
    assert done.document["tokens"]["rows_a_step"] > 1


def test_a_file_of_one_domain(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}] * 2)
    columns = {"prompt": "question", "completion": "answer"}
    domains = [{"name": "math", "dataset_id": "m", "columns": columns}, {"name": "chat", "dataset_id": "c"}]
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"recipe": "sft", "data": {"domains": domains}}))
    done = moe_train("data", "check", path, "--job", str(job), "--domain", "math", "--json")
    assert (done.code, done.document["formats"]) == (Exit.OK, {"prompt_completion": 2}), done.err
    for words, says in ((["--job", str(job)], "--domain: "), (["--domain", "math"], "a job file with data.domains"),
                        (["--job", str(job), "--domain", "law"], "'law' is not valid; expected a domain of the job "
                         "file: 'math', 'chat'")):  # fmt: skip
        done = moe_train("data", "check", path, *words)
        assert (done.code, says in done.err) == (Exit.REFUSED, True), done.err


def test_a_column_of_domains(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": f"b{at}", "weight": each} for at, each in enumerate(["law", "code"] * 2)]
    path = written(tmp_path / "rows.jsonl", rows)
    done = moe_train("data", "check", path, "--set", "data.domain_column=weight", "--json")
    assert done.code == Exit.OK, done.err
    assert done.document["notes"] == {"domain law": 2, "domain code": 2}
    assert done.document["columns_not_read"] == {}
    words = ("--set", "data.domain_column=weight", "--set", 'data.domain_ratios={"law": 1, "chat": 2}')
    done = moe_train("data", "check", path, *words)
    assert (done.code, "weight is 'code'; expected 'law', 'chat'" in done.out) == (Exit.FAILED, True), done.out
    alone = written(tmp_path / "alone.jsonl", rows[:1])
    done = moe_train("data", "check", path, "--held-out", alone, *words[:2])
    assert "at least 1 held-out row(s) of each domain; 'code' has 0" in done.err


def test_a_single_row_is_refused_as_by_a_job_unless_none_is_held_out(tmp_path: Path) -> None:
    words = ("data", "check", written(tmp_path / "rows.jsonl", [ROWS[1]]))
    done = moe_train(*words)
    assert done.code == Exit.FAILED
    assert "a job would refuse so few rows; expected at least 2 rows, because one is held out" in done.out
    assert moe_train(*words, "--set", "options.validation_split=0").code == Exit.OK


def test_rows_with_thumbs_of_one_class_are_refused_as_by_a_job(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{**row, "label": number == 1} for number, row in enumerate(ROWS)]
    done = moe_train("data", "check", written(tmp_path / "rows.jsonl", rows), "--recipe", "kto")
    assert done.code == Exit.FAILED
    assert "a thumb down (19)" in done.out
    assert "at least 2 row(s) with a thumb up, because one is held out; it has 1 of 20" in " ".join(done.out.split())


@pytest.mark.wide
def test_rows_longer_than_a_refusing_length_are_not_blamed_on_the_template(file: str, model: str) -> None:
    done = moe_train("data", "check", file, "--model", model, "--set", "options.max_length=16",
                     "--set", "options.truncate=refuse")  # fmt: skip
    assert done.code == Exit.FAILED
    assert "tokens, more than options.max_length = 16" in done.out
    assert "rows are refused, see above" in done.out


@pytest.mark.wide
def test_a_pair_is_shown_with_which_answer_is_which(tmp_path: Path, model: str) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(3)]
    done = moe_train("data", "check", written(tmp_path / "rows.jsonl", rows), "--recipe", "dpo", "--model", model,
                     "--show", "2")  # fmt: skip
    shown = [line.split(" tokens")[0].rsplit(",", 1)[0] for line in done.out.splitlines() if " learnt (" in line]
    assert shown == ["row 1, chosen", "row 1, rejected"] or shown == [
        "row 1, chosen", "row 1, rejected", "row 2, chosen", "row 2, rejected"
    ]  # fmt: skip


@pytest.mark.wide
def test_a_model_of_the_server_is_named_as_in_a_job(
    tmp_path: Path, file: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "state" / "models").mkdir(parents=True)
    (tmp_path / "state" / "models" / "mine").symlink_to(model)
    job = tmp_path / "job.yaml"
    job.write_text("{recipe: sft, model: mine, data: {dataset_id: any}}")
    for words in (["--model", "mine"], ["--job", str(job)]):
        done = moe_train("data", "check", file, *words, "--json")
        assert done.code == Exit.OK, done.err
        assert done.document["tokens"]["sequences"] == 18


@pytest.mark.wide
def test_no_template_of_ours_is_advised_for_tools(tmp_path: Path, model: str) -> None:
    tools = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}]
    rows: list[dict[str, object]] = [{**ROWS[0], "tools": tools}] * 2
    done = moe_train("data", "check", written(tmp_path / "rows.jsonl", rows), "--model", model,
                     "--set", "options.chat_template=chatml", "--json")  # fmt: skip
    assert done.code == Exit.FAILED
    for refused in done.document["tokens"]["refused_rows"]:
        assert "the chat template leaves out `tools`" in refused["reason"]
        assert "set options.chat_template" not in refused["reason"]
        assert "use a model with a chat template for tools" in refused["reason"]


def test_prompts_of_a_grpo_job_need_what_its_graders_read_and_no_answer(tmp_path: Path) -> None:
    reward = [{"grader": {"type": "string_check", "name": "same", "reference": "{{item.letter}}", "operation": "like"}}]
    job = {
        "recipe": "grpo",
        "data": {"dataset_id": "any"},
        "reward": reward,
        "rl": {"n_generations": 2},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    rows = [{"prompt": f"Word {number}?", "letter": "e"} for number in range(20)]
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    done = moe_train("data", "check", written(good, rows), "--job", str(tmp_path / "job.json"))
    assert done.code == Exit.OK, done.out + done.err
    done = moe_train("data", "check", written(bad, [*rows, {"prompt": "x"}]), "--job", str(tmp_path / "job.json"))
    assert done.code == Exit.FAILED
    assert "row 21: letter is missing; grader 'same' reads {{item.letter}}" in " ".join(done.out.split())
