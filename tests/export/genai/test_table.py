"""The embedding table in a folder for onnxruntime-genai: rows of PyTorch, however the deployment stores them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.gguf_codes import kind_of
from helpers.tied_codes import tied
from helpers.tiny_deployments import make_model_folder
from helpers.tiny_ggufs import wide, write_gguf
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer
from safetensors.numpy import load_file

from adalink.export.base.export import export_base
from adalink.export.genai.export import export_genai
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.training.models.loading import load_base


def halved(root: Path) -> Path:
    """A checkpoint of gemma3, whose module scales, with numbers of bfloat16."""
    model = FAMILIES["gemma3"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    model.save_pretrained(root)
    make_tokenizer().save_pretrained(root)
    return root


def stored(kind: str, root: Path) -> tuple[Path, str]:
    """A deployment whose table lies in its file in some form, and what it was made from."""
    source = root / "model"
    if kind == "codes":
        tied(is_exact=True).save_pretrained(source)
        make_tokenizer().save_pretrained(source)
        export_base(source, root / "deployment", quantization="int8")
    elif kind == "Q8_0":
        source = write_gguf(root / "tiny.gguf", wide("llama"), "llama", kind=kind_of)
    elif kind == "bfloat16":
        halved(source)
    else:
        make_model_folder(source, "qwen2" if kind == "untied" else "llama")
    # A float head would hold the table in float32.
    quantization = "int4" if kind == "bfloat16" else None
    dtype = "float16" if kind in ("untied", "rows") else "float32"
    export_base(source, root / "deployment", dtype=dtype, quantization=quantization)
    return root / "deployment", str(source)


@pytest.mark.parametrize(
    ("kind", "encoding", "variant"),
    [
        ("bfloat16", "bfloat16", None),
        ("untied", None, None),
        ("rows", "float16", None),
        ("codes", "codes", "int8"),
        ("codes", "codes", "onnxruntime-cpu"),
        ("Q8_0", "Q8_0", None),
    ],
)
def test_tables_are_those_of_pytorch(kind, encoding, variant, tmp_path):
    """Embeddings of the graph are the module's, bit for bit, however the deployment stores them."""
    import onnxruntime as ort

    deployment, source = stored(kind, tmp_path)
    base = read_manifest(deployment).base
    assert (base.table and base.table.encoding) == encoding
    export_genai(deployment, tmp_path / "out", variant=variant)
    session = ort.InferenceSession(tmp_path / "out" / "front.onnx", providers=["CPUExecutionProvider"])
    ids, weights = np.arange(base.vocab_size)[None], load_file(tmp_path / "out" / "base.safetensors")
    received = session.run(["inputs_embeds"], {"input_ids": ids, "attention_mask": ids * 0 + 1, **weights})[0]
    with torch.no_grad():
        expected = load_base(source).get_input_embeddings()(torch.from_numpy(ids)).numpy()
    assert received.tobytes() == expected.astype(received.dtype).tobytes()
