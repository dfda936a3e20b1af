"""Structured output: every complete text is of its schema, expression or grammar, by checks written out here."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.json_schemas import draw_schema, is_valid
from helpers.runtime import reseal
from helpers.tiny_tokenizer import SPECIALS, make_tokenizer

from adalink.runtime import Deployment, Request, SamplingParams, StructuredOutput
from adalink.runtime.errors import BackendUnavailableError, RequestError
from adalink.runtime.generation.speculative_decoding import PromptLookup
from adalink.runtime.sampling import grammar
from adalink.runtime.sampling.grammar import GrammarProcessor, Grammars
from adalink.runtime.storage.generation_schema import GenerationDefaults
from adalink.runtime.storage.manifest_io import read_manifest

# As many as the other tiny tokenizer has, with braces.
CHARACTERS = tuple(character for character in map(chr, range(32, 127)) if character not in "`^~")


@pytest.fixture(scope="module")
def folder(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny deployment with a tokenizer that can write JSON."""
    from tokenizers.models import WordLevel

    tokenizer = make_tokenizer().backend_tokenizer
    vocabulary = {token: index for index, token in enumerate((*SPECIALS, *CHARACTERS))}
    tokenizer.model = WordLevel(vocabulary, unk_token="<unk>")
    made = tmp_path_factory.mktemp("structured") / "deployment"
    shutil.copytree(llama.folder, made)
    (made / str(read_manifest(made).base.tokenizer)).write_text(tokenizer.to_str())
    reseal(made)
    return made


@pytest.fixture(scope="module")
def opened(folder: Path) -> Iterator[Deployment]:
    with Deployment.open(folder, threads=1) as deployment:
        yield deployment


def ask(opened: Deployment, output: StructuredOutput, seed: int = 0, **settings: Any) -> Request:
    """A request that samples: the tiny model's own choice is no better than chance."""
    sampling = SamplingParams(temperature=1.5, seed=seed)
    return Request("wheat", structured=output, **({"max_new_tokens": 50, "sampling": sampling} | settings))


OUTPUTS: dict[str, tuple[StructuredOutput, Any]] = {
    "schema": (
        StructuredOutput(
            json_schema={
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 12}, "s": {"enum": ["x", 'y"\\']}},
                "required": ["n", "s"],
                "additionalProperties": False,
            }
        ),
        lambda text: 3 <= json.loads(text)["n"] <= 12 and json.loads(text)["s"] in ("x", 'y"\\'),
    ),
    "schema as text": (
        StructuredOutput(json_schema='{"type": "array", "items": {"type": "boolean"}, "maxItems": 4}'),
        lambda text: all(isinstance(item, bool) for item in json.loads(text)),
    ),
    "any JSON": (StructuredOutput(json_object=True), lambda text: isinstance(json.loads(text), dict)),
    "expression": (
        StructuredOutput(regex=r"[A-Z][a-z]{2,5}(, \d{4})?|no/yes"),
        re.compile(r"[A-Z][a-z]{2,5}(, \d{4})?|no/yes").fullmatch,
    ),
    "grammar": (
        StructuredOutput(grammar='start: term ("+" term)*\nterm: /[0-9]{1,3}/ | "(" start ")"'),
        lambda text: isinstance(eval(re.sub(r"0*(\d)", r"\1", text)), int),
    ),
    "choices": (
        StructuredOutput(choices=["yes", "no", "no way", 'a "quoted" \\ one', "a/b|c.*"]),
        lambda text: text in ["yes", "no", "no way", 'a "quoted" \\ one', "a/b|c.*"],
    ),
}


def passes(check: Any, text: str) -> bool:
    try:
        return bool(check(text))
    except (ValueError, SyntaxError, NameError, TypeError, KeyError):
        return False


def texts_of(opened: Deployment, output: StructuredOutput, **settings: Any) -> list[str]:
    """Complete texts of a few seeds."""
    handles = [opened.submit(ask(opened, output, seed, **settings)) for seed in range(12)]
    results = [handle.result(60) for handle in handles]
    return [result.text for result in results if result.finish_reason == "stop"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_complete_texts_are_valid(opened: Deployment, name: str) -> None:
    output, check = OUTPUTS[name]
    texts = texts_of(opened, output)
    assert all(passes(check, text) for text in texts)
    assert len(set(texts)) >= (1 if name == "any JSON" else 2)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_mask_that_is_off_would_show(opened: Deployment, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    output, check = OUTPUTS[name]
    monkeypatch.setattr(GrammarProcessor, "__call__", lambda *given: None)
    texts = texts_of(opened, output, stop_token_ids=list(range(4, 20)))
    assert len(texts) > 3
    assert not all(passes(check, text) for text in texts)


def test_a_mask_one_step_late_would_show(opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    call = GrammarProcessor.__call__

    def late(self: GrammarProcessor, scores: Any, sequence: Any) -> None:
        if len(sequence) > self._begin:
            call(self, scores, sequence)

    monkeypatch.setattr(GrammarProcessor, "__call__", late)
    with pytest.raises(RequestError, match="structured output cannot be enforced"):
        texts_of(opened, OUTPUTS["choices"][0])


def test_texts_of_drawn_schemas_are_valid(opened: Deployment) -> None:
    """Twenty schemas, each with several seeds, all in one batch."""
    schemas = [draw_schema(np.random.default_rng(seed)) for seed in range(20)]
    handles = [
        (schema, opened.submit(ask(opened, StructuredOutput(json_schema=schema), seed)))
        for schema in schemas
        for seed in range(4)
    ]
    complete = [(schema, result) for schema, handle in handles if (result := handle.result(60)).finish_reason == "stop"]
    for schema, result in complete:
        assert is_valid(json.loads(result.text), schema), (schema, result.text)
    assert len(complete) > 60
    # The check itself can fail: no text is of every schema.
    assert not all(is_valid(json.loads(complete[0][1].text), schema) for schema in schemas)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_alone_in_a_batch_and_drafted(opened: Deployment, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    requests = [
        ask(opened, output, seed, sampling=SamplingParams(temperature, seed=seed), task=task)
        for output, _ in OUTPUTS.values()
        for seed, task in enumerate(("alpha", None))
    ]
    plain = [opened.submit(Request(**{**vars(request), "draft_tokens": 0})).result(60) for request in requests]
    together = [opened.submit(request) for request in requests]
    assert [handle.result(60) for handle in together] == plain
    lengths: list[int] = []
    draft = PromptLookup.draft
    monkeypatch.setattr(PromptLookup, "draft", lambda *given: (made := draft(*given), lengths.append(len(made)))[0])
    drafted = [Request(**{**vars(request), "draft_tokens": 8}) for request in requests]
    assert [opened.submit(request).result(60) for request in drafted] == plain
    assert sum(lengths) > 0


def test_the_end_is_where_the_text_is_complete(opened: Deployment) -> None:
    """Stop tokens of the request are no content, and end tokens come nowhere else."""
    output, stop = StructuredOutput(regex="5{4}x?"), 4 + CHARACTERS.index("x")
    assert set(texts_of(opened, output)) == {"5555", "5555x"}
    assert set(texts_of(opened, output, stop_token_ids=[stop])) == {"5555"}
    with pytest.raises(RequestError, match="ban every token for new token 5"):
        texts_of(opened, StructuredOutput(regex="5{4}x"), stop_token_ids=[stop])
    fixed = ask(opened, StructuredOutput(choices=["wheat"]), sampling=SamplingParams(logit_bias={2: 100}))
    assert opened.submit(fixed).result(60).text == "wheat"
    assert opened.submit(fixed).result(60).finish_reason == "stop"
    forced = ask(opened, output, max_new_tokens=3, sampling=SamplingParams(forced_eos_token_ids=[2]))
    assert opened.submit(forced).result(60).finish_reason == "length"


def test_stop_texts_of_the_base_do_not_cut_it(folder: Path, tmp_path: Path) -> None:
    """Those of the request do."""
    with_stops = shutil.copytree(folder, tmp_path / "deployment")
    base = read_manifest(with_stops).base
    reseal(with_stops, base=msgspec.structs.replace(base, generation=GenerationDefaults(stop_strings=("ea",))))
    output = StructuredOutput(choices=["wheat"])
    with Deployment.open(with_stops, threads=1) as opened:
        assert opened.submit(ask(opened, output)).result(60).text == "wheat"
        assert opened.submit(ask(opened, output, stop=["ea"])).result(60).text == "wh"


def test_what_no_token_can_write(opened: Deployment) -> None:
    with pytest.raises(RequestError, match="no token of the vocabulary goes on with the text"):
        opened.submit(ask(opened, StructuredOutput(choices=["é"]))).result(60)


def test_a_forced_first_token_is_no_part_of_it(t5: Any) -> None:
    """An encoder-decoder's, in a closed batch."""
    with Deployment.open(t5.folder, threads=1) as opened:
        sampling = SamplingParams(temperature=1.5, seed=3, forced_bos_token_id=9)
        requests = [
            ask(opened, StructuredOutput(regex=regex), sampling=sampling, task=task, max_new_tokens=9)
            for regex, task in (("[a-c]{3}", "alpha"), ("[0-9]{2}", None))
        ]
        results = [handle.result(60) for handle in [opened.submit(request) for request in requests]]
        assert [result.finish_reason for result in results] == ["stop", "stop"]
        assert re.fullmatch("%[a-c]{3}", results[0].text)
        assert re.fullmatch("%[0-9]{2}", results[1].text)


def test_grammars_are_compiled_once(opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[StructuredOutput] = []
    original = grammar._compile
    monkeypatch.setattr(
        grammar, "_compile", lambda output, tokens: (compiled.append(output), original(output, tokens))[1]
    )
    for pattern in ("ab", "ab", "abc", "ab"):
        request = ask(opened, StructuredOutput(regex=pattern))
        assert opened.submit(request).result(60).text == pattern
    assert [output.regex for output in compiled] == ["ab", "abc"]
    for number in range(200):  # as many as are kept: the first ones are not
        opened.submit(ask(opened, StructuredOutput(choices=[f"x{number}"])))
    opened.submit(ask(opened, StructuredOutput(regex="ab"))).result(60)
    assert len(compiled) == 203


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        ({}, "has nothing, expected one of json_schema, regex"),
        ({"regex": "a", "choices": ["b"]}, "has regex, choices, expected one of"),
        ({"regex": 3}, "regex is 3, expected a text"),
        ({"regex": "\ud800"}, "regex holds"),
        ({"grammar": b"start"}, "grammar is b'start', expected a text"),
        ({"choices": "yes"}, "choices is 'yes', expected a list"),
        ({"choices": []}, "expected a list of at least one text"),
        ({"choices": ["a", ""]}, "choices holds '', expected texts"),
        ({"json_object": 1}, "json_object is 1, expected True or False"),
        ({"json_schema": [1]}, r"json_schema is \[1\], expected an object"),
        ({"json_schema": "true"}, "json_schema is True, expected an object"),
        ({"json_schema": "{"}, "json_schema cannot be read as JSON"),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema cannot be read as JSON"),
        ({"json_schema": {"enum": [object()]}}, "json_schema cannot be read as JSON"),
        (
            {"json_schema": {"items": {"minProperties": 2, "type": "object"}}},
            "minProperties 2 with names",
        ),
        ({"json_schema": {"enum": ["a" * 50_000]}}, "json_schema has 500.. characters, expected at most 50000"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], wording: str) -> None:
    with pytest.raises(RequestError, match=wording):
        StructuredOutput(**settings)


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        ({"json_schema": {"type": "objec"}}, "json_schema cannot be enforced: Invalid type: objec"),
        ({"json_schema": {"not": {}}}, "Unimplemented keys"),
        ({"json_schema": {"not": {}, "x-guidance": {"lenient": True}}}, "Unimplemented keys"),
        ({"json_schema": {"$ref": "http://example.com/schema"}}, "not present in a registry"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json_schema": json.dumps({"items": {}}).replace("{}", '{"items":' * 2000 + "{}" + "}" * 2000)}, "recursion"),
        ({"regex": "("}, "regex cannot be enforced: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: missing"}, "unknown name"),
        ({"grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "too deeply nested"),
        ({"grammar": "start: " + '"a"? ' * 9000}, "Too many items"),
    ],
)
def test_what_cannot_be_enforced_is_refused(opened: Deployment, settings: dict[str, Any], wording: str) -> None:
    with pytest.raises(RequestError, match=wording):
        opened.submit(ask(opened, StructuredOutput(**settings)))


class PanicException(BaseException):
    """As PyO3's, which is no ``Exception``."""


def test_a_panic_fails_the_request_alone(opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*given: Any) -> None:
        raise PanicException("index out of bounds")

    request = ask(opened, StructuredOutput(regex="[a-c]{3}"))
    expected = opened.submit(request).result(60)
    processors: list[GrammarProcessor] = []
    original = Grammars.processor
    monkeypatch.setattr(Grammars, "processor", lambda *given: (processors.append(original(*given)), processors[-1])[1])  # type: ignore[arg-type]
    other = opened.submit(ask(opened, StructuredOutput(regex="[a-c]{9}"), processors=[lambda *given: time.sleep(0.01)]))
    processors[0]._matcher = SimpleNamespace(is_error=panic, consume_token=panic)  # type: ignore[assignment]
    with pytest.raises(RequestError, match="structured output cannot be enforced: index out of bounds"):
        other.result(60)
    assert opened.submit(request).result(60) == expected
    monkeypatch.setattr(grammar, "_make_matcher", panic)
    with pytest.raises(RequestError, match="regex cannot be enforced: index out of bounds"):
        opened.submit(ask(opened, StructuredOutput(regex="never compiled")))


def test_chains_of_references_end_no_process(opened: Deployment) -> None:
    """Each is a step deeper in llguidance, which would overflow a thread's usual stack."""
    names = {str(index): {"items": {"$ref": f"#/$defs/{index + 1}"}} for index in range(1200)}
    schema = {"$defs": {**names, "1200": {"type": "null"}}, "$ref": "#/$defs/0", "type": "array"}
    text = opened.submit(ask(opened, StructuredOutput(json_schema=schema))).result(60).text
    assert text.startswith("[")
    rules = "\n".join(f"x{index}:x{index + 1}" for index in range(3500))
    lark = StructuredOutput(grammar=f'start:x0\n{rules}\nx3500:"a"')
    assert opened.submit(ask(opened, lark)).result(60).text == "a"


def test_the_package_is_named_where_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with Deployment.open(folder, threads=1) as fresh:
        with pytest.raises(BackendUnavailableError, match=r"pip install 'adalink-kit\[structured\]'"):
            fresh.submit(ask(fresh, StructuredOutput(regex="a")))
        with pytest.raises(RequestError, match="structured is 'a', expected a StructuredOutput"):
            fresh.submit(Request("wheat", structured="a"))  # type: ignore[arg-type]
