"""`loader: unsloth`: load and adapt a model with Unsloth's FastModel (see `models.backend`).

Unsloth sometimes does something else than its caller asks for, and at most prints a line about it: another dtype, no
4-bit without bitsandbytes, whole matrices instead of LoRA on the head. So this module checks the model afterwards, and
a job whose model is not as requested fails before it trains.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch._dynamo.callback import on_compile_end, on_compile_start
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed

from llama_stack_provider_moe.compute.models.hidden_states import Blocks
from llama_stack_provider_moe.compute.models.loader import DTYPES, load_tokenizer, model_config, pick_device, trusted
from llama_stack_provider_moe.compute.models.prepare import Base, has_conversations, repeatable
from llama_stack_provider_moe.compute.moe.adapters import Adapted, add_lora
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout, decoder_layers, text_config
from llama_stack_provider_moe.compute.moe.quantize import QuantizeReport, linear_layers
from llama_stack_provider_moe.compute.moe.resolve_settings import ResolvedMoe, ShippedConfig, resolve_moe
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.compute.runtime.library_signs import transformers_counts
from llama_stack_provider_moe.errors import AdapterError, ModelError
from llama_stack_provider_moe.ground import liveness
from llama_stack_provider_moe.spec import DType, TrainingSpec

CHECKED_TOKENS = 16
# A share of the largest state. On a CPU two passes over the same weights in the same order are equal. On a GPU a
# compiled head may round differently from one that is not compiled, by a half-precision number's last place or two.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 4e-3}


def load_base(session: AnySession) -> Base:
    """Load the tokenizer and the model, and decide what applies to it."""
    spec = session.spec
    repeatable(spec.options.deterministic)
    device = pick_device(spec.training.dtype, session.peers.local_rank)
    tokenizer = load_tokenizer(spec, has_conversations(session))
    model, layout = load(spec, device)
    resolved = resolve(spec, layout)
    coded = quantized(spec, model, layout)
    return Base(model, tokenizer, device, layout, resolved, ShippedConfig(text_config(model), {}), None, coded)


def load(spec: TrainingSpec, device: torch.device) -> tuple[PreTrainedModel, ExpertLayout | None]:
    """Load the model on `device`, its linear layers and experts in 4 bits if asked, and find its experts.

    Raises:
        ModelError: Unsloth can't load the model, or loaded something else than the job asks for.
        LayoutError: see `find_layout`.
    """
    from unsloth import FastModel  # already imported, see `unsloth.entry`

    assert spec.adapter is not None, "the server checked it"
    config = model_config(spec.model)
    layout = _blank_layout(config)
    four_bits = spec.adapter.quantize_base
    # The first passes compile kernels, one graph after the other, which takes minutes.
    for register in (on_compile_start, on_compile_end):
        register(_compiles)
    try:
        with liveness.stage("loading by Unsloth", unit="files"), transformers_counts():
            model, _ = FastModel.from_pretrained(
                spec.model,
                max_seq_length=spec.options.max_length,
                dtype=DTYPES[spec.training.dtype],
                load_in_4bit=four_bits,
                load_in_16bit=not four_bits and spec.training.dtype != "fp32",
                use_exact_model_name=True,  # otherwise Unsloth may load its own copy of the model from the hub
                device_map={"": device},
                trust_remote_code=trusted(spec.model),
                use_gradient_checkpointing=False,  # the trainer uses transformers' own, not reentrant
                random_state=spec.options.seed,
            )
    except (OSError, ValueError, RuntimeError, ImportError, NotImplementedError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"model: Unsloth can't load {spec.model!r} here: {type(error).__name__}: {text}") from error
    _check_loaded(model, config, spec, device)
    return model, layout


def _compiles(_: object) -> None:
    liveness.alive()


def resolve(spec: TrainingSpec, layout: ExpertLayout | None) -> ResolvedMoe:
    """What applies of the `moe` block: only the model's experts, with Unsloth's kernels."""
    resolved = resolve_moe(spec.moe, layout, full=False)
    if layout is None:
        return resolved
    return replace(
        resolved, output_router_logits=False, aux_coef=0.0, own_aux=False, train_router=False,
        experts_implementation="unsloth", notes=("routing is not recorded (loader unsloth)",),
    )  # fmt: skip


def quantized(spec: TrainingSpec, model: PreTrainedModel, layout: ExpertLayout | None) -> QuantizeReport | None:
    """Report what is in 4 bits, and check that it is all that this project would quantise.

    Raises:
        ModelError: some weights are not in 4 bits.
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
            f"adapter.quantize_base: Unsloth did not quantise {len(plain)} weights ({', '.join(plain[:3])}) and has "
            f"{coded} linear layers in 4 bits; expected all of them"
        )
    before = sum(_whole_bytes(parameter, DTYPES[spec.training.dtype]) for parameter in model.parameters())
    after = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    nested = any(module.weight.quant_state.nested for module in model.modules() if isinstance(module, Linear4bit))
    return QuantizeReport(4, nested, len(experts), coded, before, after)


def adapt(spec: TrainingSpec, model: PreTrainedModel, layout: ExpertLayout | None, resolved: ResolvedMoe) -> Adapted:
    """Add LoRA with FastModel.get_peft_model to the same weights as PEFT would, and check it in the same way.

    Args:
        spec: the job.
        model: the loaded model.
        layout: where its experts are; None for a dense model.
        resolved: what applies of the `moe` block.

    Raises:
        AdapterError: see `add_lora`; or the model with the adapter off differs from the base.
    """
    from unsloth import FastModel

    assert spec.adapter is not None, "the server checked it"

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


def require_equal_states(model: PreTrainedModel | PeftModel, targets: Collection[int], dtype: DType) -> None:
    """Compare what hooks take from the blocks `targets` with the hidden states that the model returns.

    Raises:
        ModelError: they differ, or a block returns nothing: a circuit breaker would change something else.
    """
    ids_BT, mask_BT = _some_tokens(model)
    with torch.no_grad():
        taken = Blocks(model).states(targets, ids_BT, mask_BT, whole=True)
        own = model(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True, use_cache=False).hidden_states
    depth = len(decoder_layers(model)[1])
    for block in sorted(targets):
        if block not in taken or own is None:
            raise ModelError(f"circuit_breaker: Unsloth's model returns no hidden states for block {block}")
        if block == depth - 1:
            continue  # the model returns its state only after the final norm, as number `depth`
        gap = _gap(taken[block], own[min(block + 1, depth)], mask_BT)
        if not gap <= TOLERANCE[dtype]:  # NaN is not
            raise ModelError(
                f"circuit_breaker: the state that a hook takes from block {block} of Unsloth's model differs from the "
                f"model's hidden state by {gap:.2g} of the largest; expected at most {TOLERANCE[dtype]:g}"
            )


def off_is_base(model: PeftModel, dtype: DType) -> None:
    """Check that the model with its adapter off has the base's states, and with the adapter on it has others.

    DPO and circuit breakers use the model with its adapter off as their reference. A fresh adapter adds nothing, so the
    check temporarily gives it weights that add something.

    Raises:
        AdapterError: the states are not as expected.
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
        wrong.append(f"an adapter with non-zero weights changes nothing ({effect:.2g})")
    if wrong:
        raise AdapterError(f"loader: 'unsloth' does not compute LoRA as PEFT does: {'; '.join(wrong)}")


def _gap(one: Tensor, other: Tensor, mask_BT: Tensor) -> float:
    here = mask_BT.bool()
    one, other = one.float()[here], other.float()[here]
    return float((one - other).abs().max() / other.abs().max())


def _some_tokens(model: PreTrainedModel | PeftModel) -> tuple[Tensor, Tensor]:
    """Two rows of tokens, (batch, sequence), and their mask; the second row ends with padding."""
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BT = (torch.arange(2 * CHECKED_TOKENS, device=device) * 7 % vocabulary).view(2, CHECKED_TOKENS)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, CHECKED_TOKENS // 2 :] = 0
    return ids_BT, mask_BT


def _blank_layout(config: PreTrainedConfig) -> ExpertLayout | None:
    """Where the experts are, in a model without weights: Unsloth's model may keep them packed."""
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
            f"training.dtype: Unsloth loaded {spec.model!r} as {model.dtype} {others or ''}, not as {asked}; expected "
            "a dtype that Unsloth supports for this model and machine"
        )
    if away := sorted({str(parameter.device) for parameter in model.parameters()} - {str(device)}):
        raise ModelError(f"model: Unsloth put weights of {spec.model!r} on {', '.join(away)}, not on {device}")
    here, there = text_config(model), config.get_text_config()
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        if getattr(here, name, None) != getattr(there, name, None):
            raise ModelError(
                f"model: Unsloth loaded {spec.model!r} with {name} {getattr(here, name, None)!r}; its config.json has "
                f"{getattr(there, name, None)!r}"
            )


def _whole_bytes(parameter: Tensor, dtype: torch.dtype) -> int:
    """The bytes of the weight before it was quantised to 4 bits, two values to a byte."""
    if parameter.dtype == torch.uint8:
        return parameter.numel() * 2 * dtype.itemsize
    return parameter.numel() * parameter.element_size()
