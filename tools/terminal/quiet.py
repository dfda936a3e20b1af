"""Progress bars and notes of the libraries below, silenced while a verb reports its own progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers' progress bars and everything below its errors until the block ends.

    Reading a GGUF file takes long: its bar stays where stderr is a terminal.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    level, bars, gguf_bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), gguf.tqdm
    silence_libraries(gguf_bar_off=None)
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def silence_libraries(*, gguf_bar_off: bool | None = True) -> None:
    """The same for good, in a separate process.

    Args:
        gguf_bar_off: whether reading a GGUF file shows no bar either; ``None``: it does on a terminal.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf.tqdm = partial(gguf.tqdm, disable=gguf_bar_off)  # transformers itself has no switch for this one
