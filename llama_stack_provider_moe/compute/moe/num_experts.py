"""`config.num_experts` for TRL 1.16, which reads it (trainer/utils.py) of any model that returns router logits.

transformers 5.23 maps that name to the real one for Mixtral and others, but not for Granite, Phi and others. It is
mapped here on the class, as transformers does: an attribute of the instance would be written to config.json. Remove
this when transformers maps it for all.
"""

from transformers import PreTrainedConfig

_NAME = "num_experts"
_mapped_here: set[type[PreTrainedConfig]] = set()


def lacks_num_experts(config: PreTrainedConfig) -> bool:
    """Whether transformers' config has no `num_experts`."""
    return type(config) in _mapped_here or not hasattr(config, _NAME)


def alias_num_experts(config: PreTrainedConfig, num_experts: int) -> None:
    """Map `num_experts` to the key in which this config has the number of experts."""
    kind = type(config)
    if kind in _mapped_here:
        return
    names = [key for key, value in config.to_dict().items()
             if "experts" in key and "shared" not in key and "per_tok" not in key and value == num_experts]  # fmt: skip
    if names:
        kind.attribute_map = {**kind.attribute_map, _NAME: names[0]}
        _mapped_here.add(kind)
