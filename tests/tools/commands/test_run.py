"""`adalink run` against the deployment called directly."""

import json
import os
import pty
import shlex
import subprocess
import sys
from dataclasses import asdict

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.runtime import reseal
from helpers.tiny_deployments import make_deployment

from adalink.runtime.deployment import Deployment
from adalink.runtime.sampling.sampler import SamplingParams
from adalink.runtime.storage.generation_schema import GenerationDefaults
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.text.tokenizer import Tokenizer
from adalink.tools.cli import main
from adalink.tools.commands.run import read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tasks = {"alpha": {"seed": 1}, "beta": {"seed": 2}}
    return make_deployment(tmp_path_factory.mktemp("run"), "mistral", tasks)[1]


@pytest.fixture(scope="module")
def expected(folder):
    with Deployment.open(folder) as deployment:
        return {
            task: deployment.generate(["Hello 12"], tasks=task, max_new_tokens=6)[0].text
            for task in (None, "alpha", "beta")
        }


def run(*arguments, **settings):
    return CliRunner().invoke(main, ["run", *map(str, arguments)], **settings)


@pytest.mark.parametrize("task", [None, "alpha", "beta"])
def test_text_file_and_stdin_give_the_same(folder, expected, tmp_path, task):
    options = ["--max-new-tokens", 6, *(["--task", task] if task else [])]
    (tmp_path / "prompt.txt").write_text("Hello 12\n")
    results = [
        run(folder, "Hello 12", *options),
        run(folder, "--file", tmp_path / "prompt.txt", *options),
        run(folder, *options, input="Hello 12\n"),
    ]
    assert [result.stdout for result in results] == [expected[task] + "\n"] * 3
    assert len(set(expected.values())) == 3  # the tasks differ, so the option is heeded


def test_sampling_and_stops_reach_the_deployment(folder):
    how = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 3}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]
    with Deployment.open(folder) as deployment:
        samplings = [SamplingParams(**{**how, "seed": seed}) for seed in (3, 4)]
        free, other = (
            deployment.generate(["Hello 12"], max_new_tokens=12, sampling=sampling)[0].text for sampling in samplings
        )
        stop = free[3:5]
        sampling = SamplingParams(**how)
        cut = deployment.generate(["Hello 12"], max_new_tokens=12, stop=[stop], sampling=sampling)[0].text
    assert free != other
    assert cut != free
    drafted = run(folder, "Hello 12", "--max-new-tokens", 12, "--draft-tokens", 4, "--full-check", *options)
    assert drafted.stdout == free + "\n"
    assert run(folder, "Hello 12", "--max-new-tokens", 12, "--stop", stop, *options).stdout == cut + "\n"


@pytest.mark.parametrize(
    "how",
    [
        {"repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 12},
        {"presence_penalty": 2, "frequency_penalty": 2},
        {"presence_penalty": -2, "logit_bias": {20: 3.5, 33: -1}},
        {"temperature": 1.0, "min_p": 0.2, "seed": 5},
    ],
)
def test_penalties_reach_the_deployment(folder, how):
    with Deployment.open(folder) as deployment:
        expected = deployment.generate(["Hello 12"], max_new_tokens=12, sampling=SamplingParams(**how))[0].text
        if "presence_penalty" in how:
            assert expected != deployment.generate(["Hello 12"], max_new_tokens=12)[0].text
    biases = [f"--logit-bias={token}={bias}" for token, bias in how.get("logit_bias", {}).items()]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in how.items() if name != "logit_bias"] + biases
    assert run(folder, "Hello 12", "--max-new-tokens", 12, *options).stdout == expected + "\n"


@pytest.mark.parametrize("bias", ["7", "x=1", "7=", "7=1=2"])
def test_biases_that_are_none(folder, bias):
    result = run(folder, "x", "--logit-bias", bias)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"'{bias}': expected a token id and a number, such as 7=-2.5" in result.stderr.replace("\n", " ")


def test_generation_config_is_the_default(tmp_path):
    """Of a base that samples a few tokens, and with a penalty; it can be left out."""
    _, folder = make_deployment(tmp_path / "tiny", "llama", {})
    base = read_manifest(folder).base
    defaults = GenerationDefaults(repetition_penalty=1.6, max_new_tokens=5)
    plain = run(folder, "Hello 12", "--max-new-tokens", 5).stdout
    reseal(folder, base=msgspec.structs.replace(base, generation=defaults))
    penalised = run(folder, "Hello 12").stdout
    assert penalised != plain
    assert run(folder, "Hello 12", "--ignore-generation-config", "--max-new-tokens", 5).stdout == plain
    assert run(folder, "Hello 12", "--repetition-penalty", 1).stdout == plain
    sampled = msgspec.structs.replace(defaults, do_sample=True, temperature=5.0)
    reseal(folder, base=msgspec.structs.replace(base, generation=sampled))
    assert len({run(folder, "Hello 12", "--seed", seed).stdout for seed in range(4)}) > 1
    assert run(folder, "Hello 12", "--top-k", 1).stdout == penalised
    assert run(folder, "Hello 12", "--temperature", 0).stdout == penalised
    refused = run(folder, "Hello 12", "--temperature", 0, "--top-k", 1)
    assert "--top-k needs a --temperature above 0" in refused.stderr


def test_a_byte_order_mark_is_no_part_of_a_prompt(folder, expected, tmp_path):
    (tmp_path / "prompt.txt").write_text("Hello 12", encoding="utf-8-sig")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hello 12"}', encoding="utf-8-sig")
    options = ["--max-new-tokens", 6]
    assert run(folder, "--file", tmp_path / "prompt.txt", *options).stdout == expected[None] + "\n"
    assert run(folder, *options, input=(tmp_path / "prompt.txt").read_bytes()).stdout == expected[None] + "\n"
    assert json.loads(run(folder, "--jsonl", tmp_path / "rows.jsonl", *options).stdout)["text"] == expected[None]


def test_jsonl_rows_keep_order_and_task(folder, expected, tmp_path):
    rows = [{"prompt": "Hello 12", "task": task} for task in ("beta", None, "alpha")] * 4 + [{"prompt": "Hello 12"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(folder, "--jsonl", tmp_path / "rows.jsonl", "--task", "beta", "--max-new-tokens", 6)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == [expected[row.get("task", "beta")] for row in rows]


def test_jsonl_lines_end_at_line_feeds_alone(folder, tmp_path):
    """Other separators of Unicode may stand in a JSON text as they are."""
    prompts = ["a\u2028b", "a\u2029b", "a\x85b", "c"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    result = run(folder, "--jsonl", tmp_path / "rows.jsonl", "--max-new-tokens", 2)
    assert result.exit_code == 0, result.stderr
    assert [json.loads(line)["prompt"] for line in result.stdout.split("\n")[:-1]] == prompts


def test_an_empty_prompt_is_named_before_anything_is_generated(folder, tmp_path):
    rows = [{"prompt": "a"}] * 9 + [{"prompt": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(folder, "--jsonl", tmp_path / "rows.jsonl", "--max-new-tokens", 2)
    assert result.exit_code == 2
    assert "rows.jsonl:10: the prompt has no tokens" in result.stderr
    assert not result.stdout
    single = run(folder, "", "--max-new-tokens", 2)
    assert (single.exit_code, single.stdout) == (2, "")
    assert "the prompt has no tokens" in single.stderr


@pytest.mark.parametrize("options", [[], ["--chat"]])
def test_every_prompt_is_tokenized_once(folder, tmp_path, monkeypatch, options):
    """The ids that show that no row is empty are those that are answered."""
    encoded = []

    def counted(name):
        method = getattr(Tokenizer, name)

        def call(self, text, *arguments):
            encoded.append(text)
            return method(self, text, *arguments)

        return call

    for name in ("encode", "encode_chat"):
        monkeypatch.setattr(Tokenizer, name, counted(name))
    monkeypatch.setattr(Tokenizer, "render_chat", lambda self, message, options: f"user: {message}")
    prompts = [f"{'abc'[row % 3]} {row}" for row in range(11)]
    rows = [{"prompt": prompt, "task": "alpha"} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(folder, "--jsonl", tmp_path / "rows.jsonl", "--max-new-tokens", 3, *options)
    assert result.exit_code == 0, result.stderr
    assert encoded == prompts
    settings = {"tasks": "alpha", "max_new_tokens": 3, "chat": bool(options)}
    with Deployment.open(folder) as deployment:
        batches = [deployment.generate(prompts[start : start + 8], **settings) for start in (0, 8)]
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    expected = [row for batch in batches for row in batch]
    for answer, row in zip(answers, expected, strict=True):
        assert answer == {"prompt": answer["prompt"], "task": "alpha", **json.loads(json.dumps(asdict(row)))}


def test_row_that_the_chat_template_refuses_is_named(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "forbidden"}')
    result = run(folder, "--jsonl", tmp_path / "rows.jsonl", "--chat", "--max-new-tokens", 1)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "rows.jsonl:2: base/chat_template.jinja cannot render this message" in result.stderr


def test_json_holds_tokens_and_reason(folder, expected):
    answer = json.loads(run(folder, "Hello 12", "--json", "--max-new-tokens", 6).stdout)
    assert answer["text"] == expected[None]
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["prompt_tokens"] == 8


def test_json_file_beside_the_text(folder, expected, tmp_path):
    path, prompt = tmp_path / "answer.jsonl", "Hello 12"
    shown = run(folder, prompt, "--json-file", path, "-n", 6, "-q")
    assert (shown.stdout, shown.stderr) == (f"{expected[None]}\n", "")
    assert path.read_text() == run(folder, prompt, "--json", "-n", 6).stdout


def test_json_lines_are_json_whatever_the_prompt_holds(folder):
    """Control characters and bidi controls, which a terminal is shown as escapes."""
    prompt = "a\x9b\x7f\u202e"
    line = run(folder, prompt, "--json", "-n", 1).stdout
    assert json.loads(line)["prompt"] == prompt
    assert not set(prompt[1:]) & set(line)


def test_streams_on_a_terminal(folder, expected):
    """A real terminal: the same text, and an end of line."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "adalink.tools", "run", str(folder), "Hello 12", "--max-new-tokens", "6"]
    done = subprocess.run(command, stdout=follower, check=True, stdin=subprocess.DEVNULL)
    os.close(follower)
    assert done.returncode == 0
    assert os.read(leader, 1 << 16).decode().replace("\r\n", "\n") == expected[None] + "\n"
    os.close(leader)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not JSON"),
        ('{"text": "x"}', ":2: expected"),
        ('{"prompt": "x", "task": 3}', ":2: task is 3"),
        ('{"prompt": "x", "Task": "alpha"}', ":2: field 'Task' is none of a row's: did you mean 'task'?"),
        ('{"prompt": "x", "tasks": "alpha"}', ":2: field 'tasks' is none of a row's: did you mean 'task'?"),
        ('{"prompt": "x", "image": "a.png"}', ":2: field 'image' is none of a row's: did you mean 'images'?"),
        ('{"prompt": ' + "[" * 100_000, ":2: not JSON"),
        ('{"prompt": "x", "task": ' + "1" * 5000 + "}", ":2: not JSON"),
        (r'{"prompt": "a\ud800"}', r":2: not JSON: it holds \ud800, half of a character"),
    ],
)
def test_bad_row_is_named(folder, tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + line)
    result = run(folder, "--jsonl", tmp_path / "rows.jsonl")
    assert result.exit_code == 2
    assert message in result.stderr


def test_other_fields_are_not_read(tmp_path):
    """Rows of training data, and rows with notes of their own, can be run as they are."""
    row = {"prompt": "x", "completion": "y", "label": "y", "prompt_id": 3, "text": "z", "mask": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (read,) = read_rows(tmp_path / "rows.jsonl", "alpha")
    assert (read.prompt, read.task, read.images) == ("x", "alpha", ())


def test_wrong_use_exits_2(folder, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for arguments, message in (
        ([folder, "x", "--task", "gamma", "--max-new-tokens", 4], "'gamma' is not deployed"),
        ([folder, "x", "--file", tmp_path / "empty.jsonl"], "give one of"),
        ([folder, "--jsonl", tmp_path / "empty.jsonl"], "holds no rows"),
        ([tmp_path, "x"], "holds no manifest.json"),
        ([folder, "x", "--temperature", -1], "temperature"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr


@pytest.mark.parametrize(
    ("redirected", "message"), [("<&-", "no prompt: give TEXT"), ("'Hello 12' --max-new-tokens 6 >&-", "")]
)
def test_a_closed_standard_stream_is_no_bug(folder, redirected, message):
    """As under some schedulers of jobs."""
    command = f"{shlex.quote(sys.executable)} -m adalink.tools run {shlex.quote(str(folder))} {redirected}"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == (2 if message else 0), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--top-k", "--top-p", "--min-p"])
def test_sampling_without_a_temperature_is_refused(folder, option):
    for temperature in ([], ["--temperature", 0]):
        result = run(folder, "x", option, 1, *temperature, "--max-new-tokens", 2)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{option} needs a --temperature above 0" in result.stderr
    assert run(folder, "x", option, 1, "--temperature", 1, "--max-new-tokens", 2).exit_code == 0


def test_encoder_gives_mean_states(tmp_path):
    _, folder = make_deployment(tmp_path / "bert", "bert", {"alpha": {"seed": 1}})
    answer = json.loads(run(folder, "Hello", "--task", "alpha").stdout)
    with Deployment.open(folder) as deployment:
        ids = deployment.tokenizer.encode("Hello")
        states = deployment.run(input_ids=[ids], tasks="alpha")["last_hidden_state"][0]
    np.testing.assert_allclose(answer["mean"], states.mean(axis=0), rtol=1e-6)
    for option in (["--chat"], ["--stop", "x"], ["--max-new-tokens", 3], ["--temperature", 1], ["--draft-tokens", 0]):
        result = run(folder, "Hello", *option)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{option[0]} is for generating, and tiny is an encoder: leave it out" in result.stderr


@pytest.mark.parametrize("chat", [[], ["--chat"]])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_bytes_that_are_not_utf8_exit_2(folder, locale, chat):
    """In some locales Python hands undecodable bytes on as halves of characters."""
    command = [sys.executable, "-m", "adalink.tools", "run", folder, *chat, "--max-new-tokens", "2"]
    settings = {"capture_output": True, "env": {**os.environ, "LC_ALL": locale}}
    argument = subprocess.run([*command, b"caf\xe9"], check=False, stdin=subprocess.DEVNULL, **settings)
    piped = subprocess.run(command, check=False, input=b"caf\xe9", **settings)
    for done, message in ((argument, rb"TEXT holds '\udce9' at character 3"), (piped, b"standard input")):
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert b"Traceback" not in done.stderr
