"""Cases that `test_triton` runs in separate processes: kernels interpreted on the CPU, and compiled for GPUs.

Triton decides at its import whether it interprets, so start `python -m tests.support.triton_cases interpret`
with TRITON_INTERPRET=1, also `layers` and `models`, and `compile` without it. All print one line of JSON for each
case.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_stack_provider_moe.compute.moe.kernels import grouped, pointwise, ragged, reference
from llama_stack_provider_moe.compute.moe.kernels.drop import INNER, UP, Drop, Dropout
from llama_stack_provider_moe.compute.moe.kernels.groups import Groups, Sorted
from llama_stack_provider_moe.compute.moe.kernels.layer import Projection, expert_layer
from llama_stack_provider_moe.compute.moe.kernels.linear import Lora, grouped_linear
from llama_stack_provider_moe.compute.moe.kernels.reference import Activation

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DROPPING = ("some", "rows of none", "no size is a tile's", "rank 100", "several tiles")
HALVED = ("some", "no size is a tile's", "several tiles")  # in fp16 not all, because its code is bf16's
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
    """From now on uninitialised memory is NaN, so that a missing number shows."""
    plain = torch.Tensor.new_empty

    def poisoned(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        out = plain(self, *shape, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    torch.Tensor.new_empty = poisoned  # type: ignore[method-assign,assignment]


def learnt(
    kernels: Any, dtype: torch.dtype, shape: str, bias: bool, lora: bool, dropout: float = 0.0
) -> dict[str, Tensor]:
    """The output and all gradients, in double precision for comparison."""
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
        Lora(leaves["a"], leaves["b"], dropout) if lora else None, kernels,
        Drop(dropout, 5, UP, torch.arange(rows)) if dropout else None,
    )  # fmt: skip
    upstream = made(5, rows, outputs).to(dtype)
    upstream[sum(sizes) :] = 0  # as `combine` returns it
    out.backward(upstream)
    found = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.detach()[: sum(sizes)], **found}


def interpret() -> None:
    poison()
    describe = grouped._can_describe
    for (name, dtype), shape, how in itertools.product(
        DTYPES.items(), SHAPES, ((False, True), (True, False), (True, True), (False, True, 0.3))
    ):
        twice = shape in ("some", "rows of none")
        if how in ((True, False), (True, True)) and not twice:
            continue
        if len(how) > 2 and shape not in DROPPING:
            continue
        if name == "fp16" and shape not in HALVED:
            continue
        ours = learnt(grouped, dtype, shape, *how)
        again = learnt(grouped, dtype, shape, *how) if twice else ours
        twin = learnt(reference, dtype, shape, *how)
        truth = learnt(reference, torch.float64, shape, *how)
        grouped._can_describe = lambda tensor: False
        plain = learnt(grouped, dtype, shape, *how)
        grouped._can_describe = describe
        bias, lora, *dropout = how
        case = f"{shape}{', bias' if bias else ''}{', LoRA' if lora else ''}{', dropout' if dropout else ''}"
        report(case, name, [ours, again], [ours, plain], twin, truth)
    masks()


def masks() -> None:
    """The kernels' masks are the formula's, bit by bit: of ones nothing but the mask is left."""
    ones = Activation(lambda inner: inner.chunk(2, -1)[1], "silu")
    for share, seed, columns in ((0.5, 0, 300), (0.1, 2**61 + 12345, 77), (0.999, 3, 64), (1e-6, 4, 520)):
        drop = Drop(share, seed, INNER, torch.randperm(50) * 2**20)
        inner = torch.cat([torch.full((50, columns), 30.0), torch.ones(50, columns)], dim=1)  # silu(30) is 30
        found = pointwise.gated(inner, ones, drop) / (30 * drop.scale)
        groups = Groups(torch.tensor([20, 50], dtype=torch.int32))
        eyes = torch.eye(columns).expand(2, -1, -1).contiguous()
        zeros = torch.zeros(2, columns, columns)
        rows = torch.ones(50, columns)
        forward, low = grouped.product(rows, zeros, groups, eyes, eyes, drop=drop)
        backward, _ = grouped.product(rows, zeros, groups, eyes, eyes, flip=True, drop=drop)
        assert low is not None
        kept = drop.keep(columns).float()
        same = all(torch.equal(each, kept) for each in (found.round(decimals=4), forward, low, backward))
        dropped = float((kept == 0).float().mean())
        print(json.dumps({"case": f"mask {share:g}", "same": same, "dropped": dropped}), flush=True)


def report(
    case: str,
    dtype: str,
    repeated: list[dict[str, Tensor]],
    ours: list[dict[str, Tensor]],
    twin: dict[str, Tensor],
    truth: dict[str, Tensor],
) -> None:
    """The largest errors of `ours` and of the twin, and whether those of `repeated` are all the same."""
    errors = {
        what: [max(_error(each[what], true) for each in ours), _error(twin[what], true)]
        for what, true in truth.items()
        if true.numel()
    }
    same = all(torch.equal(each[what], repeated[0][what]) for each in repeated for what in truth)
    print(json.dumps({"case": f"{case}, {dtype}", "dtype": dtype, "errors": errors, "same": same}), flush=True)


GATES: dict[str, Activation] = {
    "silu": Activation(lambda inner: inner.chunk(2, -1)[1] * F.silu(inner.chunk(2, -1)[0]), "silu"),
    "clamped": Activation(lambda inner: clamped(inner), "clamped", 1.7, 1.0),
    "other": Activation(lambda inner: inner.chunk(2, -1)[1] * F.gelu(inner.chunk(2, -1)[0]), "other"),
}


def clamped(inner_SJ: Tensor) -> Tensor:
    """gpt-oss's formula, written again."""
    gate, up = inner_SJ[:, ::2].clamp(max=1.0), inner_SJ[:, 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.7)


def layer_learnt(
    kernels: Any, dtype: torch.dtype, gate: str, partial: bool, tokens: int, dropout: float = 0.0
) -> dict[str, Tensor]:
    """As `learnt`, for a whole layer with LoRA and biases: 3 experts, 2 choices."""
    shapes = {
        "hidden": (tokens, 48), "weights": (tokens, 2), "up": (3, 72, 48), "up bias": (3, 72), "up a": (3, 5, 48),
        "up b": (3, 72, 5), "down": (3, 48, 36), "down bias": (3, 48), "down a": (3, 5, 36), "down b": (3, 48, 5),
    }  # fmt: skip
    leaves = {name: made(seed, *shape) / shape[-1] ** 0.5 for seed, (name, shape) in enumerate(shapes.items())}
    leaves = {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}
    index_TK = torch.randint(0, 3 + partial, (tokens, 2), generator=torch.Generator().manual_seed(1))
    order = torch.argsort(index_TK.flatten(), stable=True)
    # As on a GPU: groups are not padded, and rows of no expert are at the end.
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0])
    ends = torch.bincount(index_TK.flatten(), minlength=4)[:3].cumsum(0).int()
    found = Sorted(order, places.view_as(index_TK), Groups(ends, partial))
    up, down = (
        Projection(leaves[name], leaves[f"{name} bias"], Lora(leaves[f"{name} a"], leaves[f"{name} b"], dropout))
        for name in ("up", "down")
    )
    weights_TK = leaves["weights"] * (index_TK < 3)
    dropping = Dropout(7, dropout / 2) if dropout else None
    out = expert_layer(leaves["hidden"], weights_TK, up, down, GATES[gate], found, kernels, dropping)
    out.backward(made(20, tokens, 48).to(out.dtype))
    found_too = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.detach(), **found_too}


def layers() -> None:
    poison()
    for (name, dtype), how in itertools.product(
        DTYPES.items(),
        (("silu", False, 30), ("silu", True, 11), ("silu", False, 1), ("clamped", False, 30), ("other", False, 9),
         ("silu", True, 30, 0.3), ("clamped", False, 9, 0.3), ("other", False, 9, 0.3)),
    ):  # fmt: skip
        gate, partial, tokens, *dropout = how
        if (name == "fp16" and (gate, tokens) != ("silu", 30)) or (name == "bf16" and tokens != 30):
            continue
        ours, again = (layer_learnt(grouped, dtype, *how) for _ in range(2))
        twin = layer_learnt(reference, dtype, *how)
        truth = layer_learnt(reference, torch.float64, *how)
        case = f"{gate}, {tokens} tokens{', some of none' if partial else ''}{', dropout' if dropout else ''}"
        report(case, name, [ours, again], [ours], twin, truth)


def models() -> None:
    """Whole tiny models with LoRA, with the kernels and with their torch twins."""
    from llama_stack_provider_moe.compute.moe.adapters import add_lora
    from llama_stack_provider_moe.compute.moe.derive import find_layout
    from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
    from llama_stack_provider_moe.spec import Adapter, Moe
    from tests.support import tiny_models

    ids = torch.arange(3, 15).unsqueeze(0)
    for family, checkpointed in (
        ("mixtral", False), ("granitemoe", True), ("llama4_text", False), ("gpt_oss", True)
    ):  # fmt: skip
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
            if checkpointed:
                adapted.train().gradient_checkpointing_enable({"use_reentrant": False})
            logits = adapted(input_ids=ids).logits
            logits.square().mean().backward()
            gradients = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
            found.append({"logits": logits.detach(), **gradients})
        errors = {name: _error(one, found[1][name].double()) for name, one in found[0].items()}
        case = f"{family}{', checkpointed' if checkpointed else ''}"
        print(json.dumps({"case": case, "worst": max(errors.values()), "compared": len(errors)}), flush=True)


def _error(found: Tensor, true: Tensor) -> float:
    """The error relative to the norm; NaN becomes 1e9, because JSON has no NaN."""
    off = (found.double() - true).norm() / true.norm().clamp(min=1e-30)
    return float(off) if bool(torch.isfinite(off)) else 1e9


def compile_all() -> None:
    """One line of JSON for each kernel, device and dtype; with `table` as a second argument a table."""
    if sys.argv[2:] == ["table"]:
        titles = ("registers", "spilt bytes", "shared bytes", "wgmma", "TMA loads")
        print(f"{'kernel':<44}" + "".join(f"{title:>13}" for title in titles))
    for arch, name in itertools.product((80, 90, 100), ("bf16", "fp16", "fp32")):
        for kind, kernel, constants, options in variants(arch, name):
            found = {"case": f"{kind}, sm_{arch}, {name}", **compiled(kernel, arch, name, constants, options)}
            if sys.argv[2:] == ["table"]:
                columns = ("registers", "local_bytes", "shared_bytes", "wgmma", "tma")
                print(f"{found['case']:<44}" + "".join(f"{found[each]:>13}" for each in columns), flush=True)
            else:
                print(json.dumps(found), flush=True)


UNMASKED = {"GIVEN": False, "MASK_IN": False, "MASK_OUT": False, "LIMIT": 0}
LIMIT = {"LIMIT": round(0.05 * 2**31)}


def variants(arch: int, name: str) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """(what it is, kernel, constants, options): the first candidate of `tiles`, and on Hopper those by descriptors."""
    depth = 32 if name == "fp32" else 64
    plain: dict[str, Any] = {
        "BLOCK_S": 128, "BLOCK_O": 128, "BLOCK_I": depth, "BLOCK_R": 16, "LANES": 8, "HAS_LORA": True,
        "HAS_BIAS": False, "HAS_INDEX": False, "ROWS_DESCRIBED": False, "WEIGHT_DESCRIBED": False,
        "WEIGHT_TURNED": False, "WIDEN": False, "SEPARATE": arch >= 100, **UNMASKED,
        "rows_i": 1, "weight_i": 1, "first_i": 1, "second_r": 1,
    }  # fmt: skip
    turned = {"WEIGHT_TURNED": True, "weight_o": 1, "first_r": 1, "second_o": 1}
    backward = {key: value for key, value in plain.items() if key not in ("weight_i", "first_i", "second_r")} | turned
    eight = {"num_warps": 8, "num_stages": 3}
    if name == "fp32":
        plain, backward = plain | {"BLOCK_S": 64}, backward | {"BLOCK_S": 64}
    yield "times, LoRA, gathered", ragged.times, plain | {"HAS_INDEX": True}, eight
    yield "times, LoRA, turned", ragged.times, backward, eight
    yield "times, bias", ragged.times, plain | {"HAS_LORA": False, "HAS_BIAS": True}, eight
    dropping = name == "bf16"
    given = plain | {"HAS_LORA": False, "GIVEN": True}
    thin = plain | {"HAS_LORA": False, "MASK_IN": True, "HAS_INDEX": True, "BLOCK_O": 16} | LIMIT
    if dropping:
        yield "times, LoRA, dropout", ragged.times, given | {"HAS_INDEX": True}, eight
        rows = {"BLOCK_S": 64} if arch == 80 else {}
        yield "times, LoRA, dropout, turned", ragged.times, backward | {"MASK_OUT": True} | LIMIT | rows, eight
        yield "times, thin, dropout", ragged.times, thin, {"num_warps": 4, "num_stages": 4}
    if arch >= 90 and name != "fp32":
        described = {"WEIGHT_DESCRIBED": True}
        wide = {"BLOCK_O": 256} if name == "bf16" and arch == 90 else {}
        yield "times, LoRA, gathered, TMA", ragged.times, plain | described | {"HAS_INDEX": True} | wide, eight
        yield "times, LoRA, TMA", ragged.times, plain | described | {"ROWS_DESCRIBED": True} | wide, eight
        yield "times, LoRA, turned, TMA", ragged.times, backward | described | {"ROWS_DESCRIBED": True}, eight
    outer = {"BLOCK_S": depth, "BLOCK_O": 128, "BLOCK_I": 128, "LEFT_INDEX": False, "RIGHT_INDEX": True,
             "WIDEN": False, "DROPS": False, "LIMIT": 0, "left_o": 1, "right_i": 1}  # fmt: skip
    yield "outer", ragged.outer, outer, eight
    if dropping:
        yield "outer, dropout", ragged.outer, outer | {"BLOCK_O": 16, "DROPS": True} | LIMIT, eight
    gate = {"CLAMPED": False, "DROPS": False, "LIMIT": 0, "BLOCK_S": 4, "BLOCK_I": 256}
    four = {"num_warps": 4, "num_stages": 3}
    for kind, is_clamped in (("silu", False), ("clamped", True)):
        yield f"gate, {kind}", pointwise._gated, gate | {"CLAMPED": is_clamped}, four
        yield f"gate backward, {kind}", pointwise._gated_backward, gate | {"CLAMPED": is_clamped}, four
    if dropping:
        gate |= {"DROPS": True} | LIMIT
        yield "gate, silu, dropout", pointwise._gated, gate, four
        yield "gate backward, silu, dropout", pointwise._gated_backward, gate, four
    yield "sum of rows", pointwise._weighted_sum, {"CHOICES": 8, "HAS_WEIGHTS": True, "BLOCK_D": 1024}, four


def compiled(kernel: Any, arch: int, name: str, constants: dict[str, Any], options: dict[str, int]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {argument: _type(argument, name, constants) for argument in kernel.arg_names}
    # Strides and sizes that are multiples of 16, as at a launch.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.arg_names)
        if signature[argument] not in ("constexpr", "fp32")
        and not signature[argument].startswith("tensordesc")
        and argument not in {each.name for each in kernel.params if each.do_not_specialize}
    }
    made = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", arch, 32), options=options,
    )  # fmt: skip
    ptx = made.asm["ptx"]
    return {
        "shared_bytes": made.metadata.shared, **_resources(made.asm["cubin"]),
        "wgmma": ptx.count("wgmma.mma_async"), "tma": ptx.count("cp.async.bulk.tensor"),
    }  # fmt: skip


def _type(argument: str, name: str, constants: dict[str, Any]) -> str:
    if argument in constants:
        return "constexpr"
    if argument == "rows" and constants.get("ROWS_DESCRIBED"):
        return f"tensordesc<{name}[{constants['BLOCK_S']}, {constants['BLOCK_I']}]>"
    if argument == "weight" and constants.get("WEIGHT_DESCRIBED"):
        sides = [constants["BLOCK_O"], constants["BLOCK_I"]]
        sides = sides[::-1] if constants["WEIGHT_TURNED"] else sides
        return f"tensordesc<{name}[1, {sides[0]}, {sides[1]}]>"
    if argument in ("table", "ends", "keys", "index", "left_index", "right_index"):
        return "*i32" if argument in ("table", "ends", "keys") else "*i64"
    if argument == "places":
        return "*i64"
    if argument in ("alpha", "limit", "scale"):
        return "fp32"
    if argument in ("weights", "d_weight") or (argument == "weight" and "CLAMPED" in constants):
        return "*fp32"
    pointers = (
        "rows", "weight", "first", "second", "bias", "out", "low", "left", "right", "inner", "made", "d_made", "d_inner"
    )  # fmt: skip
    is_size = argument == "rows" and "CLAMPED" in constants
    return f"*{name}" if argument in pointers and not is_size else "i32"


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of spills, as the assembler's tools report them (they come with triton)."""
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
    {"interpret": interpret, "layers": layers, "models": models, "compile": compile_all}[sys.argv[1]]()
