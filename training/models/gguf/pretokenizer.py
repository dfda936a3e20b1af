r"""Pre-tokenizers of GGUF files: what each value of ``tokenizer.ggml.pre`` stands for.

A GGUF file names its pre-tokenizer; the regular expressions are known to the program that reads it. The table follows
llama.cpp (``src/llama-vocab.cpp``): each expression splits the pieces that the one before left, and matches and what is
between them become pieces of their own. Where llama.cpp rewrote an expression for its engine, the original of the
model's ``tokenizer.json`` stands here. Byte-level encoding follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adalink.runtime.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CODE_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_TAIL}"
_GPT4O = rf"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|\p{{N}}{{1,3}}|{_CASED_TAIL}"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_FALCON = r"[\p{P}\$\+<=>\^~\|`]+"
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_SEED = rf"{_SHORT}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer of byte-level BPE.

    Attributes:
        splits: regular expressions, applied in turn.
        ignore_merges: whether a piece that is a token of the vocabulary is that token, whatever the merges say.
        add_bos: whether texts begin with the bos token where the file leaves ``add_bos_token`` open.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _table() -> dict[str, PreTokenizer]:
    llama3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
    kinds = {
        PreTokenizer((GPT2,)): (
            *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "modern-bert"),
            *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum"),
        ),
        PreTokenizer((_DIGIT, GPT2)): (
            *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        ),
        llama3: (
            *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
            "jina-v5-nano",
        ),
        PreTokenizer((_LLAMA3,)): ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
        PreTokenizer((_QWEN2,)): (
            *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
            "grok-2",
        ),
        PreTokenizer((_QWEN35,)): ("qwen35",),
        PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): ("tekken",),
        PreTokenizer((_GPT4O,)): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        PreTokenizer((_BLOOM,)): ("bloom", "poro-chat", "gpt3-finnish"),
        PreTokenizer((_BLOOM, _DIGIT)): ("viking",),
        PreTokenizer((_FALCON, GPT2, "[0-9][0-9][0-9]")): ("falcon",),
        PreTokenizer((r"\p{N}{1,3}", _CJK, _CODE_WORDS)): ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, _DIGIT)): ("deepseek-coder",),
        PreTokenizer((_BAILING,)): ("bailingmoe", "bailingmoe2", "llada-moe"),
        PreTokenizer((_SEED,)): ("seed-coder",),
        PreTokenizer((r"\p{N}{1,3}", rf"{_SHORT}|{_WORD}|\p{{N}}+|{_TAIL}"), ignore_merges=True): ("minicpm5",),
    }
    return {name: kind for kind, names in kinds.items() for name in names}


PRE_TOKENIZERS = _table()


def find_pretokenizer(name: str | None, file: str, assumed: str | None = None) -> PreTokenizer:
    """The pre-tokenizer of a GGUF file with byte-level BPE.

    Args:
        name: its ``tokenizer.ggml.pre``; ``None`` if it has none.
        file: its name, for messages.
        assumed: the pre-tokenizer to assume where the file does not say one that is known.

    Raises:
        ConfigError: the name is unknown, and none is assumed; or the file says one, and another is assumed.
    """
    if assumed is not None and assumed not in PRE_TOKENIZERS:
        raise ConfigError(
            f"the pre-tokenizer to assume is {assumed!r}, expected one of {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    if name in PRE_TOKENIZERS:
        if assumed is not None and PRE_TOKENIZERS[assumed] != PRE_TOKENIZERS[name]:
            raise ConfigError(
                f"{file} says that its pre-tokenizer is {name!r}, and {assumed!r} is to be assumed, which splits texts "
                "in another way: leave --assume-pretokenizer out"
            )
        return PRE_TOKENIZERS[name]
    if assumed is not None:
        return PRE_TOKENIZERS[assumed]
    raise ConfigError(
        f"{file} has {'no tokenizer.ggml.pre' if name is None else f'tokenizer.ggml.pre = {name!r}'}, which does not "
        f"say how texts are split before BPE; expected one of {', '.join(sorted(PRE_TOKENIZERS))}: convert the model "
        "again, or name the one of the model's family with --assume-pretokenizer"
    )


def apply_pretokenizer(tokenizer: PreTrainedTokenizerBase, kind: PreTokenizer) -> None:
    """Give a fast tokenizer of byte-level BPE this pre-tokenizer, in place."""
    from tokenizers import Regex, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    ends_in_gpt2 = kind.splits[-1] == GPT2  # which ByteLevel has itself
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == _DIGIT
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in (kind.splits[:-1] if ends_in_gpt2 else kind.splits)
    ]
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=ends_in_gpt2)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, encode]) if steps else encode
    backend.model.ignore_merges = kind.ignore_merges
