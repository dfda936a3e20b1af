"""Adapters that PEFT trained and saved, exported: what ONNX Runtime gives is what PEFT's own model gives."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers.export import skip_windows_of_old
from helpers.tiny_models import FAMILIES, HIDDEN_SIZE, VOCAB_SIZE, token_ids
from helpers.tiny_tokenizer import make_tokenizer
from safetensors.numpy import load_file, save_file

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import AdapterError, ContractError
from adalink.runtime.storage.kv_prefix_spec import KV_PREFIX_NAME, KvPrefixSpec
from adalink.runtime.storage.manifest_io import read_manifest

TOKENS, STEPS, NEW = 4, 3, 8
TASK_TYPES = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}
EMBEDDINGS = {"gpt2": "wte", "bert": "word_embeddings"}


def configure(method: str, family: str, **settings: Any) -> peft.PeftConfig:
    task_type = TASK_TYPES.get(family, "CAUSAL_LM")
    soft = {"task_type": task_type, "num_virtual_tokens": TOKENS, "num_transformer_submodules": 1}
    match method:
        case "prompt":
            return peft.PromptTuningConfig(**(soft | settings))
        case "p-tuning":
            return peft.PromptEncoderConfig(**(soft | {"encoder_hidden_size": 24} | settings))
        case "lstm":
            lstm = {"encoder_hidden_size": 24, "encoder_reparameterization_type": "LSTM"}
            return peft.PromptEncoderConfig(**(soft | lstm | settings))
        case "prefix" | "projected":
            return peft.PrefixTuningConfig(
                **(soft | {"prefix_projection": method == "projected", "encoder_hidden_size": 24} | settings)
            )
        case "cartridge":
            return peft.CartridgeConfig(**(soft | settings))
        case "cpt":
            return peft.CPTConfig(
                task_type=task_type,
                cpt_token_ids=[5, 6, 7, 8],
                cpt_mask=[1] * TOKENS,
                cpt_tokens_type_mask=[1, 2, 3, 4],
                **settings,
            )
    lora = {"task_type": task_type, "r": 3, "lora_alpha": 7, "target_modules": [EMBEDDINGS.get(family, "embed_tokens")]}
    return peft.LoraConfig(**(lora | {"use_rslora": method == "rslora"} | settings))


def train(model: Any, family: str, method: str, folder: Path) -> Any:
    """A few steps of real training from random weights, large enough to be seen, saved by PEFT itself."""
    torch.manual_seed(5)
    tuned = peft.get_peft_model(model, configure(method, family))
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.4 * torch.randn(parameter.shape))
    optimizer = torch.optim.SGD(trained, lr=0.05)
    tuned.train()
    for step in range(STEPS):
        ids = token_ids(step)
        labels = {"labels": ids} if family != "bert" else {}
        found = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), **labels)
        (found.loss if labels else found.last_hidden_state.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.eval()
    tuned.save_pretrained(folder)
    return tuned


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family) / "deployment"
            export_base(FAMILIES[family](), folders[family], tokenizer=make_tokenizer())
        return folders[family]

    return make


def peft_output(tuned: Any, ids: torch.Tensor, **inputs: Any) -> tuple[np.ndarray, float]:
    """PEFT's output at the tokens' own positions, and a limit (as ``helpers.export.yardstick``)."""
    found = []
    for model in (tuned, copy.deepcopy(tuned).double()):
        with torch.no_grad():
            made = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
        found.append(made.logits if hasattr(made, "logits") else made.last_hidden_state)
    own = found[0].numpy() if inputs else found[0].numpy()[:, -ids.shape[1] :]
    return own, 8 * float((found[0] - found[1]).abs().max())


CASES = [
    *itertools.product(
        ["llama", "gpt2", "gemma", "gemma3", "bert", "t5"], ["prompt", "p-tuning", "lstm", "lora", "rslora"]
    ),
    *itertools.product(["llama", "gemma3"], ["prefix"]),
    *itertools.product(["llama"], ["projected", "cartridge", "cpt"]),
]
SLOW_CASES = [
    *itertools.product(["gpt2", "qwen2", "qwen3", "phi3"], ["prefix"]),
    *itertools.product(["gemma3"], ["projected", "cartridge", "cpt"]),
]
KV_PREFIXES = ("prefix", "projected", "cartridge")


@pytest.mark.parametrize(
    ("family", "method"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_outputs_and_generation_are_pefts(
    family: str, method: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    if family == "t5" and "lora" in method:
        return  # refused, below
    skip_windows_of_old(family)  # prefixes are kept by the operator alone
    folder, ids = bases(family), token_ids(9, 3, 6)
    tuned = train(FAMILIES[family](), family, method, tmp_path / "tuned")
    entry = export_adapter(tmp_path / "tuned", folder, name=method, assume_base=True, replace=True).tasks[method]
    if method in KV_PREFIXES:
        assert (entry.rank, entry.soft_tokens, entry.kv_prefix) == (0, 0, KvPrefixSpec(tokens=TOKENS))
    else:
        assert (entry.rank, entry.soft_tokens) == ((3, 0) if "lora" in method else (0, TOKENS))
    keeps_prefixes = family not in ("bert", "t5")
    with Deployment.open(folder, prefix_cache_bytes=keeps_prefixes << 20) as deployment:
        if family == "t5":
            decoder_ids = token_ids(10, 3, 4)
            expected, limit = peft_output(tuned, ids, decoder_input_ids=decoder_ids)
            received = deployment.run(input_ids=ids, tasks=method, decoder_input_ids=decoder_ids)["logits"]
            plain = deployment.run(input_ids=ids, decoder_input_ids=decoder_ids)["logits"]
        else:
            name = "last_hidden_state" if family == "bert" else "logits"
            expected, limit = peft_output(tuned, ids)
            received, plain = (deployment.run(input_ids=ids, tasks=task)[name] for task in (method, None))
        assert np.abs(received - expected).max() <= limit
        assert np.abs(plain - expected).max() > 100 * limit, "the task changes the output"
        if family == "bert":
            return
        made = tuned.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=2
        )
        # A decoder's result begins with the prompt, an encoder-decoder's with one token.
        made = made[:, 1 if family == "t5" else ids.shape[1] :].tolist()
        batch = {"prompts": [*ids.tolist(), [5, 6]], "tasks": [method] * 3 + [None], "max_new_tokens": NEW}
        mixed = deployment.generate(**batch)
        assert deployment.generate(**batch) == mixed, "from the prefixes that were kept"
    for row, tokens in zip(mixed, made, strict=False):
        ended = tokens.index(2) if 2 in tokens else len(tokens)
        assert list(row.token_ids) == tokens[:ended]


@pytest.fixture
def saved(bases: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def save(method: str, family: str = "llama", **settings: Any) -> Path:
        peft.get_peft_model(FAMILIES[family](), configure(method, family, **settings)).save_pretrained(tmp_path / "own")
        return tmp_path / "own"

    return save


def edit(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_somebody_vouches_for_the_base(bases: Callable[[str], Path], saved: Callable[..., Path]) -> None:
    folder = edit(saved("prompt"), base_model_name_or_path="somebody/model")
    with pytest.raises(ContractError, match=r"'somebody/model'.*--assume-base"):
        export_adapter(folder, bases("llama"))


def test_a_saved_embedding_matrix_shows_the_base(bases: Callable[[str], Path], saved: Callable[..., Path]) -> None:
    folder = saved("lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    (matrix,) = (name for name in tensors if name.endswith("base_layer.weight"))
    export_adapter(folder, bases("llama"), name="shown", replace=True)
    tensors[matrix][5, 7] += 1e-3
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ContractError, match="another base, or resized it"):
        export_adapter(folder, bases("llama"), name="shown", replace=True, assume_base=True)
    del tensors[matrix]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ContractError, match="--assume-base"):
        export_adapter(folder, bases("llama"), name="shown", replace=True)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "q_proj.* changes weights inside"),
        (
            peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens", "v_proj"]),
            "v_proj.* changes weights inside",
        ),
        (peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]), "lm_head.* changes weights inside"),
        (
            peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], modules_to_save=["norm"]),
            "modules_to_save",
        ),
        (peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], use_dora=True), "use_dora"),
        (
            peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[5]),
            "trainable_token_indices",
        ),
        (
            peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
            "IA3 .*inside every layer",
        ),
        (peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "LOHA .*inside the engine"),
        (peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "VERA .*inside the engine"),
        (peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]), "LN_TUNING .*norms"),
        (peft.FourierFTConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "FOURIERFT .*knows no way"),
    ],
    ids=lambda value: None if isinstance(value, str) else value.peft_type.value,
)
def test_what_acts_inside_is_refused_with_the_reason(
    config: peft.PeftConfig, reason: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    before = read_manifest(bases("llama"))
    peft.get_peft_model(FAMILIES["llama"](), config).save_pretrained(tmp_path / "own")
    with pytest.raises(AdapterError, match=reason):
        export_adapter(tmp_path / "own", bases("llama"), assume_base=True)
    assert read_manifest(bases("llama")) == before


@pytest.mark.parametrize(
    ("method", "fields", "reason"),
    [
        ("prompt", {"num_transformer_submodules": 2}, "second prompt is for the decoder"),
        ("prompt", {"modules_to_save": ["score"]}, "modules_to_save"),
        ("prompt", {"something_new": 3}, "something_new is 3"),
        ("prompt", {"num_virtual_tokens": "4"}, "num_virtual_tokens is '4'"),
        ("lora", {"bias": "all"}, "bias is 'all'"),
        ("lora", {"rank_pattern": {"embed_tokens": 5}}, "rank_pattern"),
        ("lora", {"init_lora_weights": "pissa"}, "changes the base's own weights"),
        ("lora", {"lora_alpha": 0}, "lora_alpha is 0"),
        ("lora", {"peft_type": 7}, r"got `int` - at `\$.peft_type`"),
    ],
)
def test_settings_that_are_not_understood_are_refused(
    method: str, fields: dict[str, Any], reason: str, bases: Callable[[str], Path], saved: Callable[..., Path]
) -> None:
    with pytest.raises(AdapterError, match=reason):
        export_adapter(edit(saved(method), **fields), bases("llama"), assume_base=True)


@pytest.mark.parametrize(
    "value", [b"1e400", b"9" * 5000, b'"\xff"', b"NaN", b"[" * 20_000 + b"]" * 20_000], ids=lambda value: value[:5]
)
@pytest.mark.parametrize("field", ["lora_alpha", "unknown"])
def test_a_config_that_is_no_json_of_numbers(
    value: bytes, field: str, bases: Callable[[str], Path], saved: Callable[..., Path]
) -> None:
    folder = saved("lora")
    config = json.loads((folder / "adapter_config.json").read_text()) | {field: "VALUE"}
    (folder / "adapter_config.json").write_bytes(json.dumps(config).encode().replace(b'"VALUE"', value))
    with pytest.raises(AdapterError, match=r"adapter_config\.json: "):
        export_adapter(folder, bases("llama"), assume_base=True)


def test_an_adapter_with_a_name(bases: Callable[[str], Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens"])
    peft.get_peft_model(FAMILIES["llama"](), config, adapter_name="my_task").save_pretrained(tmp_path / "out")
    with pytest.raises(AdapterError, match=r"one level down, in my_task: give .*out/my_task"):
        export_adapter(tmp_path / "out", bases("llama"), assume_base=True)
    export_adapter(tmp_path / "out" / "my_task", bases("llama"), assume_base=True)


def test_both_prompts_of_an_encoder_decoder_are_refused(
    bases: Callable[[str], Path], saved: Callable[..., Path]
) -> None:
    with pytest.raises(AdapterError, match="num_transformer_submodules=1"):
        export_adapter(saved("prompt", "t5", num_transformer_submodules=2), bases("t5"), assume_base=True)


def test_an_embedding_that_a_decoder_shares_is_refused(
    bases: Callable[[str], Path], saved: Callable[..., Path]
) -> None:
    with pytest.raises(ContractError, match="serves its decoder too"):
        export_adapter(saved("lora", "t5"), bases("t5"), assume_base=True)


@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_tensors_of_another_base_are_refused(
    method: str, bases: Callable[[str], Path], saved: Callable[..., Path]
) -> None:
    folder = saved(method)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "prompt_embeddings" if method == "prompt" else "base_model.model.model.embed_tokens.lora_embedding_A"
    assert tensors[name].shape == ((TOKENS, HIDDEN_SIZE) if method == "prompt" else (3, VOCAB_SIZE))
    save_file(tensors | {name: np.ascontiguousarray(tensors[name][:, :-1])}, path)
    with pytest.raises(ContractError, match="another base"):
        export_adapter(folder, bases("llama"), assume_base=True)


def test_more_than_the_prompt_is_refused(bases: Callable[[str], Path], saved: Callable[..., Path]) -> None:
    folder = saved("prompt")
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"word_embeddings.weight": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(AdapterError, match="'prompt_embeddings' alone"):
        export_adapter(folder, bases("llama"), assume_base=True)


def test_a_deployment_that_is_open_takes_adapters_of_this_kit_alone(
    bases: Callable[[str], Path], saved: Callable[..., Path]
) -> None:
    with (
        Deployment.open(bases("llama")) as deployment,
        pytest.raises(AdapterError, match=r"peft_type is 'PROMPT_TUNING'.*'adalink export adapter'"),
    ):
        deployment.add_task(saved("prompt"))


def test_a_pickle_is_never_loaded(bases: Callable[[str], Path], saved: Callable[..., Path]) -> None:
    folder = saved("prompt")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled, which can run code"):
        export_adapter(folder, bases("llama"), assume_base=True)


def test_a_kv_prefix_of_another_cache_is_refused(bases: Callable[[str], Path], saved: Callable[..., Path]) -> None:
    """As many numbers a token in other heads: only the config tells."""
    folder = edit(saved("prefix"), num_attention_heads=4)
    with pytest.raises(ContractError, match=r"num_attention_heads is 4, the KV cache of .* asks for 2"):
        export_adapter(folder, bases("llama"), assume_base=True)
    with pytest.raises(ContractError, match="num_layers is 3"):
        export_adapter(edit(folder, num_attention_heads=2, num_layers=3), bases("llama"), assume_base=True)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_base_without_an_initial_cache_takes_no_kv_prefix(
    family: str, bases: Callable[[str], Path], saved: Callable[..., Path]
) -> None:
    with pytest.raises(ContractError, match=r"encoder.* has no KV cache"):
        export_adapter(saved("prefix"), bases(family), assume_base=True)


def test_a_kv_prefix_of_16_bits_stays_one(bases: Callable[[str], Path], saved: Callable[..., Path]) -> None:
    folder = saved("prefix")
    tensors = {
        name: value.astype(np.float16) for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    manifest = export_adapter(folder, bases("llama"), name="half", replace=True, assume_base=True)
    (rows,), cache = tensors.values(), manifest.base.cache
    assert cache is not None
    stored = load_file(bases("llama") / manifest.tasks["half"].weights)[KV_PREFIX_NAME]
    assert stored.dtype == np.float16
    for token, layer, part in itertools.product(range(TOKENS), range(cache.layers), (0, 1)):
        width = cache.kv_heads * cache.head_dim
        start = (2 * layer + part) * width
        np.testing.assert_array_equal(stored[layer, part, :, token].ravel(), rows[token, start : start + width])
