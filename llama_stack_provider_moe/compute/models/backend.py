"""What loads and runs a job's model, by the job's `loader`: the one place that knows how the loaders differ.

Importing this module imports neither torch nor Unsloth. The training process asks for its backend before it imports
any library, and Unsloth is installed in a separate environment only.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llama_stack_provider_moe.compute.models.unsloth.entry import NOTICE, import_unsloth
from llama_stack_provider_moe.compute.runtime.context import AnySession
from llama_stack_provider_moe.spec import JobSpec, TrainingSpec
from llama_stack_provider_moe.spec.unsloth_limits import Loader

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from llama_stack_provider_moe.compute.models.prepare import Base
    from llama_stack_provider_moe.compute.moe.adapters import AdapterReport
    from llama_stack_provider_moe.compute.moe.rates import Rates

    type Trainable = tuple[PreTrainedModel | PeftModel, AdapterReport, Rates]


class Backend(Protocol):
    """What loads, adapts and runs the model of a job that trains.

    Attributes:
        notice: a message that the job writes when it starts, or None.
        has_memory_estimate: whether the planner knows what its kernels keep in memory.
        has_load_check: whether transformers computes the same logits, so that a load check can compare them.
        has_determinism_check: whether `determinism` searches its forward passes for random numbers.
        has_routing_analysis: whether its routers can be watched while they choose experts for rows.
    """

    notice: str | None
    has_memory_estimate: bool
    has_load_check: bool
    has_determinism_check: bool
    has_routing_analysis: bool

    def import_first(self, cache: Path) -> dict[str, str]:
        """Import what has to come before any other library.

        Args:
            cache: a folder of the job for files that the import writes.

        Returns:
            The versions of what was imported.
        """

    def load(self, session: AnySession, models_loss: bool = True) -> "Base":
        """Load the model, find its experts and apply the `moe` block; `models_loss`: see `resolve_moe`."""

    def adapt(self, session: AnySession, base: "Base") -> "Trainable":
        """Add the adapter to the loaded model, or make all its weights trainable."""

    def check_hidden_states(self, session: AnySession, base: "Base", blocks: Collection[int]) -> None:
        """Check that hooks on `blocks` take the model's hidden states, which a circuit breaker changes.

        Raises:
            ModelError: they take something else.
        """


class Transformers:
    """`loader: hf`: transformers' model and PEFT's adapter, with the experts' kernels of this package."""

    notice: str | None = None
    has_memory_estimate = True
    has_load_check = True
    has_determinism_check = True
    has_routing_analysis = True

    def import_first(self, cache: Path) -> dict[str, str]:
        """Nothing: the order of imports does not matter."""
        return {}

    def load(self, session: AnySession, models_loss: bool = True) -> "Base":
        """See `prepare.load_base`."""
        from llama_stack_provider_moe.compute.models.prepare import load_base

        return load_base(session, models_loss)

    def adapt(self, session: AnySession, base: "Base") -> "Trainable":
        """See `prepare.make_trainable`."""
        from llama_stack_provider_moe.compute.models.prepare import make_trainable

        return make_trainable(session, base)

    def check_hidden_states(self, session: AnySession, base: "Base", blocks: Collection[int]) -> None:
        """Nothing: transformers takes its hidden states from the same blocks."""


class Unsloth:
    """`loader: unsloth`: Unsloth's FastModel. Its forward passes and kernels differ from those of transformers."""

    notice: str | None = NOTICE
    has_memory_estimate = False
    has_load_check = False
    has_determinism_check = False  # `unsloth.base` checks its models
    has_routing_analysis = False

    def import_first(self, cache: Path) -> dict[str, str]:
        """Unsloth, because it changes other libraries while it is imported."""
        return import_unsloth(cache)

    def load(self, session: AnySession, models_loss: bool = True) -> "Base":
        """See `unsloth.base.load_base`; the model never adds a balance loss there, whatever `models_loss` is."""
        from llama_stack_provider_moe.compute.models.unsloth.base import load_base

        return load_base(session)

    def adapt(self, session: AnySession, base: "Base") -> "Trainable":
        """See `unsloth.base.adapt`."""
        from llama_stack_provider_moe.compute.models.unsloth.base import adapt

        adapted = adapt(session.spec, base.model, base.layout, base.resolved)
        return adapted.model, adapted.report, adapted.rates

    def check_hidden_states(self, session: AnySession, base: "Base", blocks: Collection[int]) -> None:
        """See `unsloth.base.require_equal_states`."""
        from llama_stack_provider_moe.compute.models.unsloth.base import require_equal_states

        require_equal_states(base.model, blocks, session.spec.training.dtype)
        session.show("unsloth   hidden states by hooks agree with the model's at every block that the losses use")


BACKENDS: Mapping[Loader, Backend] = {"hf": Transformers(), "unsloth": Unsloth()}


def backend_of(spec: JobSpec) -> Backend:
    """The backend of a job; a job that does not train has no `loader` and uses transformers."""
    return BACKENDS[spec.loader if isinstance(spec, TrainingSpec) else "hf"]
