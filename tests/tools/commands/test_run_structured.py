"""``adalink run --json-schema`` and ``--regex``: the texts are those of ``Deployment.submit``."""

import json
import re

import pytest
from click.testing import CliRunner
from helpers.tiny_deployments import make_deployment

from adalink.runtime import Deployment, Request, SamplingParams, StructuredOutput
from adalink.tools.cli import main

SCHEMA = {"type": "array", "items": {"enum": [1, "x", True]}, "minItems": 2, "maxItems": 5}
SAMPLED = ("--temperature", "1.5", "--seed", "4", "--max-new-tokens", "30")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_deployment(tmp_path_factory.mktemp("structured"), "llama", {"alpha": {"seed": 1}})[1]


def run(*arguments):
    return CliRunner().invoke(main, ["run", *map(str, arguments)])


def test_texts_are_of_the_schema(folder, tmp_path):
    path, rows = tmp_path / "schema.json", tmp_path / "rows.jsonl"
    path.write_text(json.dumps(SCHEMA))
    prompts = ["Hello 12", "wheat", "oil", "Q"]
    rows.write_text("".join(json.dumps({"prompt": prompt, "task": "alpha"}) + "\n" for prompt in prompts))
    texts = [
        json.loads(line)["text"]
        for line in run(folder, "--jsonl", rows, "--json-schema", path, *SAMPLED).stdout.splitlines()
    ]
    output, sampling = StructuredOutput(json_schema=SCHEMA), SamplingParams(1.5, seed=4)
    with Deployment.open(folder) as opened:
        expected = [
            opened.submit(
                Request(prompt, task="alpha", structured=output, choice=row, sampling=sampling, max_new_tokens=30)
            )
            for row, prompt in enumerate(prompts)
        ]
        assert texts == [handle.result(60).text for handle in expected]
    for text in texts:
        assert 2 <= len(json.loads(text)) <= 5
        assert all(item in (1, "x") or item is True for item in json.loads(text))
    assert len(set(texts)) > 1


def test_a_text_matches_the_expression(folder):
    result = run(folder, "Hello", "--regex", "[a-c]{4}", *SAMPLED)
    assert re.fullmatch("[a-c]{4}\n", result.stdout)


@pytest.mark.parametrize(
    ("options", "wording"),
    [
        (["--regex", "("], "regex cannot be enforced"),
        (["--regex", "a", "--json-schema", "x.json"], "give one of --json-schema and --regex"),
        (["--json-schema", "missing.json"], "missing.json: cannot be read as UTF-8 text"),
    ],
)
def test_what_cannot_be_used_is_named(folder, options, wording):
    result = run(folder, "Hello", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert wording in result.stderr
    assert "Traceback" not in result.stderr
