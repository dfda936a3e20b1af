"""A text as a task: prompts about it give what the whole text gives, read again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.served import serve_in_thread
from helpers.soft_prompts import Soft, build_soft
from helpers.tiny_tokenizer import make_tokenizer, with_beginning

from adalink.export.adapter.document import export_prefix
from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import AdaLinkError, ContractError, DataError, DeploymentError, RequestError
from adalink.runtime.storage.adapter_spec import settings_of
from adalink.runtime.storage.kv_prefix_spec import KV_PREFIX_NAME
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main

TEXT, QUESTION = "Oil prices rose again in may.\n", "why?"
VARIANTS = ("onnxruntime-cpu", "portable")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Soft:
    made = build_soft("llama", tmp_path_factory.mktemp("document"), tokenizer=with_beginning(make_tokenizer()))
    export_base(made.model, made.folder, target="portable")
    for variant in VARIANTS:
        export_prefix(made.folder, TEXT, f"text-{variant}", variant=variant)
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_question_gives_what_the_whole_text_gives(own: Soft, variant: str) -> None:
    task = f"text-{variant}"
    with Deployment.open(own.folder, variant=variant) as deployment:
        whole = [*deployment.tokenizer.encode(TEXT), *deployment.tokenizer.encode_plain(QUESTION)]
        question = whole[-len(QUESTION) :]
        assert len(whole) - len(question) == deployment.manifest.tasks[task].prepended_positions
        output, limit = own.output(whole, None)
        received = deployment.run(input_ids=[question], tasks=task)["logits"][0]
        assert np.abs(received - output[-len(question) :]).max() <= limit
        expected = own.greedy(whole, None, 12)
        for prompt in (QUESTION, question):
            found = deployment.generate([prompt], tasks=task, max_new_tokens=12)[0]
            assert list(found.token_ids) == expected
            assert found.prompt_tokens == len(question), "the text is read no more, and no token begins one"
        mixed = deployment.generate([QUESTION, "hello"], tasks=[task, None], max_new_tokens=12)
        assert [row.token_ids for row in mixed] == [
            tuple(expected),
            tuple(own.greedy(deployment.tokenizer.encode("hello"), None, 12)),
        ]


def test_the_command_line_and_the_server_read_prompts_as_generate_does(own: Soft) -> None:
    task = "text-onnxruntime-cpu"
    words = ["run", str(own.folder), QUESTION, "--task", task, "--max-new-tokens", "12", "--json"]
    answer = json.loads(CliRunner().invoke(main, [*words, "--variant", "onnxruntime-cpu"]).stdout)
    with Deployment.open(own.folder, variant="onnxruntime-cpu", threads=1) as deployment:
        whole = [*deployment.tokenizer.encode(TEXT), *deployment.tokenizer.encode_plain(QUESTION)]
        assert answer["token_ids"] == own.greedy(whole, None, 12)
        assert answer["prompt_tokens"] == len(QUESTION)
        with serve_in_thread(deployment) as server:
            for model, beginning in ((task, []), (server.gateway.base_name, [1])):
                found = server.post("/tokenize", {"model": model, "prompt": QUESTION}).json()["tokens"]
                assert found == [*beginning, *deployment.tokenizer.encode_plain(QUESTION)]


def test_the_states_are_pytorchs(own: Soft) -> None:
    with Deployment.open(own.folder) as deployment:
        received = deployment.kv_prefix("text-onnxruntime-cpu")
        ids = deployment.tokenizer.encode(TEXT)
    assert received is not None
    with torch.no_grad():
        cache = own.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    for layer, part in enumerate(cache.layers):
        np.testing.assert_allclose(received[2 * layer], part.keys[0].numpy(), rtol=0, atol=2e-5)
        np.testing.assert_allclose(received[2 * layer + 1], part.values[0].numpy(), rtol=0, atol=2e-5)


def test_another_variant_refuses(own: Soft) -> None:
    with Deployment.open(own.folder, variant="portable") as deployment:
        for call in (
            lambda: deployment.generate([QUESTION], tasks="text-onnxruntime-cpu"),
            lambda: deployment.run(input_ids=[[5, 6]], tasks="text-onnxruntime-cpu"),
        ):
            with pytest.raises(ContractError, match=r"base variant onnxruntime-cpu, .* open the deployment with that"):
                call()


def test_a_deployment_without_the_variant_refuses(own: Soft, tmp_path: Path) -> None:
    from adalink.export.adapter.export import export_adapter

    export_base(own.model, tmp_path / "other", target="portable")
    entry = read_manifest(own.folder).tasks["text-onnxruntime-cpu"]
    folder = (own.folder / entry.config).parent
    with pytest.raises(ContractError, match="has only portable"):
        export_adapter(folder, tmp_path / "other")


def test_16_bits_are_half_the_file_and_are_rounded(own: Soft) -> None:
    manifest = export_prefix(own.folder, TEXT, "half", dtype="float16")
    half, full = manifest.tasks["half"], manifest.tasks["text-onnxruntime-cpu"]
    assert half.kv_prefix is not None
    assert half.kv_prefix.dtype == "float16"
    sizes = [manifest.files[task.weights].size_bytes for task in (half, full)]
    assert sizes[0] < 0.6 * sizes[1]
    with Deployment.open(own.folder) as deployment:
        received, exact = (deployment.kv_prefix(name) for name in ("half", "text-onnxruntime-cpu"))
    assert received is not None
    assert exact is not None
    np.testing.assert_array_equal(received, exact.astype(np.float16).astype(np.float32))
    assert settings_of(half)["kv_prefix"] == half.kv_prefix
    assert KV_PREFIX_NAME == "kv_prefix"


@pytest.mark.parametrize(
    ("text", "name", "error", "message"),
    [
        (" \n", "empty", DataError, "is empty"),
        ("a" * 64, "long", RequestError, "positions"),
        (TEXT, "no/name", DeploymentError, "task name"),
    ],
    ids=["empty", "long", "name"],
)
def test_a_text_that_cannot_be_a_task(own: Soft, text: str, name: str, error: type[AdaLinkError], message: str) -> None:
    before = read_manifest(own.folder)
    with pytest.raises(error, match=message):
        export_prefix(own.folder, text, name)
    assert read_manifest(own.folder) == before


def test_a_name_that_is_taken_is_said_before_the_text_is_read(own: Soft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deployment, "open", lambda *given, **named: pytest.fail("the engine was opened"))
    with pytest.raises(DeploymentError, match="--replace"):
        export_prefix(own.folder, TEXT, "text-portable")


@pytest.mark.slow
def test_an_encoder_reads_no_text_as_a_task(tmp_path: Path) -> None:
    made = build_soft("bert", tmp_path)
    with pytest.raises(AdaLinkError, match="KV"):
        export_prefix(made.folder, TEXT, "text")
