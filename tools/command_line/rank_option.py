"""The option ``--rank``: one number, or one for each modality."""

from __future__ import annotations

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.adapter_spec import Rank


def read_rank(texts: tuple[str, ...]) -> Rank:
    """``("16",)``, or ``("text=16", "image=64")``; raises ``ConfigError``."""
    named = [text.partition("=") for text in texts]
    try:
        if len(texts) == 1 and not named[0][1]:
            return int(texts[0])
        ranks = {name: int(number) for name, _, number in named}
    except ValueError as error:
        raise ConfigError(
            f"--rank is {' '.join(texts)}, expected one number, or MODALITY=NUMBER for each modality"
        ) from error
    if len(ranks) < len(texts):
        raise ConfigError(f"--rank is {' '.join(texts)}, expected each modality once")
    return ranks
