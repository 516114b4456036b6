"""The experts layers that are measured, and the arithmetic of one: FLOPs, bytes, the least time, and a prediction.

H hidden, I intermediate, E experts, K experts per token, R LoRA's rank, T tokens, S = T K rows. A layer is two products
of each row with a matrix of its own expert: gate and up together (H to 2 I), then down (I to H).

| FLOPs | forward | forward and backward |
|---|---|---|
| the weights, frozen | 6 S H I | 12 S H I: the gradient of the rows takes as much again |
| the weights, trained | 6 S H I | 18 S H I: so does the gradient of the weights |
| LoRA beside them | 2 S R (2 H + 3 I) | three times that |

Only these count as useful work, whatever else an implementation computes (PEFT's merge, a gradient of frozen weights, a
repeated forward), so a share of the dense rate is a share of useful work.

The least bytes, with b per number, count each of these once. Forward: tokens in and out, gate_up written, the tensor
between the two products written and read, weights and factors read: b (2 T H + 4 S I + R E (2 H + 3 I)) + w E 3 H I,
where w is b, or for NF4 0.5625 (half a byte, and a 4-byte scale for 64 of them). Backward: the same weights and
factors, tokens and the two gradients of tokens, gate_up read and its gradient written and read, gradients of trained
weights written: b (3 T H + 6 S I + 2 R E (2 H + 3 I)) + w E 3 H I, and b E 3 H I more if the weights train.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Mode = Literal["LoRA", "4-bit LoRA", "full"]
Pass = Literal["forward", "forward+backward"]

# Measured on one H200 by the project: a bf16 product of 8192-cubed matrices, and a copy on the device.
DENSE_FLOPS, BANDWIDTH = 790e12, 4.3e12  # a second, bytes a second
BYTES, NF4_BYTES = 2, 0.5 + 4 / 64  # a number
# Assumed in predictions: what a grouped product of ragged rows reaches of the dense rate.
GROUPED_SHARE = 0.65


@dataclass(frozen=True)
class Shape:
    """Of an experts layer: `model_type` names the modules of transformers that it is built of."""

    name: str
    model_type: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    more: dict[str, Any] = field(default_factory=dict)  # of the config
    silu: bool = True  # plain weights (E, out, in), no bias, silu: what other packages' fused layers take

    @property
    def weights(self) -> int:
        """Numbers in the weights of a layer: E 3 H I."""
        return 3 * self.experts * self.hidden * self.inner

    def factors(self, rank: int) -> int:
        """Numbers in the LoRA of a layer."""
        return rank * self.experts * (2 * self.hidden + 3 * self.inner)

    def flops(self, tokens: int, mode: Mode, rank: int, what: Pass) -> float:
        """Useful ones; see the top. `rank` is not read where all weights train."""
        rows = tokens * self.top_k
        base = 6.0 * rows * self.hidden * self.inner
        both = what == "forward+backward"
        if mode == "full":
            return base * (3 if both else 1)
        lora = 2.0 * rows * rank * (2 * self.hidden + 3 * self.inner)
        return base * (2 if both else 1) + lora * (3 if both else 1)

    def bytes_moved(self, tokens: int, mode: Mode, rank: int, what: Pass) -> float:
        """At least; see the top."""
        rows_inner, tokens_hidden = tokens * self.top_k * self.inner, tokens * self.hidden
        factors = 0 if mode == "full" else self.factors(rank)
        read = self.weights * (NF4_BYTES if mode == "4-bit LoRA" else BYTES)
        moved = BYTES * (2 * tokens_hidden + 4 * rows_inner + factors) + read
        if what == "forward+backward":
            moved += BYTES * (3 * tokens_hidden + 6 * rows_inner + 2 * factors) + read
            moved += BYTES * self.weights if mode == "full" else 0
        return moved

    def floor_ms(self, tokens: int, mode: Mode, rank: int, what: Pass) -> float:
        """The longer of the two: arithmetic at the dense rate, bytes at a copy's."""
        arithmetic = self.flops(tokens, mode, rank, what) / DENSE_FLOPS
        return 1e3 * max(arithmetic, self.bytes_moved(tokens, mode, rank, what) / BANDWIDTH)

    def predicted_ms(self, tokens: int, rank: int) -> dict[str, float]:
        """LoRA, forward and backward: products at `GROUPED_SHARE` of the dense rate, and passes over memory beside.

        Passes beside the products, in rows of H and of I, counted off the code:
        - triton, with gather, un-permute and swiglu fused and gate_up recomputed: 1 and 3.
        - torch, unfused. Forward: gather 2, LoRA added to gate_up 6 (it is 2 I wide), silu and product 5, LoRA added to
          down 3, rows back 5 (gather, weigh, sum), so 10 and 11. Backward: rows out and the routing's gradient 6,
          weighed 2, LoRA added 3 and 3, swiglu 12, tokens' gradient 3, so 14 and 15.
        - PEFT on grouped_mm: the same without LoRA added, 18 and 17, and W + B A: of all weights read and written twice
          in a forward, and a gradient of them written, then read for A's and for B's: six times, as one is cached.
        """
        rows = tokens * self.top_k
        wide, narrow = BYTES * rows * self.hidden, BYTES * rows * self.inner
        split = self.flops(tokens, "LoRA", rank, "forward+backward")
        folded = 18.0 * rows * self.hidden * self.inner
        seconds = {
            "triton": split / (DENSE_FLOPS * GROUPED_SHARE) + (wide + 3 * narrow) / BANDWIDTH,
            "torch": split / (DENSE_FLOPS * GROUPED_SHARE) + (24 * wide + 26 * narrow) / BANDWIDTH,
            "PEFT": folded / (DENSE_FLOPS * GROUPED_SHARE)
            + (18 * wide + 17 * narrow + 6 * BYTES * self.weights) / BANDWIDTH,
        }
        return {name: 1e3 * value for name, value in seconds.items()}


_LOCAL = ("hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok")
_NAMES = {"qwen3_moe": ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")}

SHAPES = (
    Shape("Qwen3-30B-A3B", "qwen3_moe", 2048, 768, 128, 8),
    Shape("Mixtral-8x7B", "mixtral", 4096, 14336, 8, 2),
    Shape("Granite-3.0-1b-a400m", "granitemoe", 1024, 512, 32, 8),
    Shape("gpt-oss-20b", "gpt_oss", 2880, 2880, 32, 4, silu=False),
    Shape("Llama-4-Scout", "llama4_text", 5120, 8192, 16, 1, {"interleave_moe_layer_step": 1}, silu=False),
)
# The same layouts, for a machine without a GPU; ragged sizes, and rows of all kinds of experts.
TINY = tuple(
    Shape(f"tiny {shape.name}", shape.model_type, 32, 24, 4, min(shape.top_k, 2), shape.more, shape.silu)
    for shape in SHAPES
)


def config_values(shape: Shape) -> dict[str, Any]:
    """Of a model of one decoder layer whose experts are of that shape; all else in it is small, and not measured."""
    sizes = (shape.hidden, shape.inner, shape.experts, shape.top_k)
    small = {"num_hidden_layers": 1, "vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    if shape.model_type == "llama4_text":
        small["intermediate_size_mlp"] = 64
    names = _NAMES.get(shape.model_type, _LOCAL)
    tokens = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    return {**small, **tokens, "head_dim": 8, **dict(zip(names, sizes, strict=True)), **shape.more}


def arithmetic() -> str:
    """Two tables, in Markdown: of each shape what the least time is made of, and what is predicted."""
    lines = [
        "| Shape | Tokens | What | Forward: TFLOP, GB, least ms | Forward+backward: TFLOP, GB, least ms |",
        "|---|---|---|---|---|",
    ]
    modes: tuple[tuple[Mode, int], ...] = (("LoRA", 16), ("LoRA", 64), ("4-bit LoRA", 16), ("full", 0))
    for shape in SHAPES:
        for tokens in (1024, 8192, 32768):
            for mode, rank in modes if tokens == 8192 else modes[:1]:
                kind = f"{mode} r={rank}" if rank else mode
                cells = " | ".join(
                    f"{shape.flops(tokens, mode, rank, what) / 1e12:.3f}, "
                    f"{shape.bytes_moved(tokens, mode, rank, what) / 1e9:.2f}, "
                    f"{shape.floor_ms(tokens, mode, rank, what):.3f}"
                    for what in ("forward", "forward+backward")
                )
                lines.append(f"| {shape.name} | {tokens} | {kind} | {cells} |")
    lines += [
        "",
        f"Predicted, LoRA r=16, 8192 tokens, forward+backward, ms; grouped products at {GROUPED_SHARE:.0%} of the "
        "dense rate:",
        "",
        "| Shape | triton | torch | PEFT on grouped_mm | PEFT / triton | torch / triton | share of dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        found = shape.predicted_ms(8192, 16)
        share = shape.flops(8192, "LoRA", 16, "forward+backward") / DENSE_FLOPS * 1e3 / found["triton"]
        lines.append(
            f"| {shape.name} | {found['triton']:.2f} | {found['torch']:.2f} | {found['PEFT']:.2f} | "
            f"{found['PEFT'] / found['triton']:.2f} | {found['torch'] / found['triton']:.2f} | {share:.0%} |"
        )
    return "\n".join(lines)
