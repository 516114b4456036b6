"""Routers that begin with the mean router input of each domain, measured in the mixed model itself.

The model has random routers while its inputs are measured, so its experts are mixed as they will be for a token that no
domain claims. Shapes: N domains, B rows of a batch, T their tokens, H width of the residual stream.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from llama_stack_provider_moe.compute.analysis.routing_report import Prompt
from llama_stack_provider_moe.compute.analysis.routing_run import load_routed, read_prompts
from llama_stack_provider_moe.compute.export.tensors import append, read_model
from llama_stack_provider_moe.compute.methods.mixing import domain_rows
from llama_stack_provider_moe.compute.mixing.mix import StartRouters
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec import MixSpec, RoutingAnalysisSpec
from llama_stack_provider_moe.spec.routing import AnalysisOptions


def from_domains(spec: MixSpec, rows: Mapping[str, Path], say: Callable[[str], None]) -> StartRouters:
    """What puts the rows of domains into a mixed model's routers.

    Args:
        spec: of the mix.
        rows: name of a branch -> canonical rows of its domain, in the order of the branches.
        say: called with lines for a person.
    """

    def start(folder: Path, names: dict[int, str]) -> None:
        means = _means(spec, rows, folder, say)
        entries = read_model(folder)
        for layer, name in names.items():
            entry = entries[name]
            norm = spec.router_std * sqrt(entry.shape[1])
            try:
                rows_NH = domain_rows(means[layer], norm)
            except ValueError as error:
                raise InvalidInput("branches", list(rows), f"domains that differ: in layer {layer}, {error}") from None
            # The anchor's logit is 0, as all are for a token that no domain claims.
            router_EH = torch.zeros(entry.shape)
            router_EH[len(router_EH) - len(rows_NH) :] = rows_NH
            with entry.file.open("r+b") as file:
                file.seek(entry.start)
                append(router_EH.to(entry.dtype), file)

    return start


def _means(spec: MixSpec, rows: Mapping[str, Path], folder: Path, say: Callable[[str], None]) -> dict[int, Tensor]:
    """Layer -> mean router input of each domain, (N, H) in fp64."""
    sources = {branch.name: branch.dataset_id for branch in spec.branches}
    asked = RoutingAnalysisSpec.model_validate(
        {
            "recipe": "routing_analysis",
            "model": str(folder),
            "data": {"sets": {name: sources[name] for name in rows}, "format": spec.options.format},
            "training": spec.training,
            "options": AnalysisOptions(max_length=spec.options.max_length, chat_template=spec.options.chat_template),
        }
    )
    model, tokenizer, layout = load_routed(asked)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    found: dict[int, list[Tensor]] = {layer: [] for layer in layout.moe_layers}
    for name, path in rows.items():
        length = spec.options.max_length
        prompts = read_prompts(path, asked.data.sets[name], "all", length, tokenizer, vocabulary, say)
        for layer, mean_H in _of_rows(model, layout, prompts, spec.training.batch_size, name).items():
            found[layer].append(mean_H)
    del model
    gc.collect()
    return {layer: torch.stack(means) for layer, means in found.items()}


def _of_rows(
    model: nn.Module, layout: ExpertLayout, prompts: Sequence[Prompt], batch_size: int, name: str
) -> dict[int, Tensor]:
    """Layer -> mean input of its router over all tokens of the rows, (H,) in fp64 on the CPU."""
    sums: dict[int, Tensor] = {}
    mask_BT = torch.empty(0)

    def adding(layer: int, router: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs_TH = given[0].detach().reshape(mask_BT.numel(), -1)
            summed_H = inputs_TH[mask_BT.flatten().bool()].double().sum(dim=0).cpu()
            sums[layer] = sums[layer] + summed_H if layer in sums else summed_H

        return router.register_forward_pre_hook(add)

    device = next(model.parameters()).device
    order = sorted(prompts, key=lambda prompt: len(prompt.ids))
    handles = [adding(layer, router) for layer, router in layout.routers(model).items()]
    try:
        with torch.no_grad(), liveness.stage(f"measuring {name}", len(order), "rows") as counter:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                ids_BT = pad_sequence([torch.tensor(each.ids) for each in batch], batch_first=True).to(device)
                lengths_B = torch.tensor([len(each.ids) for each in batch], device=device)
                mask_BT = (torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]).long()
                model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=1)
                counter.at(start + len(batch), len(order))
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(len(prompt.ids) for prompt in prompts)
    return {layer: summed_H / tokens for layer, summed_H in sums.items()}
