"""Prompts of `adalink verify` are cut to what a model takes, however little that is."""

import pytest
from helpers.runtime import random_adapter, write_adapter
from helpers.soft_prompts import TASKS
from helpers.tiny_models import llama
from helpers.tiny_tokenizer import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.errors import RequestError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.inputs.prompts import PROMPTS, fit, fitting_prompts
from adalink.tools.parity.suite import VerifyOptions, verify

# Bytes; with a token that begins every text; letters in threes, as where merging makes fewer tokens.
TOKENIZERS = {
    "bytes": lambda text: list(text.encode()),
    "begun": lambda text: [0, *text.encode()],
    "merged": lambda text: list(range(-(-len(text) // 3))),
}


@given(st.text(max_size=60), st.sampled_from(sorted(TOKENIZERS)), st.integers(-40, 80))
def test_a_text_is_cut_to_its_beginning_or_to_nothing(text, name, longest):
    encode = TOKENIZERS[name]
    found = fit(text, encode, longest)
    assert text.startswith(found)
    assert len(encode(found)) <= longest or not found
    if len(encode(text)) <= longest:
        assert found == text
    elif text and len(encode(text[0])) <= longest:
        assert found, "one letter fits"


def test_prompts_whose_first_letter_does_not_fit_are_left_out():
    encode = TOKENIZERS["bytes"]
    found = fitting_prompts(quick=False, encode=encode, longest=2)
    assert len(found) == sum(len(text[0].encode()) <= 2 for text in PROMPTS) == len(PROMPTS) - 1
    assert all(1 <= len(encode(text)) <= 2 for text in found)
    assert fitting_prompts(quick=True, encode=encode, longest=0) == []


@pytest.mark.parametrize(("positions", "soft"), [(32, 0), (20, 0), (40, 8)])
def test_a_context_without_room_for_generated_tokens_is_refused(tmp_path, positions, soft):
    network, model, folder = llama(), tmp_path / "model", tmp_path / "deployment"
    network.config.max_position_embeddings = positions
    network.save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    export_base(model, folder)
    if soft:
        base = read_manifest(folder).base
        own = TASKS["soft"] | {"soft_tokens": soft}
        adapter = random_adapter(base.fingerprint, base.hidden_size, 1, **own)
        export_adapter(write_adapter(tmp_path / "soft", adapter), folder)
    with pytest.raises(RequestError, match=rf"takes {positions - soft} positions here .* before 32 generated tokens"):
        verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True))
