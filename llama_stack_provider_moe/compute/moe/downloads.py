"""Signs of life during downloads from the hub (see `liveness`)."""

from tqdm.std import tqdm

from llama_stack_provider_moe.ground import liveness


class DownloadBar(tqdm):
    """A progress bar for huggingface_hub that draws nothing and reports to the current stage."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **{**keywords, "disable": True})

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` more bytes."""
        liveness.alive()
        shown: bool | None = super().update(n)
        return shown
