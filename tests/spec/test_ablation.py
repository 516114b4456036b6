"""The plan of an ablation: what it names, what it refuses."""

from typing import Any

import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import JOB_SPEC, AblationSpec
from llama_stack_provider_moe.spec.ablation import AblationPlan, resolve_experts
from tests.support.routing_reports import report_of

ENTRY = {"layer": 3, "measurement": 5}


def problem(**body: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        AblationPlan.model_validate({"ablate": [ENTRY], **body})
    (error,) = caught.value.errors()
    return ".".join(map(str, error["loc"])) + ": " + error["msg"].removeprefix("Value error, ")


def test_defaults() -> None:
    plan = AblationPlan.model_validate({"ablate": [ENTRY]})
    assert (plan.direction, plan.norm_preserving, plan.gate_scale) == ("projected", "column", 0.5)
    assert (plan.ablate_individual_experts, plan.expert_subset) == (False, None)
    assert plan.edits().keys() == {3}
    assert (plan.edits()[3].scale, plan.edits()[3].sparsity) == (1.0, 0.0)


def test_ranges_of_blocks() -> None:
    plan = AblationPlan.model_validate({"ablate": [{**ENTRY, "layer": "7,2-4"}, {"layer": 0, "measurement": 9}]})
    edits = plan.edits()
    assert {layer: entry.measurement for layer, entry in edits.items()} == {0: 9, 2: 5, 3: 5, 4: 5, 7: 5}
    assert [entry.layer for entry in edits.values()] == ["0", "2", "3", "4", "7"]


def test_interpolation_goes_linearly_from_one_entry_to_the_next() -> None:
    entries = [
        {"layer": 8, "measurement": 10, "scale": 0.5},
        {"layer": 4, "measurement": 6, "scale": 1.0, "sparsity": 0.2},
        {"layer": 9, "measurement": 10, "scale": 0.25},
    ]
    edits = AblationPlan.model_validate({"ablate": entries, "interpolate": True}).edits()
    assert {layer: (e.measurement, e.scale, round(e.sparsity, 3)) for layer, e in edits.items()} == {
        4: (6, 1.0, 0.2), 5: (7, 0.875, 0.15), 6: (8, 0.75, 0.1), 7: (9, 0.625, 0.05), 8: (10, 0.5, 0.0),
        9: (10, 0.25, 0.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"expert_subset": [1]}, ": expert_subset: has no effect without ablate_individual_experts true"),
        ({"expert_subset": [1, 1], "ablate_individual_experts": True}, ": expert_subset: [1, 1] names an expert twice"),
        ({"layer_experts": {"0": "1"}}, ": layer_experts: has no effect without ablate_individual_experts true"),
        (
            {"layer_experts": {"0": "1"}, "expert_subset": [1], "ablate_individual_experts": True},
            ": expert_subset: is not valid beside layer_experts; expected one of expert_subset, layer_experts, from",
        ),
        ({"layer_experts": {}, "ablate_individual_experts": True}, "layer_experts: Value should have at least 1 item"),
        ({"layer_experts": {"a": "1"}, "ablate_individual_experts": True}, "layer_experts: 'a' is not the number of"),
        ({"layer_experts": {"0": "all"}, "ablate_individual_experts": True}, "layer_experts: 'all' does not name"),
        ({"layer_experts": {"0": "3-1"}, "ablate_individual_experts": True}, "layer_experts: range '3-1' ends before"),
        (
            {"layer_experts_from": {"analysis": "a", "moe_layers": [0], "num_experts": 4}},
            ": layer_experts_from: has no effect without layer_experts",
        ),
        ({"ablate": [ENTRY, {**ENTRY, "layer": "1-4"}]}, ": ablate.1.layer: '1-4' names block 3, as entry 0 does"),
        ({"interpolate": True}, ": interpolate: true is not valid with these entries"),
        ({"interpolate": True, "ablate": [ENTRY, {**ENTRY, "layer": "5-6"}]}, ": interpolate: true is not valid"),
        ({"ablate": []}, "ablate: List should have at least 1 item"),
        ({"ablate": [{**ENTRY, "layer": "4-2"}]}, "ablate.0.layer: range '4-2' ends before it begins"),
        ({"ablate": [{**ENTRY, "layer": "all"}]}, "ablate.0.layer: String should match pattern"),
        ({"ablate": [{**ENTRY, "layer": True}]}, "ablate.0.layer: Input should be a valid string"),
        ({"ablate": [{**ENTRY, "scale": 0}]}, "ablate.0.scale: Input should be greater than 0"),
        ({"ablate": [{**ENTRY, "sparsity": 1}]}, "ablate.0.sparsity: Input should be less than 1"),
        ({"ablate": [{**ENTRY, "factor": 1}]}, "ablate.0.factor: Extra inputs are not permitted"),
        ({"gate_scale": 1.5}, "gate_scale: Input should be less than or equal to 1"),
        ({"direction": "raw"}, "direction: Input should be 'plain', 'projected' or 'biprojected'"),
        ({"norm_preserving": False}, "norm_preserving: Input should be 'column', 'row' or 'off'"),
    ],
)
def test_what_a_plan_refuses(body: dict[str, Any], words: str) -> None:
    assert problem(**body).startswith(words)


def test_the_experts_of_an_analysis_become_those_of_layers() -> None:
    report = report_of({(0, 3): 0.2, (1, 2): 0.4, (1, 0): 0.3}, unsure={(0, 1)})
    asked: dict[str, Any] = {"ablate_individual_experts": True, "from_analysis": {"job": "j", "set": "a", "top": 2}}
    found = resolve_experts(AblationPlan.model_validate({"ablate": [ENTRY], **asked}), report, "from_analysis")
    assert (found.from_analysis, found.layer_experts) == (None, {"1": "0,2"}), "only what the analysis is sure of"
    assert found.layer_experts_from is not None
    assert found.layer_experts_from.model_dump() == {
        "analysis": "job j, set a, top 2", "moe_layers": [0, 1], "num_experts": 4,
    }  # fmt: skip
    assert [found.experts_of(layer) for layer in (0, 1)] == [frozenset(), {0, 2}]
    assert AblationPlan.model_validate(found.model_dump(mode="json")) == found
    whole = AblationPlan.model_validate({"ablate": [ENTRY], "ablate_individual_experts": True})
    assert whole.experts_of(0) is None
    wrong = AblationPlan.model_validate(
        {"ablate": [ENTRY], **asked, "from_analysis": {"job": "j", "set": "z", "top": 2}}
    )
    with pytest.raises(InvalidInput, match=r"from_analysis\.set: 'z' is not valid; expected a set of the analysis"):
        resolve_experts(wrong, report, "from_analysis")


def test_a_plan_is_a_job_and_reads_itself() -> None:
    body = {"recipe": "ablation", "model": "m", "measurements": "a-job", "ablate": [ENTRY]}
    spec = JOB_SPEC.validate_python(body)
    assert isinstance(spec, AblationSpec)
    assert JOB_SPEC.validate_python(spec.model_dump(mode="json")) == spec
    assert spec.row_sources() == []


@pytest.mark.parametrize("sets", [{"target": "a"}, {"target": "a", "other": "b"}, {"a": "x", "b": "y", "target": "z"}])
def test_a_measurement_compares_a_target_with_a_baseline(sets: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match=r"expected 2 to 16|expected two sets, target .* and baseline"):
        JOB_SPEC.validate_python({"recipe": "ablation_measure", "model": "m", "data": {"sets": sets}})
