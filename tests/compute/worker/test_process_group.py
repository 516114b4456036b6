"""Laws of a group of processes: to the supervisor it is one process with one end, and nothing of it stays behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.compute.data.batch_sharing import Ballast, part_of
from llama_stack_provider_moe.compute.worker.process_group import End, verdict
from llama_stack_provider_moe.control.supervisor.processes import birth
from llama_stack_provider_moe.spec import JOB_SPEC
from tests.support.jobs_support import wait_for

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `tests.support.tiny_group` wrote."""
    folder = tmp_path_factory.mktemp("groups")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.tiny_group", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def found(groups: Path, work: str) -> dict[str, Any]:
    """The verdict on the group that ran `work`."""
    verdict: dict[str, Any] = json.loads((groups / f"{work}.json").read_text())
    return verdict


def test_peers_count_and_agree(groups: Path) -> None:
    assert found(groups, "completes")["end"]["kind"] == "completed", (groups / "completes.log").read_text()


def test_what_is_shared_out_is_written_whole_and_taken_up_in_parts(groups: Path) -> None:
    """FSDP2's weights and optimiser state, gathered in one process and back (`tests.support.tiny_shards`)."""
    assert found(groups, "shares_out")["end"]["kind"] == "completed", (groups / "shares_out.log").read_text()


def test_rank_0_tunes_for_both(groups: Path) -> None:
    assert found(groups, "shares_tiles")["end"]["kind"] == "completed", (groups / "shares_tiles.log").read_text()


def test_a_kernel_of_any_process_hands_the_job_over(groups: Path) -> None:
    end = found(groups, "one_hands_over")["end"]
    assert (end["kind"], end["reason"]) == ("handed_over", "a kernel failed (process 1 of 2)")


def test_the_reason_is_that_of_the_process_that_had_one(groups: Path) -> None:
    end = found(groups, "one_fails")["end"]
    assert end["reason"] == "ValueError: row 7 is too strange (process 1 of 2)"
    log = (groups / "one_fails.log").read_text()
    assert "[process 1] ValueError: row 7 is too strange" in log
    assert found(groups, "both_fail")["end"]["reason"] == "ValueError: the model is too strange"


def test_a_killed_process_is_no_failure_of_the_others(groups: Path) -> None:
    assert found(groups, "one_is_killed") == {"end": None, "signal": signal.SIGKILL}
    assert "process 1 of 2 was killed by SIGKILL" in (groups / "one_is_killed.log").read_text()


def test_a_process_that_does_not_notice_is_killed(groups: Path) -> None:
    assert found(groups, "one_hangs")["end"]["reason"] == "ValueError: too strange"
    assert "killed by" not in (groups / "one_hangs.log").read_text(), "the leader's own kill explains nothing"


def test_output_of_all_with_their_number_before_each_line(groups: Path) -> None:
    lines = (groups / "prints.log").read_text().splitlines()
    assert {"first of 0", "second of 0", "[process 1] first of 1", "[process 1] second of 1"} <= set(lines)
    assert "[process 1] " + "x" * 100_000 in lines
    assert "[process 1] no end" in lines


def test_all_stop_at_one_step(groups: Path) -> None:
    end = found(groups, "is_stopped")["end"]
    assert end["kind"] == "stopped"
    assert end["step"] >= 3


def test_nothing_outlives_its_leader(groups: Path) -> None:
    assert not (groups / "leader_dies.json").exists()
    for rank in (0, 1):
        pid = int((groups / f"pid-{rank}").read_text())
        wait_for(lambda pid=pid: birth(pid) is None)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("said", "killed", "asked", "expected"),
    [
        ([End(1, "failed", "a"), End(0, "failed", "gloo", trace=True)], {}, False, "a (process 1 of 2)"),
        ([End(0, "failed", "gloo", trace=True), End(1, "failed", "a")], {}, False, "a (process 1 of 2)"),
        ([End(0, "failed", "gloo", trace=True)], {1: 9}, False, 9),
        ([End(0, "failed", "a")], {1: 6}, False, "a"),
        ([], {0: 9}, False, 9),
        ([], {0: 15, 1: 15}, True, "stopped"),
        ([], {1: 9}, True, 9),
        ([End(1, "stopped"), End(0, "failed", "gloo", trace=True)], {}, True, "stopped"),
        ([End(0, "failed", "a"), End(1, "stopped")], {}, True, "a"),
        ([End(0, "failed", "gloo", trace=True), End(1, "handed_over", "k")], {0: 6}, False, "k (process 1 of 2)"),
        ([End(0, "completed")], {1: 11}, False, "completed"),
        ([End(1, "completed")], {0: 9}, False, 9),
        ([End(0, "failed", "gloo", trace=True)], {}, False, "the job's 2 processes lost contact with each other: gloo"),
        ([], {}, False, "the job's 2 processes lost contact with each other, and none gave a reason"),
    ],
)
def test_verdicts(said: list[End], killed: dict[int, int], asked: bool, expected: str | int) -> None:
    made = verdict(said, killed, asked, 2)
    told = made.signal if made.end is None else made.end.reason or made.end.kind
    assert told == expected


@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_row_is_one_processs(rows: int, size: int) -> None:
    parts = [part_of(range(rows), rank, size) for rank in range(size)]
    counted = [[row for row in part if not isinstance(row, Ballast)] for part in parts]
    assert [row for part in counted for row in part] == list(range(rows))
    assert max(map(len, counted)) - min(map(len, counted)) <= 1
    assert all(parts), "each process has a batch"


@pytest.mark.parametrize(
    ("resources", "ranks"),
    [({}, 1), ({"gpus": 0}, 1), ({"gpus": 4}, 4), ({"gpus": 0, "processes": 3}, 3), ({"gpus": 2, "processes": 2}, 2),
     ({"processes": 1}, 1)],
)  # fmt: skip
def test_a_process_for_each_gpu_or_as_asked(resources: dict[str, int], ranks: int) -> None:
    body = {"recipe": "sft", "model": "a/b", "data": {"dataset_id": "d"}, "resources": resources}
    assert JOB_SPEC.validate_python(body).resources.ranks == ranks


@pytest.mark.parametrize(
    ("recipe", "resources", "problem"),
    [
        ("sft", {"processes": 2}, "processes: 2 is not valid without gpus; expected also gpus 0"),
        ("sft", {"gpus": 2, "processes": 4}, "processes: 4 is not valid with gpus 2; leave it out"),
        ("sft", {"gpus": 0, "processes": 65}, "less than or equal to 64"),
        ("sft", {"gpus": 1, "strategy": "fsdp"}, "strategy: 'fsdp' is not valid with one process"),
        ("routing_analysis", {"gpus": 2}, "gpus: 2 is not valid with this recipe, which runs in one process"),
        ("routing_analysis", {"gpus": 0, "processes": 2}, "processes: 2 is not valid with this recipe"),
        ("export", {"gpus": 0, "processes": 2}, "processes: 2 is not valid with this recipe"),
    ],
)
def test_what_can_not_be_is_refused(recipe: str, resources: dict[str, int], problem: str) -> None:
    data = {"sets": {"a": "d", "b": "e"}} if recipe == "routing_analysis" else {"dataset_id": "d"}
    body = {"recipe": recipe, "model": "a/b", "data": data, "resources": resources}
    if recipe == "export":
        body = {"recipe": recipe, "of": "job", "export": {"gguf": {}}, "resources": resources}
    with pytest.raises(ValueError, match="resources") as error:
        JOB_SPEC.validate_python(body)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ({"adapter": {"quantize_base": True}}, "quantize_base true, whose codes can't be divided"),
        ({"adapter": {}, "options": {"save_merged": True}}, "save_merged true; merge on disk instead"),
        ({"adapter": {}, "eval": {"retain_dataset_id": "e"}}, "an eval block, which a single process runs"),
        ({"adapter": {}, "recipe": "dpo", "options": {"precompute_ref_log_probs": True}}, "a precomputed reference"),
        ({"adapter": {}, "recipe": "dpo", "moe": {"moe_load_balancing": "aux_free"}}, "a precomputed reference"),
    ],
)
def test_what_needs_the_base_whole_is_refused(blocks: dict[str, Any], problem: str) -> None:
    body = {"recipe": "sft", "model": "a/b", "data": {"dataset_id": "d"},
            "resources": {"gpus": 0, "processes": 2, "strategy": "fsdp"}, **blocks}  # fmt: skip
    with pytest.raises(ValueError, match=r"resources\.strategy: \'fsdp\' is not valid with") as error:
        JOB_SPEC.validate_python(body)
    assert problem in str(error.value)
