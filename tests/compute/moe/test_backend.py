"""Our experts compute what transformers' eager ones do, in every family, forward and backward; so does LoRA on them.

Everything that has to hold between the two is measured in double precision, where only a mistake makes a difference.
"""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from llama_stack_provider_moe.compute.moe import backend
from llama_stack_provider_moe.compute.moe.adapters import add_lora
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.dropout import add_expert_dropout
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.moe.split_lora import split_lora
from llama_stack_provider_moe.compute.train.fit import CHECKPOINTING
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.spec import Adapter, Moe
from tests.support import tiny_models

OURS, EAGER = Moe(), Moe(enable_moe_optimizations=False)


@pytest.fixture(params=["keeps", "computes again"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer does with its activations: on a CPU it keeps them, on a GPU it computes them again."""
    again = request.param == "computes again"
    monkeypatch.setattr(backend, "recomputes", lambda kernels, device: again)


def ids(tokens: int = 37) -> Tensor:
    return 3 + torch.arange(tokens).unsqueeze(0) % (tiny_models.VOCAB_SIZE - 3)  # 0 is padding, whose embedding is 0


def answer(model: nn.Module, tokens: int = 37) -> Tensor:
    found: Tensor = model(input_ids=ids(tokens)).logits
    return found


def learnt(model: nn.Module, tokens: int = 37) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (1, T, V) and every gradient of one backward."""
    logits = answer(model, tokens)
    logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


def base(family: str, moe: Moe, **changes: Any) -> Any:
    model = tiny_models.model(family, **changes).double().eval()
    layout = find_layout(model)
    apply_moe(model, layout, resolve_moe(moe, layout, full=True))
    return model


def adapted(family: str, moe: Moe, **adapter: Any) -> PeftModel:
    """In double precision, with LoRA on all of it, always the same; B begins at zero, and would hide A's gradient."""
    model = tiny_models.model(family).eval()
    layout = find_layout(model)
    resolved = resolve_moe(moe, layout, full=False)
    apply_moe(model, layout, resolved)
    made = add_lora(model, Adapter(rank=4, alpha=12, **adapter), layout, resolved)
    assert any("beside their weights" in note for note in made.report.notes) == moe.enable_moe_optimizations
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    return made.model.double().eval()


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("family", tiny_models.MOE)
def test_equal_to_the_eager_ones(family: str, tokens: int) -> None:
    logits, gradients = learnt(base(family, OURS), tokens)
    expected, expected_gradients = learnt(base(family, EAGER), tokens)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    assert any(gradient.abs().max() > 0 for name, gradient in gradients.items() if "down_proj" in name)


# Measured over all families, relative to the norm: at most 1.8e-6.
ROUNDING = 1e-5


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("family", tiny_models.MOE)
def test_in_fp32_the_difference_is_rounding(family: str) -> None:
    """Logits, and each gradient of LoRA, against PEFT's fold over the eager loop."""
    folded, beside = adapted(family, EAGER).float(), adapted(family, OURS).float()
    expected, expected_gradients = learnt(folded)
    logits, gradients = learnt(beside)
    pairs = {"logits": (logits, expected)}
    pairs |= {name: (gradients[name], gradient) for name, gradient in expected_gradients.items()}
    off = {name: ((one - other).norm() / other.norm()).item() for name, (one, other) in pairs.items() if other.norm()}
    print(f"{family}: logits {off['logits']:.1e}, gradients at most {max(off.values()):.1e}")
    assert max(off.values()) < ROUNDING
    assert any("experts" in name for name in off)


def no_fold(*_: object, **__: object) -> None:
    raise AssertionError("LoRA was folded into the weights")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("family", tiny_models.MOE)
def test_lora_beside_the_weights_equals_the_fold(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folded, beside = adapted(family, EAGER), adapted(family, OURS)
    expected, expected_gradients = learnt(folded)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "baddbmm", no_fold)  # PEFT's
        logits, gradients = learnt(beside)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    with beside.disable_adapter(), folded.disable_adapter():
        torch.testing.assert_close(answer(beside), answer(folded))
    beside.merge_adapter()
    torch.testing.assert_close(answer(beside), logits)
    beside.unmerge_adapter()
    torch.testing.assert_close(answer(beside), logits)


@pytest.mark.parametrize("family", ["granitemoe", "llama4_text", "gpt_oss"])
def test_no_gradient_of_a_frozen_weight_is_made(family: str) -> None:
    """The largest tensor that backward makes is smaller than the experts' weights."""
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() == 3 and out.shape[0] == 4 and "view" not in str(func):
                made.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    model = adapted(family, OURS, lora_attn_modules=[])
    weight = 4 * 32 * 24  # of the smaller one, E H I
    logits = answer(model, 5)
    loss = logits.square().mean()
    with Watch():
        loss.backward()
    # A's and B's own gradients (E r in) are the largest stacks there are.
    assert 0 < max(made) < weight


@pytest.mark.parametrize(
    ("family", "how"),
    [
        *product(("mixtral", "llama4_text", "gpt_oss", "deepseek_v3"), ("checkpointing", "autocast", "two passes",
                                                                        "deep copy")),
        ("gpt_oss", "compile"),  # half a minute each, and its experts are those with the most to them
    ],
)  # fmt: skip
# torch 2.15's dynamo looks at `.grad` of what flows between its graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_equal_in_every_way_of_running(family: str, how: str) -> None:
    model = adapted(family, OURS).float()
    expected, expected_gradients = learnt(model)
    tolerance = {"rtol": 1e-4, "atol": 1e-6}
    if how == "checkpointing":
        model.train()  # there is no dropout in these models
        getattr(model.get_base_model(), f"{CHECKPOINTING}_enable")({"use_reentrant": False})
        model.enable_input_require_grads()
        logits, gradients = learnt(model)
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            logits, gradients = learnt(model)
        tolerance = {"rtol": 0.1, "atol": 0.1}  # the attention's products are in bf16 now
    elif how == "compile":
        torch._dynamo.reset()
        logits, gradients = learnt(torch.compile(model, backend="aot_eager"))
        gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    elif how == "two passes":  # as DPO's: the reference with the adapter off in between
        logits = answer(model)
        with torch.no_grad(), model.disable_adapter():
            off = answer(model)
        assert (off - logits).abs().max() > 1e-3
        logits.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        logits = logits.detach()
    else:
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        logits, gradients = learnt(copied)
    torch.testing.assert_close(logits.float(), expected, **tolerance)
    torch.testing.assert_close(gradients, expected_gradients, **tolerance)


def without_dropout_on_modules(model: nn.Module) -> None:
    """Attention's LoRA has dropout too; what varies after this is due to that of the experts."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("family", ["granitemoe", "llama4_text"])
def test_dropout_of_experts_lora(family: str) -> None:
    """In training outputs vary, on the adapter's part alone; in evaluation nothing changes."""
    plain, dropping = adapted(family, OURS), adapted(family, OURS, dropout=0.5)
    assert torch.equal(answer(plain), answer(dropping))
    dropping.train()
    without_dropout_on_modules(dropping)
    torch.manual_seed(0)
    first, second = answer(dropping), answer(dropping)
    assert (first - second).abs().max() > 1e-4
    with dropping.disable_adapter():
        assert torch.equal(answer(dropping), answer(dropping))


@pytest.mark.parametrize("family", ["mixtral", "llama4_text", "gpt_oss"])
def test_a_layer_that_recomputes_has_the_dropout_of_one_that_keeps(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU against as on a CPU, and checkpointed: the same output and gradients from the same random state."""
    found = []
    for recomputing, checkpointed in ((False, False), (True, False), (False, True), (True, True)):
        model = adapted(family, OURS, dropout=0.3).float()
        layout = find_layout(model.get_base_model())
        assert layout is not None
        add_expert_dropout(model.get_base_model(), layout, 0.2, ours=True)
        model.train()
        if checkpointed:
            getattr(model.get_base_model(), f"{CHECKPOINTING}_enable")({"use_reentrant": False})
            model.enable_input_require_grads()
        with monkeypatch.context() as patch:
            patch.setattr(backend, "recomputes", lambda kernels, device, again=recomputing: again)
            torch.manual_seed(3)
            found.append(learnt(model))
    (logits, gradients), *others = found
    for other_logits, other_gradients in others:
        torch.testing.assert_close(other_logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-4, atol=1e-6)
    torch.manual_seed(4)
    assert (learnt(model)[0] - logits).abs().max() > 1e-3, "another state, another mask"


def test_lora_of_two_experts_is_computed_beside_them_too() -> None:
    """One is the number that tells a plain matrix from a stack of experts."""
    model = tiny_models.model("mixtral", num_local_experts=2).eval()
    layout = find_layout(model)
    resolved = resolve_moe(OURS, layout, full=False)
    apply_moe(model, layout, resolved)
    report = add_lora(model, Adapter(rank=4), layout, resolved).report
    assert any("beside their weights" in note for note in report.notes)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_two_adapters_at_once_add_up(family: str) -> None:
    model = adapted(family, OURS).float()
    model.add_adapter("other", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    model.base_model.set_adapter(["default", "other"])
    found = answer(model)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = answer(model)
        assert (alone[name] - found).abs().max() > 1e-2
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(adapter_names=["default", "other"])
    torch.testing.assert_close(answer(model), found, rtol=1e-4, atol=1e-5)


def test_lora_offered_without_dropout_has_none() -> None:
    model = adapted("mixtral", OURS, dropout=0.5)
    expected = answer(model)
    assert split_lora(model) == 4
    model.train()
    without_dropout_on_modules(model)
    assert torch.equal(answer(model), expected)


def test_an_offer_that_is_not_taken_is_an_error() -> None:
    model = adapted("mixtral", OURS)
    model.get_base_model().set_experts_implementation("eager")
    with pytest.raises(AdapterError, match="had no effect in a forward"):
        answer(model)
