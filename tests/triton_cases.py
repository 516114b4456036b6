"""What `test_kernels_triton` runs in processes of their own: kernels interpreted on the CPU, and compiled for GPUs.

Whether triton interprets is decided when it is imported, so `python -m tests.triton_cases interpret` has to be started
with TRITON_INTERPRET=1, so has `models`, and `compile` without. All print one line of JSON a case.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_stack_provider_moe.experts.kernels import grouped, reference
from llama_stack_provider_moe.experts.kernels.groups import Groups
from llama_stack_provider_moe.experts.kernels.linear import Lora, grouped_linear

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# name -> rows of each expert, rows of none, outputs, inputs, rank
SHAPES: dict[str, tuple[tuple[int, ...], int, int, int, int]] = {
    "some": ((9, 4, 12), 0, 32, 32, 16),
    "an empty expert": ((9, 0, 12), 0, 32, 32, 16),
    "all to one": ((0, 40, 0), 0, 32, 32, 16),
    "one token": ((0, 0, 1), 0, 32, 32, 16),
    "no token": ((0, 0, 0), 0, 32, 32, 16),
    "rows of none": ((5, 0, 7), 4, 32, 32, 16),
    "no size is a tile's": ((17, 1, 30), 0, 37, 51, 5),
    "rank 1": ((9, 4, 12), 0, 48, 33, 1),
    "rank 64": ((9, 4, 12), 0, 48, 33, 64),
    "rank 100": ((9, 4, 12), 0, 48, 33, 100),
    "rank 256": ((9, 4, 12), 0, 48, 33, 256),
    "several tiles": ((70, 3, 40), 0, 150, 80, 20),
}


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def poison() -> None:
    """Memory that nobody wrote is NaN from here on, so that a number left out shows."""
    plain = torch.Tensor.new_empty

    def poisoned(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        out = plain(self, *shape, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    torch.Tensor.new_empty = poisoned  # type: ignore[method-assign,assignment]


def learnt(kernels: Any, dtype: torch.dtype, shape: str, bias: bool, lora: bool) -> dict[str, Tensor]:
    """Output, and the gradient of everything, in double precision for comparison."""
    sizes, strays, outputs, inputs, rank = SHAPES[shape]
    groups = Groups(torch.tensor(sizes).cumsum(0).int(), partial=strays > 0)
    rows = sum(sizes) + strays
    leaves = {
        "rows": made(0, rows, inputs), "weight": made(1, 3, outputs, inputs) / inputs**0.5,
        "a": made(2, 3, rank, inputs) / inputs**0.5, "b": made(3, 3, outputs, rank) / rank**0.5,
        "bias": made(4, 3, outputs),
    }  # fmt: skip
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    out = grouped_linear(
        leaves["rows"], leaves["weight"], groups, leaves["bias"] if bias else None,
        Lora(leaves["a"], leaves["b"]) if lora else None, kernels,
    )  # fmt: skip
    upstream = made(5, rows, outputs).to(dtype)
    upstream[sum(sizes) :] = 0  # as `combine` gives it
    out.backward(upstream)
    found = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.detach()[: sum(sizes)], **found}


def interpret() -> None:
    poison()
    for (name, dtype), shape, (bias, lora) in itertools.product(
        DTYPES.items(), SHAPES, ((False, True), (True, False), (True, True))
    ):
        if (bias, lora) != (False, True) and shape not in ("some", "rows of none"):
            continue
        ours = learnt(grouped, dtype, shape, bias, lora)
        again = learnt(grouped, dtype, shape, bias, lora)
        twin = learnt(reference, dtype, shape, bias, lora)
        truth = learnt(reference, torch.float64, shape, bias, lora)
        errors = {
            what: [_error(ours[what], true), _error(twin[what], true)] for what, true in truth.items() if true.numel()
        }
        same = all(torch.equal(ours[what], again[what]) for what in ours)
        case = f"{shape}, {name}{', bias' if bias else ''}{', LoRA' if lora else ''}"
        print(json.dumps({"case": case, "dtype": name, "errors": errors, "same_again": same}), flush=True)


def models() -> None:
    """Whole tiny models, with LoRA on them, by the kernels and by their torch twins."""
    from llama_stack_provider_moe.experts.adapters import add_lora
    from llama_stack_provider_moe.experts.layout import find_layout
    from llama_stack_provider_moe.experts.settings import apply_moe, resolve_moe
    from llama_stack_provider_moe.spec import Adapter, Moe
    from tests import tiny_models

    ids = torch.arange(3, 15).unsqueeze(0)
    for family in ("mixtral", "granitemoe", "llama4_text", "gpt_oss"):
        found = []
        for backend in ("triton", "torch"):
            model = tiny_models.model(family)
            layout = find_layout(model)
            resolved = resolve_moe(Moe(experts_backend=backend, train_router=True), layout, full=False)
            apply_moe(model, layout, resolved)
            torch.manual_seed(0)
            adapted = add_lora(model, Adapter(rank=3), layout, resolved).model
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
            logits = adapted(input_ids=ids).logits
            logits.square().mean().backward()
            gradients = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
            found.append({"logits": logits.detach(), **gradients})
        errors = {name: _error(one, found[1][name].double()) for name, one in found[0].items()}
        print(json.dumps({"case": family, "worst": max(errors.values()), "compared": len(errors)}), flush=True)


def _error(found: Tensor, true: Tensor) -> float:
    """Relative to the norm; NaN counts as 1e9, for JSON has none."""
    off = (found.double() - true).norm() / true.norm().clamp(min=1e-30)
    return float(off) if bool(torch.isfinite(off)) else 1e9


def compile_all() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes: dict[str, Any] = {"BLOCK_S": 128, "BLOCK_O": 128, "BLOCK_R": 16, "LANES": 8, "WIDEN": False}
    for arch, (name, depth) in itertools.product((80, 90, 100), {"bf16": 64, "fp16": 64, "fp32": 32}.items()):
        for kernel, more in (
            (grouped._times, sizes | {"BLOCK_I": depth, "HAS_LORA": True, "HAS_BIAS": False, "rows_i": 1,
                                      "weight_i": 1, "first_i": 1, "second_r": 1}),
            (grouped._times, sizes | {"BLOCK_I": depth, "HAS_LORA": False, "HAS_BIAS": True, "rows_i": 1,
                                      "weight_i": 1}),
            (grouped._outer, {"BLOCK_S": depth, "BLOCK_O": 128, "BLOCK_I": 128, "WIDEN": False, "left_o": 1,
                              "right_i": 1}),
        ):  # fmt: skip
            signature = {argument: _type(argument, name, more) for argument in kernel.arg_names}
            # Strides and sizes that are multiples of 16, as a launch would find them.
            attributes = {
                (index,): [["tt.divisibility", 16]]
                for index, argument in enumerate(kernel.arg_names)
                if signature[argument] != "constexpr" and argument not in ("total", "tiles_o", "tiles_i")
            }
            made = triton.compile(
                ASTSource(fn=kernel, signature=signature, constexprs=more, attrs=attributes),
                target=GPUTarget("cuda", arch, 32), options={"num_warps": 8, "num_stages": 3},
            )  # fmt: skip
            kind = "LoRA" if more.get("HAS_LORA") else "bias" if more.get("HAS_BIAS") else "outer"
            case = f"{kernel.__name__.strip('_')}, {kind}, sm_{arch}, {name}"
            found = {"case": case, "shared_bytes": made.metadata.shared, **_resources(made.asm["cubin"])}
            print(json.dumps(found), flush=True)


def _type(argument: str, name: str, constants: dict[str, Any]) -> str:
    if argument in constants:
        return "constexpr"
    if argument in ("table", "ends"):
        return "*i32"
    pointers = ("rows", "weight", "first", "second", "bias", "out", "low", "left", "right")
    return f"*{name}" if argument in pointers else "i32"


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of spills, as the assembler's own tools tell them (they come with triton)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.findall(r"REG:(\d+)", text)[0]),
        "stack_bytes": int(re.findall(r"STACK:(\d+)", text)[0]),
        "local_bytes": int(re.findall(r"LOCAL:(\d+)", text)[0]),
    }


if __name__ == "__main__":
    {"interpret": interpret, "models": models, "compile": compile_all}[sys.argv[1]]()
