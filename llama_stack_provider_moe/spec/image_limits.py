"""What a job on rows with images can't ask for. The server checks it once it has read the rows, and training again."""

from llama_stack_provider_moe.errors import InvalidInput
from llama_stack_provider_moe.spec import DPOSpec, JobSpec, SFTSpec


def require_trainable_images(spec: JobSpec) -> None:
    """Check that a job can train on rows with images.

    Args:
        spec: the whole job.

    Raises:
        InvalidInput: it can't, and names the field.
    """
    if not isinstance(spec, SFTSpec | DPOSpec):
        raise InvalidInput("recipe", spec.recipe, "'sft' or 'dpo', because the rows have images")
    because = ", because the rows have images"
    if spec.loader != "hf":
        raise InvalidInput("loader", spec.loader, f"'hf'{because}")
    if spec.data.packed:
        raise InvalidInput("data.packed", True, f"false{because}")
    if spec.options.chat_template is not None:
        raise InvalidInput("options.chat_template", spec.options.chat_template, f"no value{because}: the model's own "
                           "template places them")  # fmt: skip
    if spec.resources.strategy in ("fsdp", "ep"):
        raise InvalidInput("resources.strategy", spec.resources.strategy, f"'ddp'{because}")
    if isinstance(spec, SFTSpec) and spec.distill is not None:
        raise InvalidInput("distill", "such a block", f"null{because}")
    if isinstance(spec, SFTSpec) and spec.options.rope_scaling is not None:
        raise InvalidInput("options.rope_scaling", "such a block", f"null{because}")
    if spec.adapter is not None and spec.adapter.quantize_base:
        raise InvalidInput("adapter.quantize_base", True, f"false{because}")
    if spec.adapter is not None and spec.adapter.vision != "off" and spec.resources.ranks > 1:
        raise InvalidInput("adapter.vision", spec.adapter.vision, "'off' in a job of several processes: in a batch "
                           "without images those weights would have no gradient")  # fmt: skip
