"""The whole inputs that mutations start from: small, real and seeded."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from helpers.runtime import build
from helpers.studies import METHODS, study_text
from helpers.tiny_deployments import make_model_folder
from helpers.vision_deployments import build_vision_deployment, picture
from safetensors.numpy import save

from adalink.runtime.storage.manifest_io import read_manifest

PROMPT_ROWS = [{"prompt": "abc", "task": "alpha"}, {"prompt": "a b", "task": None}, {"prompt": "x", "images": []}]
TRAINING_ROWS = [{"prompt": "ab", "completion": "c"}, {"prompt": "b", "completion": "dd", "images": ["0.png"]}]
IMAGE_FORMATS = {"png": {}, "jpeg": {}, "webp": {}, "gif": {}, "bmp": {}}
LORA = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"}
SOFT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM", "token_dim": 48}


def make_corpus(root: Path) -> Path:
    """Write the corpus into an empty folder.

    It holds ``text`` and ``vision`` (each a deployment with adapters), ``peft``, ``hf`` (a checkpoint), ``model.gguf``,
    ``images``, ``rows`` and ``study.toml``.
    """
    root.mkdir(parents=True, exist_ok=True)
    build("llama", root / "text")
    build_vision_deployment(root / "vision")
    make_model_folder(root / "hf", "llama")
    _write_peft(root / "peft", read_manifest(root / "text" / "deployment").base)
    write_gguf(root / "model.gguf")
    (root / "images").mkdir()
    for name, options in IMAGE_FORMATS.items():
        buffer = BytesIO()
        picture(3, 20, 31).save(buffer, name, **options)
        (root / "images" / f"picture.{name}").write_bytes(buffer.getvalue())
    (root / "rows").mkdir()
    for name, rows in (("prompts", PROMPT_ROWS), ("training", TRAINING_ROWS)):
        (root / "rows" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (root / "study.toml").write_text(study_text(Path("base"), Path("data"), METHODS))
    return root


def _write_peft(folder: Path, base: Any) -> None:
    """A LoRA on the embedding layer and a soft prompt, named as PEFT names them."""
    rng = np.random.default_rng(4)
    prefix = "base_model.model.model.embed_tokens"
    files = {
        "lora": (LORA, {f"{prefix}.lora_embedding_A": (3, base.vocab_size), f"{prefix}.lora_embedding_B": (48, 3)}),
        "soft": (SOFT, {"prompt_embeddings": (4, 48)}),
    }
    for name, (config, shapes) in files.items():
        (folder / name).mkdir(parents=True)
        tensors = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        (folder / name / "adapter_model.safetensors").write_bytes(save(tensors))


def write_gguf(path: Path) -> None:
    """A llama of one layer with the smallest vocabulary, as GGUF."""
    import gguf

    width, inner, vocabulary, rng = 32, 48, 64, np.random.default_rng(6)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<eos>", *(chr(33 + index) for index in range(vocabulary - 1))])
    writer.add_token_types([3] + [1] * (vocabulary - 1))
    writer.add_token_merges(['! "', "# $"])
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd": (vocabulary, width),
        "output": (vocabulary, width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape, scale=0.2).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
