"""The training process: from a job's folder to its checkpoints. Nothing here knows the store or the server."""

import logging
import warnings


def _is_news(record: logging.LogRecord) -> bool:
    """False for the remark that `kernels`, which nobody needs, is not installed.

    bitsandbytes (0.50) makes it when PEFT or this package imports it on a CPU with AVX512-BF16. If `kernels` is
    installed and fails, the same text has another error, and is shown.
    """
    errors = record.args if isinstance(record.args, tuple) else ()
    return not any(isinstance(error, ModuleNotFoundError) and error.name == "kernels" for error in errors)


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
# peft 0.21.2 and trl 1.16 read the property by the name that it had before transformers 5.23.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
