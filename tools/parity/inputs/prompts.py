"""Prompts of a parity run: real texts of several lengths, languages and kinds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from adalink.runtime.deployment import Deployment
from adalink.runtime.storage.manifest import Base

PROMPTS = (
    "The capital of France is",
    (
        "Text: Oil prices rose on Monday after the producers' group said it would keep its output ceiling "
        "until the end of the quarter, while refiners reported lower stocks of heating fuel.\nTopic:"
    ),
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "Hello",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist",
    "El viejo pescador salió antes del amanecer, remó hasta que la costa desapareció y",
    "Question: A train leaves at 9:40 and arrives at 13:05. How long is the journey?\nAnswer:",
    "SELECT name, COUNT(*) FROM orders WHERE total > 100 GROUP BY",
    "昨日は雨が降ったので、",
    (
        "Dear Ms. Okafor,\n\nThank you for your letter of 3 March. We have looked into the matter of the "
        "delayed shipment and found that the parcel was held at the border for an inspection that was not "
        "announced to us. We are sorry for the inconvenience and would like to offer you a refund of the "
        "postage. Please let us know whether you prefer a transfer to your account or a voucher, and"
    ),
    "1, 1, 2, 3, 5, 8, 13, 21,",
    (
        "The committee met for the third time this year. After a long debate about the budget, in which "
        "several members asked for more detail on travel and on the cost of the new building, the chair "
        "proposed to postpone the vote. Two members objected. The secretary then read the minutes of the "
        "previous meeting, which were approved with one correction: the figure for the library had been given"
        " as 14,200 where it should have been 12,400. The next item was the report of the working group on "
        "energy. Its speaker explained that insulation of the older wing would pay for itself within nine "
        "years, and that the subsidy could only be claimed if work began before"
    ),
)
_QUICK = (0, 1, 2, 4, 9)
_ID_LENGTHS = (1, 3, 7, 12, 20)


def choose_prompts(quick: bool) -> tuple[str, ...]:
    """The prompts of a run."""
    return tuple(PROMPTS[index] for index in _QUICK) if quick else PROMPTS


def fitting_prompts(quick: bool, encode: Callable[[str], list[int]], longest: int) -> list[str]:
    """The prompts of a run, cut to at most ``longest`` tokens.

    A small vocabulary may lack a whole script, and one letter may be many tokens. A prompt without a token, or whose
    first letter is too long, is left out.
    """
    fitting = (fit(text, encode, longest) for text in choose_prompts(quick))
    return [text for text in fitting if text and encode(text)]


def longest_prompt(deployment: Deployment, steps: int) -> int:
    """Most positions of a prompt before so many steps, behind the longest soft prompt of any task."""
    base, profile = deployment.manifest.base, deployment.profile
    limits = [base.max_positions, None if profile is None else profile.capacity]
    longest = min(filter(None, limits), default=1 << 20) - steps
    if profile is not None and base.bidirectional_prompt:  # goes in at once
        longest = min(longest, profile.seq.max)
    return longest - max((task.prepended_positions for task in deployment.manifest.tasks.values()), default=0)


def fit(text: str, encode: Callable[[str], list[int]], longest: int) -> str:
    """Cut ``text`` until it has at most ``longest`` tokens, for models with short contexts; empty if no letter fits."""
    while text and len(encode(text)) > longest:
        text = text[: min(len(text) - 1, max(1, len(text) * longest // len(encode(text))))]
    return text


def seeded_rows(base: Base, longest: int) -> list[list[int]]:
    """Random token ids, for a base without a tokenizer."""
    rng = np.random.default_rng(20231012)
    return [rng.integers(0, base.vocab_size, min(length, longest)).tolist() for length in _ID_LENGTHS]
