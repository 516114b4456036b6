"""When DPO's reference is computed once, before training."""

from llama_stack_provider_moe.spec import DPOSpec


def reference_ahead(spec: DPOSpec) -> bool:
    """Whether the reference's log-probabilities are computed once, before training.

    With `aux_free` they must be: training moves the biases, which then no longer are the reference's. With
    `expert_choice` they can't be: experts choose tokens only in a training step, and the reference must see what the
    policy sees. With a sharded base they can't be either: TRL can't compute the fingerprint under which it caches them.
    """
    asked, balancing = spec.options.precompute_ref_log_probs, spec.moe.moe_load_balancing
    if balancing == "aux_free":
        return True
    if balancing == "expert_choice" or spec.resources.sharded:
        return False
    return spec.training.n_epochs > 1 if asked is None else asked
