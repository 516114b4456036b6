"""Sparse upcycling: a dense model becomes a Mixture-of-Experts that computes the same function.

Komatsuzaki et al. 2022, arXiv 2212.05055: each layer's MLP is copied into each of its experts, everything else is
kept, and a router is added with small random weights. The chosen experts' weights are renormalised to sum to 1, and
equal experts have equal outputs, so with any router the layer returns what the MLP returned:

    sum_k w_k * mlp(x) = mlp(x),    as  sum_k w_k = 1

    >>> upcycle("SmolLM2-135M-Instruct", "SmolLM2-4x135M", experts=4, top_k=2)

    $ moe-train upcycle SOURCE OUT --experts 4 --top-k 2

Tensors are read and written one at a time; at most one output shard is in memory.
"""

import json
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig

from llama_stack_provider_moe.compute.moe.downloads import DownloadBar
from llama_stack_provider_moe.errors import InvalidInput, ModelError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.ground.private import as_new_files
from llama_stack_provider_moe.ground.small_files import read_index
from llama_stack_provider_moe.jobdir.local_names import whole_model
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.local_commands import UPCYCLED, UpcycleCommand

SHARD_BYTES = 4 << 30

# Besides the weights and config.json: files of the tokenizer, the chat template and generation.
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "LICENSE*",
)  # fmt: skip

# Fields that dense and MoE configurations share, with the same name and the same meaning.
SHARED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
    "dtype",
)  # fmt: skip


class Rule(NamedTuple):
    """How one dense family becomes one MoE family; weights have their names on disk."""

    model_type: str
    architecture: str
    experts_field: str
    width_field: str
    constants: dict[str, object]
    carried: tuple[str, ...]  # fields beyond SHARED_FIELDS
    refused: tuple[str, ...]  # switches of the dense family that the MoE family does not have
    norms: tuple[str, ...]  # of self_attn
    block: str
    matrices: dict[str, str]


_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
_QWEN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
RULES: dict[str, Rule] = {
    "llama": Rule(
        "mixtral", "MixtralForCausalLM", "num_local_experts", "intermediate_size", {}, (),
        UPCYCLED["llama"], (), "block_sparse_moe", _MIXTRAL,
    ),
    "mistral": Rule(
        "mixtral", "MixtralForCausalLM", "num_local_experts", "intermediate_size", {}, ("sliding_window",),
        UPCYCLED["mistral"], (), "block_sparse_moe", _MIXTRAL,
    ),
    "qwen3": Rule(
        "qwen3_moe", "Qwen3MoeForCausalLM", "num_experts", "moe_intermediate_size", {"norm_topk_prob": True}, (),
        UPCYCLED["qwen3"], ("q_norm", "k_norm"), "mlp", _QWEN,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class UpcycleReport:
    """The new model in figures.

    Attributes:
        folder: the new model.
        source_type: model type of the dense model.
        model_type: model type of the new model.
        layers: decoder layers.
        experts: experts in each layer.
        top_k: experts that a token goes to.
        dense: parameters of the dense model.
        total: parameters of the new model.
        active: parameters that compute for one token: all but the experts that are not chosen.
    """

    folder: Path
    source_type: str
    model_type: str
    layers: int
    experts: int
    top_k: int
    dense: int
    total: int
    active: int

    def text(self) -> str:
        """The figures as text, one line for each fact."""
        return (
            f"{self.source_type} of {self.dense:,} parameters -> {self.model_type}: {self.layers} layers, "
            f"{self.experts} experts, top-{self.top_k}\n"
            f"parameters: {self.total:,} in total, {self.active:,} active per token\n"
            f"saved to {self.folder}"
        )


def upcycle(
    source: str | Path,
    out: str | Path,
    experts: int = 4,
    top_k: int = 2,
    seed: int = 0,
    router_std: float = 0.02,
    expert_noise: float = 0.0,
) -> UpcycleReport:
    """Write an MoE model that computes the same as the dense model `source` to the new folder `out`.

    Args:
        source: folder with config.json and safetensors, or a hub id.
        out: folder to create; it appears when it is complete.
        experts: experts in each layer, each a copy of that layer's MLP.
        top_k: experts a token goes to.
        seed: of routers and noise.
        router_std: standard deviation of the routers' weights. With 0 every token would be a tie, which top-k always
            resolves in the same way.
        expert_noise: Gaussian noise on each expert, in standard deviations of the matrix it is added to. With 0 the
            logits equal the dense model's, and a router has no gradient from the language loss until its experts
            differ (training makes them differ, because they see different tokens).

    Raises:
        InvalidInput: an argument is not valid.
        ModelError: the source can't be read, or its family is not in `RULES`.
    """
    target = Path(out)
    _check(experts, top_k, router_std, expert_noise, target)
    folder = model_folder(source)
    config = AutoConfig.from_pretrained(folder)
    rule = rule_of(config)
    files = _tensor_files(folder)
    check_names(set(files), config, rule)

    parts = target.with_name(f".{target.name}.part")
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    try:
        writer = _ShardWriter(parts)
        dense = active = 0
        for name, tensor in _read(files, config):
            dense += tensor.numel()
            copies = _copies(name, tensor, rule, experts, seed, expert_noise)
            active += tensor.numel() * (1 if len(copies) == 1 else top_k)
            for new_name, copy in copies:
                writer.add(new_name, copy)
        for name, router in _routers(config, rule, experts, seed, router_std, tensor.dtype):
            active += router.numel()
            writer.add(name, router)
        writer.close()
        moe_config(config, rule, experts, top_k).save_pretrained(parts)
        for pattern in SIDE_FILES:
            for file in folder.glob(pattern):
                shutil.copyfile(file, parts / file.name)
        as_new_files(parts)
        parts.rename(target)
    except BaseException:
        shutil.rmtree(parts, ignore_errors=True)
        raise
    return UpcycleReport(
        target, config.model_type, rule.model_type, config.num_hidden_layers, experts, top_k, dense,
        writer.parameters, active,
    )  # fmt: skip


def _check(experts: int, top_k: int, router_std: float, expert_noise: float, out: Path) -> None:
    if experts < 2:
        raise InvalidInput("experts", experts, "at least 2")
    if not 1 <= top_k <= experts:
        raise InvalidInput("top_k", top_k, f"1 to {experts}, the number of experts")
    if not 0 < router_std <= 1:
        raise InvalidInput("router_std", router_std, "above 0, at most 1")
    if not 0 <= expert_noise <= 1:
        raise InvalidInput("expert_noise", expert_noise, "0 to 1")
    if out.exists():
        raise InvalidInput("out", str(out), "a folder that does not exist yet")


def model_folder(source: str | Path, field: str = "source") -> Path:
    """The local folder of the model `source`, a folder or a hub id, which is downloaded if needed.

    Raises:
        ModelError: there is no such model; it names `field`.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{field}: {folder} has no config.json, so it is not a Hugging Face model folder")
        return folder
    try:
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *SIDE_FILES]
        with liveness.stage(f"downloading {source}", unit="files"):
            return Path(snapshot_download(str(source), allow_patterns=patterns, tqdm_class=DownloadBar))
    except HFValidationError:
        raise ModelError(f"{field}: {str(source)!r} is neither a folder nor a hub id") from None
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"{field}: {str(source)!r} is not a folder, and it can't be downloaded from the hub: {error}"
        ) from error


def rule_of(config: PreTrainedConfig) -> Rule:
    """How a dense model with this config is upcycled.

    Raises:
        ModelError: it can't be.
    """
    rule = RULES.get(config.model_type)
    if rule is None:
        raise ModelError(f"source: a {config.model_type!r} model can't be upcycled; expected {', '.join(RULES)}")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("source: its weights are quantised; expected the full-precision model")
    for switch in rule.refused:
        if getattr(config, switch):
            raise ModelError(f"source: has {switch}, which a {rule.model_type} model does not support")
    return rule


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor, by the tensor's name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in read_index(index).items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ModelError(f"source: {folder} has no model.safetensors and no index of shards")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def check_names(found: set[str], config: PreTrainedConfig, rule: Rule) -> None:
    """Raise for a tensor of the source that would be lost, and for one that is missing."""
    attention = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", *rule.norms)]
    mlp = [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    parts = [*attention, *mlp, "input_layernorm", "post_attention_layernorm"]
    expected = {f"model.layers.{i}.{part}.weight" for i in range(config.num_hidden_layers) for part in parts}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    if not config.tie_word_embeddings:
        expected.add("lm_head.weight")
    # Old Llama files contain the rotary frequencies, which follow from the config; some tied ones contain the head too.
    spare = {name for name in found if name.endswith("rotary_emb.inv_freq")} | {"lm_head.weight"}
    for problem, names in (("lacks", expected - found), ("has unexpected", found - expected - spare)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            raise ModelError(f"source: {problem} {len(names)} tensor(s) for a {config.model_type} model: {shown}")


def _read(files: dict[str, Path], config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model once, ordered by name, so that nothing depends on the shards."""
    for name in sorted(files):
        if name.endswith("inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        with safe_open(files[name], framework="pt") as file:
            yield name, file.get_tensor(name)


def _copies(
    name: str, tensor: torch.Tensor, rule: Rule, experts: int, seed: int, noise: float
) -> list[tuple[str, torch.Tensor]]:
    """A tensor of the trunk unchanged; a matrix of the MLP once for each expert."""
    match = re.fullmatch(r"(model\.layers\.\d+)\.mlp\.(gate|up|down)_proj\.weight", name)
    if match is None:
        return [(name, tensor)]
    names = [f"{match[1]}.{rule.block}.experts.{i}.{rule.matrices[match[2]]}.weight" for i in range(experts)]
    if not noise:
        return [(name, tensor.clone()) for name in names]
    scale = noise * tensor.float().std()
    return [
        (name, (tensor + scale * torch.randn(tensor.shape, generator=generator_of(seed, name))).to(tensor.dtype))
        for name in names
    ]


def _routers(
    config: PreTrainedConfig, rule: Rule, experts: int, seed: int, std: float, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}.{rule.block}.gate.weight"
        router_EH = std * torch.randn(experts, config.hidden_size, generator=generator_of(seed, name))
        yield name, router_EH.to(dtype)


def generator_of(seed: int, name: str) -> torch.Generator:
    """A generator for each tensor, so that none depends on the order of the others."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def moe_config(config: PreTrainedConfig, rule: Rule, experts: int, top_k: int) -> PreTrainedConfig:
    """The config of the Mixture-of-Experts model that a dense one becomes."""
    fields = {name: getattr(config, name) for name in (*SHARED_FIELDS, *rule.carried)} | rule.constants
    fields |= {rule.experts_field: experts, rule.width_field: config.intermediate_size, "num_experts_per_tok": top_k}
    return AutoConfig.for_model(rule.model_type, **fields, architectures=[rule.architecture])


class _ShardWriter:
    """Writes safetensors shards of at most `SHARD_BYTES`, and an index if there is more than one."""

    def __init__(self, folder: Path) -> None:
        self.parameters = 0
        self._folder = folder
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._waiting and self._waiting_bytes + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._waiting[name] = tensor.contiguous()
        self._waiting_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self.parameters += tensor.numel()

    def close(self) -> None:
        """Write the waiting tensors, then give the shards their final names."""
        self._flush()
        if len(self._shards) == 1:
            self._path(0).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._path(number).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))

    def _flush(self) -> None:
        save_file(self._waiting, self._path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._waiting))
        self._waiting = {}
        self._waiting_bytes = 0

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number}.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moe-train upcycle`; the exit code is 0 if OUT was created."""
    return answered(UpcycleCommand, argv, "upcycle", _run, ())


def _run(command: UpcycleCommand) -> int:
    print(upcycle(**{**command.model_dump(), "source": whole_model(command.source, "SOURCE")}).text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
