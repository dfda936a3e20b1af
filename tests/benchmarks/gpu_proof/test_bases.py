"""Seeded bases: what transformers loads is what was drawn, of sensible size, in the real models' shapes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu_proof.bases import SHAPES, write_base, write_weights

PROMPT = "The deployment of a base, with 12 tasks: naïve, 中文."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "tiny", SHAPES["tiny"])


def test_weights_are_the_same_numbers_in_every_dtype(base: Path) -> None:
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    for dtype in (torch.bfloat16, torch.float16):
        other = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).state_dict()
        assert all(torch.equal(exact[name], other[name].float()) for name in exact)


def test_weights_have_the_size_of_their_place(base: Path) -> None:
    """Both signs, no zero, no row twice; a layer keeps the size of what goes through it, within a factor of two."""
    for name, tensor in AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict().items():
        values = tensor.numpy()
        assert (values != 0).all()
        if values.ndim == 1:
            assert ((values >= 0.5) & (values < 1)).all()
            continue
        wanted = 0.5 if "embed" in name or "lm_head" in name else 1.2 / math.sqrt(values.shape[-1])
        size = math.sqrt(float((values**2).mean()))
        assert wanted / 2 < size < wanted * 2, name
        assert abs(float(np.sign(values).mean())) < 0.1
        assert len(np.unique(values, axis=0)) == len(values)


def test_outputs_are_finite_and_follow_the_input(base: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        one, other = (model(**tokenizer(text, return_tensors="pt")).logits[0, -1] for text in (PROMPT, PROMPT[:-2]))
    assert torch.isfinite(one).all()
    assert one.std() > 0.1
    assert not torch.allclose(one, other, atol=0.1)


def test_the_tokenizer_gives_every_text_back(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert len(tokenizer) == SHAPES["tiny"].vocabulary
    assert tokenizer.decode(tokenizer(PROMPT)["input_ids"]) == PROMPT
    assert len(tokenizer("the deployment of a base")["input_ids"]) < 12


def test_a_seed_gives_the_same_file(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_weights(tmp_path / name, SHAPES["tiny"], seed)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1] != files[2]


def test_shapes_are_those_of_the_real_models() -> None:
    sizes = {name: sum(math.prod(sizes) for _, sizes in shape.tensors()) for name, shape in SHAPES.items()}
    assert sizes["135m"] == 134_515_008
    assert sizes["1b"] == 1_235_814_400
