"""A GGUF file, checked: what transformers makes of it is put right, or refused."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ModelError
from adalink.training.models.gguf.header import GgufHeader, read_header
from adalink.training.models.gguf.metadata import repair_config
from adalink.training.models.gguf.t5 import check_t5_head
from adalink.training.models.gguf.tensors import check_layers, check_shapes, check_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Keys below `general.sampling.`, and what generation_config.json calls them.
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# Those that transformers has no name for: the values that change nothing, and such as only tune another.
_SAMPLING_NEUTRAL = {"xtc_probability": 0.0, "mirostat": 0}
_SAMPLING_TUNING = ("sequence", "xtc_threshold", "mirostat_tau", "mirostat_eta", "penalty_last_n")


class CheckedGguf:
    """A GGUF file: ``check`` it, ``repair`` the config made of it, load the model, then ``finish`` that."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def header(self) -> GgufHeader:
        """The file's header; raises ``ModelError``."""
        return read_header(self._path)

    @property
    def numbers(self) -> int:
        """How many numbers the tensors have together."""
        return sum(math.prod(place.shape) for place in self.header.tensors.values())

    def check(self) -> None:
        """Check what the file says before anything is made of it; raises ``ModelError``."""
        header = self.header
        layers = header.metadata.get(f"{header.architecture}.block_count")
        decoder_layers = header.metadata.get(f"{header.architecture}.decoder_block_count")
        if isinstance(layers, int):
            check_layers(header, layers, decoder_layers if isinstance(decoder_layers, int) else None)

    def repair(self, config: Any) -> None:
        """Put right, in place, the config that transformers made; raises ``ModelError`` for what it cannot take."""
        repair_config(self.header, self._path, config)
        check_layers(
            self.header, config.num_hidden_layers, config.num_decoder_layers if config.is_encoder_decoder else None
        )

    def finish(self, model: PreTrainedModel) -> None:
        """Check the loaded model's tensors, and give it the file's end tokens and recommended sampling.

        Raises:
            ModelError: a tensor of the file was dropped, or it recommends sampling that transformers does not know.
        """
        check_tensors(self.header, model)
        check_shapes(self.header, model)
        self._check_head(model)
        _unmark(model)
        metadata = self.header.metadata
        ends = [metadata[f"tokenizer.ggml.{name}"] for name in _ENDS if f"tokenizer.ggml.{name}" in metadata]
        if model.generation_config is None:
            return
        if ends:
            model.generation_config.eos_token_id = list(dict.fromkeys(ends))
        for name, value in self._sampling().items():
            setattr(model.generation_config, name, value)

    def _sampling(self) -> dict[str, Any]:
        """The recommended sampling, by transformers' names; raises ``ModelError`` for one that it does not know."""
        prefix = "general.sampling."
        settings: dict[str, Any] = {}
        for full, value in self.header.metadata.items():
            key = full.removeprefix(prefix)
            if key == full or key in _SAMPLING_TUNING or (key in _SAMPLING_NEUTRAL and value == _SAMPLING_NEUTRAL[key]):
                continue
            if key not in _SAMPLING:
                raise ModelError(
                    f"base model {self.header.name}: its metadata key {full} recommends {value!r}, which is not "
                    f"supported; expected {', '.join(sorted(_SAMPLING))}: remove the key from the file"
                )
            settings[_SAMPLING[key]] = value
        if settings.keys() - {"repetition_penalty"}:
            settings["do_sample"] = settings.get("temperature", 1.0) > 0
        return settings

    def _check_head(self, model: PreTrainedModel) -> None:
        """A model that shares its embeddings with its head has no other head in the file."""
        if self.header.architecture == "t5":
            check_t5_head(self.header, model)
        elif "output.weight" in self.header.tensors and model.config.tie_word_embeddings:
            raise ModelError(
                f"base model {self.header.name}: its tensor 'output.weight' would be dropped, as a "
                f"{type(model).__name__} takes the embeddings for its head: export the original checkpoint instead"
            )


def _unmark(model: PreTrainedModel) -> None:
    """Take off the marks of a quantised model: its weights are plain numbers, and it can be saved as such."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    if getattr(model, "is_quantized", False):
        model.is_quantized = False
