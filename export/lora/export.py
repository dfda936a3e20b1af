"""``export_lora``: a text task as a LoRA of the input embedding, for PEFT, vLLM and others, or for llama.cpp.

What was written is read again and compared with the method in float64, for every token of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adalink.export.adapter.error_bound import LARGEST, Float64
from adalink.export.adapter.peft import FINGERPRINT_KEY
from adalink.export.lora.base import LoraBase
from adalink.export.lora.factors import LoraFactors, check_lora
from adalink.export.lora.layout import (
    NUMBERS,
    LoraLayout,
    LoraShape,
    gguf_layout,
    peft_layout,
)
from adalink.export.lora.place import check_place
from adalink.export.lora.reading import StoredLora, read_gguf, read_peft
from adalink.export.lora.untied_gguf import check_untied_place, is_tied, write_untied
from adalink.export.table_file import blocks_of_rows
from adalink.runtime.arrays import Array
from adalink.runtime.errors import ConfigError, GraphError
from adalink.runtime.storage.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, read_adapter
from adalink.runtime.storage.atomic import draft_file, make_folder, sync, write_through
from adalink.runtime.storage.atomic_folder import replace_folder
from adalink.runtime.storage.contract import check_adapter
from adalink.training.models.gguf.header import read_header

FORMATS = ("peft", "gguf")
# `general.architecture` of a model type whose GGUF file is not at hand.
_GGUF_NAMES = {
    **{name: name for name in ("gemma", "gpt2", "llama", "phi3", "qwen2", "qwen3")},
    "gemma3_text": "gemma3",
    "mistral": "llama",
}
# llama.cpp gives these no head of their own, and applies a LoRA of the embedding to a shared one as well.
_ALWAYS_TIED = ("gemma",)
_TASK_TYPES = {"decoder": "CAUSAL_LM", "encoder": "FEATURE_EXTRACTION"}
# Bytes of embeddings that are adapted at a time, in float64.
_PIECE_BYTES = 32 << 20

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class Lora:
    """A LoRA that was written.

    Attributes:
        tokens: size of the vocabulary.
        rank: width of the LoRA: the adapter's rank, and one more for a bias of ``up``.
        alpha: its ``lora_alpha``.
        dtype: of its numbers.
        size_bytes: bytes of its files.
        worst_ratio: largest deviation of an embedding from the method, over all tokens, in units of the bound.
    """

    tokens: int
    rank: int
    alpha: float
    dtype: str
    size_bytes: int
    worst_ratio: float


def export_lora(
    adapter_folder: str | Path,
    base: LoraBase,
    out: str | Path,
    form: str,
    *,
    dtype: str = "float32",
    untied_base: str | Path | None = None,
    replace: bool = False,
    progress: Progress = lambda line, done: None,
) -> Lora:
    """Write a task as a LoRA of the input embedding.

    Args:
        adapter_folder: a folder that training wrote.
        base: its base, with the embeddings to adapt (`adalink.export.lora.base`).
        out: a folder for ``"peft"``, a file for ``"gguf"``.
        form: one of ``FORMATS``.
        dtype: of the LoRA's numbers: ``"float32"``, or ``"float16"``, which rounds them.
        untied_base: where to write a copy of a GGUF base whose head has a matrix of its own, which llama.cpp needs
            (`adalink.export.lora.untied_gguf`).
        replace: whether a LoRA, or a copy of the base, may be there already.
        progress: called with a line, and how far it is from 0 to 1.

    Raises:
        AdapterError: the adapter folder is broken.
        ConfigError: the task is no LoRA, the format cannot hold it, or the host would apply it elsewhere too.
        ContractError: the adapter belongs to another base.
        DeploymentError: the place is taken, or cannot be written.
        GraphError: what was written is not the task.
    """
    out, origin = Path(out), f"adapter {adapter_folder}"
    if form not in FORMATS:
        raise ConfigError(f"format is {form!r}, expected one of {', '.join(FORMATS)}")
    check_place(out, form, replace=replace)
    adapter = read_adapter(adapter_folder)
    check_adapter(adapter, base.contract, origin, tokenizer_digest=base.tokenizer_digest)
    check_lora(adapter, base.kind, origin)
    untied = None if untied_base is None else Path(untied_base)
    check_head(base, form, untied, replace=replace)
    if untied is not None and untied.resolve() == out.resolve():
        raise ConfigError(
            f"{out} is named for the LoRA and for the copy of the base: name another file for one of them"
        )
    writer = _Writer(adapter, base, dtype, origin, progress)
    lora = writer.write_peft(out) if form == "peft" else writer.write_gguf(out)
    if untied is not None and base.gguf is not None:
        progress(f"copying {base.gguf.name}", None)
        write_untied(base.gguf, untied)
    return lora


def check_head(base: LoraBase, form: str, untied: Path | None, *, replace: bool) -> None:
    """Check that llama.cpp will not apply the LoRA to a head that shares its embeddings.

    Args:
        base: the base.
        form: the format of the LoRA.
        untied: where to write a copy of the base with a head of its own, if anywhere.
        replace: whether such a copy may be there already.

    Raises:
        ConfigError: it would, or no copy can be written.
        DeploymentError: the copy's place is taken.
    """
    if untied is not None:
        if form != "gguf" or base.gguf is None:
            raise ConfigError(f"{untied}: a copy of the base is written from a GGUF file, for the format gguf alone")
        check_untied_place(base.gguf, untied, replace=replace)
    elif form == "gguf" and base.gguf is not None and is_tied(base.gguf):
        raise ConfigError(
            f"{base.gguf.name} takes its embeddings for the head, and llama.cpp would apply the LoRA to the head as "
            "well: write a copy of it once, with --untied-base FILE, and run that; for further tasks give the copy as "
            "--base"
        )


def gguf_architecture(base: LoraBase) -> str:
    """``general.architecture`` of a base; raises ``ConfigError`` where llama.cpp cannot run a LoRA of its embedding."""
    name = read_header(base.gguf).architecture if base.gguf is not None else _GGUF_NAMES.get(base.model_type)
    if name is None or base.kind != "decoder":
        raise ConfigError(
            f"base {base.name} is a {base.model_type}: a LoRA of its embedding has not been tried in llama.cpp, "
            f"expected one of {', '.join(sorted(_GGUF_NAMES))}; choose --format peft"
        )
    if name in _ALWAYS_TIED:
        raise ConfigError(
            f"base {base.name} is a {base.model_type}, whose head llama.cpp always takes from the embeddings: it would "
            "apply the LoRA to the head as well, and ends with an error; choose --format peft"
        )
    return name


class _Writer:
    """Writes and checks one LoRA."""

    def __init__(self, adapter: Adapter, base: LoraBase, dtype: str, origin: str, progress: Progress) -> None:
        if dtype not in NUMBERS:
            raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(NUMBERS)}")
        self._adapter, self._base, self._origin, self._progress = adapter, base, origin, progress
        self._factors = LoraFactors(adapter, base.scale)
        contract = base.contract
        self._shape = LoraShape(contract.vocab_size, self._factors.rank, contract.hidden_size, dtype)

    def write_peft(self, out: Path) -> Lora:
        if self._base.embedding is None:
            raise ConfigError(
                f"base {self._base.name} takes images, and its deployment does not say where its embeddings are in the "
                "model: give the model itself with --base"
            )
        layout = peft_layout(self._shape, self._base.embedding, {FINGERPRINT_KEY: self._base.contract.fingerprint})
        with replace_folder(out.resolve(), f"LoRA {out}") as staging:
            with (staging / WEIGHTS_FILE).open("wb") as file:
                self._write(layout, file)
            sync(staging / WEIGHTS_FILE)
            write_through(staging / CONFIG_FILE, self._peft_config())
            worst = self._check(read_peft(staging))
        return self._describe(worst, sum(path.stat().st_size for path in out.iterdir()))

    def write_gguf(self, out: Path) -> Lora:
        layout = gguf_layout(
            self._shape,
            gguf_architecture(self._base),
            self._factors.alpha,
            {
                "general.name": f"LoRA of the input embedding for {self._base.name}",
                "adalink.base_fingerprint": self._base.contract.fingerprint,
            },
        )
        make_folder(out.absolute().parent)
        with draft_file(out) as (file, draft):
            self._write(layout, file)
            file.flush()
            worst = self._check(read_gguf(draft))
        return self._describe(worst, out.stat().st_size)

    def _write(self, layout: LoraLayout, file: BinaryIO) -> None:
        self._check_range(self._factors.second)
        layout.begin(file, self._factors.second)
        for first, embeds in self._pieces("writing"):
            rows = self._factors.first(embeds, first)
            self._check_range(rows)
            layout.write_rows(file, first, rows)

    def _check_range(self, values: Array) -> None:
        """Check that numbers can be stored; raises ``ConfigError``."""
        if not (np.abs(values) <= LARGEST[self._shape.dtype]).all():
            raise ConfigError(
                f"{self._origin}: its LoRA has numbers of up to {np.abs(values).max():.3g}, more than "
                f"{self._shape.dtype} holds: choose --dtype fp32, or train it again with a lower rate"
            )

    def _peft_config(self) -> bytes:
        factors, embedding = self._factors, self._base.embedding
        assert embedding is not None
        fields = {
            "base_model_name_or_path": self._base.name,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": int(factors.alpha) if factors.alpha == int(factors.alpha) else factors.alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": factors.rank,
            "target_modules": [embedding.rpartition(".")[2]],
            "task_type": _TASK_TYPES[self._base.kind],
        }
        return json.dumps(fields, indent=2).encode() + b"\n"

    def _check(self, stored: StoredLora) -> float:
        """Compare what a host reads with the method for every token; raises ``GraphError``."""
        worst = 0.0
        for start, embeds in self._pieces("checking"):
            worst = max(worst, self._factors.worst_ratio(embeds, start, stored, self._base.scale, self._shape.dtype))
        if worst > 1:
            raise GraphError(
                f"{self._origin}: its LoRA was written, and an embedding is {worst:.3g} times the bound away from the "
                "task's: it was not kept; the disk or the memory of this machine altered it, export it again"
            )
        return worst

    def _pieces(self, job: str) -> Iterator[tuple[int, Float64]]:
        """Embeddings of all tokens, some at a time, in float64, with the id of the first."""
        tokens = self._shape.tokens
        for first, last in blocks_of_rows(tokens, max(1, _PIECE_BYTES // (8 * self._shape.width))):
            self._progress(f"{job}: {last} of {tokens} tokens", first / tokens)
            yield first, self._base.rows(first, last).astype(np.float64)

    def _describe(self, worst: float, size_bytes: int) -> Lora:
        shape = self._shape
        return Lora(shape.tokens, shape.rank, self._factors.alpha, shape.dtype, size_bytes, worst)
