r"""Tokens of a text by llama.cpp's rules, from a GGUF file itself: the reference for tokenizers made of such files.

The tokenizer that is exported and the one that transformers makes of a file come from one table of pre-tokenizers. So
they are compared with a third: llama.cpp's own regular expressions (``src/llama-vocab.cpp``), as it writes them for its
engine, and merges by rank in plain Python.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from adalink.training.models.gguf.header import read_header

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
# Of these llama.cpp rewrote the letters' case for ASCII alone; its source has the original beside it.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+ENDING|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*ENDING"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
# By the names of llama.cpp's enumeration, lower case; `_KINDS` says which value of `tokenizer.ggml.pre` is which.
EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "gpt2": (_GPT2,),
    "digits": (r"\p{N}", _GPT2),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "tekken": (_CASED.replace("ENDING", "") + r"|\p{N}" + _CASED_TAIL,),
    "gpt4o": (_CASED.replace("ENDING", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _CASED_TAIL,),
    "deepseek3": _DEEPSEEK3,
    "bloom": (_BLOOM,),
    "viking": (_BLOOM, r"\p{N}"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}
KINDS = {
    "gpt2": ("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "mellum", "modern-bert", "jina-es", "jina-de"),
    "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "llama3": ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2"),
    "tekken": ("tekken",),
    "gpt4o": ("gpt-4o", "llama4"),
    "deepseek3": ("deepseek-v3", "hunyuan-dense"),
    "bloom": ("bloom", "poro-chat", "gpt3-finnish"),
    "viking": ("viking",),
    "falcon": ("falcon",),
    "deepseek-coder": ("deepseek-coder",),
}
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
_IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")

# Texts in which pre-tokenizers differ: digits behind white space, runs of it, code, contractions, letters of any case.
PROBES = (
    "Steps:\n\n1. Boil\n2. Pour 12345 ml",
    "x  5 |  12 | 3.14 and 10,000",
    "if a:\n    return b[1:22] + 0x1F\n\n\n# don't, WE'LL, 'S",
    "abCdEF HTTPServer2 naïve Straße (2024)",
    "\t 7 \r\n8\n 9   ",
    "你好，世界 42 года ١٢ ½",
)


def split(text: str, kind: str) -> list[str]:
    """Pieces of a text: each expression splits the pieces of the one before; what is between matches stays a piece."""
    import regex

    pieces = [text]
    for expression in EXPRESSIONS[kind]:
        parts: list[str] = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(expression, piece):
                parts += [piece[end : match.start()], match.group()]
                end = match.end()
            parts.append(piece[end:])
        pieces = [part for part in parts if part]
    return pieces


class GgufTokens:
    """Tokens by llama.cpp's rules.

    Attributes:
        kind: which of ``EXPRESSIONS``; ``None`` for a tokenizer that is not byte-level BPE, or of which none is here.
    """

    def __init__(self, path: Path, assumed: str | None = None) -> None:
        metadata = read_header(path, arrays=(_TOKENS, _MERGES)).metadata
        name = metadata.get("tokenizer.ggml.pre")
        name = name if name in _KIND_OF else assumed
        self.kind = _KIND_OF.get(name or "") if metadata.get("tokenizer.ggml.model") == "gpt2" else None
        if self.kind is None:
            return
        self._ids = {token: index for index, token in enumerate(metadata[_TOKENS])}
        self._ranks = {tuple(merge.split(" ", 1)): rank for rank, merge in enumerate(metadata[_MERGES])}
        self._ignores_merges = name in _IGNORE_MERGES
        self._start = _start(metadata, adds_by_default=self._ignores_merges)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens in it."""
        assert self.kind is not None
        ids = list(self._start)
        for piece in split(text, self.kind):
            spelled = "".join(_byte_letters()[byte] for byte in piece.encode())
            for token in self._merge(spelled):
                known = self._ids.get(token)
                ids += [known] if known is not None else [self._ids[letter] for letter in token if letter in self._ids]
        return ids

    def _merge(self, piece: str) -> list[str]:
        if self._ignores_merges and piece in self._ids:
            return [piece]
        parts = list(piece)
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(parts)]
            best = min(ranks)
            if best == len(self._ranks):
                break
            place = ranks.index(best)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return parts


def _start(metadata: dict[str, Any], *, adds_by_default: bool) -> list[int]:
    is_added = metadata.get("tokenizer.ggml.add_bos_token", adds_by_default)
    return [metadata["tokenizer.ggml.bos_token_id"]] if is_added else []


@lru_cache(maxsize=1)
def _byte_letters() -> dict[int, str]:
    """The letter of each byte in byte-level vocabularies: printable Latin-1 stands for itself, the rest follows."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + index) for index, byte in enumerate(hidden)}
