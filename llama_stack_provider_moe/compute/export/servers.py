"""Which servers are known to apply an adapter; each statement has its source and version.

A server can load an adapter without applying it: it skips names that it has no layer for, some servers silently. So
nothing here is guessed: `unknown` means that no source was found. A merged model does not need any of this. None of
these servers was run here; statements say what was run.
"""

from pathlib import Path
from typing import Literal

from peft.utils import CONFIG_NAME
from pydantic import BaseModel, Field
from torch import nn

from llama_stack_provider_moe.compute.moe.layout import text_config
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.ground.small_files import read_object
from llama_stack_provider_moe.spec.options import ROPE_FILE

Applies = Literal["yes", "with settings", "no", "unknown"]
_VLLM = "vllm/lora/model_manager.py at 01533aa (2026)"
_VLLM_HELPER = "vllm/lora/peft_helper.py at 0214369"
_OLLAMA = "Ollama 0.33.0-rc2: convert/convert.go, convert/convert_llama_adapter.go"
# model_type -> whether vLLM's class accepts fused experts unchanged (`is_3d_moe_weight`), and the source.
_VLLM_FUSED: dict[str, tuple[bool, str]] = {
    "gpt_oss": (True, "vllm/model_executor/models/gpt_oss.py: is_3d_moe_weight"),
    "qwen3_5_moe": (True, "vllm/model_executor/models/qwen3_5.py; run on Qwen3.6-35B-A3B, unslothai/unsloth-zoo#1250"),
    "olmoe": (False, "vllm/model_executor/models/olmoe.py at 048a32c"),
}
# model_type -> the source in which its class declares SupportsLoRA.
_VLLM_LORA = {
    **{family: source for family, (_, source) in _VLLM_FUSED.items()},
    "granitemoe": "vllm/model_executor/models/granitemoe.py",
    "mixtral": "vllm/model_executor/models/mixtral.py",
    "qwen3_moe": "vllm/model_executor/models/qwen3_moe.py",
    "llama": "vllm/model_executor/models/llama.py, docs/features/lora.md",
}


class Statement(BaseModel):
    """What is known about one server and one adapter."""

    server: str
    applies: Applies
    why: str
    source: str = Field(description="Source of the statement; empty: none was found.")

    def text(self) -> str:
        """The statement as one line."""
        return f"{self.server}: {self.applies}. {self.why}" + (f" [{self.source}]" if self.source else "")


class Kind(BaseModel):
    """Properties of an adapter that matter to servers.

    Attributes:
        experts: fused parameters of experts with LoRA (`gate_up_proj`, `down_proj`).
        router: routers have LoRA.
        uneven: targets have different ranks or scales.
        dora: the adapter is DoRA.
        biases: the adapter's folder has router biases that training moved.
        longer: its base needs a longer context than its own config says.
    """

    experts: frozenset[str]
    router: bool
    uneven: bool
    dora: bool
    biases: bool
    longer: bool = False

    @property
    def attention_only(self) -> bool:
        """Whether only linear layers have LoRA."""
        return not (self.experts or self.router or self.biases or self.longer)


def family_of(model: nn.Module) -> str:
    """The model_type; for the language model of a composite model that of the whole model."""
    return str(text_config(model).model_type).removesuffix("_text")


def read_kind(adapter: Path) -> Kind:
    """Read the properties from an adapter's folder.

    Raises:
        AdapterError: its config can't be read.
    """
    try:
        config = read_object(adapter / CONFIG_NAME)
        parameters = [str(name) for name in config.get("target_parameters") or ()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"adapter: {adapter / CONFIG_NAME} can't be read: {error}") from error
    experts = [name for name in parameters if "experts" in name.split(".")]
    return Kind(
        experts=frozenset(name.rpartition(".")[2] for name in experts),
        router=len(experts) < len(parameters),
        uneven=bool(config.get("rank_pattern") or config.get("alpha_pattern")),
        dora=bool(config.get("use_dora")),
        biases=(adapter / ROUTER_BIAS).is_file(),
        longer=(adapter / ROPE_FILE).is_file(),
    )


def statements(model_type: str, kind: Kind) -> list[Statement]:
    """For each server, what is known about an adapter of this kind on this family."""
    found = [_transformers(kind), vllm(model_type, kind), _sglang(kind), _llama_cpp(kind), _ollama(model_type, kind)]
    if kind.longer:
        why = f"the base needs the longer context in {ROPE_FILE}, which no server reads: merge first"
        return [each.model_copy(update={"applies": "no", "why": why, "source": "our own file"}) for each in found]
    if not kind.biases:
        return found
    why = f"no server reads {ROUTER_BIAS}, the router biases that training moved: merge first"
    return [each.model_copy(update={"applies": "no", "why": why, "source": "our own file"}) for each in found]


def card_section(model_type: str, adapter: Path) -> str:
    """The statements as Markdown, for the README.md of an adapter's folder."""
    lines = [f"- {each.text()}" for each in statements(model_type, read_kind(adapter))]
    return "\n".join(["", "## Servers that apply this adapter", "", *lines, ""])


def _transformers(kind: Kind) -> Statement:
    return Statement(
        server="transformers serve", applies="yes",
        why="AutoModelForCausalLM.from_pretrained(ADAPTER) gives exactly PEFT's logits, as a test asserts; the server "
        "itself was not run",
        source="transformers 5.23, peft 0.21.2",
    )  # fmt: skip


def vllm(model_type: str, kind: Kind) -> Statement:
    """What is known about vLLM and an adapter of this kind on this family."""

    def said(applies: Applies, why: str, source: str) -> Statement:
        return Statement(server="vLLM", applies=applies, why=why, source=source)

    if kind.dora:
        return said("no", "it refuses DoRA", _VLLM_HELPER)
    if kind.uneven:
        return said("no", "it reads one rank and one alpha for all targets; this adapter has several", _VLLM_HELPER)
    if model_type not in _VLLM_LORA:
        return said("unknown", "no source says whether its class for this family accepts LoRA", "")
    if kind.router:
        return said("unknown", "no source says whether it applies LoRA on routers", "")
    if not kind.experts:
        return said("yes", "LoRA on attention (`--enable-lora`)", _VLLM_LORA[model_type])
    if kind.experts != {"gate_up_proj", "down_proj"}:
        return said("no", "for fused experts it asserts LoRA on both gate_up_proj and down_proj", _VLLM)
    if model_type not in _VLLM_FUSED:
        return said(
            "unknown", "no source says whether its class for this family accepts PEFT's fused experts under these "
            "names; if not, the base answers requests, with a line in the debug log", _VLLM,
        )  # fmt: skip
    fused, source = _VLLM_FUSED[model_type]
    if fused:
        return said("yes", "PEFT's fused experts, unchanged from disk", f"{source}; {_VLLM}")
    return said(
        "with settings", "its class accepts one LoRA per expert; PEFT's fused form needs "
        "enable_mixed_moe_lora_format=True and is_3d_lora_weight=True in the LoRARequest", f"{source}; {_VLLM}",
    )  # fmt: skip


def _sglang(kind: Kind) -> Statement:
    if kind.attention_only:
        return Statement(server="SGLang", applies="unknown", why="not looked up per family", source="")
    return Statement(
        server="SGLang", applies="unknown",
        why="it serves LoRA on experts (FusedMoEWithLoRA); no source says whether it reads PEFT's fused form",
        source="sgl-project/sglang#14105",
    )  # fmt: skip


def _llama_cpp(kind: Kind) -> Statement:
    why = "its adapter converter was not tried on PEFT's fused experts" if kind.experts else "not tried"
    return Statement(server="llama.cpp --lora", applies="unknown", why=f"{why}; only a merged GGUF is verified here",
                     source="")  # fmt: skip


def _ollama(model_type: str, kind: Kind) -> Statement:
    def said(applies: Applies, why: str) -> Statement:
        return Statement(server="Ollama ADAPTER", applies=applies, why=why, source=_OLLAMA)

    if kind.experts or kind.router:
        return said("no", "its converter only knows names of attention and dense MLPs")
    if model_type in ("llama", "mixtral", "gemma2"):
        return said("unknown", "its converter accepts this architecture's attention; not tried")
    return said("no", "its converter refuses any architecture but llama's and Gemma 2's")
