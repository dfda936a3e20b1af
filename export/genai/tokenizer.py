"""Whether onnxruntime-genai makes the same tokens of a text: it reads ``tokenizer.json`` with a library of its own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from adalink.export.pipeline.texts import TEXTS
from adalink.runtime.storage.integrity import locate
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.text.tokenizer import Tokenizer


def compare_tokenizers(deployment: Path, folder: Path) -> str | None:
    """Compare tokens of ``TEXTS``, as the deployment makes them and as onnxruntime-genai does.

    Args:
        deployment: the deployment.
        folder: what ``export_genai`` wrote of it.

    Returns:
        ``None`` if all are equal; else what differs, or why that is not known.
    """
    if find_spec("onnxruntime_genai") is None:
        return "onnxruntime-genai is not installed here, so its tokens were not compared"
    import onnxruntime_genai

    base = read_manifest(deployment).base
    assert base.tokenizer is not None
    ours = Tokenizer(locate(deployment, base.tokenizer).read_bytes(), None, base)
    try:
        theirs = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(folder)))
    except RuntimeError as error:
        return f"onnxruntime-genai cannot read this tokenizer ({error}): give it token ids"
    for text in TEXTS:
        expected, received = list(ours.encode(text)), [int(token) for token in theirs.encode(text)]
        if received != expected:
            return (
                f"onnxruntime-genai makes other tokens of {text!r}: {received}, expected {expected}. Where texts "
                "have such characters, give it token ids"
            )
    return None
