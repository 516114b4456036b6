"""`loader: unsloth`: Unsloth's FastModel behind what `stages` and the recipes expect of transformers' and PEFT's.

Its calls change what they were asked for where it sees fit, and say so in a print at most (another dtype, no 4-bit
without bitsandbytes, whole matrices instead of LoRA on the head). So everything is read off the model afterwards, and
a job whose model is not as asked does not begin.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.experts.adapters import Adapted, add_lora
from llama_stack_provider_moe.experts.layout import ExpertLayout, decoder_layers, find_layout, text_config
from llama_stack_provider_moe.experts.quantize import QuantizeReport, linear_layers
from llama_stack_provider_moe.experts.settings import ResolvedMoe, resolve_moe
from llama_stack_provider_moe.spec import TrainingSpec
from llama_stack_provider_moe.training.capture import Blocks
from llama_stack_provider_moe.training.loader import DTYPES, model_config, trusted

CHECKED_TOKENS = 16
# Of the largest state: two passes over the same weights in the same order differ by nothing on a CPU; on a GPU a
# compiled head and one that is not may round apart, by a half-precision number's last place or two.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}


def load(spec: TrainingSpec, device: torch.device) -> tuple[PreTrainedModel, ExpertLayout | None]:
    """The model on `device`, its linear layers (and experts) in 4 bits where asked, and where its experts are.

    Raises:
        ModelError: Unsloth can't load it, or loaded something else than was asked for.
        LayoutError: see `find_layout`.
    """
    from unsloth import FastModel  # by now it has been imported, see `unsloth_entry`

    assert spec.adapter is not None, "checked at the door"
    config = model_config(spec.model)
    layout = _blank_layout(config)
    four_bits = spec.adapter.quantize_base
    try:
        model, _ = FastModel.from_pretrained(
            spec.model,
            max_seq_length=spec.options.max_length,
            dtype=DTYPES[spec.training.dtype],
            load_in_4bit=four_bits,
            load_in_16bit=not four_bits and spec.training.dtype != "fp32",
            use_exact_model_name=True,  # not a repository of Unsloth's own that it holds for the same
            device_map={"": device},
            trust_remote_code=trusted(spec.model),
            use_gradient_checkpointing=False,  # the trainer asks for transformers' own, not reentrant
            random_state=spec.options.seed,
        )
    except (OSError, ValueError, RuntimeError, ImportError, NotImplementedError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"model: Unsloth can't load {spec.model!r} here: {type(error).__name__}: {text}") from error
    _check_loaded(model, config, spec, device)
    return model, layout


def resolve(spec: TrainingSpec, layout: ExpertLayout | None) -> ResolvedMoe:
    """What runs of the `moe` block: nothing beside the model's own experts, by Unsloth's kernels."""
    resolved = resolve_moe(spec.moe, layout, full=False)
    if layout is None:
        return resolved
    return replace(
        resolved, output_router_logits=False, aux_coef=0.0, own_aux=False, train_router=False,
        experts_implementation="unsloth", notes=("routing is not recorded (loader unsloth)",),
    )  # fmt: skip


def quantized(spec: TrainingSpec, model: PreTrainedModel, layout: ExpertLayout | None) -> QuantizeReport | None:
    """What is in 4 bits; all that our own quantising would have put so must be.

    Raises:
        ModelError: some of it is not.
    """
    if spec.adapter is None or not spec.adapter.quantize_base:
        return None
    plain = [name for _, name, layer in linear_layers(model, layout) if not isinstance(layer, Linear4bit)]
    coded = sum(isinstance(module, Linear4bit) for module in model.modules())
    experts = [] if layout is None else [
        (name, parameter) for name, parameter in model.named_parameters()
        if any(name.startswith(layout.path(layer, f"{layout.experts_path}.")) for layer in layout.moe_layers)
    ]  # fmt: skip
    plain += [name for name, parameter in experts if parameter.dtype != torch.uint8]
    if coded == 0 or plain:
        raise ModelError(
            f"adapter.quantize_base: Unsloth left {len(plain)} weights as they are ({', '.join(plain[:3])}), with "
            f"{coded} linear layers in 4 bits; expected all"
        )
    before = sum(_whole_bytes(parameter, DTYPES[spec.training.dtype]) for parameter in model.parameters())
    after = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return QuantizeReport(4, len(experts), coded, before, after)


def adapt(spec: TrainingSpec, model: PreTrainedModel, layout: ExpertLayout | None, resolved: ResolvedMoe) -> Adapted:
    """LoRA by FastModel.get_peft_model, at exactly the places where PEFT would put it; checked as PEFT's is.

    Raises:
        AdapterError: see `add_lora`; or switching the adapter off does not give the base.
    """
    from unsloth import FastModel

    assert spec.adapter is not None, "checked at the door"

    def put(base: nn.Module, config: LoraConfig) -> PeftModel:
        wrapped: PeftModel = FastModel.get_peft_model(
            base,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=sorted(config.target_modules or ()),
            target_parameters=config.target_parameters or [],
            use_rslora=config.use_rslora,
            use_gradient_checkpointing=False,
            random_state=spec.options.seed,
        )
        return wrapped

    set_seed(spec.options.seed)
    adapted = add_lora(model, spec.adapter, layout, resolved, put)
    off_is_base(adapted.model, spec.training.dtype)
    return adapted


def states_are_the_models(model: Any, targets: Collection[int], dtype: str) -> None:
    """Compare what hooks take from the blocks `targets` with the hidden states that the model itself gives out.

    Raises:
        ModelError: they differ, or a block gives nothing: a circuit breaker would reroute something else.
    """
    ids_BT, mask_BT = _some_tokens(model)
    with torch.no_grad():
        taken = Blocks(model).states(targets, ids_BT, mask_BT)
        own = model(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True, use_cache=False).hidden_states
    depth = len(decoder_layers(model)[1])
    for block in sorted(targets):
        if block not in taken or own is None:
            raise ModelError(f"circuit_breaker: Unsloth's model gives no hidden states of block {block}")
        if block == depth - 1:
            continue  # the last one is given out behind the final norm
        gap = _gap(taken[block], own[block + 1], mask_BT)
        if not gap <= TOLERANCE[dtype]:  # NaN is not
            raise ModelError(
                f"circuit_breaker: what a hook takes from block {block} of Unsloth's model differs from its hidden "
                f"state by {gap:.2g} of the largest; expected at most {TOLERANCE[dtype]:g}"
            )


def off_is_base(model: PeftModel, dtype: str) -> None:
    """The reference of DPO and of circuit breakers: with the adapter off, the base's states; with it on, others.

    A fresh adapter adds nothing, so one that is seen to add something is put in for the time of the check.

    Raises:
        AdapterError: it is not so.
    """
    blocks, (ids_BT, mask_BT) = Blocks(model), _some_tokens(model)
    last = len(blocks.layers) - 1
    moved = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_B" in name]
    training = model.training
    model.eval()

    def states() -> Tensor:
        return blocks.states([last], ids_BT, mask_BT)[last]

    with torch.no_grad():
        base = states()
        for parameter in moved:
            parameter.fill_(0.02)
        on = states()
        with model.disable_adapter():
            off = states()
        for parameter in moved:
            parameter.zero_()
        again = states()
    model.train(training)
    tolerance = TOLERANCE[dtype]
    gaps = {"the adapter off": _gap(off, base, mask_BT), "a fresh adapter": _gap(again, base, mask_BT)}
    wrong = [f"{what} is {gap:.2g} from the base" for what, gap in gaps.items() if not gap <= tolerance]
    if not (effect := _gap(on, base, mask_BT)) > max(gaps.values()):
        wrong.append(f"an adapter that adds something moves nothing ({effect:.2g})")
    if wrong:
        raise AdapterError(f"loader: 'unsloth' does not run LoRA as PEFT does: {'; '.join(wrong)}")


def _gap(one: Tensor, other: Tensor, mask_BT: Tensor) -> float:
    here = mask_BT.bool()
    one, other = one.float()[here], other.float()[here]
    return float((one - other).abs().max() / other.abs().max())


def _some_tokens(model: Any) -> tuple[Tensor, Tensor]:
    """Two rows of tokens, the second with padding behind it: (batch, sequence), and the mask."""
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BT = (torch.arange(2 * CHECKED_TOKENS, device=device) * 7 % vocabulary).view(2, CHECKED_TOKENS)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, CHECKED_TOKENS // 2 :] = 0
    return ids_BT, mask_BT


def _blank_layout(config: PreTrainedConfig) -> ExpertLayout | None:
    """Where experts are, by a model without weights: Unsloth's own may hold them packed."""
    with torch.device("meta"):
        return find_layout(AutoModelForCausalLM.from_config(config))


def _check_loaded(model: PreTrainedModel, config: PreTrainedConfig, spec: TrainingSpec, device: torch.device) -> None:
    asked = DTYPES[spec.training.dtype]
    others = sorted({
        str(parameter.dtype) for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.dtype not in (asked, torch.float32)
    })  # fmt: skip
    if model.dtype != asked or others:
        raise ModelError(
            f"training.dtype: Unsloth loaded {spec.model!r} as {model.dtype} {others or ''}, not as {asked}: this "
            "machine, or this family, has no other there; expected the dtype that it takes"
        )
    if away := sorted({str(parameter.device) for parameter in model.parameters()} - {str(device)}):
        raise ModelError(f"model: Unsloth put weights of {spec.model!r} on {', '.join(away)}, not on {device}")
    here, there = text_config(model), config.get_text_config()
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        if getattr(here, name, None) != getattr(there, name, None):
            raise ModelError(
                f"model: Unsloth loaded {spec.model!r} with {name} {getattr(here, name, None)!r}, which its "
                f"config.json has as {getattr(there, name, None)!r}"
            )


def _whole_bytes(parameter: Tensor, dtype: torch.dtype) -> int:
    """Of the weight as it was before it was put in 4 bits: two to a byte."""
    if parameter.dtype == torch.uint8:
        return parameter.numel() * 2 * dtype.itemsize
    return parameter.numel() * parameter.element_size()
