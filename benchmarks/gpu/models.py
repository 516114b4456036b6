"""End to end: LoRA SFT and DPO steps of a random model, by backend: tokens per second, time of a step, peak memory.

There are two ways, and each result names its own. `recipe`: a job in its own process, as the supervisor starts it; if
trl is installed. `loop`: a plain loop in this process, over the same adapted model, with AdamW; if pydantic is missing
too, PEFT and `split_lora`, which `add_lora` calls, apply LoRA directly.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.layers import why_not
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.timing import Clock, Times
from llama_stack_provider_moe.compute.moe.backend import OURS, TRITON, kernels_of
from llama_stack_provider_moe.compute.moe.derive import find_layout

Recipe = Literal["sft", "dpo"]
Backend = Literal["triton", "torch", "peft"]
Way = Literal["recipe", "loop"]
BACKENDS: tuple[Backend, ...] = ("triton", "torch", "peft")
IMPLEMENTATIONS = {"triton": TRITON, "torch": OURS, "peft": "grouped_mm"}
RANK, ALPHA, RATE, BETA = 16, 32, 1e-4, 0.1
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROOT = Path(__file__).parents[2]
JOB_LIMIT_S = 600.0
_TOKENS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


@dataclass(frozen=True)
class Model:
    """A random model, and the step that is timed: `rows` of `length` tokens (DPO: half as many pairs)."""

    name: str
    model_type: str
    values: dict[str, Any]
    rows: int = 4
    length: int = 2048

    @property
    def config(self) -> Any:
        """Of transformers."""
        return AutoConfig.for_model(self.model_type, **self.values, **_TOKENS)


MODELS = (
    Model("Granite-3.0-1b-a400m, 24 layers", "granitemoe", {
        "hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 8, "vocab_size": 49155,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
        "logits_scaling": 6.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625,
    }),
    Model("Qwen3-30B-A3B, 4 of its 48 layers", "qwen3_moe", {
        "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "vocab_size": 151936, "max_position_embeddings": 40960, "norm_topk_prob": True,
    }),
)  # fmt: skip
TINY = Model("tiny Granite", "granitemoe", {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 384,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}, rows=2, length=24)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One line of the result."""

    model: Model
    recipe: Recipe
    backend: Backend
    way: Way

    @property
    def name(self) -> str:
        """Without the backend, so that runs which compare share it."""
        return f"{self.model.name}, LoRA {self.recipe.upper()}, {self.way}"


def runs() -> list[Run]:
    """The most telling first."""
    return [
        Run(model, recipe, backend, _way()) for model in MODELS for recipe in ("sft", "dpo") for backend in BACKENDS
    ]


def tiny_runs() -> list[Run]:
    """Each recipe, each backend and each way at least once."""
    found = [Run(TINY, "sft", backend, "loop") for backend in BACKENDS] + [Run(TINY, "dpo", "torch", "loop")]
    return found + ([Run(TINY, "dpo", "torch", "recipe")] if _way() == "recipe" else [])


def _way() -> Way:
    return "recipe" if find_spec("trl") is not None else "loop"


@dataclass(frozen=True)
class Steps:
    """How to run one: on what, in which dtype, how many steps, of which the first are not counted."""

    clock: Clock
    dtype: torch.dtype
    interpreted: bool = False
    counted: int = 10
    preload: int = 3

    def run(self, run: Run) -> dict[str, Any]:
        """For the result file."""
        told = {"run": run.name, "model": run.model.name, "recipe": run.recipe, "backend": run.backend, "way": run.way}
        why = self._why_not(run)
        if why is not None:
            return told | {"status": "skipped", "why": why}
        try:
            figures = (self._by_recipe if run.way == "recipe" else self._by_loop)(run)
        except Exception as error:  # noqa: BLE001  as for a variant of a layer
            return told | {"status": "failed", "why": f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"}
        finally:
            self.clock.tidy()
        return told | {"status": "ok", "tokens_a_step": run.model.rows * run.model.length} | figures

    def _why_not(self, run: Run) -> str | None:
        cuda = self.clock.device.type == "cuda"
        if run.backend != "triton":
            return None
        if run.way == "recipe" and not cuda:
            return "a job takes triton on a CUDA device only"
        return why_not("triton", SHAPES[0], "LoRA", self.clock.device, self.interpreted)

    def _by_loop(self, run: Run) -> dict[str, Any]:
        device = self.clock.device
        clock = Clock(device, self.counted, 4 * self.clock.limit_s)
        cuda = device.type == "cuda"
        before = torch.cuda.memory_allocated(device) if cuda else 0
        with torch.device(device):
            plain = AutoModelForCausalLM.from_config(run.model.config, dtype=self.dtype)
        model, how = adapted(plain, run.backend)
        model.train()
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=RATE, fused=cuda)
        loss_of = sft_loss if run.recipe == "sft" else dpo_loss
        random = torch.Generator(device).manual_seed(0)
        ids = torch.empty(run.model.rows, run.model.length, dtype=torch.long, device=device)
        half = self.dtype != torch.float32

        def renew() -> None:
            ids.random_(3, run.model.values["vocab_size"], generator=random)

        def step() -> None:
            with torch.autocast(device.type, self.dtype) if half else nullcontext():
                loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        renew()
        first_s = clock.first_s(step)
        for _ in range(self.preload - 1):
            renew()
            step()
        clock.tidy()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        times = clock.times(renew, step)
        peak = torch.cuda.max_memory_allocated(device) - before if cuda else None
        tokens = run.model.rows * run.model.length
        return _figures(times, tokens, peak) | {"first_step_s": round(first_s, 2), "adapted_by": how}

    def _by_recipe(self, run: Run) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "job"
            write_job(run, folder, self.dtype, self.counted + self.preload)
            done = subprocess.run(
                [sys.executable, "-m", "llama_stack_provider_moe.compute.worker.main", str(folder)],
                capture_output=True, text=True, timeout=JOB_LIMIT_S, check=False, cwd=ROOT,
            )  # fmt: skip
            if done.returncode != 0:
                raise RuntimeError(f"the job ended with {done.returncode}: {done.stderr[-300:]}")
            from llama_stack_provider_moe.jobdir.events import read
            from llama_stack_provider_moe.jobdir.folder import JobFolder

            events = [each for each in read(JobFolder(folder).events, limit=10_000).events if each.type == "step"]
        found = [1e3 * seconds for seconds in seconds_of_steps(events)][self.preload - 1 :]
        tenths = statistics.quantiles(found, n=10, method="inclusive")
        times = Times(statistics.median(found), tenths[0], tenths[-1], len(found))
        peak = int(max(event.metrics["memory_bytes"] for event in events))
        return _figures(times, run.model.rows * run.model.length, peak) | {"adapted_by": "the recipe"}


def seconds_of_steps(events: list[Any]) -> list[float]:
    """Between one optimiser step's event and the next's."""
    times = [event.time for event in events if event.type == "step"]
    return [(later - earlier).total_seconds() for earlier, later in pairwise(times)]


def _figures(times: Times, tokens: int, peak: int | None) -> dict[str, Any]:
    return {
        "tokens_per_s": round(1e3 * tokens / times.median, 1),
        "step_ms": times.as_json(),
        "peak_mib": None if peak is None else round(peak / 2**20, 1),
    }


def adapted(model: Any, backend: Backend) -> tuple[Any, str]:
    """The model with LoRA on attention and all experts, computed by `backend`; and what put it there."""
    if find_spec("pydantic") is not None:
        from llama_stack_provider_moe.compute.moe.adapters import add_lora
        from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
        from llama_stack_provider_moe.spec import Adapter, Moe

        layout = find_layout(model)
        resolved = resolve_moe(Moe(experts_backend=backend, output_router_logits=False), layout, full=False)
        apply_moe(model, layout, resolved)
        return add_lora(model, Adapter(rank=RANK, alpha=ALPHA), layout, resolved).model, "add_lora"
    from peft import LoraConfig, get_peft_model

    from llama_stack_provider_moe.compute.moe.split_lora import split_lora

    if backend != "peft":
        kernels_of(IMPLEMENTATIONS[backend])
    model.set_experts_implementation(IMPLEMENTATIONS[backend])
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=ATTENTION,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    if backend != "peft":
        split_lora(wrapped)
    return wrapped, "PEFT and split_lora, for pydantic is not installed"


def sft_loss(model: Any, ids_BL: Tensor) -> Tensor:
    """Cross entropy of every next token."""
    loss: Tensor = model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
    return loss


def dpo_loss(model: Any, ids_BL: Tensor) -> Tensor:
    """arXiv 2305.18290, eq. 7; the first half of the rows is chosen, the reference is the adapter switched off."""
    with torch.no_grad(), model.disable_adapter():
        reference_B = _log_probability(model, ids_BL)
    chosen_B, rejected_B = (_log_probability(model, ids_BL) - reference_B).chunk(2)
    return -F.logsigmoid(BETA * (chosen_B - rejected_B)).mean()


def _log_probability(model: Any, ids_BL: Tensor) -> Tensor:
    logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1]
    by_token = F.cross_entropy(logits_BLV.flatten(0, 1).float(), ids_BL[:, 1:].flatten(), reduction="none")
    return -by_token.view(ids_BL.shape[0], -1).sum(dim=1)


def write_job(run: Run, folder: Path, dtype: torch.dtype, steps: int) -> None:
    """A job's folder as the service would write it: random weights, a tiny tokenizer, rows that fill every sequence."""
    from llama_stack_provider_moe.jobdir.folder import JobFolder, write_atomic
    from llama_stack_provider_moe.spec import JOB_SPEC
    from tests.support.tiny_models import tokenizer

    model = folder.parent / "model"
    AutoModelForCausalLM.from_config(run.model.config, dtype=dtype).save_pretrained(model)
    tokenizer().save_pretrained(model)
    job = JobFolder(folder)
    job.data.mkdir(parents=True)
    pairs = run.model.rows // (1 if run.recipe == "sft" else 2)
    body = {
        "recipe": run.recipe, "job_uuid": "run", "model": str(model), "data": {"dataset_id": "train"},
        "training": {
            "batch_size": pairs, "max_steps_per_epoch": steps, "dtype": "fp32" if dtype == torch.float32 else "bf16",
        },
        "optimizer": {"lr": RATE}, "adapter": {"rank": RANK, "alpha": ALPHA},
        "moe": {"experts_backend": run.backend, "output_router_logits": False},
        "options": {"max_length": run.model.length, "validation_split": 0},
    }  # fmt: skip
    write_atomic(job.spec, JOB_SPEC.validate_python(body))
    rows = [_row(run.recipe, number, run.model.length) for number in range(pairs * steps)]
    job.train_rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _row(recipe: Recipe, number: int, length: int) -> dict[str, Any]:
    """Letters at random, of which no tokenizer makes long tokens: a row is longer than `length` tokens, and is cut."""
    random = torch.Generator().manual_seed(number)
    letters: Callable[[], str] = lambda: "".join(  # noqa: E731
        chr(97 + code) for code in torch.randint(26, (3 * length,), generator=random).tolist()
    )
    asked = {"role": "user", "content": "Go."}
    if recipe == "sft":
        return {"messages": [asked, {"role": "assistant", "content": letters()}]}
    answers = ({"role": "assistant", "content": letters()} for _ in range(2))
    return {"prompt": [asked], "chosen": [next(answers)], "rejected": [next(answers)]}
