"""Stop strings of a generation config: rows end where ``generate`` of transformers ends them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import FAMILIES, VOCAB_SIZE

from adalink.export.base.export import export_base
from adalink.runtime import Deployment, SamplingParams

STEPS = 12


def make_tokenizer() -> Any:
    """Tokens of one to three characters of a small alphabet, so that stop texts begin and end inside tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["".join(piece) for size in (2, 3) for piece in itertools.product("ab\n.", repeat=size)]
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *"abcdef\n.", *pieces, *"ghijklmnopqrstuvwxyz"][:VOCAB_SIZE]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def prompts() -> list[list[int]]:
    return np.random.default_rng(5).integers(4, VOCAB_SIZE, (10, 6)).tolist()


class Case:
    """A model whose texts are known, and stop texts that some of them hold."""

    def __init__(self, family: str) -> None:
        self.tokenizer = make_tokenizer()
        self.model: Any = FAMILIES[family]()
        self.longest = self.generated(None)
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in self.longest]
        usual = [text for text in texts if len(text) >= STEPS]
        self.stops = [usual[row][start : start + 3] for row, start in ((0, 5), (1, 2), (2, 8))]
        if family != "t5":  # its decoder does not see the prompt
            ends = [self.tokenizer.decode(row)[-2:] for row in prompts()]
            self.stops += [ends[row] + texts[row][:2] for row in (3, 4)]

    def generated(self, stops: list[str] | None) -> list[list[int]]:
        """What transformers answers, row by row, without end tokens."""
        settings = {} if stops is None else {"stop_strings": stops, "tokenizer": self.tokenizer}
        rows = []
        for prompt in prompts():
            ids = torch.tensor([prompt])
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=STEPS,
                **settings,
            )[0].tolist()
            made = output[1:] if self.model.config.is_encoder_decoder else output[len(prompt) :]
            rows.append(made[: made.index(2)] if 2 in made else made)
        return rows

    def deploy(self, folder: Path) -> Deployment:
        self.model.generation_config.stop_strings = self.stops
        try:
            export_base(self.model, folder, tokenizer=self.tokenizer)
        finally:
            self.model.generation_config.stop_strings = None
        return Deployment.open(folder, threads=1)


@pytest.fixture(scope="module", params=["llama", "t5"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_rows_end_as_in_transformers(case: Case, tmp_path: Path) -> None:
    expected = case.generated(case.stops)
    assert sum(len(row) < len(whole) for row, whole in zip(expected, case.longest, strict=True)) >= 3
    with case.deploy(tmp_path / "deployment") as deployment:
        together = deployment.generate(prompts(), max_new_tokens=STEPS)
        assert [list(row.token_ids) for row in together] == expected
        for row, prompt in zip(together, prompts(), strict=True):
            pieces: list[str] = []
            (alone,) = deployment.generate(
                [prompt], max_new_tokens=STEPS, stream=lambda _, piece, pieces=pieces: pieces.append(piece)
            )
            assert alone == row
            assert "".join(pieces) == row.text
            assert not any(stop in row.text for stop in case.stops)
        # A request's own stop texts take their place, and so does none.
        plain = SamplingParams(temperature=0, base_defaults=False)
        for settings in ({"stop": []}, {"stop": "never"}, {"sampling": plain}):
            rows = deployment.generate(prompts(), max_new_tokens=STEPS, **settings)
            assert [list(row.token_ids) for row in rows] == case.longest


def test_a_stop_text_of_the_request_begins_behind_the_prompt(tmp_path: Path) -> None:
    case = Case("llama")
    with case.deploy(tmp_path / "deployment") as deployment:
        (row,) = deployment.generate([prompts()[3]], max_new_tokens=STEPS, stop=case.stops[3:4])
        assert list(row.token_ids) == case.longest[3]
        (row,) = deployment.generate([prompts()[3]], max_new_tokens=STEPS)
        assert (row.text, row.finish_reason) == ("", "stop")
