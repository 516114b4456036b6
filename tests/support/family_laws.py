"""The laws that a family of models with experts must hold, each a function of a subject; see `test_every_family`.

A law raises if it does not hold. All run in this process, on a tiny model with random weights. Here are those of what
is computed; `family_job_laws` has those of what jobs and reports do with it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from trl.trainer.utils import add_fused_lm_head

from llama_stack_provider_moe.compute.models.determinism import without_dropout
from llama_stack_provider_moe.compute.models.heads import differs_after_backbone, needs_plain_head, set_plain_head
from llama_stack_provider_moe.compute.moe.adapters import add_lora, injected, train_whole
from llama_stack_provider_moe.compute.moe.balance import balance_loss
from llama_stack_provider_moe.compute.moe.codes import Coding
from llama_stack_provider_moe.compute.moe.layout import outside_text, text_config
from llama_stack_provider_moe.compute.moe.masking import masked_experts
from llama_stack_provider_moe.compute.moe.model_types import class_of
from llama_stack_provider_moe.compute.moe.quantize import dequantize, quantize
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.moe.routing import RoutingRecorder
from llama_stack_provider_moe.compute.moe.steering import Steering
from llama_stack_provider_moe.compute.train import checkpoints
from llama_stack_provider_moe.errors import ModelError
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import family_job_laws, tiny_models
from tests.support.family_subject import ALPHA, CLOSE, IDS, RANK, Subject, answer, loss_of, off_by


def counts(subject: Subject, folder: Path) -> None:
    """Experts, layers, top-k and LoRA are those of the modules, as a forward sees them."""
    model, layout = subject.model(), subject.layout
    sizes: dict[int, int] = {}
    chosen: dict[int, int] = {}
    for layer, experts in layout.experts(model).items():
        sizes[layer] = experts.get_parameter(layout.down).shape[0]

        def see(module: nn.Module, args: Any, kwargs: Any, layer: int = layer) -> None:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            index = [each for each in tensors if not each.is_floating_point()]
            # Llama 4 sends every token to every expert, as zeros where it was not chosen.
            chosen[layer] = (
                index[0].shape[-1]
                if index
                else (int(tensors[0].reshape(layout.num_experts, IDS.numel(), -1).abs().sum(-1).ne(0).sum(0).max()))
            )

        experts.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        answer(model)
    assert sizes == dict.fromkeys(layout.moe_layers, layout.num_experts)
    assert chosen == dict.fromkeys(layout.moe_layers, layout.top_k)
    adapted, _ = subject.adapted(Moe())
    found = injected(adapted)
    stacks = tuple(layout.path(layer, f"{layout.experts_path}.") for layer in layout.moe_layers)
    assert sum(name.startswith(stacks) for name in found) == 2 * len(stacks), list(found)
    for layer, experts in layout.experts(adapted).items():
        for name in (layout.gate_up, layout.down):
            count, *sides = experts.get_parameter(name).shape
            out, into = reversed(sides) if getattr(experts, "is_transposed", False) else sides  # as PEFT reads it
            lora = found[layout.path(layer, f"{layout.experts_path}.{name}")]
            shapes = [tuple(part["default"].weight.shape) for part in (lora.lora_A, lora.lora_B)]
            expected = [(count * RANK, into), (out, count * RANK)]
            assert shapes == expected, (name, shapes, expected)


def fast_path(subject: Subject, folder: Path) -> None:
    """Logits and gradients equal those of transformers' loop over experts with plain W + s B A."""
    layout = subject.layout
    ours, _ = subject.adapted(Moe())
    logits = answer(ours)
    logits.square().mean().backward()  # type: ignore[no-untyped-call]
    eager = subject.model()
    apply_moe(eager, layout, resolve_moe(Moe(enable_moe_optimizations=False), layout, full=False))
    leaves: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    base = dict(eager.named_parameters())
    for name, lora in injected(ours).items():
        a, b = (part["default"].weight.detach().clone().requires_grad_() for part in (lora.lora_A, lora.lora_B))
        leaves[f"{name} A"], leaves[f"{name} B"] = a, b
        weight = base[name] if name in base else base[f"{name}.weight"]
        if weight.dim() == 3:
            count = weight.shape[0]
            delta = torch.einsum("oke,eki->eoi", b.view(b.shape[0], -1, count), a.view(count, -1, a.shape[1]))
            delta = delta if delta.shape == weight.shape else delta.transpose(1, 2)
        else:
            delta = b @ a
        weights[name if name in base else f"{name}.weight"] = weight.detach() + ALPHA / RANK * delta
    made = torch.func.functional_call(eager, weights, (), {"input_ids": IDS, "use_cache": False})
    made.logits.square().mean().backward()
    assert off_by(logits, made.logits) < CLOSE, f"logits differ by {off_by(logits, made.logits):.1e} of the norm"
    largest = 0.0
    for name, lora in injected(ours).items():
        for part, factor in (("A", lora.lora_A), ("B", lora.lora_B)):
            gradient, expected = factor["default"].weight.grad, leaves[f"{name} {part}"].grad
            assert gradient is not None, f"{name} {part} has no gradient"
            assert expected is not None, f"{name} {part} has no gradient to compare with"
            largest = max(largest, expected.abs().max().item())
            gap = off_by(gradient, expected)
            assert gap < 10 * CLOSE or expected.norm() < 1e-7, f"gradient of {name} {part} is off by {gap:.1e}"
    assert largest > 0


def telemetry(subject: Subject, folder: Path) -> None:
    """Every token is counted top-k times in each layer, and the experts get what was counted."""
    model, layout = subject.model(), subject.layout
    apply_moe(model, layout, resolve_moe(Moe(), layout, full=False))
    received: dict[int, Tensor] = {}

    def see(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            index = next(each for each in (*args, *kwargs.values())
                         if isinstance(each, Tensor) and not each.is_floating_point())  # fmt: skip
            received[layer] = torch.bincount(index.reshape(-1), minlength=layout.choices)

        return hook

    for layer, experts in layout.experts(model).items():
        experts.register_forward_pre_hook(see(layer), with_kwargs=True)
    recorder = RoutingRecorder(model, layout)
    with torch.no_grad(), recorder.recording(None):
        answer(model)
    counted = recorder.take_counts()
    assert tuple(sorted(counted)) == layout.moe_layers
    for layer, counts_E in counted.items():
        assert counts_E.sum().item() == layout.top_k * IDS.numel(), layer
        if layer in received:  # Llama 4's block is replaced and calls its experts as the others do
            assert torch.equal(counts_E.long(), received[layer]), layer
    for routing in recorder.take():
        assert abs(sum(routing.share) - 1) < 1e-5


def seeded_loss(model: nn.Module) -> Tensor:
    """The loss with the same random numbers at each call: routers such as Phi-MoE's choose by chance in training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return loss_of(model)


def one_step(subject: Subject, folder: Path) -> None:
    """A step of training lowers the loss, and moves nothing but LoRA."""
    model, _ = subject.adapted(Moe())
    without_dropout(model.train())
    before = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.02)
    first = seeded_loss(model)
    first.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    with torch.no_grad():
        second = seeded_loss(model)
    assert second < first, f"the loss went from {first.item():.5f} to {second.item():.5f}"
    after = dict(model.named_parameters())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def adapter_off(subject: Subject, folder: Path) -> None:
    """With its adapter off, the model is the base, bit for bit."""
    base = subject.model()
    apply_moe(base, subject.layout, resolve_moe(Moe(), subject.layout, full=False))
    model, _ = subject.adapted(Moe())
    with torch.no_grad():
        expected = answer(base)
        assert not torch.equal(answer(model), expected), "the adapter has no effect"
        with model.disable_adapter():
            assert torch.equal(answer(model), expected), "the adapter, off, has an effect"


def trl_figures(subject: Subject, folder: Path) -> None:
    """TRL's head, or the plain one where TRL's can't, gives the log-probabilities of the model's own logits."""
    model, layout = subject.model(), subject.layout
    with torch.no_grad():
        logits = answer(model)[:, :-1].float()
    expected = logits.log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)
    apply_moe(model, layout, resolve_moe(Moe(), layout, full=False))
    config = text_config(model)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = layout.aux_loss
    add_fused_lm_head(model)
    if model.base_model is not model:
        # A sharded model can't run the pass that decides; it must come to the same.
        assert differs_after_backbone(model) == needs_plain_head(model)
    if needs_plain_head(model):
        set_plain_head(model)
    wanted = {"output_router_logits": True} if layout.aux_loss else {}
    with torch.no_grad():
        found = model(input_ids=IDS, labels=IDS, fused_lm_head=True, use_cache=False, **wanted)
    assert (found.log_probs - expected).abs().max() < 1e-4
    if layout.aux_loss:
        # With top-k of E experts, the loss is K at perfect balance.
        assert 0.5 * layout.top_k < float(found.aux_loss) < 2 * layout.num_experts


def whole_model(subject: Subject, folder: Path) -> None:
    """A step that trains all weights lowers the loss; parts beside the language model stay as they are, bit for bit.

    What is saved is a whole model of the same class.
    """
    model, layout = subject.model(), subject.layout
    resolved = resolve_moe(Moe(), layout, full=True)
    shipped = apply_moe(model, layout, resolved)
    report = train_whole(model, layout, resolved)
    others = outside_text(model)
    assert bool(others) == any("other tensors" in note for note in report.notes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not trained & others
    without_dropout(model.train())
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.01)
    first = seeded_loss(model)
    first.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    with torch.no_grad():
        second = seeded_loss(model)
    assert second < first, f"the loss went from {first.item():.5f} to {second.item():.5f}"
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name in others)
    assert any(not torch.equal(before[layout.path(layer, f"{layout.experts_path}.{layout.down}")],
                               after[layout.path(layer, f"{layout.experts_path}.{layout.down}")])
               for layer in layout.moe_layers)  # fmt: skip
    checkpoints.save(model, tiny_models.tokenizer(), folder / "out", shipped.restored(), step=1)
    config = AutoConfig.from_pretrained(folder / "out")
    assert class_of(config) is type(model)
    loaded = type(model).from_pretrained(folder / "out").eval()
    with torch.no_grad():
        assert off_by(answer(loaded), answer(model.eval())) < CLOSE


def masked(subject: Subject, folder: Path) -> None:
    """A masked expert gets no token in any layer whose router chooses, and afterwards the model is as before."""
    model, layout = subject.model(), subject.layout
    apply_moe(model, layout, resolve_moe(Moe(), layout, full=False))
    layers = [layer for layer in layout.moe_layers if layer not in layout.by_token_layers]
    recorder = RoutingRecorder(model, layout)
    with torch.no_grad():
        before = answer(model)
        with masked_experts(model, layout, {layer: [1] for layer in layers}), recorder.recording(None):
            answer(model)
        assert torch.equal(answer(model), before)
    counted = recorder.take_counts()
    for layer in layers:
        assert counted[layer][1] == 0, layer
        assert counted[layer].sum() == layout.top_k * IDS.numel(), layer


def four_bits(subject: Subject, folder: Path) -> None:
    """LoRA over a base in 4 bits computes and learns what it does over the decoded base."""
    quantized(subject, 4)


def eight_bits(subject: Subject, folder: Path) -> None:
    """The same over a base in 8 bits."""
    quantized(subject, 8)


def quantized(subject: Subject, bits: Literal[4, 8]) -> None:
    layout = subject.layout
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for decoded in (False, True):
        model = subject.model()
        resolved = resolve_moe(Moe(), layout, full=False)
        quantize(model, layout, Coding(bits), torch.device("cpu"))
        if decoded:
            dequantize(model, layout)
        apply_moe(model, layout, resolved)
        adapter = Adapter(
            rank=RANK,
            alpha=ALPHA,
            lora_attn_modules=[],
            plan="all_experts",
            quantize_base=not decoded,
            quantize_bits=4 if decoded else bits,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            made = add_lora(model, adapter, layout, resolved).model.eval()
            with torch.no_grad():
                for name, parameter in made.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(0, 0.1)
        logits = answer(made)
        logits.square().mean().backward()  # type: ignore[no-untyped-call]
        gradients = {name: each.grad for name, each in made.named_parameters() if each.grad is not None}
        found.append((logits.detach(), gradients))
    (logits, gradients), (expected, expected_gradients) = found
    assert off_by(logits, expected) < CLOSE, f"logits are off by {off_by(logits, expected):.1e}"
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert off_by(gradient, expected_gradients[name]) < 10 * CLOSE or gradient.norm() < 1e-7, name


def balances(subject: Subject, folder: Path) -> None:
    """Each balance that the family can have acts: losses have gradients, biases move, experts choose evenly."""
    layout = subject.layout
    for balancing in ("switch", "gshard", "aux_free", "expert_choice"):
        moe = Moe(moe_load_balancing=balancing, train_router=True)
        if balancing == "aux_free" and layout.bias_path is None:
            with pytest.raises(ModelError, match="no bias to move"):
                resolve_moe(moe, layout, full=True)
            continue
        if balancing == "expert_choice" and layout.idle_choices:
            with pytest.raises(ModelError, match="compute nothing"):
                resolve_moe(moe, layout, full=True)
            continue
        model = subject.model()
        resolved = resolve_moe(moe, layout, full=True)
        apply_moe(model, layout, resolved)
        train_whole(model, layout, resolved)
        steering = Steering(model, layout, resolved)
        recorder = RoutingRecorder(model, layout)
        steering.act(None)
        with recorder.recording(None):
            answer(model)
        loss = balance_loss(recorder, balancing)
        loss.backward()  # type: ignore[no-untyped-call]
        steering.rest()
        assert loss > 0
        for layer, router in layout.routers(model).items():
            gradient = router.get_parameter(layout.router_weight).grad
            if layer in layout.by_token_layers:  # nothing to balance; it only gets a gradient through later layers
                continue
            assert gradient is not None, layer
            assert gradient.abs().max() > 0, layer
        counts = recorder.take_counts()
        if balancing == "aux_free":
            before = {layer: bias.clone() for layer, bias in layout.biases(model).items()}
            uneven_E = torch.arange(layout.choices, dtype=torch.float)
            steering.after_step(dict.fromkeys(before, uneven_E))
            step_E = resolved.bias_rate * torch.sign(uneven_E.mean() - uneven_E)
            for layer, bias in layout.biases(model).items():
                assert torch.allclose(bias.view(-1), before[layer].view(-1) + step_E), layer
        if balancing == "expert_choice":
            chosen = [each for layer, each in counts.items() if layer not in layout.by_token_layers]
            assert all(each.min() == each.max() > 0 for each in chosen)


LAWS: dict[str, Callable[[Subject, Path], None]] = {
    "counts": counts,
    "fast path": fast_path,
    "telemetry": telemetry,
    "one step": one_step,
    "adapter off": adapter_off,
    "TRL's figures": trl_figures,
    "masks": masked,
    "4 bits": four_bits,
    "8 bits": eight_bits,
    "balances": balances,
    "whole model": whole_model,
    **family_job_laws.LAWS,
}
