"""An edited folder, loaded, computes what the same edit of the parameters in memory computes."""

from pathlib import Path

import pytest
import torch

from llama_stack_provider_moe.compute.ablation.apply import apply
from llama_stack_provider_moe.compute.ablation.writers import find_writers
from llama_stack_provider_moe.compute.methods.ablation import (
    direction,
    read_direction,
    remove_from_bias,
    remove_input,
    remove_output,
)
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.spec.ablation import NormPreserving
from tests.compute.ablation.test_apply import FAMILIES, everywhere, subject
from tests.support import tiny_models
from tests.support.ablation_models import load, plan
from tests.support.family_subject import answer

# The norms after attention and after the MLP, by family, and what is added to their weights.
OUTPUT_NORMS = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm", 1),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", 0),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm", 0),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norms", ["column", "row"])
def test_the_logits_are_those_of_an_edit_in_memory(family: str, norms: NormPreserving, tmp_path: Path) -> None:
    folder, found = subject(family)
    routed = family in tiny_models.MOE
    apply(str(folder), plan(everywhere(family), scale=0.9, norm_preserving=norms, ablate_individual_experts=routed),
          found, tmp_path / "out")  # fmt: skip
    model = load(folder)
    layout = find_layout(model)
    unit = direction(found.target.mean_LH[1], found.baseline.mean_LH[1], "projected")
    with torch.no_grad():
        before = answer(model)
        for writer in find_writers(model, layout):
            parameter = model.get_parameter(writer.parameter)
            if writer.kind == "router":
                assert layout is not None
                block = model.get_submodule(f"{layout.layers_path}.{writer.layer}")
                norm = block.get_submodule(str(found.provenance.router_norms[writer.layer]))
                parameter.copy_(remove_input(parameter, read_direction(unit, norm.weight), 0.45))
            elif writer.bias:
                for row in parameter.view(-1, parameter.shape[-1]):
                    row.copy_(remove_from_bias(row, unit, 0.9))
            else:
                for matrix in parameter.view(-1, *parameter.shape[-2:]):
                    written = matrix.mT if writer.columns else matrix
                    lost = unit
                    if family in OUTPUT_NORMS:
                        attention, mlp, offset = OUTPUT_NORMS[family]
                        block = model.get_submodule(f"model.layers.{writer.layer}")
                        norm = block.get_submodule(attention if writer.kind == "attention" else mlp)
                        lost = read_direction(unit, norm.weight + offset)
                    written.copy_(remove_output(written.clone(), lost, 0.9, norms))
        inside = answer(model)
        assert torch.allclose(inside, answer(load(tmp_path / "out")), atol=2e-5)
    assert float((inside - before).abs().max()) > 1e-2
