"""A deployment in Node: greedy tokens of PyTorch and of the kit, tasks switched in place, and faults that are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.genai_host import NEW, greedy
from helpers.sites import TASKS, ask_node, generate_in_node, run_script, seal
from helpers.tied_codes import tied
from helpers.tiny_deployments import seeded_adapter, write_adapter
from helpers.tiny_tokenizer import make_bpe_tokenizer
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.export.pipeline.texts import TEXTS
from adalink.export.web.export import export_web
from adalink.export.web.tokenizer import rewrite_tokenizer
from adalink.runtime import Deployment, SamplingParams
from adalink.training.models.loading import load_base

PROMPTS = ([5], [7, 0, 2, 9], list(range(10, 40)))


def test_tokens_are_those_of_pytorch(site):
    """Tasks take turns on one model that is loaded once."""
    adapters = {None: None, **{name: seeded_adapter(site.model, **settings) for name, settings in TASKS.items()}}
    model = load_base(site.model)
    cases = [(prompt, task) for prompt in PROMPTS for task in adapters]
    requests = [{"prompt": prompt, "task": task, "maxNewTokens": NEW} for prompt, task in cases]
    answers = ask_node(site.folder, requests)
    ends = (2, None)
    expected = [
        [token for token in greedy(model, prompt, adapters[task]) if token not in ends] for prompt, task in cases
    ]
    assert [answer["tokens"] for answer in answers] == expected
    assert len({tuple(tokens) for tokens in expected}) > len(PROMPTS)


def test_texts_are_those_of_the_kit(site):
    texts = [*TEXTS, "the other thing", "<bos>the<eos>"]
    requests = [{"prompt": text, "task": "gelu", "maxNewTokens": 8} for text in texts]
    with Deployment.open(site.deployment, threads=1) as deployment:
        made = deployment.generate(texts, tasks="gelu", max_new_tokens=8, sampling=SamplingParams(temperature=0))
    received = [(answer["tokens"], answer["text"], answer["reason"]) for answer in ask_node(site.folder, requests)]
    reasons = {"stop": "end", "length": "length"}
    assert received == [(list(row.token_ids), row.text, reasons[row.finish_reason]) for row in made]


def test_codes_of_a_head_are_read_by_both_graphs(tmp_path):
    source, deployment = tmp_path / "model", tmp_path / "deployment"
    tied(is_exact=True).save_pretrained(source)
    make_bpe_tokenizer().save_pretrained(source)
    export_base(source, deployment, quantization="int8")
    export_adapter(write_adapter(tmp_path / "gelu", seeded_adapter(source, 1)), deployment)
    export_web(deployment, tmp_path / "site", variant="int8")
    index = json.loads((tmp_path / "site" / "web.json").read_text())
    assert index["front"]["data"] == index["base"]["data"] == ["model.onnx.data"]
    requests = [{"prompt": PROMPTS[2], "task": task, "maxNewTokens": NEW} for task in (None, "gelu")]
    with Deployment.open(deployment, variant="int8", threads=1) as opened:
        settings = {"max_new_tokens": NEW, "sampling": SamplingParams(temperature=0)}
        made = opened.generate([PROMPTS[2]] * 2, tasks=[None, "gelu"], **settings)
    assert [answer["tokens"] for answer in ask_node(tmp_path / "site", requests)] == [
        list(row.token_ids) for row in made
    ]


def test_draws_follow_the_softmax(site):
    """Shares on a grid fall on each token as often as it is likely."""
    logits, temperature, count = np.array([0.5, -1.0, 2.0, 0.0], np.float32), 0.7, 10_000
    script = f"""
      const {{ draw }} = await import("{(site.folder / "adalink.mjs").as_uri()}");
      const counts = [0, 0, 0, 0];
      for (let place = 0; place < {count}; place++)
        counts[draw(Float32Array.from({logits.tolist()}), {temperature}, (place + 0.5) / {count})]++;
      console.log(JSON.stringify(counts));
    """
    counts = json.loads(run_script(script))
    exact = np.exp(logits.astype(np.float64) / temperature)
    np.testing.assert_allclose(np.array(counts) / count, exact / exact.sum(), atol=1.5 / count)


def read_about(path: Path) -> dict[str, str]:
    with safe_open(path, "numpy") as file:
        return dict(file.metadata())


def cut(folder: Path) -> None:
    path = folder / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])


def alter(folder: Path) -> None:
    path = folder / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def remove(folder: Path) -> None:
    (folder / "front.onnx").unlink()


def shift_table(folder: Path) -> None:
    name = json.loads((folder / "web.json").read_text())["front"]["data"][0]
    table = (folder / name).read_bytes()
    (folder / name).write_bytes(table[-192:] + table[:-192])
    seal(folder)


def exchange_tasks(folder: Path) -> None:
    shutil.copy(folder / "tasks/relu.safetensors", folder / "tasks/gelu.safetensors")
    seal(folder)


def take_task_of_another_base(folder: Path) -> None:
    path = folder / "tasks/gelu.safetensors"
    about = {"adapter_digest": "sha256:0", "base_fingerprint": "sha256:0"}
    save_file(load_file(path), path, about)
    seal(folder)


def take_another_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]
    path.write_text(json.dumps(content))
    seal(folder)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (cut, "digest: model.onnx.data has"),
        (alter, "digest: model.onnx.data is not the file that was exported"),
        (remove, "missing: front.onnx: ENOENT"),
        (shift_table, "result: the base model: logits are"),
        (exchange_tasks, "result: gelu: logits are"),
        (take_task_of_another_base, "task-base: task gelu is for another base"),
        (take_another_tokenizer, "tokenizer: this library makes other tokens of"),
    ],
)
def test_faults_are_named(site, tmp_path, fault, words):
    folder = shutil.copytree(site.folder, tmp_path / "site")
    fault(folder)
    done = generate_in_node(folder, "--task", "gelu", "--tokens", "8", "the")
    assert (done.returncode, done.stdout) == (2, ""), done.stdout
    assert done.stderr.startswith(words)


def test_wrong_requests_are_named(site):
    assert (
        "request: task gellu is not in this folder, only gelu, relu"
        in generate_in_node(site.folder, "--task", "gellu", "--tokens", "8", "a").stderr
    )
    assert "ask for fewer" in generate_in_node(site.folder, "--tokens", "64", "a").stderr
    assert "token ids" in generate_in_node(site.folder, "--json", "--tokens", "8", stdin='[{"prompt": [96]}]').stderr


def test_wrong_calls_of_the_program_are_named(site, tmp_path):
    for arguments, words in (
        ((tmp_path,), f"missing: {tmp_path} holds no adalink.mjs"),
        ((site.folder,), "request: the prompt is empty"),
        ((site.folder, "--json"), "request: standard input is no JSON"),
    ):
        done = generate_in_node(*arguments, stdin="no")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(words)


def test_tasks_that_are_added_are_whole(site, tmp_path):
    """Their files have no digest: what is not one of this folder's is refused before it runs."""
    path = site.folder / "tasks/gelu.safetensors"
    tensors, whole, about = load_file(path), path.read_bytes(), read_about(path)
    files = {"none": b"", "page": b"<!doctype html>", "cut": whole[:-40]}
    changes = {"turned": {"up": tensors["up"].swapaxes(1, 2)}, "half": {"down": tensors["down"].astype(np.float16)}}
    for name, change in changes.items():
        save_file(
            {key: np.ascontiguousarray(value) for key, value in (tensors | change).items()}, tmp_path / name, about
        )
        files[name] = (tmp_path / name).read_bytes()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    script = f"""
      import {{ readFile }} from "node:fs/promises";
      import {{ Tokenizer }} from "@huggingface/tokenizers";
      import * as ort from "onnxruntime-node";
      const {{ Model }} = await import("{(site.folder / "adalink.mjs").as_uri()}");
      const read = (path) => readFile({json.dumps(str(site.folder))} + "/" + path);
      const model = await Model.open({{ ort, Tokenizer, read }});
      const codes = [];
      for (const name of {json.dumps([*files])}) {{
        try {{
          // In the middle of other bytes, as Node's small buffers are.
          const bytes = await readFile({json.dumps(str(tmp_path))} + "/" + name);
          const room = new Uint8Array(bytes.length + 200);
          room.set(bytes, 100);
          model.addTask(name, room.subarray(100, 100 + bytes.length));
          codes.push(null);
        }} catch ({{ code }}) {{
          codes.push(code);
        }}
      }}
      const {{ Float32Array }} = globalThis;
      globalThis.Float32Array = null; // as if there were no memory for a cache
      await model.generate([5], {{ maxNewTokens: 2 }}).next().catch(() => codes.push("failed"));
      globalThis.Float32Array = Float32Array;
      await model.generate([5], {{ maxNewTokens: 2 }}).next();
      console.log(JSON.stringify(codes));
    """
    assert json.loads(run_script(script)) == ["task"] * 5 + ["failed"]


def test_large_files_come_in_pieces(site, tmp_path, monkeypatch):
    monkeypatch.setattr("adalink.export.web.export.PIECE_BYTES", 5000)
    export_web(site.deployment, tmp_path / "site")
    assert len(list((tmp_path / "site").glob("model.onnx.data.0*"))) > 3
    request = [{"prompt": PROMPTS[1], "task": "relu", "maxNewTokens": NEW}]
    assert ask_node(tmp_path / "site", request) == ask_node(site.folder, request)


@pytest.mark.parametrize("individual", [True, False])
def test_numbers_are_split_as_the_kit_splits_them(tmp_path, individual):
    """The library's own step knows only 0 to 9: without the rewriting it makes other tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [*TEXTS, "x\r\n½ ①Ⅷ٣４", "12 345  ²"]
    tokenizer = Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(individual), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts * 9, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    expected = [tokenizer.encode(text).ids for text in texts]
    assert encode_in_node(path, texts) != expected
    rewrite_tokenizer(path)
    assert encode_in_node(path, texts) == expected


def encode_in_node(path: Path, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, as the library makes them."""
    script = f"""
      import {{ readFileSync }} from "node:fs";
      import {{ Tokenizer }} from "@huggingface/tokenizers";
      const tokenizer = new Tokenizer(JSON.parse(readFileSync({json.dumps(str(path))})), {{}});
      console.log(JSON.stringify({json.dumps(texts)}.map((text) => tokenizer.encode(text).ids)));
    """
    ids: list[list[int]] = json.loads(run_script(script))
    return ids
