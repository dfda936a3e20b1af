"""Training runs on a tiny model: reproducible, resumable, and on the completion only."""

from __future__ import annotations

import json
import random
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import FAMILIES, MAX_POSITIONS
from helpers.tiny_tokenizer import make_tokenizer
from transformers import Trainer, TrainerCallback

from adalink.runtime.errors import AdapterError, ConfigError, DataError, ModelError, WriteError
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.digest import digest_file
from adalink.training.adapter_io import load_adapter
from adalink.training.evaluation import greedy_replies
from adalink.training.loop.options import LoopOptions
from adalink.training.method.config import AdaLinkConfig
from adalink.training.models.loading import load_base
from adalink.training.run import train
from adalink.training.settings import TrainSettings

CONFIG = AdaLinkConfig(rank=16, activation="gelu", dropout=0.1)
SETTINGS = TrainSettings(lr=2e-2, max_steps=12, batch_size=4, max_length=24, seed=3, device="cpu", save_steps=5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "tiny-llama"
    FAMILIES["llama"]().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows whose completion names the letter that the prompt repeats."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(7)
    for name, count in (("train", 40), ("eval", 12)):
        lines = []
        for _ in range(count):
            letter = draw.choice("ab")
            prompt = letter * draw.choice([3, 5, 7]) + "=" * draw.choice([1, 2])
            lines.append(json.dumps({"prompt": prompt, "completion": letter.upper()}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def run(base, data, out, config=CONFIG, settings=SETTINGS, **options):
    return train(base, data / "train.jsonl", data / "eval.jsonl", out, config, settings, loop=LoopOptions(**options))


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "adapter"
    return out, run(base, data, out)


class _Interrupt(TrainerCallback):
    """Stops a run after a step, as a crash would."""

    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


@pytest.fixture(scope="module")
def checkpoints(base, data, tmp_path_factory):
    """What a run leaves that was interrupted after 11 of its 12 steps."""
    root = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        run(base, data, root / "out", callbacks=[_Interrupt(11)])
    return root / "out.checkpoints"


@pytest.fixture
def interrupted(checkpoints, tmp_path):
    """An adapter folder that is not there yet; a copy of the checkpoints lies beside it."""
    shutil.copytree(checkpoints, tmp_path / checkpoints.name)
    return tmp_path / "out"


class _Count(TrainerCallback):
    """Counts the steps of a run."""

    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_report_tells_what_was_done(finished, base, data):
    out, report = finished
    assert json.loads((out / "training.json").read_text()) == json.loads(json.dumps(report))
    assert report["data"]["train"] == {
        "file": "train.jsonl",
        "sha256": digest_file(data / "train.jsonl"),
        "rows": 40,
    }
    assert report["base"] == "tiny-llama"
    assert report["settings"]["lr"] == SETTINGS.lr
    assert report["adapter_digest"] == read_adapter(out).digest
    assert [point["step"] for point in report["loss_curve"]] == list(range(1, 13))
    assert str(base.parent) not in (out / "training.json").read_text()
    assert not (out.parent / "adapter.checkpoints").exists()


def test_learns_on_the_completion(base, data, tmp_path):
    settings = TrainSettings(lr=2e-2, max_steps=150, batch_size=8, max_length=24, seed=3, device="cpu")
    report = run(base, data, tmp_path / "out", AdaLinkConfig(rank=24), settings)
    first, last = report["loss_curve"][0]["loss"], report["loss_curve"][-1]["loss"]
    assert last < 0.5 * first
    assert report["exact_match"]["base"] < report["exact_match"]["adapter"]


def test_same_run_gives_the_same_adapter(finished, base, data, tmp_path):
    assert run(base, data, tmp_path / "out")["adapter_digest"] == finished[1]["adapter_digest"]


@pytest.mark.parametrize("change", [{"seed": 4}, {"lr": 1e-2}, {"max_steps": 11}])
def test_other_settings_give_another_adapter(finished, base, data, tmp_path, change):
    settings = TrainSettings(**{**SETTINGS.__dict__, **change})
    assert run(base, data, tmp_path / "out", settings=settings)["adapter_digest"] != finished[1]["adapter_digest"]


@pytest.mark.parametrize("step", [3, 7, 11])
def test_interrupted_and_resumed_is_as_uninterrupted(finished, base, data, tmp_path, step):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(base, data, out, callbacks=[_Interrupt(step)])
    assert not out.exists()
    resumed = run(base, data, out, resume=True)
    assert resumed["adapter_digest"] == finished[1]["adapter_digest"]
    assert resumed["loss_curve"] == finished[1]["loss_curve"]


def test_checkpoints_hold_the_adapter_alone(interrupted, base, data):
    folder = interrupted.with_suffix(".checkpoints")
    weights = folder / "checkpoint-10" / "model.safetensors"
    adapter_bytes = 2 * CONFIG.rank * 48 * 4
    assert adapter_bytes < weights.stat().st_size < adapter_bytes + 500
    (folder / "checkpoint-10" / "trainer_state.json").unlink()  # a checkpoint that was cut off is not used
    resumed = run(base, data, interrupted, resume=True)
    assert [point["step"] for point in resumed["loss_curve"]] == list(range(1, 13))


@pytest.mark.parametrize("kept", [0, 0.5])
@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_that_a_power_loss_cut_is_not_used(finished, interrupted, base, data, name, kept):
    path = interrupted.with_suffix(".checkpoints") / "checkpoint-10" / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    count = _Count()
    resumed = run(base, data, interrupted, resume=True, callbacks=[count])
    assert count.steps == 12 - 5
    assert resumed["adapter_digest"] == finished[1]["adapter_digest"]


def test_a_run_interrupted_after_its_last_step_makes_no_other(finished, base, data, tmp_path, monkeypatch):
    looks = []

    def stopped(*arguments, **options):
        looks.append(arguments)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return greedy_replies(*arguments, **options)

    monkeypatch.setattr("adalink.training.run.greedy_replies", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "out")
    count = _Count()
    resumed = run(base, data, tmp_path / "out", resume=True, callbacks=[count])
    assert count.steps == 0
    for name in ("adapter_digest", "loss_curve", "exact_match"):
        assert resumed[name] == finished[1][name]


@pytest.mark.parametrize("limit", [3000, 9000], ids=["weights", "optimizer"])
def test_a_full_disk_in_a_checkpoint_is_told_and_can_be_resumed(finished, base, data, tmp_path, monkeypatch, limit):
    save, before = Trainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_little(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            save(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", save_little)
        with pytest.raises(WriteError, match=r"cannot write .*out\.checkpoints: .*go on with --resume"):
            run(base, data, tmp_path / "out")
    assert run(base, data, tmp_path / "out", resume=True)["adapter_digest"] == finished[1]["adapter_digest"]


def test_resuming_other_settings_is_refused(interrupted, base, data):
    with pytest.raises(ConfigError, match=r"go on with --resume, or remove that folder"):
        run(base, data, interrupted)
    with pytest.raises(ConfigError, match=r"interrupted run had other settings: .*resume with the same ones"):
        run(base, data, interrupted, settings=TrainSettings(**{**SETTINGS.__dict__, "lr": 1e-3}), resume=True)
    with pytest.raises(ConfigError, match=r"other method"):
        run(base, data, interrupted, config=AdaLinkConfig(rank=3), resume=True)


def test_resuming_another_base_of_the_same_name_is_refused(interrupted, base, data, tmp_path):
    other = tmp_path / base.name
    FAMILIES["qwen3"]().save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(ConfigError, match="the interrupted run had other base_fingerprint: sha256:"):
        run(other, data, interrupted, resume=True)


def test_nothing_to_resume(base, data, tmp_path):
    with pytest.raises(ConfigError, match="no interrupted run to resume"):
        run(base, data, tmp_path / "out", resume=True)
    (tmp_path / "out.checkpoints").mkdir()
    (tmp_path / "out.checkpoints" / "settings.json").write_text('{"base')
    with pytest.raises(ConfigError, match=r"settings\.json is cut off: remove .*out\.checkpoints and start without"):
        run(base, data, tmp_path / "out", resume=True)


def test_refusals_leave_nothing_behind(base, data, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        train(base, tmp_path / "bad.jsonl", data / "eval.jsonl", out, CONFIG, SETTINGS)
    with pytest.raises(DataError, match=r"expected at most 6: shorten its prompt or raise --max-length"):
        run(base, data, out, settings=TrainSettings(**{**SETTINGS.__dict__, "max_length": 6}))
    with pytest.raises(ModelError, match="no such file or folder"):
        run(tmp_path / "nowhere", data, out)
    with pytest.raises(AdapterError, match="is a file"):
        run(base, data, tmp_path / "bad.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_gpu_that_is_not_there_is_refused_at_once(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no CUDA GPU"):
        run(base, data, tmp_path / "out", settings=replace(SETTINGS, device="cuda"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "method", "error", "message"),
    [
        ("llama", {"rank": 49}, ConfigError, "rank is 49 and the embeddings of LlamaForCausalLM are 48 wide"),
        ("llama", {"modalities": ("text", "image")}, ConfigError, "are text, image, and the rows of tiny, a LlamaFor"),
        ("t5", {"soft_tokens": 3}, ModelError, "an encoder-decoder, which takes no soft prompt"),
        ("broken", {}, ModelError, "base model tiny has a loss of nan on the first rows, before any training"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_at_once(data, tmp_path, monkeypatch, family, method, error, message):
    model = FAMILIES["llama" if family == "broken" else family]()
    if family == "broken":
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(
        "adalink.training.run.greedy_replies", lambda *_, **__: pytest.fail("the base was measured first")
    )
    with pytest.raises(error, match=message):
        run(tmp_path / "tiny", data, tmp_path / "out", AdaLinkConfig(**{"rank": 16, **method}))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_an_error_leaves_checkpoints_only_if_they_help(finished, base, data, tmp_path):
    error = DataError("planted")
    with pytest.raises(DataError, match="planted"):
        run(base, data, tmp_path / "out", callbacks=[_Interrupt(3, error)])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="planted"):
        run(base, data, tmp_path / "out", callbacks=[_Interrupt(7, error)])
    assert run(base, data, tmp_path / "out", resume=True)["adapter_digest"] == finished[1]["adapter_digest"]


def test_an_adapter_that_diverged_is_refused_and_leaves_nothing_behind(base, data, tmp_path):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.adapters["text"].up.weight.data[0, 0] = float("inf")

    with pytest.raises(AdapterError, match="holds NaN or infinity; train again with a lower rate"):
        run(base, data, tmp_path / "out", callbacks=[Diverge()])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", [".", "x/..", "../here"])
def test_the_current_folder_is_refused_at_once(base, data, tmp_path, monkeypatch, path):
    (tmp_path / "here" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "adapter_config.json").write_text("{}")  # as if an adapter had been there
    with pytest.raises(AdapterError, match="is the current folder, and an adapter folder is replaced as a whole"):
        run(base, data, path)
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"x", "adapter_config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_path_may_end_in_its_parent(finished, base, data, tmp_path):
    out = tmp_path / "adapter" / "x" / ".."
    with pytest.raises(KeyboardInterrupt):
        run(base, data, out, callbacks=[_Interrupt(7)])
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.checkpoints"]
    run(base, data, out, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert read_adapter(tmp_path / "adapter").digest == finished[1]["adapter_digest"]


def test_encoders_are_refused(data, tmp_path):
    FAMILIES["bert"]().save_pretrained(tmp_path / "tiny-bert")
    make_tokenizer().save_pretrained(tmp_path / "tiny-bert")
    with pytest.raises(ModelError, match="tiny-bert is a BertModel, which cannot generate"):
        run(tmp_path / "tiny-bert", data, tmp_path / "out")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"max_steps": 0}, "max_steps is 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"device": "tpu"}, "device is 'tpu', expected one of auto, cpu, cuda"),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of float32, bfloat16"),
    ],
)
def test_settings_refuse(wrong, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**wrong)


def test_rows_fill_the_positions_of_a_base_and_go_no_further(data, tmp_path):
    FAMILIES["gpt2"]().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    method = AdaLinkConfig(rank=0, soft_tokens=4)
    settings = TrainSettings(**{**SETTINGS.__dict__, "max_steps": 2, "max_length": 99})
    rows = [{"prompt": "a" * (MAX_POSITIONS - 6), "completion": "b"}, {"prompt": "c", "completion": "d" * 20}]
    (tmp_path / "full.jsonl").write_text("\n".join(map(json.dumps, rows)))
    full = tmp_path / "full.jsonl"
    report = train(tmp_path / "tiny", full, full, tmp_path / "out", method, settings)
    assert report["exact_match"].keys() == {"base", "adapter"}
    rows[0]["prompt"] += "a"
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
    for files in ((tmp_path / "long.jsonl", full), (full, tmp_path / "long.jsonl")):
        with pytest.raises(DataError, match=r"long\.jsonl:2 takes 65 positions, 4 of them the soft prompt's, and"):
            train(tmp_path / "tiny", *files, tmp_path / "other", method, settings)
    assert not (tmp_path / "other.checkpoints").exists()


def test_exact_match_counts_right_rows(base, data, tmp_path):
    """Of the adapter as it is deployed: nothing is dropped any more, however much was in training."""
    settings = TrainSettings(lr=2e-2, max_steps=60, batch_size=8, max_length=24, seed=3, device="cpu")
    report = run(base, data, tmp_path / "out", AdaLinkConfig(rank=24, dropout=0.95), settings)
    model, tokenizer = load_base(base), make_tokenizer()
    lines = [json.loads(line) for line in (data / "eval.jsonl").read_text().splitlines()]
    with load_adapter(tmp_path / "out", model):
        right = 0
        for line in lines:
            ids = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
            reply = model.generate(ids, max_new_tokens=2, do_sample=False, eos_token_id=2, pad_token_id=0)
            right += tokenizer.decode(reply[0, ids.shape[1] :]) == f"{line['completion']}<eos>"
    assert report["exact_match"]["adapter"] == right / len(lines) > 0
