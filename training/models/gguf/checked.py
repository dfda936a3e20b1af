"""A GGUF file, checked: what transformers makes of it is put right, or refused."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalink.runtime.errors import ModelError
from adalink.training.models.gguf.header import GgufHeader, read_header
from adalink.training.models.gguf.metadata import repair_config
from adalink.training.models.gguf.tensors import check_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


class CheckedGguf:
    """A GGUF file while its model is loaded: ``repair`` its config, load the model, then ``finish`` it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def header(self) -> GgufHeader:
        """The file's header; raises ``ModelError``."""
        return read_header(self._path)

    def repair(self, config: Any) -> None:
        """Put right, in place, the config that transformers made; raises ``ModelError`` for what it cannot take."""
        repair_config(self.header, self._path, config)

    def finish(self, model: PreTrainedModel) -> None:
        """Check the loaded model's tensors, and give it the file's end tokens.

        Raises:
            ModelError: a tensor of the file was dropped.
        """
        check_tensors(self.header, model)
        self._check_head(model)
        metadata = self.header.metadata
        ends = [metadata[f"tokenizer.ggml.{name}"] for name in _ENDS if f"tokenizer.ggml.{name}" in metadata]
        if ends and model.generation_config is not None:
            model.generation_config.eos_token_id = list(dict.fromkeys(ends))

    def _check_head(self, model: PreTrainedModel) -> None:
        """A model that shares its embeddings with its head has no other head in the file."""
        if "output.weight" in self.header.tensors and model.config.tie_word_embeddings:
            raise ModelError(
                f"base model {self.header.name}: its tensor 'output.weight' would be dropped, as a "
                f"{type(model).__name__} takes the embeddings for its head: export the original checkpoint instead"
            )
