"""Load what a job saved in a fresh process, and check that its logits equal those of the trained model.

    $ moe-train export check JOBFOLDER

Two comparisons answer two questions. *As trained*: base and adapter from disk, with the job's dtype, quantisation and
experts implementation. Only the files could differ, so logits must be equal except for the last bits: this shows
whether the files hold what was trained. *Plain*: only transformers and PEFT, as other people load it. In bf16 this
rounds differently (PEFT folds W + B A into 16 bits), so the distance is judged, also in relation to the effect of the
adapter: if an adapter is not applied, the distance to the recorded logits is as large as its effect.

A job with a 4-bit base trained against the rounding of that base, which the 16-bit base does not have. There the plain
model is compared with the 16-bit adapter model in the job's experts implementation; the distance of the latter to the
trained model is reported (`rounding_of_base`), not judged.
"""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from llama_stack_provider_moe.compute.export.card import find_source
from llama_stack_provider_moe.compute.export.load_figures import LoadCheck, MergedCheck, effect_of_image, gap
from llama_stack_provider_moe.compute.export.model_card import Source
from llama_stack_provider_moe.compute.export.probe import Arithmetic, Probe, ask, digest, read_probe
from llama_stack_provider_moe.compute.export.probe_images import saved_processor
from llama_stack_provider_moe.compute.export.servers import family_of, read_kind, statements
from llama_stack_provider_moe.compute.models.classifier import (
    is_reward_adapter,
    is_saved_classifier,
    load_new_classifier,
    load_quantized_classifier,
    load_saved_classifier,
)
from llama_stack_provider_moe.compute.models.loader import DTYPES, load_plain, model_config
from llama_stack_provider_moe.compute.models.quantized_loading import read_quantized
from llama_stack_provider_moe.compute.models.rope import extend_for
from llama_stack_provider_moe.compute.moe.backend import ALL_OURS
from llama_stack_provider_moe.compute.moe.codes import Coding
from llama_stack_provider_moe.compute.moe.derive import find_layout
from llama_stack_provider_moe.compute.moe.implementation import ExpertsImplementation, available
from llama_stack_provider_moe.compute.moe.layout import ExpertLayout
from llama_stack_provider_moe.compute.moe.model_types import is_classifier
from llama_stack_provider_moe.compute.moe.resolve_settings import apply_moe, resolve_moe
from llama_stack_provider_moe.compute.moe.saved_names import names_in_file
from llama_stack_provider_moe.compute.moe.split_lora import split_lora
from llama_stack_provider_moe.compute.moe.steering import ROUTER_BIAS, restore_biases
from llama_stack_provider_moe.errors import AdapterError
from llama_stack_provider_moe.ground.small_files import read_config, read_object
from llama_stack_provider_moe.jobdir import local_names
from llama_stack_provider_moe.spec import DType, Moe
from llama_stack_provider_moe.spec.command_words import answered
from llama_stack_provider_moe.spec.local_commands import LoadCheckCommand

# Mean distance between two models' logits, as a share of the spread of logits (`Gap.share`). Measured over all
# families, recipes and 4-bit bases on a CPU: as trained 0, bit by bit; 8e-7 in fp32 with another number of threads.
# Not measured on a GPU, where the bound is a tenth of that for another kind of device.
AS_TRAINED: dict[DType, float] = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
AS_TRAINED_CUDA: dict[DType, float] = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}
# Measured at most 3e-7 in fp32. In bf16 7e-3, and 1.6e-2 where one token went to another expert. fp16, which no CPU
# trains, was not measured; its rounding is an eighth of bf16's.
PLAIN: dict[DType, float] = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}
# The plain model's distance divided by the adapter's effect on the logits: 1 means no adapter; measured at most 0.13 in
# tiny models. The alternative bound is for rounding in deep models: in bf16 SmolLM2-4x135M (30 layers) has 2.1e-2.
OF_EFFECT = 1 / 3
ROUNDING: dict[DType, float] = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 5e-3}


class NotRecorded(AdapterError):
    """Nothing to compare with: the folder belongs to a job that recorded no logits."""


def check(given: str | Path, base: str | None = None) -> LoadCheck:
    """Run `check_adapter` or `check_model` on a job's folder or on an artifact's folder.

    Raises:
        AdapterError: see there.
    """
    folder = Path(given)
    if (folder / "artifacts" / "model").is_dir():
        return check_model(folder / "artifacts" / "model")
    if (folder / "config.json").is_file() and not (folder / CONFIG_NAME).is_file():
        return check_model(folder)
    return check_adapter(folder, base)


def check_adapter(given: str | Path, base: str | None = None) -> LoadCheck:
    """Load base and adapter from disk and compare them with the recording from the end of training.

    Args:
        given: the folder of the adapter or of its job.
        base: folder or hub id; default: the model that the job names, or else the one in the adapter's config.

    Raises:
        NotRecorded: the adapter is from an older job.
        AdapterError: the adapter differs from the trained one (with figures).
        ModelError: the base can't be loaded.
    """
    source = find_source(Path(given))
    probe = _probe(source.adapter)
    dtype, coding = probe.arithmetic.dtype, _coding(probe.arithmetic)
    name = _base(source, base)
    model, layout, tensors = _load(name, source.adapter, dtype)
    biases = _restore(source.adapter, model, layout, probe)
    is_reward = is_classifier(model.get_base_model())
    servers = [] if is_reward else statements(family_of(model), read_kind(source.adapter))
    processor = _processor(source.adapter, probe)
    plain = ask(model, probe, processor=processor)
    with model.disable_adapter():
        effect = gap(plain, ask(model, probe, processor=processor))
    here = _here(probe.arithmetic, None)
    _as_trained(model, layout, here.experts_implementation)
    again = sixteen = ask(model, probe, dtype, processor)
    if coding is not None:
        del model
        model, layout, _ = _load(name, source.adapter, dtype, coding)
        _restore(source.adapter, model, layout, probe)
        _as_trained(model, layout, here.experts_implementation)
        again, here = ask(model, probe, dtype, processor), _here(probe.arithmetic, coding)
    recorded = probe.values()
    found = LoadCheck(
        kind="adapter", positions=probe.positions, arithmetic=probe.arithmetic, here=here,
        as_trained=gap(again, recorded), as_trained_tolerance=_as_trained_tolerance(probe.arithmetic, here),
        plain=gap(plain, recorded if coding is None else sixteen), plain_tolerance=PLAIN[dtype],
        plain_against="recorded" if coding is None else "16-bit adapter model",
        rounding_of_base=None if coding is None else gap(sixteen, recorded),
        effect=effect, effect_of_image=effect_of_image(probe, plain), tensors=tensors, router_biases=biases,
        servers=servers,
    )  # fmt: skip
    return judged(found, str(source.adapter))


def check_model(folder: str | Path) -> LoadCheck:
    """The same check for a job that trained all weights; plain transformers loads its folder.

    Raises:
        NotRecorded: see `check_adapter`.
        AdapterError: see `check_adapter`.
        ModelError: the folder can't be loaded.
    """
    probe = _probe(Path(folder))
    dtype = probe.arithmetic.dtype
    model = _load_whole(str(folder), dtype)
    layout = find_layout(model)
    processor = _processor(Path(folder), probe)
    plain = ask(model, probe, processor=processor)
    here = _here(probe.arithmetic, None)
    _as_trained(model, layout, here.experts_implementation)
    recorded = probe.values()
    found = LoadCheck(
        kind="model", positions=probe.positions, arithmetic=probe.arithmetic, here=here,
        as_trained=gap(ask(model, probe, dtype, processor), recorded),
        as_trained_tolerance=_as_trained_tolerance(probe.arithmetic, here),
        plain=gap(plain, recorded), plain_tolerance=PLAIN[dtype], plain_against="recorded",
        effect_of_image=effect_of_image(probe, plain), tensors=sum(1 for _ in model.state_dict()), router_biases=0,
    )  # fmt: skip
    return judged(found, str(folder))


def check_merged(merged: str | Path, given: str | Path, base: str | None = None) -> MergedCheck:
    """Compare the logits of a merged folder with those of the adapter on its base, in plain transformers and PEFT.

    Both run in the dtype that the merged folder has on disk; LoRA is added in that dtype too.

    Args:
        merged: the merged folder.
        given: see `check_adapter`.
        base: see `check_adapter`.

    Raises:
        NotRecorded: the adapter is from an older job.
        AdapterError: they differ by more than rounding (with figures).
    """
    source = find_source(Path(given))
    probe = _probe(source.adapter)
    weights = _dtype_of(Path(merged))
    dtype: DType = "fp32" if probe.arithmetic.dtype == "fp32" else weights
    one = _load_whole(str(merged), dtype)
    mine = ask(one, probe, processor=_processor(Path(merged), probe))
    del one
    model, layout, _ = _load(_base(source, base), source.adapter, dtype)
    _restore(source.adapter, model, layout, probe)
    # Even if both run in fp32, a merge into 16 bits has rounded the weights once, so its tolerance applies.
    tolerance = PLAIN[weights]
    theirs = ask(model, probe, processor=_processor(source.adapter, probe))
    found = MergedCheck(
        positions=probe.positions, dtype=dtype, weights=weights, gap=gap(mine, theirs), tolerance=tolerance,
        effect_of_image=effect_of_image(probe, mine),
    )  # fmt: skip
    if found.gap.share > tolerance:
        raise AdapterError(f"merged: {merged} differs from the adapter on its base: {found.text()}")
    return found


def judged(found: LoadCheck, what: str) -> LoadCheck:
    """Return `found`, or raise `AdapterError` if the loaded model differs from the trained one.

    Args:
        found: the figures.
        what: the folder, for the error.
    """
    if found.as_trained.share > found.as_trained_tolerance:
        raise AdapterError(f"load check: {what} does not hold what was trained:\n{found.text()}")
    allowed = found.plain_tolerance
    if found.effect is not None and found.detects_missing_adapter:
        allowed = min(allowed, max(OF_EFFECT * found.effect.share, ROUNDING[found.arithmetic.dtype]))
    if found.plain.share > allowed:
        raise AdapterError(
            f"load check: loaded plainly, {what} differs from what was trained: its logits are off by "
            f"{found.plain.share:.2g} of their spread; expected at most {allowed:.2g}, from rounding:\n{found.text()}"
        )
    return found


def _probe(folder: Path) -> Probe:
    probe = read_probe(folder)
    if probe is None:
        raise NotRecorded(
            f"{folder} holds no logits of the trained model: it is from a job of an earlier version, from a job with "
            "loader unsloth, or not from a job"
        )
    return probe


def _processor(folder: Path, probe: Probe) -> Any:
    """The processor of images in a folder, for a probe with images; else None."""
    return saved_processor(folder) if probe.has_images else None


def _base(source: Source, base: str | None) -> str:
    if base is not None:
        return base
    if source.spec is not None and source.spec.recipe != "routing_analysis":
        return source.spec.model
    try:
        name = read_object(source.adapter / CONFIG_NAME)["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise AdapterError(f"adapter: {source.adapter / CONFIG_NAME} can't be read: {error}") from error
    if not isinstance(name, str) or not name:
        raise AdapterError(f"adapter: {source.adapter / CONFIG_NAME} does not name its base; give it with --base")
    return name


def _load(
    name: str, adapter: Path, dtype: DType, coding: Coding | None = None
) -> tuple[PeftModel, ExpertLayout | None, int]:
    """Load base and adapter; also return the number of adapter tensors, all of which are equal in model and file.

    Args:
        name: folder or hub id of the base.
        adapter: the adapter's folder.
        dtype: dtype of the base.
        coding: of the base; None: not quantised.

    Raises:
        AdapterError: a tensor has no place in the model, or the file lacks a tensor that the adapter's config needs.
    """
    device, is_reward = _device(), is_reward_adapter(adapter)
    if coding is None:
        base = load_new_classifier(name, dtype, device, None) if is_reward else load_plain(name, dtype, device)
        layout = find_layout(base)
    elif is_reward:
        base, layout, _ = load_quantized_classifier(name, dtype, device, None, coding)
    else:
        base, layout, _ = read_quantized(name, model_config(name), DTYPES[dtype], device, coding)
    extend_for(base, adapter)
    with warnings.catch_warnings():
        # peft 0.21 looks for parameters' names among modules, and only warns about missing ones; both are checked here.
        warnings.simplefilter("ignore")
        try:
            model: PeftModel = PeftModel.from_pretrained(base, adapter).eval()
        except (ValueError, RuntimeError, OSError, SafetensorError) as error:
            raise AdapterError(f"adapter: PEFT can't load {adapter}: {' '.join(str(error).split())[:600]}") from error
    written = load_file(adapter / SAFETENSORS_WEIGHTS_NAME)
    names = names_in_file(model)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    there: dict[str, Tensor] = {names[own]: tensor for own, tensor in state.items()}
    if lost := sorted(written.keys() - there.keys()):
        raise AdapterError(f"adapter: PEFT finds no place for {len(lost)} of its tensors: {', '.join(lost[:3])}")
    if missing := sorted(there.keys() - written.keys()):
        raise AdapterError(f"adapter: {adapter} lacks {len(missing)} tensor(s): {', '.join(missing[:3])}")
    if other := [key for key, tensor in written.items() if not torch.equal(there[key].cpu(), tensor)]:
        raise AdapterError(f"adapter: {len(other)} tensor(s) differ after loading: {', '.join(sorted(other)[:3])}")
    return model, layout, len(written)


def _restore(adapter: Path, model: PeftModel, layout: ExpertLayout | None, probe: Probe) -> int:
    """Load the router biases that training moved into the base; return their number."""
    if probe.router_biases is None:
        return 0
    if layout is None or not (adapter / ROUTER_BIAS).is_file():
        raise AdapterError(f"adapter: {adapter} lacks {ROUTER_BIAS}, the router biases that it was trained with")
    restore_biases(adapter, model, layout)
    biases = layout.biases(model)
    if digest(biases) != probe.router_biases:
        raise AdapterError(f"adapter: {adapter / ROUTER_BIAS} does not hold the router biases that it was trained with")
    return len(biases)


def _as_trained(
    model: PreTrainedModel | PeftModel, layout: ExpertLayout | None, implementation: ExpertsImplementation | None
) -> None:
    """Run the experts as in the job."""
    if layout is None or implementation is None:
        return
    resolved = resolve_moe(Moe(output_router_logits=False), layout, full=False)
    apply_moe(model, layout, replace(resolved, experts_implementation=implementation))
    if implementation in ALL_OURS:
        split_lora(model)


def _load_whole(folder: str, dtype: DType) -> PreTrainedModel:
    load = load_saved_classifier if is_saved_classifier(folder) else load_plain
    return load(folder, dtype, _device())


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _coding(trained: Arithmetic) -> Coding | None:
    if trained.quantize_bits is None:
        return None
    return Coding(4 if trained.quantize_bits == 4 else 8, trained.quantize_scales)


def _here(trained: Arithmetic, coding: Coding | None) -> Arithmetic:
    """The job's arithmetic, as far as this machine supports it."""
    implementation, device = trained.experts_implementation, _device().type
    if implementation is not None:
        implementation = available(implementation, device)
    return trained.model_copy(
        update={
            "device": device,
            "experts_implementation": implementation,
            "quantize_bits": None if coding is None else coding.bits,
            "quantize_scales": coding is not None and coding.nested,
        }
    )


def _as_trained_tolerance(trained: Arithmetic, here: Arithmetic) -> float:
    """The bound for `as_trained`; another kind of device or other kernels round sums differently."""
    if trained != here:
        return PLAIN[trained.dtype]
    return (AS_TRAINED if here.device == "cpu" else AS_TRAINED_CUDA)[trained.dtype]


def _dtype_of(folder: Path) -> DType:
    try:
        config = read_config(folder / "config.json")
    except (OSError, ValueError) as error:
        raise AdapterError(f"merged: {folder / 'config.json'} can't be read: {error}") from error
    names: dict[str, DType] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    stored = config.get("dtype", config.get("torch_dtype", "float32"))
    if stored not in names:
        raise AdapterError(f"merged: {folder} has dtype {stored!r}, expected one of {', '.join(names)}")
    return names[stored]


def main(argv: Sequence[str] | None = None) -> int:
    """`moe-train export check`; the exit code is 0 if all is equal, 1 if not, 2 for a mistake in the command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable_progress_bar()
    return answered(LoadCheckCommand, argv, "export check", _run, ())


def _run(command: LoadCheckCommand) -> int:
    found: dict[str, LoadCheck | MergedCheck] = {}
    base = None if command.base is None else local_names.whole_model(command.base, "--base")
    what = local_names.job_or_artifact(command.given, "JOBFOLDER|ADAPTER")
    found["loaded"] = check(what, base)
    if command.merged is not None:
        found["merged"] = check_merged(local_names.whole_model(command.merged, "--merged"), what, base)
    if command.as_json:
        print(json.dumps({name: each.model_dump(mode="json") for name, each in found.items()}))
    else:
        print("\n".join(each.text() for each in found.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
