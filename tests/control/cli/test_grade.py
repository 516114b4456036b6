"""`moe-train grade` without torch: the table, the JSON, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli_support import Done, moe_train

SHORT = {"type": "length", "name": "short", "most": 3}
SAME = {"type": "string_check", "name": "same", "reference": "{{item.gold}}", "operation": "eq"}


def grade(folder: Path, graders: Any, *rows: dict[str, Any], options: tuple[str, ...] = ()) -> Done:
    file, data = folder / "graders.json", folder / "rows.jsonl"
    file.write_text(json.dumps(graders))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return moe_train("grade", str(file), "--data", str(data), *options)


def test_a_table_and_a_warning(tmp_path: Path) -> None:
    done = grade(tmp_path, SHORT, {"output_text": "a b"}, {"output_text": "a"})
    assert done.code == 0
    assert done.out.splitlines()[1].split()[:6] == ["short", "length", "1", "all", "2", "1"]
    assert "every answer got the same" in done.out


def test_json_has_every_row_and_a_failure_is_exit_code_1(tmp_path: Path) -> None:
    reward = {"reward": [{"grader": SAME, "weight": 2}, {"grader": SHORT}]}
    rows = ({"output_text": "x", "gold": "x"}, {"output_text": "y"})
    done = grade(tmp_path, reward, *rows, options=("--json",))
    assert done.code == 1
    first, second = done.document["results"]
    assert first["total"] == 3
    assert second["total"] is None
    assert second["failures"]["same"]["code"] == "unknown_name"
    assert done.document["graders"][0]["failed"] == {"unknown_name": 1}


def test_a_job_file_names_graders(tmp_path: Path) -> None:
    job = {"recipe": "grpo", "model": "m", "data": {"dataset_id": "d"}, "reward": [{"grader": SHORT}],
           "grading": {"retries": 0}}  # fmt: skip
    done = grade(tmp_path, job, {"output_text": "a b"}, options=("--json",))
    assert (done.code, done.document["mean_total"]) == (0, 1), done.err
    done = grade(tmp_path, {"recipe": "sft", "model": "m"}, {"output_text": "a b"})
    assert (done.code, "reward: is missing" in done.err) == (2, True)


def test_the_last_turn_or_a_column_is_the_answer(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a b c d"}], "mine": "a"}
    assert grade(tmp_path, SHORT, row, options=("--json",)).document["results"][0]["total"] == 0
    assert grade(tmp_path, SHORT, row, options=("--json", "--answer", "mine")).document["results"][0]["total"] == 1


@pytest.mark.parametrize(
    ("graders", "row", "told"),
    [
        ({**SHORT, "colour": 1}, {"output_text": "x"}, "grader.colour: unknown key"),
        ([{"grader": SHORT}, {"grader": SHORT}], {"output_text": "x"}, "'short' is named twice"),
        (SHORT, {"prompt": "x"}, "row 1: output_text: None is not valid; expected the answer, as text"),
        ({"type": "score_model", "name": "j", "model": "m", "input": [{"role": "user", "content": "x"}]},
         {"output_text": "x"}, "grader.model: 'm' is not valid; expected a judge that `--judges FILE` names"),
        ([{"grader": {**SHORT, "colour": 1}}], {"output_text": "x"}, "reward.0.grader.colour: unknown key"),
        ({"type": "regex", "name": "r", "pattern": "("}, {"output_text": "x"}, "references (unclosed group)"),
        ({"type": "regex", "name": "r", "pattern": r"(\w{1000}){1000}"}, {"output_text": "x"},
         "(it is too large once compiled: repeat less)"),
        ({"type": "json_schema", "name": "form", "json_schema": True}, {"output_text": "x"},
         "grader.json_schema: True is not valid; expected an object"),
        ({"type": "multi", "name": "m", "calculate_output": "math", "graders": {"math": {**SHORT, "most": -1}}},
         {"output_text": "x"}, "grader.graders.math.most: -1 is not valid"),
        ({**SHORT, "unit": "tokens", "input": "{{item.text}}"}, {"output_text": "x"}, "input: has no effect with unit"),
        ({"type": "python", "name": "p"}, {"output_text": "x"}, "'python' is not valid"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, graders: Any, row: dict[str, Any], told: str) -> None:
    done = grade(tmp_path, graders, row)
    assert done.code == 2
    assert told in done.err
    assert "SchemaError" not in done.err


def test_options_are_named_in_their_mistakes(tmp_path: Path) -> None:
    row = {"prompt": "x", "output_text": "x"}
    missing = grade(tmp_path, SHORT, row, options=("--answer", "nope"))
    assert (missing.code, "--answer: 'nope'" in missing.err) == (2, True)
    assert "row 1 has prompt, output_text" in missing.err
    none = grade(tmp_path, SHORT, row, options=("--judges", str(tmp_path / "nofile")))
    assert (none.code, "--judges:" in none.err, "Errno" in none.err) == (2, True, False)
    judges = tmp_path / "judges.json"
    judges.write_text(json.dumps({"judges": {"fair": {"url": "ftp://x", "model": "m"}}}))
    wrong = grade(tmp_path, SHORT, row, options=("--judges", str(judges)))
    assert "judges.fair.url: 'ftp://x' is not valid" in wrong.err


def test_tokens_of_judges_are_null_where_none_was_asked(tmp_path: Path) -> None:
    done = grade(tmp_path, SHORT, {"output_text": "x"}, options=("--json",))
    assert done.document["results"][0]["tokens"] is None
