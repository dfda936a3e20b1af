"""Chat template and special tokens of an exported base: those of the tokenizer, and found to be right at export."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from helpers.chat_templates import TEMPLATES
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.base.export import export_base
from adalink.runtime import ChatOptions, Deployment, ModelError, RequestError
from adalink.runtime.storage.manifest_io import read_manifest


def test_special_tokens_are_the_tokenizers(tmp_path: Path) -> None:
    """A fine-tuned tokenizer ends a turn with another token than config.json says."""
    from transformers import AutoTokenizer

    model, tokenizer = FAMILIES["llama"](), make_tokenizer()
    tokenizer.eos_token, tokenizer.unk_token, tokenizer.chat_template = "b", None, TEMPLATES["every-token"]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_base(tmp_path / "model", tmp_path / "deployment")
    messages = [{"role": "user", "content": "hi"}]
    expected = AutoTokenizer.from_pretrained(tmp_path / "model").apply_chat_template(messages, tokenize=False)
    with Deployment.open(tmp_path / "deployment") as deployment:
        assert deployment.tokenizer.render_messages(messages) == expected
    assert "eos=b;" in expected
    base = read_manifest(tmp_path / "deployment").base
    assert base.special_tokens is not None
    assert base.special_tokens["eos_token"] == "b"
    again = export_base(tmp_path / "model", tmp_path / "deployment", replace=True).base
    # The table is in the data of the variant, whose folder is another one.
    assert msgspec.structs.replace(again, embeddings=base.embeddings) == base


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% break %}", "'break' outside loop"),
        ("{% if %}", "Expected an expression"),
        ("{{ lipsum() | wordwrap }}", "No filter named 'wordwrap'"),
        ("{% include 'x' %}", "cannot include"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_found_at_export(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=f"the chat template of the tokenizer .*{message}.*; or correct chat_template"):
        export_base(FAMILIES["llama"](), tmp_path / "deployment", tokenizer=tokenizer)
    assert not (tmp_path / "deployment" / "manifest.json").exists()


@pytest.mark.parametrize("names", [("default", "tool_use"), ("default", "rag"), ("tool_use",)])
def test_of_several_templates_the_one_for_tools_is_used_with_tools(tmp_path: Path, names: tuple[str, ...]) -> None:
    tokenizer = make_tokenizer()
    sources = {name: f"\n  {{% if 1 %}}\n{name} {{{{ messages[0].content }}}}\n{{% endif %}}\n \n" for name in names}
    tokenizer.chat_template = sources
    export_base(FAMILIES["llama"](), tmp_path / "deployment", tokenizer=tokenizer)
    messages, tools = [{"role": "user", "content": "hi"}], [{"type": "function", "function": {"name": "f"}}]
    with Deployment.open(tmp_path / "deployment") as deployment:
        for given in (None, tools):
            if given is None and "default" not in names:
                with pytest.raises(RequestError, match="a chat template for tools alone"):
                    deployment.tokenizer.render_messages(messages)
                continue
            expected = tokenizer.apply_chat_template(messages, tools=given, tokenize=False)
            assert (
                deployment.tokenizer.render_messages(messages, ChatOptions(tools=given, add_generation_prompt=False))
                == expected
            )
