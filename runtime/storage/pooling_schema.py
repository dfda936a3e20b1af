"""Pooling of a base: how the checkpoint's own sentence-transformers files make one vector of a text."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

# In the order in which sentence-transformers concatenates several.
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

Demand = Callable[[bool, str, object, str], None]


class Pooling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How texts become vectors by default; names and meanings are those of sentence-transformers.

    Attributes:
        modes: some of ``POOLING_MODES``; the vectors of several are concatenated. Empty if ``unsupported`` says why.
        normalize: whether vectors are divided by their length.
        include_prompt: whether the tokens of a prompt are pooled too.
        max_tokens: tokens to which a text is cut, special tokens included; ``None`` for no limit but the model's.
        truncate_left: whether the beginning of a long text is cut off, rather than its end.
        lower_case: whether texts are lower-cased before the tokenizer sees them.
        prompts: prompts by name; one is put before each text.
        default_prompt: name of the prompt that is used where a call names none.
        unsupported: a module of the checkpoint behind the transformer that the runtime does not have, in words.
    """

    modes: tuple[str, ...] = ()
    normalize: bool = False
    include_prompt: bool = True
    max_tokens: int | None = None
    truncate_left: bool = False
    lower_case: bool = False
    prompts: dict[str, str] = {}
    default_prompt: str | None = None
    unsupported: str = ""


def check_pooling(pooling: Pooling, demand: Demand) -> None:
    """Validate the section of a manifest.

    Args:
        pooling: the section.
        demand: called with whether something holds, its field, what was received and what was expected.
    """
    known = set(pooling.modes) <= set(POOLING_MODES) and len(set(pooling.modes)) == len(pooling.modes)
    demand(known, "$.base.pooling.modes", pooling.modes, f"some of {', '.join(POOLING_MODES)}, each once")
    says = bool(pooling.modes) != bool(pooling.unsupported)
    demand(says, "$.base.pooling.modes", pooling.modes, "at least one, or the reason in unsupported")
    limit = pooling.max_tokens
    demand(limit is None or limit >= 1, "$.base.pooling.max_tokens", limit, "null or a positive number")
    name = pooling.default_prompt
    demand(name is None or name in pooling.prompts, "$.base.pooling.default_prompt", name, "a name in prompts, or null")
