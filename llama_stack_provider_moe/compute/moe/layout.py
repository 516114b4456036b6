"""`ExpertLayout`: where the experts and routers of a model are, and how many; `derive.find_layout` makes it."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llama_stack_provider_moe.compute.moe.scoring import Scoring, Weighing
from llama_stack_provider_moe.errors import LayoutError

DEFAULT_AUX_COEF = 0.001
LISTS = ("layers", "h")  # names of a list of decoder layers
GATE_UP = "gate_up_proj"
UP = "up_proj"
DOWN = "down_proj"

if TYPE_CHECKING:

    class ExpertsModule(nn.Module):
        """Attributes of the experts modules of transformers that this package reads; for annotations only."""

        num_experts: int
        has_gate: bool
        has_bias: bool
        is_transposed: bool
        has_post_expert_norm: bool
        down_proj: nn.Parameter
        act_fn: Callable[[Tensor], Tensor]
        post_expert_norm: Callable[[Tensor], Tensor]
        alpha: float  # gpt-oss
        limit: float  # gpt-oss
        expert_dropout: nn.Dropout  # added by `dropout`

        def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


# The linear layers of an MLP, as most families name them.
SPLIT_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class ExpertLayout:
    """Where the experts of one model are.

    `layers_path` is relative to the model; all other paths are relative to a decoder layer, where "" is the layer.

    Attributes:
        family: the model's class, without what it is for.
        model_type: of the language model.
        dense_layers: layers without experts.
        num_experts: E, the routed experts of a layer.
        top_k: K, choices per token.
        shared_path: the experts that see every token.
        block: the module that holds router and experts.
        router_weight: the matrix of the logits, relative to the router.
        gate_up: name of the up projection, with the gate where experts have one.
        transposed: gate_up (E, H, 2I) and down (E, I, H); else (E, 2I, H) and (E, H, I).
        biased: the experts have biases.
        scoring: how the router turns logits into scores.
        logits_at: position of the logits in the output of a router.
        chosen_at: position of the chosen experts; if the output has none, they are the top-k of the logits.
        idle_choices: choices beyond the experts that compute nothing (LongCat's zero-compute experts).
        by_token_layers: layers in which a token's id fixes its experts (DeepSeek-V4's hash layers).
        aux_loss: the model computes a balance loss itself.
        grouped_mm: its experts are decorated with `use_experts_implementation`.
        experts_class: class of the experts modules.
        own_gate: experts define `_apply_gate` themselves and have no `act_fn`.
        needs_num_experts: TRL 1.16 reads `config.num_experts`, which this config has under another name.
        peft_renames_mlp: peft 0.21 takes `target_modules` ending in gate_proj, up_proj or down_proj for experts, so
            shared and dense layers are named as parameters.
        frozen: parameters that no optimiser may change.
        bias_path: added to the scores when experts are chosen, not to their weights (arXiv 2412.19437, eq. 16).
        groups, groups_chosen: groups of experts, and how many of them a token may use (arXiv 2412.19437, 2.1.2).
        dense_mlps: full names of the MLPs beside shared experts: in layers without experts, and beside experts.
        weighing: what the weights of the chosen experts depend on, see `scoring.Weighing`.
    """

    family: str
    model_type: str
    layers_path: str
    moe_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    shared_experts: int
    shared_path: str | None
    block: str
    router_path: str
    router_weight: str
    experts_path: str
    gate_up: str
    down: str
    transposed: bool
    biased: bool
    scoring: Scoring
    logits_at: int
    chosen_at: int
    idle_choices: int
    by_token_layers: tuple[int, ...]
    aux_loss: bool
    default_aux_coef: float
    grouped_mm: bool
    experts_class: str
    own_gate: bool
    needs_num_experts: bool
    peft_renames_mlp: bool
    frozen: tuple[str, ...]
    bias_path: str | None
    groups: int
    groups_chosen: int
    dense_mlps: tuple[str, ...]
    weighing: Weighing

    @property
    def choices(self) -> int:
        """What a router chooses among: the experts, and choices that compute nothing."""
        return self.num_experts + self.idle_choices

    def routers(self, model: nn.Module) -> dict[int, nn.Module]:
        """The router of each MoE layer, without an adapter around it."""
        return {layer: self.submodule(model, layer, self.router_path) for layer in self.moe_layers}

    def experts(self, model: nn.Module) -> "dict[int, ExpertsModule]":
        """The module with the fused experts of each MoE layer, without an adapter around it."""
        found = {layer: self.submodule(model, layer, self.experts_path) for layer in self.moe_layers}
        return cast("dict[int, ExpertsModule]", found)

    def biases(self, model: nn.Module) -> dict[int, Tensor]:
        """The bias of each MoE layer that only affects the choice of experts; empty if the family has none."""
        if self.bias_path is None:
            return {}
        parent, _, name = self.bias_path.rpartition(".")
        return {
            layer: getattr(self.submodule(model, layer, parent), name)
            for layer in self.moe_layers
            if layer not in self.by_token_layers
        }

    def submodule(self, model: nn.Module, layer: int, below: str) -> nn.Module:
        """The module at `below` in decoder layer `layer`, without an adapter around it."""
        return find_module(self._layer(model, layer), below)

    def path(self, layer: int, below: str) -> str:
        """Full name of `below` in decoder layer `layer`, in the model without adapters."""
        return join(self.layers_path, str(layer), below)

    def text(self) -> str:
        """The layout as one line for the start of a job's log."""
        shared = f", {self.shared_experts} shared" if self.shared_experts else ""
        dense = f"; dense layers {layer_ranges(self.dense_layers)}" if self.dense_layers else ""
        return (
            f"{self.family} ({self.model_type}): {self.num_experts} experts{shared}, top-{self.top_k}, "
            f"in layers {layer_ranges(self.moe_layers)}{dense}"
        )

    def as_json(self) -> dict[str, object]:
        """The layout for `resolved.json`."""
        return asdict(self)

    def _layer(self, model: nn.Module, layer: int) -> nn.Module:
        module: nn.Module = without_adapters(model).get_submodule(f"{self.layers_path}.{layer}")
        return module


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The config of the language model, also if it is part of a composite one."""
    return without_adapters(model).config.get_text_config()


def without_adapters(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers of the language model: the one list with the name and the length of them.

    The config gives the length. The name is `layers`, or `h` in GPT-2 and the dense families that came from it.

    Raises:
        LayoutError: there is none, or more than one.
    """
    # Not `get_decoder()`: transformers 5.23 returns the whole model for Llama 4.
    model, config = without_adapters(model), text_config(model)
    # In LongCat a layer counts twice in `num_hidden_layers`, because it has two attentions.
    wanted = {config.num_hidden_layers, getattr(config, "num_layers", None)}
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in LISTS and len(module) in wanted
        and isinstance(_owner(model, name).config, type(config))
    ]  # fmt: skip
    if len(lists) != 1:
        raise LayoutError(
            f"{config.model_type}: expected one list of {config.num_hidden_layers} decoder layers named "
            f"{' or '.join(map(repr, LISTS))}, found {[name for name, _ in lists] or 'none'}"
        )
    return lists[0]


def _owner(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost model of transformers that contains the module `name`."""
    owner: nn.Module = model
    found = model
    for part in name.split("."):
        owner = owner.get_submodule(part)
        found = owner if isinstance(owner, PreTrainedModel) else found
    return found


def outside_text(model: nn.Module) -> set[str]:
    """Names of the parameters of a composite model that are not part of its language model; else empty."""
    base = without_adapters(model)
    if text_config(base) is base.config:
        return set()
    path, _ = decoder_layers(base)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    inside = [base.get_submodule(path.rpartition(".")[0]), *(each for each in ends if each is not None)]
    ours = {id(parameter) for module in inside for parameter in module.parameters()}
    return {name for name, parameter in base.named_parameters() if id(parameter) not in ours}


def find_module(module: nn.Module, path: str) -> nn.Module:
    """The module at `path`; adapters may wrap any module on the way."""
    for part in path.split(".") if path else ():
        module = bare(bare(module).get_submodule(part))
    return module


def bare(module: nn.Module) -> nn.Module:
    """The module without an adapter around it."""
    if isinstance(module, BaseTunerLayer):
        inside: nn.Module = module.get_base_layer()
        return inside
    return module


def bare_name(name: str) -> str:
    """The name of a module or parameter in the model without adapters."""
    return name.replace(".base_layer", "")


def join(*parts: str) -> str:
    """A path of the parts that are not empty.

    >>> join("model.layers", "3", "", "experts")
    'model.layers.3.experts'
    """
    return ".".join(part for part in parts if part)


def layer_ranges(numbers: Iterator[int] | tuple[int, ...] | list[int]) -> str:
    """`0, 2-5`; `none` if empty."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
