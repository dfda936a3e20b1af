"""Stop texts that hold special tokens, and several end tokens."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from helpers.runtime import reseal
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.base.export import export_base
from adalink.runtime import Deployment, RequestError
from adalink.runtime.generation.sequence import SequenceState
from adalink.runtime.generation.stop_texts import StopTexts, check_stops, mark_stops
from adalink.runtime.storage.manifest_io import read_manifest

SPECIAL = {"<|im_end|>": 0, "<|im_end|>!": 1, "<x>": 2}


class Letters:
    """A tokenizer whose tokens are characters, and three special ones that decoding leaves out."""

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(token) for token in token_ids if token > 2)


def run(stops: list[str], tokens: list[int | str], eos: frozenset[int] = frozenset()) -> tuple[str, str, str, int]:
    """Text, streamed text, reason and number of tokens of a row."""
    sent: list[str] = []
    ids = [token for part in tokens for token in ([part] if isinstance(part, int) else map(ord, part))]
    row = SequenceState(0, (9,), Letters(), mark_stops(stops, SPECIAL), eos, lambda _, piece: sent.append(piece))  # type: ignore[arg-type]
    for token in ids:
        if row.finish_reason is None:
            row.push(token)
    result = row.finish()
    return result.text, "".join(sent), result.finish_reason, len(result.token_ids)


@pytest.mark.parametrize(
    ("stops", "tokens", "text", "reason", "count"),
    [
        (["<|im_end|>"], ["ab", 0, "cd"], "ab", "stop", 3),
        (["<|im_end|>"], [0, "ab"], "", "stop", 1),
        (["<|im_end|>\n"], ["ab", 0, "c", 0, "\nd"], "abc", "stop", 6),  # the whole text, not the token alone
        (["b<|im_end|>c"], ["abx", 2, "b", 0, "cd"], "abx", "stop", 7),
        (["<|im_end|><x>"], ["a", 0, "b", 0, 2, "c"], "ab", "stop", 5),
        (["<|im_end|>!"], ["a", 1, "b"], "a", "stop", 2),  # a special token that begins with another
        (["<|im_end|>!"], ["a", 0, "!b"], "a!b", "length", 4),
        (["<|im_end|>"], ["a<|im_end|>b"], "a", "stop", 11),  # written with ordinary tokens
        (["|>"], ["a", 0, "b"], "ab", "length", 3),  # a part of a special token is in no text
        (["<x>"], ["a", 0, "b"], "ab", "length", 3),
        (["zz", "<x>"], ["az", 2, "z"], "az", "stop", 3),
    ],
)  # fmt: skip
def test_special_tokens_in_stop_texts(
    stops: list[str], tokens: list[int | str], text: str, reason: str, count: int
) -> None:
    assert run(stops, tokens) == (text, text, reason, count)


def test_an_end_token_may_end_a_stop_text() -> None:
    assert run(["b<x>"], ["ab", 2], eos=frozenset({2})) == ("a", "a", "stop", 2)
    assert run(["c<x>"], ["ab", 2], eos=frozenset({2})) == ("ab", "ab", "stop", 2)


def test_marks_are_made_for_what_stop_texts_hold() -> None:
    assert mark_stops(["a"], SPECIAL) == StopTexts(("a",), {})
    marked = mark_stops(["a<x>"], SPECIAL)
    assert marked.marks == {2: "\ud800"}
    assert marked.texts == ("a<x>", "a\ud800")
    with pytest.raises(RequestError, match="a stop text holds '\\\\ud800'"):
        check_stops("\ud800")


@pytest.fixture(scope="module")
def saying(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A deployment whose model says a special token that no config calls an end token, after a few others."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    model = FAMILIES["llama"]()
    tokenizer.backend_tokenizer.add_special_tokens(["<|im_end|>"])
    token = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.resize_token_embeddings(token + 1)
    with torch.no_grad():  # logits from one dimension alone: the special token where it is positive
        model.model.norm.weight.zero_()
        model.model.norm.weight[0] = 1.0
        head = model.get_output_embeddings().weight
        head[:] = -1e-3 * torch.rand(head.shape, generator=torch.Generator().manual_seed(7))
        head[token, 0], head[:, 1:] = 1.0, 0
    folder = tmp_path_factory.mktemp("saying")
    export_base(model, folder, tokenizer=tokenizer)
    return folder, token


def test_a_deployment_ends_at_a_special_token(saying: tuple[Path, int]) -> None:
    folder, token = saying
    sent: list[str] = []
    with Deployment.open(folder) as deployment:
        for draft_tokens in (0, 8):
            settings = {"max_new_tokens": 8, "draft_tokens": draft_tokens}
            free = deployment.generate(["abcabc"], **settings)[0]
            ended = deployment.generate(
                ["abcabc"], stop=["<|im_end|>"], stream=lambda _, piece: sent.append(piece), **settings
            )[0]
            assert token in free.token_ids[:-1]
            assert ended.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
            assert ended.finish_reason == "stop"
            assert "".join(sent) == ended.text
            sent.clear()


def test_each_of_several_end_tokens_ends_a_row(saying: tuple[Path, int]) -> None:
    """The smallest, the largest and one between, in any order of the manifest."""
    folder, token = saying
    manifest = read_manifest(folder)
    with Deployment.open(folder) as deployment:
        free = deployment.generate(["abcabc"], max_new_tokens=8)[0].token_ids
    try:
        for ends in ((2, token), (token, 2), (2, token, 95), (0, 1, token)):
            reseal(folder, base=msgspec.structs.replace(manifest.base, eos_token_ids=ends))
            with Deployment.open(folder) as deployment:
                row = deployment.generate(["abcabc"], max_new_tokens=8)[0]
            assert row.token_ids == free[: free.index(token)]
            assert row.finish_reason == "stop"
    finally:
        reseal(folder, base=manifest.base)
