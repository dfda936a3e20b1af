"""The reference of every comparison: the checkpoint in PyTorch, in float32 and in float64.

transformers loads the model in float32, with matrices that stay in the checkpoint's files and are read from there, a
piece at a time. The model in float64 has no matrices of its own.

Float64 measures the noise of float32. For a quantised engine the reference uses the engine's weights, dequantised; the
cost of quantising is measured apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adalink.export.adapter.error_bound import Float64
from adalink.runtime.arrays import Array
from adalink.runtime.errors import ContractError
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.manifest import Base, Quantization
from adalink.runtime.storage.pooling_schema import Pooling
from adalink.tools.parity.reference.checkpoint import check_files
from adalink.tools.parity.reference.forward import Row, run_row
from adalink.tools.parity.reference.gguf_file import FileLayer, file_layers
from adalink.tools.parity.reference.gguf_tokens import GgufTokens
from adalink.tools.parity.reference.gguf_weights import check_layers
from adalink.tools.parity.reference.images import Pixels, image_features, pixel_tensors
from adalink.tools.parity.reference.input_side import InputSide, has_input_side, without_input_side
from adalink.tools.parity.reference.known_outputs import KnownOutputs
from adalink.tools.parity.reference.noise_floor import ACTIVATIONS_FACTOR, Outputs, deviations, limit_of, noise_of
from adalink.tools.parity.reference.position_labels import NO_LABELS, PositionLabels
from adalink.tools.parity.reference.quantized_weights import Layer, Matrix, find_layers
from adalink.tools.parity.reference.rounding import rounded_inputs
from adalink.tools.parity.reference.stored_model import load_stored
from adalink.tools.parity.report import Check

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from adalink.training.data.rows import Example

# The models, and the adapters that are attached to them, by precision.
_FLOAT32, _FLOAT64 = 0, 1


class Reference:
    """A base model in PyTorch, alone or with an adapter attached by ``adalink.training``.

    Attributes:
        base: the contract of the deployment it is compared with.
        file_checks: the checkpoint's files, compared with the model that was loaded from them.
    """

    def __init__(self, spec: str | Path, base: Base, assume_pretokenizer: str | None = None) -> None:
        """Load the checkpoint twice, in float32 and in float64.

        Raises:
            ModelError: it cannot be loaded.
            ContractError: it is another model than the deployment's.
        """
        from adalink.tools.parity.reference.stored_weight import in_float64
        from adalink.training.models.loading import base_fingerprint, weights_digest
        from adalink.training.models.source import display_name

        self.base = base
        self._spec, self._assumed = spec, assume_pretokenizer
        self._model = load_stored(spec)
        self.file_checks = check_files(spec, self._model)
        digests = {"fingerprint": base_fingerprint(self._model), "weights_digest": weights_digest(self._model)}
        for field, digest in digests.items():
            exported = getattr(base, field)
            if exported and exported != digest:
                raise ContractError(
                    f"{display_name(spec)} has {field} {digest}, the deployment was exported from {base.name} with "
                    f"{exported}: verify it against the model it was made from"
                )
        self._exact = in_float64(self._model)
        self._attached: Any = None
        self._input_side: InputSide | None = None
        self._layers: Sequence[Layer | FileLayer] = []
        self._twins: dict[str, Any] = dict(self._exact.named_modules())
        self._originals: list[torch.nn.Parameter] = []
        self._is_rounding = False
        self._known = KnownOutputs()

    @property
    def model(self) -> Any:
        """The float32 model."""
        return self._model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; raises ``ModelError``."""
        from adalink.training.models.loading import load_tokenizer

        return load_tokenizer(self._spec, assume_pretokenizer=self._assumed)

    @cached_property
    def pooling(self) -> Pooling | None:
        """How the checkpoint's own files pool, read anew; raises ``ModelError``."""
        from adalink.training.models.sentence_files import read_pooling

        tokenizer = None if self.base.tokenizer is None else self.tokenizer
        return read_pooling(self._spec, tokenizer, self._model.config)

    @cached_property
    def gguf_tokens(self) -> GgufTokens | None:
        """Tokens by llama.cpp's rules; ``None`` for a checkpoint that is no GGUF file with byte-level BPE."""
        from adalink.training.models.source import gguf_file

        path = gguf_file(self._spec)
        tokens = None if path is None else GgufTokens(path, self._assumed)
        return tokens if tokens is not None and tokens.kind is not None else None

    @contextmanager
    def adapted(self, folder: Path | None) -> Iterator[None]:
        """Attach an adapter folder until the block ends; ``None`` is the base model."""
        from adalink.training.adapter_io import load_adapter, save_adapter

        with ExitStack() as stack:
            if folder is not None:
                adapter = read_adapter(folder)
                if has_input_side(adapter.config):
                    self._input_side = InputSide(adapter)
                    bottleneck, folder = without_input_side(adapter), None
                    if bottleneck is not None:
                        folder = (
                            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adalink-"))) / "bottleneck"
                        )
                        save_adapter(folder, bottleneck)
            if folder is not None:
                self._attached = [
                    stack.enter_context(load_adapter(folder, model)) for model in (self._model, self._exact)
                ]
            self._known.clear()
            try:
                yield
            finally:
                self._attached = self._input_side = None
                self._known.clear()

    def quantize(self, matrices: list[Matrix], quantization: Quantization) -> list[Check]:
        """Replace the weights of quantised layers by the graph's dequantised ones, for good; other weights stay.

        Args:
            matrices: the quantised matrices of the graph.
            quantization: what the manifest says of them.

        Returns:
            Checks that the matrices are this model's weights, quantised.

        Raises:
            ContractError: they are codes of a GGUF file, and the model is not loaded from one.
        """
        import torch

        self._layers = layers = find_layers(self._model, matrices)
        checks = check_layers(layers, matrices, quantization, self._spec)
        for layer in layers:
            # New parameters: the head may share its weight with the embedding table.
            parameters = layer.module._parameters
            self._originals.append(parameters["weight"])
            parameters["weight"] = layer.weight(torch.float32)
            self._twins[layer.name]._parameters["weight"] = layer.weight(torch.float64)
        self._known.clear()
        return checks

    def take_file(self, path: Path, quantization: Quantization) -> list[Check]:
        """Check that the weights are those of a deployed GGUF file, whose products round their inputs by its types."""
        self._layers, checks = file_layers(self._model, path, quantization)
        return checks

    @contextmanager
    def original_weights(self) -> Iterator[None]:
        """Compute with the checkpoint's weights in float32 until the block ends; their noise is unknown."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @contextmanager
    def rounded_activations(self) -> Iterator[None]:
        """Measure noise as the effect of rounded inputs of quantised products, until the block ends."""
        self._is_rounding = True
        self._known.clear()
        try:
            yield
        finally:
            self._is_rounding = False
            self._known.clear()

    @property
    def noise_source(self) -> str:
        """The source of the noise, as the subject of "is itself typically ... away"."""
        return "PyTorch with rounded activations" if self._is_rounding else "PyTorch float32"

    def limit(self, noise: Float64, typical: float) -> Float64:
        """Largest deviation of a correct engine, position by position.

        Args:
            noise: the reference's noise at each position.
            typical: its 90th percentile over all positions.
        """
        if self._is_rounding:
            return np.asarray(ACTIVATIONS_FACTOR * np.maximum(noise, typical))
        return limit_of(noise, typical, self.base.embedding_dtype)

    def values(self, ids: list[int], decoder_ids: list[int] | None) -> dict[str, Array]:
        """Float32 outputs of one row by name, without their noise."""
        return self._run(_FLOAT32, Row(ids, decoder_ids))

    def exact_match(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], batch_rows: int
    ) -> float:
        """Exact match in float32 (``adalink.training.evaluation``), as a share of the examples.

        The adapter in ``folder`` is attached as it was trained, with its soft prompt. Do not call this in ``adapted``.
        All weights are in memory meanwhile, in float32: each step of many rows needs them.
        """
        from adalink.tools.parity.reference.stored_weight import in_memory
        from adalink.training.adapter_io import load_adapter
        from adalink.training.evaluation import exact_match

        with in_memory(self._model), load_adapter(folder, self._model):
            return exact_match(self._model, tokenizer, examples, batch_rows)

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        """Token ids of a prompt without images, by the model's tokenizer or processor."""
        from adalink.training.models.prefix_lm import has_bidirectional_prompt

        if has_bidirectional_prompt(self._model):  # as PaliGemmaProcessor would, were it to take a text alone
            return list(tokenizer(f"{tokenizer.bos_token}{text}\n", add_special_tokens=False)["input_ids"])
        return list(tokenizer(text)["input_ids"])

    def embeddings(self, ids: Array) -> Float64:
        """Outputs of the embedding module for ``ids``, shape ``(len(ids), d)``."""
        import torch

        with torch.no_grad():
            return np.asarray(self._model.get_input_embeddings()(torch.from_numpy(ids)).double().numpy())

    def image_embeds(self, pixels: Pixels) -> tuple[list[Float64], list[Float64]]:
        """Image embeddings of the vision tower and the projector, before any adapter.

        Args:
            pixels: images as the model takes them.

        Returns:
            For each image, or each row of a model that takes tiles, the float32 model's embeddings with shape
            ``(positions, d)``, and the largest deviation of each position, ``(positions,)``, from the float64 model's.
        """
        import torch

        with torch.no_grad():
            single, double = (
                [
                    np.asarray(embeds.double().numpy().reshape(-1, embeds.shape[-1]))
                    for embeds in image_features(model, pixel_tensors(model, pixels))
                ]
                for model in (self._model, self._exact)
            )
        return single, [np.abs(one - other).max(axis=1) for one, other in zip(single, double, strict=True)]

    def outputs(
        self,
        ids: list[int],
        decoder_ids: list[int] | None,
        *,
        prompt_length: int | None = None,
        pixels: Pixels | None = None,
        labels: PositionLabels = NO_LABELS,
    ) -> Outputs:
        """Run one row. A decoder's logits behind a prompt begin at its last position.

        Args:
            ids: the row's tokens.
            decoder_ids: decoder tokens of an encoder-decoder, else ``None``.
            prompt_length: length of the prompt within ``ids``; the rest is generated. All of them by default.
            pixels: the row's images as the model takes them.
            labels: labels of the row's positions.
        """
        row = Row(ids, decoder_ids, prompt_length, pixels, labels)
        key = row.key(self.base.kind)
        outputs = None if key is None else self._known.find(key)
        if outputs is None:
            outputs = self._outputs(row)
            if key is not None:
                self._known.add(key, outputs)
        return outputs

    def _outputs(self, row: Row) -> Outputs:
        values = self._run(_FLOAT32, row)
        if not self._is_rounding:
            return Outputs(values, noise_of(values, self._run(_FLOAT64, row)))
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(rounded_inputs(layer, layer.module))
                stack.enter_context(rounded_inputs(layer, self._twins[layer.name]))
            # In both precisions: on the edge between two codes they round apart, as two engines would.
            single = deviations(values, self._run(_FLOAT32, row))
            double = deviations(values, self._run(_FLOAT64, row))
        return Outputs(values, {name: np.maximum(single[name], double[name]) for name in values})

    def _run(self, precision: int, row: Row) -> dict[str, Array]:
        attached = None if self._attached is None else self._attached[precision]
        return run_row((self._model, self._exact)[precision], attached, self._input_side, self.base, row)

    def _exchange(self) -> None:
        self._known.clear()
        for index, layer in enumerate(self._layers[: len(self._originals)]):
            parameters = layer.module._parameters
            parameters["weight"], self._originals[index] = self._originals[index], parameters["weight"]
