"""One experts layer in each implementation, with the same weights; and the truth, expert by expert in fp32.

Layers are transformers' own modules, in a model of one decoder layer, so that all of them run in what a job loads.
T tokens, D hidden, K experts per token, E experts.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.shapes import Mode, Shape, config_values
from llama_stack_provider_moe.compute.moe.backend import OURS, QUACK, TRITON, kernels_of, replace_loops
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.kernels import quack
from llama_stack_provider_moe.compute.moe.layout import DOWN, GATE_UP
from llama_stack_provider_moe.compute.moe.split_lora import split_lora

Variant = Literal["eager", "grouped_mm", "liger", "torch", "quack", "triton"]
Routing = Literal["balanced", "Zipf", "one-hot"]
VARIANTS: dict[Variant, str] = {
    "eager": "transformers' loop over experts (Llama 4: its bmm of every expert with every token); LoRA by PEFT",
    "grouped_mm": "transformers' grouped_mm; LoRA by PEFT target_parameters, folded into the weights; its 4-bit case "
    "has the decoded weights in 16 bits, for PEFT has no 4-bit experts",
    "liger": "liger_kernel's LigerFusedMoEFunction",
    "torch": "ours, moe_torch: LoRA beside the weights, products by F.grouped_mm",
    "quack": "ours, moe_quack: the same with the grouped GEMM of quack-kernels",
    "triton": "ours, moe_triton",
}
OURS_OF = {"torch": OURS, "quack": QUACK, "triton": TRITON}
PEERS = {
    "unsloth": "AGPL kernels and pins of its own: an environment of its own",
    "axolotl": "its ScatterMoE-LoRA: pins of its own, an environment of its own",
    "sonicmoe": "wants an older torch",
}  # fmt: skip


class Inputs(NamedTuple):
    """Tokens (T, D), their experts (T, K) and weights (T, K), and the gradient of what comes out (T, D)."""

    hidden: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name is not needed
    weights: Tensor
    upstream: Tensor

    def copied(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers, in leaves of their own."""
        hidden, weights = (each.detach().to(dtype).requires_grad_() for each in (self.hidden, self.weights))
        return Inputs(hidden, self.index, weights, self.upstream.to(dtype))


def draw(shape: Shape, tokens: int, routing: Routing, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random, always the same. Balanced: all experts alike, to a row; Zipf: expert n as popular as 1 / n; one-hot: all
    tokens to the same K experts."""
    random = torch.Generator(device).manual_seed(1)
    options: dict[str, Any] = {"generator": random, "device": device}
    hidden, upstream = (torch.randn(tokens, shape.hidden, **options).to(dtype) for _ in range(2))
    if routing == "balanced":
        index = (torch.arange(tokens * shape.top_k, device=device) % shape.experts).view(tokens, -1)
        index = torch.randperm(shape.experts, **options)[index][torch.randperm(tokens, **options)]
    elif routing == "Zipf":  # without replacement, by Gumbel's trick
        popularity = -torch.arange(1, shape.experts + 1, device=device).float().log()
        noise = -torch.empty(tokens, shape.experts, device=device).exponential_(generator=random).log()
        index = (popularity + noise).topk(shape.top_k).indices
    else:
        index = torch.arange(shape.top_k, device=device).expand(tokens, -1).contiguous()
    weights = torch.rand(tokens, shape.top_k, **options).softmax(dim=-1).to(dtype)
    return Inputs(hidden.requires_grad_(), index, weights.requires_grad_(), upstream)


def why_not(variant: Variant, shape: Shape, mode: Mode, device: torch.device, interpreted: bool) -> str | None:
    """The reason why a variant can't be run, None where it can."""
    if mode == "4-bit LoRA" and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if mode == "4-bit LoRA" and variant == "eager":
        return "the loop was measured in 16 bits"
    if variant == "grouped_mm" and shape.model_type == "llama4_text":
        return "transformers has no grouped_mm for Llama 4's experts; eager is what is replaced"
    if variant == "triton" and find_spec("triton") is None:
        return "triton is not installed"
    if variant == "triton" and device.type != "cuda" and not interpreted:
        return "no CUDA device; TRITON_INTERPRET=1 interprets it"
    if variant == "quack" and quack.installed() is None:
        return "quack-kernels is not installed"
    if variant == "quack" and device.type != "cuda":
        return "no CUDA device"
    if variant != "liger":
        return None
    if mode != "full":
        return "it has no LoRA"
    if not shape.silu:
        return "it takes plain experts with silu"
    if find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return None if device.type == "cuda" else "no CUDA device"


def replaced(shape: Shape, mode: Mode) -> Variant:
    """What a job would run without us; the measure of errors."""
    if shape.model_type != "llama4_text":
        return "grouped_mm"
    return "torch" if mode == "4-bit LoRA" else "eager"


class Layer:
    """Experts of `shape`, computed by `variant`; None: plainly, in fp32, as the truth."""

    def __init__(
        self, shape: Shape, mode: Mode, rank: int, variant: Variant | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        with torch.device(device):
            config = AutoConfig.for_model(shape.model_type, **config_values(shape))
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        layout = find_layout(model)
        assert layout is not None
        self.shape, self.layout, self.model = shape, layout, model
        path = layout.path(0, layout.experts_path)
        self._scramble(shape.hidden**-0.5)
        model.requires_grad_(False)
        if mode == "4-bit LoRA":
            self._encode(device, keep=variant in OURS_OF)
        if mode == "full":
            self.experts.requires_grad_(True)
        else:
            self._add_lora(path, rank, dtype)
        if variant is None:
            model.float()
        elif variant in OURS_OF:
            self._take_ours(OURS_OF[variant])
        elif variant == "grouped_mm" or (variant == "eager" and layout.grouped_mm):
            model.set_experts_implementation(variant)
        self._outer = model.get_submodule(path)  # PEFT's wrappers, where there are any
        self._forward = self._choose(variant)

    @property
    def experts(self) -> Any:
        """transformers' module itself."""
        return self.layout.experts(self.model)[0]

    @property
    def leaves(self) -> dict[str, nn.Parameter]:
        """What trains; of the two wrappers that PEFT nests, `base_layer` is gate_up's."""
        return {
            name.split(".experts.")[-1].removesuffix(".default.weight"): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def __call__(self, inputs: Inputs) -> Tensor:
        """(T, D)"""
        return self._forward(inputs.hidden, inputs.index, inputs.weights)

    def both(self, inputs: Inputs) -> Tensor:
        """Forward and backward; (T, D)."""
        out = self(inputs)
        out.backward(inputs.upstream)
        return out

    def forget(self, inputs: Inputs) -> None:
        """No gradient is left."""
        self.model.zero_grad(set_to_none=True)
        inputs.hidden.grad = inputs.weights.grad = None

    def learnt(self, inputs: Inputs) -> dict[str, Tensor]:
        """What comes out and every gradient, of one forward and backward."""
        self.forget(inputs)
        out = self.both(inputs).detach()
        found = {"out": out, "tokens": inputs.hidden.grad, "routing": inputs.weights.grad}
        found |= {name: leaf.grad for name, leaf in self.leaves.items()}
        if missing := [name for name, each in found.items() if each is None]:
            raise AssertionError(f"no gradient of {', '.join(missing)}")
        self.forget(inputs)
        return {name: each for name, each in found.items() if each is not None}

    def _scramble(self, std: float) -> None:
        device = next(self.experts.parameters()).device
        random = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for parameter in self.experts.parameters():
                parameter.normal_(0, std, generator=random)

    def _encode(self, device: torch.device, keep: bool) -> None:
        from llama_stack_provider_moe.compute.moe.codes import Coding
        from llama_stack_provider_moe.compute.moe.quantize import dequantize, quantize

        quantize(self.model, self.layout, Coding(4), device)
        if not keep:
            dequantize(self.model, self.layout)

    def _add_lora(self, path: str, rank: int, dtype: torch.dtype) -> None:
        """fp32, as `add_lora` has it, of numbers that `dtype` can hold; B is not zero, which would hide mistakes."""
        targets = [f"{path}.{name}" for name in (GATE_UP, DOWN)]
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets), self.model
        )
        random = torch.Generator(next(self.experts.parameters()).device).manual_seed(2)
        for leaf in self.leaves.values():
            leaf.data = (torch.empty_like(leaf).normal_(0, self.shape.hidden**-0.5, generator=random)).to(dtype).float()

    def _take_ours(self, implementation: str) -> None:
        kernels_of(implementation)
        if self.layout.grouped_mm:
            self.model.set_experts_implementation(implementation)
        else:
            replace_loops(self.model, self.layout, implementation)
        split_lora(self.model)

    def _choose(self, variant: Variant | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if variant is None:
            return self._plainly
        if variant == "liger":
            return self._by_liger
        return self._by_llama4 if variant == "eager" and not self.layout.grouped_mm else self._outer

    def _by_liger(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        experts = self.experts
        out: Tensor = LigerFusedMoEFunction.apply(
            hidden_TD, experts.gate_up_proj, experts.down_proj, index_TK.int(), weights_TK
        )
        return out

    def _by_llama4(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The routed part of transformers' Llama 4 block: every token to every expert, weighed by 0 mostly."""
        experts, (tokens, hidden) = self.shape.experts, hidden_TD.shape
        scores_TE = torch.zeros(tokens, experts, dtype=weights_TK.dtype, device=weights_TK.device)
        scores_TE = scores_TE.scatter(1, index_TK, weights_TK)
        rows = hidden_TD.repeat(experts, 1) * scores_TE.T.reshape(-1, 1)
        out: Tensor = self._outer(rows).reshape(experts, tokens, hidden).sum(dim=0)
        return out

    def _plainly(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Each expert's own tokens times its own matrices, LoRA folded in; nobody's code but this and PEFT's layout."""
        layout, experts = self.layout, self.experts
        weighs_inputs = layout.model_type == "llama4_text"
        linear = {name: self._linears(name) for name in (GATE_UP, DOWN)}
        out_TD = torch.zeros_like(hidden_TD)
        for expert in range(self.shape.experts):
            token, choice = torch.where(index_TK == expert)
            weight = weights_TK[token, choice, None]
            rows = hidden_TD[token] * weight if weighs_inputs else hidden_TD[token]
            inner = linear[GATE_UP](expert, rows)
            if layout.own_gate:
                inner = experts._apply_gate(inner)
            else:
                gate, up = inner.chunk(2, dim=-1)
                inner = nn.functional.silu(gate) * up
            rows = linear[DOWN](expert, inner)
            out_TD.index_add_(0, token, rows if weighs_inputs else rows * weight)
        return out_TD

    def _linears(self, name: str) -> Callable[[int, Tensor], Tensor]:
        """(expert, rows) -> rows times its matrix; unbound once, for each `[expert]` would have a whole gradient."""
        experts, layout = self.experts, self.layout
        matrices = getattr(experts, name).unbind()
        biases = getattr(experts, f"{name}_bias").unbind() if layout.biased else None
        wrappers = [each for each in self.model.modules() if getattr(each, "parameter_name", None) == name]
        factors = []
        for wrapper in wrappers:
            left, right, scale = wrapper.get_delta_factors("default")
            factors.append((left.unbind(), right.unbind(), scale))

        def linear(expert: int, rows: Tensor) -> Tensor:
            matrix = matrices[expert]
            for left, right, scale in factors:
                matrix = matrix + scale * left[expert] @ right[expert]
            out = rows @ (matrix if layout.transposed else matrix.T)
            return out if biases is None else out + biases[expert]

        return linear
