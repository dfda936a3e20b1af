"""``tokenizer.json`` for JavaScript: the same tokens, said so that its library makes them too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adalink.runtime.storage.decoding import decode_json


def rewrite_tokenizer(path: Path) -> None:
    """Replace steps that @huggingface/tokenizers runs otherwise; the file is no link any more. The kit can read it.

    ``Digits`` splits at every number of Unicode, ``½`` among them, and there only at 0 to 9.
    """
    content = decode_json(path.read_bytes(), dict[str, Any])
    content["pre_tokenizer"] = _rewrite(content.get("pre_tokenizer"))
    path.unlink()
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def _rewrite(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is not None and step["type"] == "Sequence":
        return {**step, "pretokenizers": [_rewrite(part) for part in step["pretokenizers"]]}
    if step is not None and step["type"] == "Digits":
        pattern = "\\p{N}" if step["individual_digits"] else "\\p{N}+"
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return step
