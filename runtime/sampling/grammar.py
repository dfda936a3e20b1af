"""Grammars: structured output as a logits processor, which bans every token that the text cannot go on with.

llguidance compiles schemas, expressions and grammars, and says at each step which tokens may follow.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from adalink.runtime.arrays import Array
from adalink.runtime.errors import RequestError
from adalink.runtime.implements import implements
from adalink.runtime.sampling.grammar_tokens import make_tokens, stripped_tokens
from adalink.runtime.sampling.logits_processors import LogitsProcessor
from adalink.runtime.sampling.structured_output import StructuredOutput
from adalink.runtime.storage.lru import LruTable
from adalink.runtime.storage.manifest import Base
from adalink.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Characters of the sources of compiled grammars that a deployment keeps, and what each counts at least: a schema of
# 45,000 characters takes 4 MB.
_KEPT_CHARACTERS, _LEAST_CHARACTERS = 1_000_000, 5_000
# Symbols of a grammar, states of its lexer (some 40 MB), and items of its parser at a step.
_MOST_SYMBOLS, _MOST_STATES, _MOST_ITEMS = 50_000, 20_000, 20_000
# llguidance recurses: a schema of 1,000 references ends the process on a stack of 8 MB. The longest fit into 64 MB.
_STACK_BYTES = 256 << 20
_STACK_LOCK = threading.Lock()
# No free white space, where small models lose themselves; and nothing that would let through what breaks the schema.
_JSON_OPTIONS = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}


class Grammars:
    """Compiles the grammars of one deployment, and keeps those used last; safe for several threads."""

    def __init__(self, tokenizer: Tokenizer, base: Base) -> None:
        self._tokenizer, self._base = tokenizer, base
        self._tokens: LLTokenizer | None = None
        self._not_first: list[int] = []
        self._compiled: LruTable[tuple[str, str], LLMatcher] = LruTable(_KEPT_CHARACTERS)
        self._lock = threading.Lock()

    def processor(self, output: StructuredOutput, begin: int, end_ids: Sequence[int]) -> LogitsProcessor:
        """The processor of one row.

        Args:
            output: what its text must be.
            begin: length of the sequence before the first token of the text.
            end_ids: tokens that end the row: allowed where the text is complete, and nowhere else.

        Raises:
            RequestError: the schema, expression or grammar is wrong, too large, or cannot be enforced.
            BackendUnavailableError: llguidance is not installed.
            BackendError: llguidance cannot read the tokenizer.
        """
        with self._lock:
            tokens = self._tokens
            if tokens is None:
                tokens = self._tokens = make_tokens(self._tokenizer, self._base)
                self._not_first = stripped_tokens(tokens, self._tokenizer)
            key = output.kind, output.source
            compiled = self._compiled.get(key)
            if compiled is None:
                compiled = _compile(output, tokens)
                self._compiled.put(key, compiled, max(_LEAST_CHARACTERS, len(key[1])))
            matcher = compiled.deep_copy()
        named = output.grammar or ""
        never = [token for text, token in self._tokenizer.special_ids.items() if text not in named]
        bans = Bans(list(end_ids), never, self._not_first)
        return GrammarProcessor(matcher, tokens.vocab_size, begin, bans)


@dataclass(frozen=True)
class Bans:
    """Tokens that are not the grammar's to allow.

    Attributes:
        ends: those that end the row: allowed where the text is complete.
        never: special tokens, which are no text: llguidance offers the unknown one where nothing else fits.
        not_first: those whose text is another at the start.
    """

    ends: list[int]
    never: list[int]
    not_first: list[int]


class GrammarProcessor:
    """Bans the tokens that a grammar does not allow next."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, begin: int, bans: Bans) -> None:
        """Prepare one row.

        Args:
            matcher: the row's own, at the start of the grammar.
            vocab_size: its number of tokens.
            begin: length of the sequence before the first token of the text.
            bans: other tokens that may not follow.
        """
        self._matcher = matcher
        self._mask = np.zeros((vocab_size + 31) // 32, np.uint32)
        self._begin = self._read = begin
        self._bans = bans

    @implements(LogitsProcessor)
    def __call__(self, scores: Array, sequence: Sequence[int]) -> None:
        if len(sequence) < self._read:  # a forced first token is no text
            return
        allowed = self._allowed(sequence[self._read :])[: len(scores)]
        self._read = len(sequence)
        np.copyto(scores[: len(allowed)], np.float32(-np.inf), where=~allowed)  # faster than an index of booleans
        scores[len(allowed) :] = -np.inf

    def _allowed(self, new: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which tokens may follow after new ones; raises ``RequestError``."""
        matcher, mask = self._matcher, self._mask
        with _panics("structured output"):
            for token in new:
                matcher.consume_token(token)
            if not matcher.is_error():
                matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if matcher.is_error():
                raise _error("structured output", matcher.get_error())
            is_complete = matcher.is_accepting()
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").view(np.bool_)
        allowed[self._bans.never] = False
        if self._read == self._begin and not new:
            allowed[self._bans.not_first] = False
        allowed[self._bans.ends] = is_complete
        return allowed


def _compile(output: StructuredOutput, tokens: LLTokenizer) -> LLMatcher:
    """A matcher at the start of a grammar; raises ``RequestError``."""
    made: list[LLMatcher | Exception] = []

    def compile_it() -> None:
        try:
            with _panics(output.kind):
                made.append(_make_matcher(output, tokens))
        except Exception as error:
            made.append(error)

    with _STACK_LOCK:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=compile_it, name="adalink-grammar")
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]


def _make_matcher(output: StructuredOutput, tokens: LLTokenizer) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    options: Any = _JSON_OPTIONS
    try:
        if output.kind in ("json_schema", "json_object"):
            grammar = LLMatcher.grammar_from_json_schema(output.source, overrides=options)
        elif output.regex is not None:
            grammar = LLMatcher.grammar_from_regex(output.regex)
        elif output.grammar is not None:
            grammar = LLMatcher.grammar_from_lark(output.grammar)
        else:
            grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(map(_literal, output.choices or ())))
    except ValueError as error:
        raise _error(output.kind, str(error)) from error
    limits = LLParserLimits(
        max_grammar_size=_MOST_SYMBOLS,
        max_lexer_states=_MOST_STATES,
        step_max_items=_MOST_ITEMS,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        # The first mask makes most of the lexer: here, rather than between two steps of everybody's.
        mask = np.zeros((tokens.vocab_size + 31) // 32, np.uint32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    if matcher.is_error():
        raise _error(output.kind, matcher.get_error())
    return matcher


@contextmanager
def _panics(what: str) -> Iterator[None]:
    """Make a ``RequestError`` of a panic in llguidance, which is no ``Exception`` and would end the thread."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _error(what, str(error)) from error


def _literal(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text, ensure_ascii=False)


def _error(what: str, message: str) -> RequestError:
    """An error of llguidance's as the sender's."""
    told = " ".join(message.replace("<non-verbose/>", "").split())
    if told.startswith("NoExtension"):
        told = "no token of the vocabulary goes on with the text"
    return RequestError(f"{what} cannot be enforced: {told:.300}")
