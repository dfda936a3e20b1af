"""Tasks with soft prompts and tables of token ids, and the same answers from PyTorch, with the formulas written out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.runtime import ACTIVATIONS, random_adapter, write_adapter
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.adapter.export import export_adapters
from adalink.export.base.export import export_base
from adalink.runtime.storage.adapter import Adapter
from adalink.runtime.storage.manifest_io import read_manifest

NO_ADAPTER = {"activation": "identity", "bias": False, "scope": "all"}
TASKS: dict[str, dict[str, Any]] = {
    "words": {"rank": 4, "activation": "gelu", "bias": True, "scope": "all"},
    "soft": {"rank": 0, **NO_ADAPTER, "soft_tokens": 5},
    "soft-too": {"rank": 0, **NO_ADAPTER, "soft_tokens": 5},
    "both": {"rank": 3, "activation": "silu", "bias": True, "scope": "all", "soft_tokens": 2},
    "asked": {"rank": 4, "activation": "gelu", "bias": True, "scope": "prompt", "soft_tokens": 3},
    "ids": {"rank": 4, **NO_ADAPTER, "input": "ids"},
    "ids-asked": {"rank": 2, **NO_ADAPTER, "scope": "prompt", "input": "ids", "soft_tokens": 1},
}
EVERY = [None, *TASKS]


@dataclass
class Soft:
    """A deployment on disk, the PyTorch model it came from, and its adapters."""

    folder: Path
    model: Any
    adapters: dict[str, Adapter]

    def embeds(self, ids: list[int], task: str | None, generated: int = 0) -> torch.Tensor:
        """What the model takes for one row, shape ``(1, n + seq, d)``; the last ``generated`` tokens are no prompt."""
        x = self.model.get_input_embeddings()(torch.tensor([ids])).detach()
        if task is None:
            return x
        config = self.adapters[task].config
        weights = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in self.adapters[task].weights.items()
        }
        adapted = x.double()
        if config.input == "ids":
            adapted = adapted + weights["text.table.weight"][torch.tensor([ids])] @ weights["text.up.weight"].T
        elif config.rank:
            zero = torch.zeros((), dtype=torch.float64)
            hidden = adapted @ weights["text.down.weight"].T + weights.get("text.down.bias", zero)
            outer = ACTIVATIONS[config.activation](hidden) @ weights["text.up.weight"].T
            adapted = adapted + outer + weights.get("text.up.bias", zero)
        if config.scope == "prompt" and generated:
            adapted[:, -generated:] = x[:, -generated:].double()
        soft = weights.get("soft_prompt", torch.zeros(0, x.shape[2], dtype=torch.float64))
        return torch.cat([soft[None], adapted], dim=1).float()

    def output(self, ids: list[int], task: str | None, **inputs: Any) -> tuple[np.ndarray, float]:
        """Output at the row's own positions, and a limit for another float32 evaluation (``helpers.export.yardstick``).

        An encoder-decoder's is that of its encoder, unless it is given ``decoder_input_ids``.
        """
        embeds, found = self.embeds(ids, task), []
        for model in (self.model, copy.deepcopy(self.model).double()):
            if model.config.is_encoder_decoder and not inputs:
                model = model.get_encoder()
            with torch.no_grad():
                made = model(inputs_embeds=embeds.to(model.dtype), **inputs)
            found.append((made.logits if hasattr(made, "logits") else made.last_hidden_state)[0])
        own = slice(0, None) if "decoder_input_ids" in inputs else slice(-len(ids), None)
        return found[0].numpy()[own], 8 * float((found[0] - found[1]).abs().max())

    def greedy(self, prompt: list[int], task: str | None, steps: int) -> list[int]:
        """Greedy tokens by running the whole sequence anew at each step: no cache, no padding."""
        made: list[int] = []
        for _ in range(steps):
            with torch.no_grad():
                if self.model.config.is_encoder_decoder:
                    start = torch.tensor([[self.model.config.decoder_start_token_id, *made]])
                    logits = self.model(inputs_embeds=self.embeds(prompt, task), decoder_input_ids=start).logits
                else:
                    logits = self.model(inputs_embeds=self.embeds([*prompt, *made], task, len(made))).logits
            if (token := int(logits[0, -1].argmax())) == 2:
                break
            made.append(token)
        return made


def build_soft(family: str, root: Path, **settings: Any) -> Soft:
    model, folder = FAMILIES[family](), root / "deployment"
    export_base(model, folder, **{"tokenizer": make_tokenizer(), **settings})
    base = read_manifest(folder).base
    adapters = {
        task: random_adapter(base.fingerprint, base.hidden_size, 70 + seed, **own)
        for seed, (task, own) in enumerate(TASKS.items())
    }
    export_adapters({task: write_adapter(root / task, adapter) for task, adapter in adapters.items()}, folder)
    return Soft(folder, model, adapters)


def padded(rows: list[list[int]], *, left: bool) -> tuple[np.ndarray, np.ndarray, list[slice]]:
    """Rows of several lengths as token ids and mask, and where each row lies."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), np.int64)
    places = [slice(longest - len(row), longest) if left else slice(0, len(row)) for row in rows]
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[index, place], mask[index, place] = row, 1
    return ids, mask, places
