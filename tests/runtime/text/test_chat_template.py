"""Chat templates against transformers' own rendering."""

from __future__ import annotations

import pytest
from helpers.tiny_tokenizer import make_tokenizer

from adalink.runtime import Deployment
from adalink.runtime.errors import RequestError
from adalink.runtime.text.tokenizer import Tokenizer


def test_chat_template_is_rendered_as_transformers_does(deployment: Deployment) -> None:
    tokenizer = make_tokenizer()
    for message in ("hello", "  two words ", "{{ 7 * 7 }}"):
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
        assert deployment.tokenizer.render_chat(message) == expected
    with pytest.raises(RequestError, match="not this word"):
        deployment.tokenizer.render_chat("forbidden")
    plain = deployment.generate(["hello"], max_new_tokens=8)[0]
    chat = deployment.generate(["hello"], max_new_tokens=8, chat=True)[0]
    assert chat.prompt_tokens > plain.prompt_tokens
    assert chat.token_ids != plain.token_ids


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% if loop.first %}{% break %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m['role'] == 'system' %}{% continue %}{% endif %}{{ m['content'] }}{% endfor %}",
        "{{ strftime_now('%Y') }} {{ messages[0]['content'] }}",
        "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
        "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ messages[0]['content'] }}{% endgeneration %}{{ a }}",
        "{% if tools is not none %}{{ raise_exception('tools') }}{% endif %}{{ messages[0]['content'] }}",
        "{% if documents is none %}{{ dict(messages[0])['content'] }}{% endif %}",
        "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = m['content'] %}{% endfor %}{{ n.t }}",
        "  {% if add_generation_prompt %}\n{{ bos_token }}{{ messages[0]['content'] }}{% endif %}\n",
    ],
)
def test_templates_have_what_transformers_gives_them(deployment: Deployment, template: str) -> None:
    reference = make_tokenizer()
    own = Tokenizer(reference.backend_tokenizer.to_str().encode(), template, deployment.manifest.base)
    for message in ("A <b> & 'c'", "é\n日本"):
        chat = [{"role": "user", "content": message}]
        expected = reference.apply_chat_template(
            chat, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        assert own.render_chat(message) == expected
        assert message[0] in expected


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages + 1 }}", "{{ 1 / 0 }}", "{{ messages.x.y }}"])
def test_a_template_that_cannot_be_rendered(deployment: Deployment, template: str) -> None:
    data = make_tokenizer().backend_tokenizer.to_str().encode()
    with pytest.raises(RequestError, match=r"chat_template.jinja (is no Jinja template|cannot render this message)"):
        Tokenizer(data, template, deployment.manifest.base).render_chat("a")
