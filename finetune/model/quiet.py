"""Messages of libraries that do not concern a user."""

import logging
import warnings

from transformers.utils.logging import disable_progress_bar


def quiet_libraries() -> None:
    """Silence messages that do not concern a user: a deprecation warning that PEFT causes in transformers, a
    progress bar for weights that load in a second, and a warning in every int8 multiplication."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    # The table at the start says that they are no longer tied where only one of them is trained.
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
    warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
    disable_progress_bar()
    # bitsandbytes warns of a cast in each layer of each forward pass.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
